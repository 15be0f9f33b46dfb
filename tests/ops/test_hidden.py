"""What a query cannot see does not reach it, nor the gradients, whatever it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops import shield as shielding
from lla.ops.problem import make_problem
from lla.ops.solver import resolve
from lla.ops.xla.backend import attend_shielded
from tests.measure import relative_error
from tests.ops.cases import Shape, make_inputs
from tests.ops.harness import EVERY, FAST, REFERENCE, XLA_CG, evaluate

LENGTH = 96
SHAPE = Shape(LENGTH, 8, heads=2, key_heads=1, batch=(2,))
VALUES = {"nan": np.nan, "inf": np.inf, "huge": 1e30, "large": 1e4}
every = pytest.mark.parametrize("implementation", EVERY, ids=str)
fast = pytest.mark.parametrize("implementation", FAST, ids=str)
# Both are float32 evaluations of the same numbers, with other origins in the blockwise form.
BOUND = 1e-4


def segments():
    ids = np.repeat([0, 1, 2], LENGTH // 3)[None].astype(np.int32)
    return {"segment_ids": (np.repeat(ids, 2, 0), np.repeat(ids, 2, 0))}


def columns(hidden):
    mask = np.ones((LENGTH, LENGTH), bool)
    mask[:, hidden] = False
    return {"mask": mask, "is_causal": False}


everything = np.arange(LENGTH)
CASES = {
    # name: options, hidden keys, rows that do not see them, keys that no row seeing them sees
    "lengths": ({"key_value_seq_lengths": np.array([80, 80])}, everything[80:], everything,
                everything[:80]),
    "lengths_full": ({"key_value_seq_lengths": np.array([80, 80]), "is_causal": False},
                     everything[80:], everything, everything[:80]),
    "segments": (segments(), everything[:32], everything[32:], everything[32:]),
    "middle_segment": (segments(), everything[40:64], np.r_[0:40, 64:96], np.r_[0:32, 64:96]),
    "dense": (columns(slice(20, 30)), everything[20:30], everything, np.r_[0:20, 30:96]),
    "causal": ({}, everything[50:51], everything[:50], everything[:0]),
    "offset": ({"query_offset": -40}, everything[50:], everything[:90], everything[:0]),
    "window": ({"local_window_size": 9}, everything[20:22], np.r_[0:20, 31:96],
               np.r_[0:11, 31:96]),
    "window_pair": ({"local_window_size": (5, 4), "is_causal": False}, everything[20:21],
                    np.r_[0:16, 26:96], np.r_[0:11, 31:96]),
}  # fmt: skip


def clean_and_spoiled(case, value):
    inputs = make_inputs(SHAPE)
    hidden = CASES[case][1]
    spoiled = {name: array.copy() for name, array in inputs.items()}
    for name in ("key", "value"):
        spoiled[name][:, hidden] = value
    return inputs, spoiled


def check(got, want, rows, keys):
    assert relative_error(got.out[:, rows], want.out[:, rows]) < BOUND
    totals = (np.exp(result.stats.lse[:, rows]) for result in (got, want))
    assert relative_error(*totals) < BOUND
    for name, gradient in want.gradients.items():
        part = keys if name in ("key", "value") else rows
        if part.size:
            error = relative_error(got.gradients[name][:, part], gradient[:, part])
            assert error < BOUND, (name, error)


QUICK = {"lengths", "segments", "causal", "window"}


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
@every
def test_hidden_keys_and_values(implementation, case):
    options, _, rows, keys = CASES[case]
    for value in VALUES.values():
        clean, spoiled = clean_and_spoiled(case, value)
        want = evaluate(clean, implementation, **options)
        check(evaluate(spoiled, implementation, **options), want, rows, keys)


@pytest.mark.parametrize("case", ["lengths", "segments", "causal", "window"])
@pytest.mark.parametrize("implementation", [REFERENCE, XLA_CG], ids=str)
@pytest.mark.parametrize("mechanism", ["softmax", "parallax"])
def test_hidden_keys_and_values_of_the_other_mechanisms(mechanism, implementation, case):
    options, _, rows, keys = CASES[case]
    for value in VALUES.values():
        clean, spoiled = clean_and_spoiled(case, value)
        want = evaluate(clean, implementation, mechanism=mechanism, **options)
        check(evaluate(spoiled, implementation, mechanism=mechanism, **options), want, rows, keys)


@every
def test_rows_that_see_a_nan_are_nan_and_so_are_their_gradients(implementation):
    inputs, spoiled = clean_and_spoiled("window", np.nan)
    del inputs
    result = evaluate(spoiled, implementation, local_window_size=9)
    # The first key that is NaN is the 20th, the last the 21st.
    assert np.isnan(result.out[:, 20:31]).all()
    assert np.isnan(result.stats.lse[:, 20:31]).all()
    assert np.isfinite(np.delete(result.out, np.arange(20, 31), axis=1)).all()
    for name in ("query", "ridge", "scale"):
        assert np.isnan(result.gradients[name][:, 20:31]).all(), name
    for name in ("key", "value"):
        assert np.isnan(result.gradients[name][:, 11:31]).any(-1).all(), name


BY_ROW = {"lla": ("query", "ridge", "scale"), "parallax": ("query", "probe", "scale")}


@every
@pytest.mark.parametrize("mechanism", ["lla", "parallax"])
def test_a_row_without_keys_is_zero_whatever_it_holds(mechanism, implementation):
    """Behind a negative offset, in another segment, behind a length of zero."""
    if mechanism == "parallax" and implementation.method == "direct":
        pytest.skip("no solve")
    ids = segments()["segment_ids"][0]
    lonely = ids.copy()
    lonely[:, :5] = 7
    for options, blind in (
        ({"query_offset": -5}, np.s_[:, :5]),
        ({"segment_ids": (lonely, ids)}, np.s_[:, :5]),
        ({"key_value_seq_lengths": np.array([0, 96])}, np.s_[:1]),
        ({"key_value_seq_lengths": np.array([0, 96]), "is_causal": False}, np.s_[:1]),
    ):
        inputs = make_inputs(SHAPE)
        spoiled = {name: array.copy() for name, array in inputs.items()}
        for name in (*BY_ROW[mechanism], "cotangent"):
            spoiled[name][blind] = np.nan
        want = evaluate(inputs, implementation, mechanism=mechanism, **options)
        got = evaluate(spoiled, implementation, mechanism=mechanism, **options)
        assert not got.out[blind].any()
        check(got, want, everything, everything)


@fast
def test_a_bad_row_reaches_the_gradients_of_the_keys_that_it_sees_alone(implementation):
    inputs = make_inputs(SHAPE)
    for name in ("query", "cotangent", "ridge", "scale"):
        spoiled = {n: a.copy() for n, a in inputs.items()}
        spoiled[name][:, 40] = np.nan
        options = segments()
        want = evaluate(inputs, implementation, **options)
        got = evaluate(spoiled, implementation, **options)
        others = np.r_[0:40, 41:96]
        check(got, want, others, np.r_[0:32, 41:96])
        assert np.isnan(got.gradients["key"][:, 32:41]).all(), name


@fast
def test_a_row_without_a_cotangent_adds_nothing(implementation):
    """With the rows that see a NaN left out of the loss, all gradients are right."""
    inputs, spoiled = clean_and_spoiled("causal", np.nan)
    for arrays in (inputs, spoiled):
        arrays["cotangent"] = arrays["cotangent"].copy()
        arrays["cotangent"][:, 50:] = 0
    want, got = evaluate(inputs, implementation), evaluate(spoiled, implementation)
    check(got, want, everything[:50], everything[:50])
    for gradient in got.gradients.values():
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("value", VALUES)
def test_the_form_for_kernels(value):
    """What kernels are given where the mask is causal and nothing else, run without them."""
    clean, spoiled = clean_and_spoiled("causal", VALUES[value])

    @jax.jit
    def run(arrays):
        def forward(arrays):
            problem = make_problem("lla", **arrays)
            inside, restore = shielding.shield(problem, fast=True)
            assert inside.query is problem.query
            return restore(*attend_shielded(inside, resolve(inside, method="cg")))[0]

        out, pullback = jax.vjp(forward, arrays)
        return out, pullback(jnp.ones_like(out))[0]["query"]

    names = ("query", "key", "value", "ridge", "scale")
    results = [
        run({n: jnp.asarray(arrays[n], jnp.float32) for n in names}) for arrays in (clean, spoiled)
    ]
    for want, got in zip(*results, strict=True):
        assert relative_error(got[:, :50], want[:, :50]) < BOUND
        assert np.isnan(got[:, 50:]).all() or value in ("huge", "large")


def test_masks_that_hide_nothing_cost_nothing():
    inputs = make_inputs(SHAPE)
    arrays = {n: jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value")}
    problem = make_problem("softmax", **arrays, is_causal=False)
    assert shielding.shield(problem)[0] is problem


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("mechanism", ["lla", "parallax", "softmax"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_cache_may_hold_anything_behind_its_end(implementation, mechanism, tokens):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    room, lengths = 64, np.array([0, 17, 30])
    key, fresh = normal(3, room, 1, 8), normal(3, tokens, 1, 8)
    query, probe = normal(3, tokens, 2, 8), normal(3, tokens, 2, 8)
    counts = np.array([tokens, tokens, max(0, tokens - 2)])
    behind = np.arange(room)[None] >= lengths[:, None]
    pads = (np.arange(tokens)[None] >= counts[:, None])[..., None, None]

    def step(key, query, probe, fresh):
        cache = lla.KVCache(key, key, jnp.asarray(lengths, jnp.int32))
        options = {"new_lengths": counts, "implementation": implementation}
        if mechanism == "lla":
            return lla.decode_step(query, fresh, fresh, cache, ridge=0.5, **options)[0]
        if mechanism == "parallax":
            return lla.parallax_decode_step(query, probe, fresh, fresh, cache, **options)[0]
        return lla.softmax_decode_step(query, fresh, fresh, cache, **options)[0]

    @jax.jit
    def run(*arrays):
        out, pullback = jax.vjp(step, *arrays)
        return out, pullback(jnp.cos(out))

    want, wanted = run(jnp.where(behind[..., None, None], 0, key), query, probe, fresh)
    for value in VALUES.values():
        spoiled = jnp.where(behind[..., None, None], value, key)
        padding = (jnp.where(pads, value, a) for a in (query, probe, fresh))
        got, gradients = run(spoiled, *padding)
        assert relative_error(got, want) < BOUND
        for gradient, other in zip(gradients, wanted, strict=True):
            assert relative_error(gradient, other) < BOUND


@fast
def test_vmap_and_shard_map(implementation):
    """The look at rare flags is a branch, which `vmap` turns into a selection."""
    inputs, spoiled = clean_and_spoiled("segments", np.nan)
    ids = segments()["segment_ids"]
    names = ("query", "key", "value", "ridge")

    def attend(query, key, value, ridge, query_ids, key_ids):
        return lla.local_linear_attention(
            query, key, value, ridge=ridge, segment_ids=(query_ids, key_ids),
            implementation=implementation.name, solver=implementation.solver(),
        )  # fmt: skip

    def gradients(function, arrays):
        arrays = [jnp.asarray(arrays[n], jnp.float32) for n in names]

        def loss(*arrays):
            out = function(*arrays, *ids)
            return (out * jnp.asarray(inputs["cotangent"], jnp.float32)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    want = gradients(attend, inputs)
    for function in (jax.vmap(attend), sharded, functools.partial(attend)):
        for got, gradient in zip(gradients(function, spoiled), want, strict=True):
            assert relative_error(got[:, 32:], gradient[:, 32:]) < BOUND
