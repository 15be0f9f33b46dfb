"""A bias of the logits: values, gradients, what it hides and what it costs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lla
from lla.ops import shield
from lla.ops.mosaic_gpu import hopper
from lla.ops.mosaic_tpu import backend as tpu
from lla.ops.problem import make_problem
from lla.ops.xla import backend as xla
from lla.ops.xla import plan
from tests.measure import largest_array
from tests.ops import oracles
from tests.ops.cases import MASKS, Shape, make_inputs
from tests.ops.harness import (
    DIFFERENTIABLE,
    EVERY,
    FUNCTIONS,
    REFERENCE,
    XLA_CG,
    XLA_DIRECT,
    Implementation,
    double_precision,
    relative_error,
)

# Three tiles of queries on a CPU, where 256 rows make one.
SHAPE = Shape(70, 8, heads=16, key_heads=2, batch=(2,))
B, T, N, S = 2, 70, 16, 70
SMALL = Shape(10, 8, heads=4, key_heads=2, batch=(2,))
SHAPES = {
    "full": (B, N, T, S),
    "heads": (1, N, T, S),
    "pairs": (T, S),
    "sequences": (B, 1, T, S),
    "keys": (B, 1, 1, S),
    "keys_of_heads": (N, 1, S),
}
MECHANISMS = {
    "softmax": ("softmax", XLA_CG),
    "parallax": ("parallax", XLA_CG),
    "lla": ("lla", XLA_CG),
    "lla_direct": ("lla", XLA_DIRECT),
}
# As in test_implementations: twice the table, for short sequences of low dimension.
OUTPUT_BOUND, GRADIENT_BOUND = 2e-5, 2e-4


def normal(shape, seed=5):
    return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def compiled(mechanism, implementation: Implementation, static=()):
    def run(arrays, options, cotangent):
        def forward(arrays):
            extra = {"solver": implementation.solver()} if mechanism == "lla" else {}
            return FUNCTIONS[mechanism](
                **arrays, **options, **dict(static), **extra,
                implementation=implementation.name, return_stats=True,
            )  # fmt: skip

        out, pullback, stats = jax.vjp(forward, arrays, has_aux=True)
        return out, pullback(cotangent.astype(out.dtype))[0], stats

    return jax.jit(run)


STATIC = ("is_causal", "local_window_size", "logits_soft_cap")


def evaluate(inputs, implementation, mechanism="lla", dtype="float32", bias_dtype=None, **options):
    """Output, gradients of everything including ``inputs["bias"]``, log-sum-exp; NumPy arrays."""
    dtype = jnp.dtype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    static = tuple(sorted((n, o) for n, o in options.items() if n in STATIC))
    given = {n: o for n, o in options.items() if n not in STATIC}
    with double_precision() if wide == np.float64 else contextlib.nullcontext():
        arrays = {
            n: jnp.asarray(inputs[n], wide if n in ("ridge", "scale") else dtype)
            for n in DIFFERENTIABLE[mechanism]
        }
        arrays["bias"] = jnp.asarray(inputs["bias"], wide if bias_dtype is None else bias_dtype)
        function = compiled(mechanism, implementation, static)
        out, gradients, stats = function(arrays, given, jnp.asarray(inputs["cotangent"], dtype))
        for name, gradient in gradients.items():
            assert (gradient.shape, gradient.dtype) == (arrays[name].shape, arrays[name].dtype)
        return np.asarray(out), jax.tree.map(np.asarray, gradients), np.asarray(stats.lse)


def with_bias(shape=SHAPE, bias="full", **options):
    size = SHAPES[bias] if isinstance(bias, str) else bias
    return {**make_inputs(shape, **options), "bias": normal(size)}


def check(got, want, output=OUTPUT_BOUND, gradient=GRADIENT_BOUND):
    assert relative_error(got[0], want[0]) < output
    for name in want[1]:
        assert relative_error(got[1][name], want[1][name]) < gradient, name


@functools.cache
def exact(mechanism, bias, mask=None):
    shape = SHAPE if mask is None else MASKS_SHAPE
    options = {} if mask is None else MASKS[mask].options(shape)
    inputs = with_bias(shape, bias)
    rounded = {n: np.asarray(np.asarray(a, np.float32), np.float64) for n, a in inputs.items()}
    return inputs, options, evaluate(rounded, REFERENCE, mechanism, "float64", **options)


# ---------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("mechanism", FUNCTIONS)
def test_reference_equals_the_definition(mechanism):
    """Against NumPy, row by row: the weights are those of the logits plus the bias."""
    inputs = with_bias(SMALL, (2, 4, 10, 10))
    valid = oracles.visible(SMALL)
    got = evaluate(inputs, REFERENCE, mechanism, "float64")[0]
    for b, i, n in np.ndindex(2, 10, 4):
        seen = valid[b, n, i]
        q, k, v = inputs["query"][b, i, n], inputs["key"][b, seen, n // 2], None
        v = inputs["value"][b, seen, n // 2]
        logits = inputs["scale"][b, i, n] * (k @ q) + inputs["bias"][b, n, i, seen]
        w = np.exp(logits - logits.max())
        w /= w.sum()
        if mechanism == "softmax":
            want = w @ v
        elif mechanism == "parallax":
            want = (w * (1 - (k - w @ k) @ inputs["probe"][b, i, n])) @ v
        else:
            # The regression that defines the operator, as ordinary least squares.
            design = np.sqrt(w)[:, None] * np.column_stack([np.ones(len(k)), k - q])
            ridge = np.sqrt(inputs["ridge"][b, i, n])
            rows = np.concatenate([design, ridge * np.eye(9)[1:]])
            target = np.concatenate([np.sqrt(w)[:, None] * v, np.zeros((8, 8))])
            want = np.linalg.lstsq(rows, target, rcond=None)[0][0]
        np.testing.assert_allclose(got[b, i, n], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("mechanism", "bias"),
    [
        *(("lla", bias) for bias in SHAPES),
        *(("softmax", bias) for bias in ("full", "pairs", "keys")),
        *(("parallax", bias) for bias in ("heads", "sequences", "keys_of_heads")),
        ("lla_direct", "heads"),
    ],
)
def test_blockwise(mechanism, bias):
    """Output and all gradients; that of the bias has its shape, summed over the axes of 1."""
    mechanism, implementation = MECHANISMS[mechanism]
    inputs, _, want = exact(mechanism, bias)
    check(evaluate(inputs, implementation, mechanism), want)


MASKS_SHAPE = Shape(66, 8, num_keys=75, heads=8, key_heads=1, batch=(2,))
MASKED = ["offset_per_sequence", "empty_sequence", "segments", "window_pair", "everything"]


@pytest.mark.parametrize("mask", MASKED)
@pytest.mark.parametrize("implementation", [REFERENCE, XLA_CG], ids=str)
def test_with_masks(implementation, mask):
    """What the masks hide of the bias is not read: NaN and infinity there change nothing."""
    bias = (1, 8, 66, 75) if mask != "window_pair" else (2, 1, 66, 75)
    inputs, options, want = exact("lla", bias, mask)
    visible = oracles.visible(MASKS_SHAPE, **options)
    hidden = ~visible.any(tuple(axis for axis in (0, 1) if bias[axis] == 1), keepdims=True)
    assert hidden.any()
    spoiled = np.where(hidden, np.resize([np.nan, np.inf, 1e30], bias), inputs["bias"])
    got = evaluate({**inputs, "bias": spoiled}, implementation, **options)
    check(got, want)
    assert not got[1]["bias"][hidden].any()


@pytest.mark.compat
def test_equals_dot_product_attention():
    inputs = with_bias(SHAPE, "heads")
    got = evaluate(inputs, XLA_CG, "softmax", is_causal=False)
    arrays = [jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value", "bias")]
    cotangent = jnp.asarray(inputs["cotangent"], jnp.float32)

    def attend(query, key, value, bias):
        return jax.nn.dot_product_attention(query, key, value, bias=bias)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out, pullback = jax.vjp(jax.jit(attend), *arrays)
        gradients = pullback(cotangent)
    assert relative_error(got[0], out) < OUTPUT_BOUND
    for name, gradient in zip(("query", "key", "value", "bias"), gradients, strict=True):
        assert relative_error(got[1][name], gradient) < GRADIENT_BOUND, name


def alibi(slopes, length):
    """``-slope_n * (i - j)``, ``[N, T, S]``."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    return -slopes[:, None, None] * distance.astype(slopes.dtype)[None]


def table_bias(table, length):
    """A learned number by head and clipped distance: ``[N, 2 r + 1] -> [N, T, S]``."""
    reach = table.shape[1] // 2
    distance = jnp.arange(length)[None] - jnp.arange(length)[:, None]
    return table[:, jnp.clip(distance, -reach, reach) + reach]


@pytest.mark.parametrize("mechanism", FUNCTIONS)
@pytest.mark.parametrize("kind", ["alibi", "table"])
def test_positional_biases(kind, mechanism):
    """The gradients of ALiBi's slopes and of a table of relative positions."""
    inputs = make_inputs(SHAPE)
    make, size = {"alibi": (alibi, (N,)), "table": (table_bias, (N, 17))}[kind]
    parameters = np.abs(normal(size)) if kind == "alibi" else normal(size)

    def run(implementation, dtype):
        given = {n: jnp.asarray(inputs[n], dtype) for n in DIFFERENTIABLE[mechanism]}

        def loss(arrays, parameters):
            bias = make(parameters, T)
            out = FUNCTIONS[mechanism](
                **arrays, bias=bias, is_causal=kind == "alibi", implementation=implementation
            )
            return (out * jnp.asarray(inputs["cotangent"], dtype)).sum()

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(given, jnp.asarray(parameters, dtype))
        return jax.tree.map(np.asarray, gradients)

    with double_precision():
        want = run("reference", "float64")
    got = run("xla", "float32")
    assert relative_error(got[1], want[1]) < GRADIENT_BOUND
    for name in want[0]:
        assert relative_error(got[0][name], want[0][name]) < GRADIENT_BOUND, name


@pytest.mark.parametrize("implementation", EVERY, ids=str)
def test_a_constant_of_a_row_changes_the_log_sum_exp_alone(implementation):
    inputs = with_bias(SMALL, (1, 4, 10, 1))
    want = evaluate({**inputs, "bias": np.zeros(())}, implementation)
    got = evaluate(inputs, implementation)
    assert relative_error(got[0], want[0]) < OUTPUT_BOUND
    np.testing.assert_allclose(
        got[2] - want[2], np.repeat(inputs["bias"][..., 0].swapaxes(1, 2), 2, 0), atol=1e-5
    )
    # Each sums to zero up to the rounding of ten or twenty numbers of size 1.
    assert np.abs(got[1]["bias"]).max() < 1e-4


@pytest.mark.parametrize("mechanism", ["softmax", "lla"])
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32"])
def test_bfloat16(mechanism, bias_dtype):
    """Within twice the error of the exact result, rounded once; the bias in its own dtype."""
    inputs = with_bias(SHAPE, "heads")
    held = {n: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for n, a in inputs.items()}
    for name, dtype in (("ridge", "float32"), ("scale", "float32"), ("bias", bias_dtype)):
        held[name] = np.asarray(jnp.asarray(inputs[name], dtype), np.float64)
    want = evaluate(held, REFERENCE, mechanism, "float64")
    got = evaluate(inputs, XLA_CG, mechanism, "bfloat16", bias_dtype)
    rounding = relative_error(np.asarray(jnp.asarray(want[0], jnp.bfloat16)), want[0])
    assert relative_error(got[0], want[0]) < 2 * rounding
    # The cotangent is rounded like an input, and so are the gradients: 10 times the output's bound.
    for name in want[1]:
        assert relative_error(got[1][name], want[1][name]) < 20 * rounding, name


@pytest.mark.parametrize("mechanism", FUNCTIONS)
def test_second_derivatives(mechanism):
    """Forward over reverse and reverse over reverse, blockwise against dense, in float64."""
    inputs = with_bias(Shape(12, 8, heads=2, key_heads=1), (1, 2, 12, 12))
    inputs["bias"][0, 0, 5, 2] = -np.inf
    names = (*DIFFERENTIABLE[mechanism], "bias")
    along = {n: normal(np.shape(inputs[n]), seed=i) for i, n in enumerate(names)}
    options = {"logits_soft_cap": 3.0} if mechanism == "softmax" else {}

    def products(implementation):
        given = {n: jnp.asarray(inputs[n]) for n in names}
        tangents = {n: jnp.asarray(along[n]) for n in names}

        def loss(arrays):
            out = FUNCTIONS[mechanism](
                **arrays, **options, implementation=implementation, local_window_size=7
            )
            return jnp.sin(out).sum()

        def slope(arrays):
            gradient = jax.grad(loss)(arrays)
            return sum((gradient[n] * tangents[n]).sum() for n in names)

        @jax.jit
        def run(arrays):
            return jax.jvp(jax.grad(loss), (arrays,), (tangents,))[1], jax.grad(slope)(arrays)

        return jax.tree.map(np.asarray, run(given))

    with double_precision():
        want, got = products("reference"), products("xla")
    for mine, right in zip(got, want, strict=True):
        for name in names:
            # Solves stop at the float64 tolerance of 1e-10.
            assert relative_error(mine[name], right[name]) < 1e-8, name
        assert not mine["bias"][0, 0, 5, 2]


# ---------------------------------------------------------------------------------------------
# What it hides, and numbers that are not finite


@pytest.mark.parametrize("mechanism", FUNCTIONS)
@pytest.mark.parametrize("implementation", [REFERENCE, XLA_CG], ids=str)
@pytest.mark.parametrize("low", [-np.inf, float(np.finfo(np.float32).min)])
def test_minus_infinity_is_a_mask(implementation, mechanism, low):
    """The same as a mask, also where keys and values behind it are NaN; empty rows are zero."""
    inputs = make_inputs(SMALL)
    allowed = np.random.default_rng(1).random((2, 1, 10, 10)) < 0.6
    allowed[:, :, 3] = False  # a query that sees nothing
    allowed[:, :, :, 4] = False  # a key that nobody sees
    want = evaluate(
        {**inputs, "bias": np.zeros((2, 1, 10, 10))}, REFERENCE, mechanism, mask=allowed
    )
    spoiled = {**inputs, "bias": np.where(allowed, 0, low)}
    for name in ("key", "value"):
        spoiled[name] = inputs[name].copy()
        spoiled[name][:, 4] = np.nan
    for name in set(DIFFERENTIABLE[mechanism]) - {"key", "value"} | {"cotangent"}:
        spoiled[name] = inputs[name].copy()
        spoiled[name][:, 3] = np.nan
    got = evaluate(spoiled, implementation, mechanism)
    check(got, want)
    assert not got[0][:, 3].any() and np.isneginf(got[2][:, 3]).all()
    assert not got[1]["bias"][~allowed].any()
    assert not got[1]["key"][:, 4].any()


@pytest.mark.parametrize("implementation", EVERY, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_sees_a_bad_entry_is_nan_alone(implementation, bad):
    inputs = with_bias(SMALL, (2, 4, 10, 10))
    want = evaluate(inputs, implementation)
    spoiled = {**inputs, "bias": inputs["bias"].copy()}
    spoiled["bias"][1, 2, 6, 5] = bad
    out, gradients, lse = evaluate(spoiled, implementation)
    row = (1, 6, 2)
    assert np.isnan(out[row]).all() and np.isnan(lse[row])
    assert np.isnan(gradients["query"][row]).all() and np.isnan(gradients["ridge"][row])
    assert np.isnan(gradients["bias"][1, 2, 6, :7]).all()
    assert np.isnan(gradients["key"][1, :7, 1]).all()
    others = np.ones(SMALL.rows, bool)
    others[row] = False
    assert relative_error(out[others], want[0][others]) < OUTPUT_BOUND
    for name in ("query", "ridge", "scale"):
        assert np.isfinite(gradients[name][others]).all(), name
    rest = np.ones((2, 4, 10, 10), bool)
    rest[1, 2, 6, :7] = False
    assert relative_error(gradients["bias"][rest], want[1]["bias"][rest]) < GRADIENT_BOUND
    assert np.isfinite(gradients["key"][0]).all() and np.isfinite(gradients["key"][:, :, 0]).all()
    # Left out of the loss, it adds nothing to any gradient.
    spoiled["cotangent"] = inputs["cotangent"].copy()
    spoiled["cotangent"][row] = 0
    want = evaluate({**inputs, "cotangent": spoiled["cotangent"]}, implementation)
    if implementation.name == "xla":
        check((want[0], evaluate(spoiled, implementation)[1]), want)


def test_a_bad_entry_of_a_shared_bias():
    """One number for all queries: NaN in its gradient where any row is NaN, and only there."""
    inputs = with_bias(SMALL, (4, 1, 10))
    spoiled = {**inputs, "query": inputs["query"].copy()}
    spoiled["query"][1, 6, 2] = np.nan
    gradient = evaluate(spoiled, XLA_CG)[1]["bias"]
    assert np.isnan(gradient[2, 0, :7]).all()
    clean = np.ones((4, 1, 10), bool)
    clean[2, 0, :7] = False
    assert np.isfinite(gradient[clean]).all()


# ---------------------------------------------------------------------------------------------
# Cost, layouts of other platforms, transformations


@pytest.mark.parametrize("bias", [(1, 1, 512, 512), (1, 8, 1, 512), (1, 1, 1, 512), (8, 1, 1, 512)])
def test_a_shared_bias_is_never_repeated(bias):
    shape = Shape(512, 8, heads=8, key_heads=8, batch=(8,))
    arrays = {
        n: jax.ShapeDtypeStruct(getattr(shape, n), jnp.float32)
        for n in DIFFERENTIABLE["softmax"][:3]
    }
    arrays["bias"] = jax.ShapeDtypeStruct(bias, jnp.float32)

    def loss(arrays):
        return lla.local_linear_attention(**arrays, ridge=1.0, implementation="xla").sum()

    # Masks are evaluated for blocks of 128 rows of all heads; all rows are four such blocks.
    assert largest_array(jax.grad(loss), arrays) <= 8 * 8 * 128 * 512


@pytest.mark.parametrize("bias", ["full", "heads", "pairs", "keys_of_heads"])
def test_tiles_of_many_groups(monkeypatch, bias):
    """The tiling of a GPU, where a tile spans groups that share parts of the bias."""
    compiled.cache_clear()
    tiling = functools.partial(plan.make_plan, platform="gpu")
    assert tiling((B, T, 2, 8, 8), S, make_mask()).groups > 1
    monkeypatch.setattr(xla, "make_plan", tiling)
    inputs, _, want = exact("lla", bias)
    got = evaluate(inputs, XLA_CG)
    compiled.cache_clear()
    check(got, want)


@pytest.mark.parametrize("mask", ["offset_per_sequence", "lengths"])
def test_tiles_of_groups_with_different_keys(monkeypatch, mask):
    """Groups of a tile whose ranges of keys start at different places of a shared bias."""
    compiled.cache_clear()
    monkeypatch.setattr(xla, "make_plan", functools.partial(plan.make_plan, platform="gpu"))
    inputs, options, want = exact("lla", (1, 8, 66, 75), mask)
    got = evaluate(inputs, XLA_CG, **options)
    windowed = evaluate(inputs, XLA_CG, **options, local_window_size=9)
    compiled.cache_clear()
    check(got, want)
    check(windowed, evaluate(inputs, REFERENCE, dtype="float64", **options, local_window_size=9))


def make_mask():
    array = jnp.zeros((1, 1, 1, 1))
    return make_problem("softmax", array, array, array).mask


def test_vmap_and_leading_axes_sum_the_gradient():
    inputs = with_bias(SMALL, (4, 10, 10))
    arrays = [jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value", "bias")]

    def loss(query, key, value, bias):
        out = lla.local_linear_attention(
            query, key, value, ridge=1.0, bias=bias, implementation="xla"
        )
        return jnp.sin(out).sum()

    want = jax.jit(jax.grad(loss, 3))(*arrays)

    def mapped(*arrays):
        return jax.vmap(loss, (0, 0, 0, None))(*arrays).sum()

    assert relative_error(jax.jit(jax.grad(mapped, 3))(*arrays), want) < GRADIENT_BOUND
    # Two leading axes, the bias along the second alone.
    split = [a.reshape(1, 2, *a.shape[1:]) for a in arrays[:3]]
    for shape in ((1, 4, 10, 10), (1, 1, 4, 10, 10)):
        got = jax.jit(jax.grad(loss, 3))(*split, arrays[3].reshape(shape))
        assert relative_error(got.reshape(4, 10, 10), want) < GRADIENT_BOUND
    repeated = jnp.stack([arrays[3]] * 2)[None]
    got = jax.jit(jax.grad(loss, 3))(*split, repeated)
    assert relative_error(got.sum((0, 1)), want) < GRADIENT_BOUND


def test_shard_map_sums_the_gradient_of_a_replicated_bias():
    inputs = with_bias(SMALL, (4, 10, 10))
    arrays = [jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value", "bias")]
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=devices)

    def attend(query, key, value, bias):
        return lla.local_linear_attention(
            query, key, value, ridge=1.0, bias=bias, implementation="xla"
        )

    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(*(P("batch"),) * 3, P()), out_specs=P("batch")
    )

    def gradients(function):
        def loss(*arrays):
            return jnp.sin(function(*arrays)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 3)))(*arrays)

    for got, want in zip(gradients(sharded), gradients(attend), strict=True):
        assert relative_error(got, want) < GRADIENT_BOUND


# ---------------------------------------------------------------------------------------------
# Who refuses


@pytest.mark.parametrize("refuse", [hopper.unsupported, hopper.unsupported_shape, tpu.unsupported])
def test_kernels_refuse_by_name(refuse):
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    bias = jnp.zeros((8, 8))
    assert "logit bias is not supported" in refuse(
        make_problem("lla", query, query, query, ridge=1.0, bias=bias)
    )


def test_explain_and_the_error_say_so():
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    reasons = lla.explain(query, query, query, bias=jnp.zeros((8, 8)))
    assert reasons["xla"] is None and reasons["reference"] is None
    for name in ("mosaic_gpu", "mosaic_tpu"):
        assert "logit bias is not supported" in reasons[name]
        with pytest.raises(NotImplementedError, match=f"{name}: logit bias is not supported"):
            lla.softmax_attention(query, query, query, bias=jnp.zeros(8), implementation=name)


def test_without_a_bias_nothing_is_looked_at():
    """The shield acts for a bias, and for nothing but it."""
    array = jnp.zeros((1, 4, 1, 8))
    plain = make_problem("softmax", array, array, array, is_causal=False)
    assert shield.shield(plain)[0] is plain
    biased = make_problem("softmax", array, array, array, is_causal=False, bias=jnp.zeros((4, 4)))
    assert shield.shield(biased)[0] is not biased
