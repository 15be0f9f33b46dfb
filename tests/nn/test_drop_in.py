"""The operator inside Flax's own attention layers, NNX and Linen."""

import doctest
import functools
import inspect
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lla
import lla.nn

WIDTH, HEADS, LENGTH = 16, 4, 7
RIDGE = 0.5
# Dense where the implementation does not matter: it compiles several times faster.
make_dense = functools.partial(
    lla.nn.attention_fn, ridge=RIDGE, is_causal=False, implementation="reference"
)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax's layers and optax promote; that our function does not is a test of its own below."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def tokens(*shape, seed=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (*shape, WIDTH), dtype)


def heads(*shape, seed=1, dtype=jnp.float32):
    return [jax.random.normal(jax.random.key(seed + i), shape, dtype) for i in range(3)]


def nnx_layer(attention_fn, **options):
    options = {"num_heads": HEADS, "in_features": WIDTH, "decode": False} | options
    return nnx.MultiHeadAttention(
        normalize_qk=True, attention_fn=attention_fn, rngs=nnx.Rngs(0), **options
    )


def linen_layer(attention_fn, **options):
    return nn.MultiHeadDotProductAttention(
        num_heads=HEADS, normalize_qk=True, attention_fn=attention_fn, **options
    )


@nnx.jit(static_argnames=("is_causal",))
def call(layer, x, mask=None, is_causal=False):
    return layer(x, mask=mask, is_causal=is_causal)


@functools.partial(jax.jit, static_argnames=("is_causal", "implementation"))
def operator(query, key, value, *, implementation="reference", **options):
    return lla.local_linear_attention(
        query, key, value, ridge=RIDGE, implementation=implementation, **options
    )


def close(actual, expected, tolerance=2e-4):
    """Relative Frobenius; 2e-4: float32 at a ridge of 0.1 or more is held to 1e-4, here twice."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def steps(step, state, count=4):
    losses = []
    for _ in range(count):
        state, loss = step(state)
        losses.append(float(loss))
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    return state


# ---------------------------------------------------------------------------------------------
# What they compute


def test_nnx_layer_equals_operator_on_its_projections():
    layer = nnx_layer(lla.nn.attention_fn(ridge=RIDGE), num_kv_heads=2)
    x = tokens(2, LENGTH)
    query, key, value = nnx.jit(
        lambda m, x: (m.query_ln(m.query(x)), m.key_ln(m.key(x)), m.value(x))
    )(layer, x)
    attended = operator(query, key, value, is_causal=True)
    causal = call(layer, x, is_causal=True)
    close(causal, layer.out(attended))
    # Flax's causal mask is float32 and has the shape [batch, 1, T, T].
    close(call(layer, x, mask=nnx.make_causal_mask(x[..., 0])), causal)
    everything = operator(query, key, value, is_causal=False)
    close(call(layer, x), layer.out(everything))


def test_linen_layer_equals_operator_on_its_projections():
    layer = linen_layer(lla.nn.attention_fn(ridge=RIDGE, is_causal=False))
    x = tokens(2, LENGTH)
    variables = jax.jit(layer.init)(jax.random.key(0), x)

    @jax.jit
    def by_hand(variables, x):
        params = variables["params"]

        def project(name):
            features = (HEADS, WIDTH // HEADS)
            return nn.DenseGeneral(features).apply({"params": params[name]}, x)

        def normalise(name):
            norm = nn.LayerNorm(use_bias=False)
            return norm.apply({"params": params[f"{name}_ln"]}, project(name))

        query, key, value = normalise("query"), normalise("key"), project("value")
        out = lla.local_linear_attention(query, key, value, ridge=RIDGE, implementation="reference")
        return nn.DenseGeneral(WIDTH, axis=(-2, -1)).apply({"params": params["out"]}, out)

    expected = by_hand(variables, x)
    apply = jax.jit(layer.apply)
    close(apply(variables, x, mask=nn.make_causal_mask(x[..., 0])), expected)
    always = linen_layer(make_dense(is_causal=True))
    close(jax.jit(always.apply)(variables, x), expected)


def test_both_differ_from_softmax_attention():
    x = tokens(2, LENGTH)
    softmax = call(nnx_layer(nnx.dot_product_attention), x)
    assert np.abs(call(nnx_layer(make_dense()), x) - softmax).max() > 0.01
    # and approach it for a large ridge
    close(call(nnx_layer(make_dense(ridge=1e6)), x), softmax)


def test_padding_mask_hides_keys_and_a_hidden_row_is_zero():
    query, key, value = heads(2, LENGTH, HEADS, 8)
    attend = jax.jit(lla.nn.attention_fn(ridge=RIDGE))
    mask = np.ones((2, 1, LENGTH, LENGTH), np.float32)
    mask[0, ..., 5:] = 0
    mask[1, :, 2] = 0
    out = attend(query, key, value, mask=jnp.asarray(mask))
    close(out[0], operator(query[0], key[0, :5], value[0, :5], is_causal=False))
    np.testing.assert_array_equal(out[1, 2], 0)


# ---------------------------------------------------------------------------------------------
# Training and decoding


def test_nnx_layer_trains():
    layer = nnx_layer(lla.nn.attention_fn(ridge=RIDGE))
    x, y = tokens(4, 12), tokens(4, 12, seed=9)
    optimizer = nnx.Optimizer(layer, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            return jnp.mean((layer(x, is_causal=True) - y) ** 2)

        value, grads = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, grads)
        return value

    steps(lambda state: (state, step(layer, optimizer)), None)


def test_linen_layer_trains():
    layer = linen_layer(lla.nn.attention_fn(ridge=RIDGE, is_causal=True))
    x, y = tokens(4, 12), tokens(4, 12, seed=9)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    tx = optax.adam(3e-3)

    @jax.jit
    def step(state):
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((layer.apply(p, x) - y) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    steps(step, (params, tx.init(params)))


def test_nnx_decoding_equals_the_full_pass():
    layer = nnx_layer(lla.nn.attention_fn(ridge=RIDGE), num_kv_heads=2)
    x = tokens(2, LENGTH)
    full = call(layer, x, is_causal=True)
    layer.init_cache(x.shape)

    @nnx.jit
    def step(layer, token):
        return layer(token, decode=True)

    close(jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(LENGTH)], axis=1), full)


def test_linen_decoding_equals_the_full_pass():
    x = tokens(2, LENGTH)
    attention_fn = make_dense()
    layer = linen_layer(attention_fn)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    full = jax.jit(layer.apply)({"params": params}, x, mask=nn.make_causal_mask(x[..., 0]))
    decoder = linen_layer(attention_fn, decode=True)
    cache = jax.jit(decoder.init)(jax.random.key(0), x)["cache"]

    @jax.jit
    def step(cache, token):
        out, updated = decoder.apply({"params": params, "cache": cache}, token, mutable=["cache"])
        return updated["cache"], out

    outs = []
    for i in range(LENGTH):
        cache, out = step(cache, x[:, i : i + 1])
        outs.append(out)
    close(jnp.concatenate(outs, axis=1), full)


# ---------------------------------------------------------------------------------------------
# The arguments Flax passes


def test_every_argument_linen_may_pass_is_listed():
    # Linen drops what it does not find in the signature, so a missing name would be ignored.
    ours = inspect.signature(lla.nn.attention_fn(ridge=1.0)).parameters
    assert set(inspect.signature(nn.dot_product_attention).parameters) <= set(ours)
    theirs = set(inspect.signature(nnx.dot_product_attention).parameters)
    assert theirs - set(ours) == {"promote_dtype"}  # never passed by the layer; ours has `dtype`


REFUSED = {
    "dropout": dict(dropout_rate=0.1, deterministic=False),
    "dropout by default": dict(dropout_rate=0.1),
    "sow": dict(module=object()),
    "qk einsum": dict(qk_attn_weights_einsum=jnp.einsum),
    "value einsum": dict(attn_weights_value_einsum=jnp.einsum),
    "dot_general": dict(einsum_dot_general=jax.lax.dot_general),
    "algorithm": dict(precision=jax.lax.DotAlgorithmPreset.F16_F16_F16),
    "algorithm's name": dict(precision="F16_F16_F32"),
    "pair with an algorithm": dict(precision=("high", jax.lax.DotAlgorithmPreset.F16_F16_F16)),
    "positions": dict(input_positions=jnp.arange(5)),
}


def test_bias_of_the_logits():
    """A learned table of relative positions through Flax's own call, gradient included."""
    query, key, value = heads(2, LENGTH, HEADS, 8)
    distance = np.arange(LENGTH)[None] - np.arange(LENGTH)[:, None]

    def loss(function, table, **options):
        bias = table[:, distance + LENGTH - 1][None]
        return jnp.sin(function(query, key, value, bias=bias, **options)).sum()

    table = tokens(HEADS)[:, : 2 * LENGTH - 1]
    attend = make_dense(implementation=None)
    got = jax.jit(jax.value_and_grad(functools.partial(loss, attend)))(table)
    want = jax.jit(jax.value_and_grad(functools.partial(loss, operator, is_causal=False)))(table)
    for mine, right in zip(got, want, strict=True):
        close(mine, right)
    assert np.abs(got[1]).min() > 0
    # For a large ridge it is Flax's function.
    flax = jax.jit(jax.value_and_grad(functools.partial(loss, nn.dot_product_attention)))(table)
    large = jax.jit(jax.value_and_grad(functools.partial(loss, make_dense(ridge=1e6))))(table)
    for mine, right in zip(large, flax, strict=True):
        close(mine, right)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name):
    query, key, value = heads(1, 5, 2, 4)
    with pytest.raises(NotImplementedError, match="does not support"):
        make_dense()(query, key, value, **REFUSED[name])


def test_unequal_lengths_with_is_causal_are_refused():
    query, key, value = heads(1, 5, 2, 4)
    for fixed, passed in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="equal lengths"):
            lla.nn.attention_fn(ridge=1.0, is_causal=fixed)(
                query[:, :1], key, value, is_causal=passed
            )


def test_refusals_reach_the_user_through_both_layers():
    x, attention_fn = tokens(1, 3), make_dense()
    with pytest.raises(NotImplementedError, match="dropout"):
        nnx_layer(attention_fn, dropout_rate=0.5, deterministic=False)(x)
    with pytest.raises(NotImplementedError, match="sow"):
        nnx_layer(attention_fn)(x, sow_weights=True)
    dropping = linen_layer(attention_fn, dropout_rate=0.5)
    init = functools.partial(dropping.init, deterministic=True)
    variables = jax.jit(init)(jax.random.key(0), x)
    quiet = functools.partial(dropping.apply, deterministic=True)
    assert jax.eval_shape(quiet, variables, x).shape == x.shape
    with pytest.raises(NotImplementedError, match="dropout"):
        dropping.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(NotImplementedError, match="sow"):
        linen_layer(attention_fn).apply(variables, x, sow_weights=True, mutable=["intermediates"])
    with pytest.raises(NotImplementedError, match="einsum"):
        linen_layer(
            attention_fn,
            qk_attn_weights_einsum_cls=lambda: jnp.einsum,
            attn_weights_value_einsum_cls=lambda: jnp.einsum,
        ).apply(variables, x)


def test_dtype_and_precision():
    query, key, value = heads(2, 9, 2, 8)
    attend = jax.jit(make_dense(is_causal=True), static_argnames=("dtype", "precision"))
    exact = attend(query, key, value)
    np.testing.assert_array_equal(attend(query, key, value, precision="HIGHEST"), exact)
    cast = [a.astype(jnp.bfloat16) for a in (query, key, value)]
    highest = jax.lax.Precision.HIGHEST
    pairs = [("high", "high"), ("default", None), (highest, highest)]
    for precision in (None, "default", "high", "tensorfloat32", highest, *pairs):
        accepted = functools.partial(make_dense(), precision=precision)
        assert jax.eval_shape(accepted, query, key, value).shape == exact.shape
        assert jax.eval_shape(accepted, *cast).dtype == jnp.bfloat16
    low = attend(query, key, value, dtype=jnp.bfloat16, force_fp32_for_softmax=True)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, attend(*cast))
    np.testing.assert_array_equal(low, attend(*cast, precision=("highest", "highest")))
    assert jax.eval_shape(make_dense(), cast[0], key, cast[2]).dtype == jnp.float32

    layer = nnx_layer(make_dense(), dtype=jnp.bfloat16)
    out = nnx.eval_shape(lambda m, x: m(x), layer, tokens(2, LENGTH))
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.float8_e4m3fn])
def test_other_dtypes_are_refused_with_those_that_are_accepted(dtype):
    query, key, value = (a.astype(dtype) for a in heads(1, 5, 2, 4))
    accepted = r"must be one of float16, bfloat16, float32, float64, got \w+ from query"
    with pytest.raises(ValueError, match=accepted) as caught:
        make_dense()(query, key, value)
    advice = "real and imaginary parts one after the other" in str(caught.value)
    assert advice == (dtype == jnp.complex64)


def test_what_is_advised_for_complex_heads_is_right():
    query, key, _ = (
        a + 1j * b for a, b in zip(heads(5, 2, 4), heads(5, 2, 4, seed=7), strict=True)
    )
    parts = (jnp.concatenate([a.real, a.imag], axis=-1) for a in (query, key))
    close(jnp.einsum("tnh,snh->nts", *parts), jnp.einsum("tnh,snh->nts", query, key.conj()).real)


def leaks(attend, *arrays, **options):
    """Whether the first output depends on the last value."""
    query, key, value = arrays
    changed = value.at[..., -1, :, :].add(1.0)
    outs = [attend(query, key, v, **options) for v in (value, changed)]
    return bool(jnp.any(outs[0][..., 0, :, :] != outs[1][..., 0, :, :]))


def test_a_forgotten_direction_is_a_warning_and_all_directions_are_attended_to():
    arrays = heads(1, 5, 2, 4)
    make = functools.partial(make_dense, is_causal=None)
    with pytest.warns(UserWarning, match=r"attends in all directions: 5 queries.*is_causal=True"):
        assert leaks(make(), *arrays)
    # Whoever says what is meant is not warned; warnings are errors here.
    mask = jnp.tril(jnp.ones((1, 1, 5, 5)))
    assert not leaks(make(), *arrays, mask=mask)
    assert not leaks(make(is_causal=True), *arrays)
    assert not leaks(make(), *arrays, is_causal=True)
    assert leaks(make(), *arrays, is_causal=False)  # as an NNX layer does
    assert leaks(make(is_causal=False), *arrays)
    query, key, value = arrays
    make()(query[:, :3], key, value)  # cross-attention
    make()(query[:, :1], key[:, :1], value[:, :1])


def test_the_warning_reaches_the_user_of_a_linen_layer():
    x = tokens(1, 5)
    layer = linen_layer(make_dense(is_causal=None))
    with pytest.warns(UserWarning, match="attends in all directions"):
        variables = layer.init(jax.random.key(0), x)
    layer.apply(variables, x, mask=nn.make_causal_mask(x[..., 0]))
    nnx_layer(make_dense(is_causal=None))(x)  # it passes is_causal=False


def rotated(x, positions):
    """Rotary embedding ``[..., T, H] -> [..., T, H]`` as Flax has it: positions of one sequence."""
    length, dim = x.shape[-2:]
    positions = jnp.arange(float(length)) if positions is None else positions
    angle = jnp.outer(positions, 100.0 ** (-jnp.arange(0.0, dim, 2) / dim))
    sin, cos = (jnp.concatenate([f(angle)] * 2, axis=-1) for f in (jnp.sin, jnp.cos))
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def test_input_positions_reach_the_rotary_embedding():
    query, key, value = heads(2, LENGTH, HEADS, 8)
    attend = make_dense(rope=rotated)
    turned = [
        jnp.stack([rotated(a[:, :, n], None) for n in range(HEADS)], axis=2) for a in (query, key)
    ]
    expected = make_dense()(*turned, value)
    assert np.abs(np.asarray(expected - make_dense()(query, key, value))).max() > 0.01
    close(attend(query, key, value), expected)
    close(attend(query, key, value, input_positions=jnp.arange(LENGTH)), expected)
    # Logits depend on differences alone, so that each sequence may begin anywhere.
    begin = jnp.asarray([[3], [40]]) + jnp.arange(LENGTH)[None]
    close(attend(query, key, value, input_positions=begin), expected, 1e-3)
    gaps = jnp.arange(LENGTH) ** 2
    spread = attend(query, key, value, input_positions=jnp.stack([jnp.arange(LENGTH), gaps]))
    close(spread[0], expected[0])
    assert np.abs(np.asarray(spread[1] - expected[1])).max() > 0.01
    low = [a.astype(jnp.bfloat16) for a in (query, key, value)]
    assert attend(*low, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_a_rotary_embedding_of_unequal_lengths_is_refused():
    query, key, value = heads(1, 5, 2, 4)
    with pytest.raises(ValueError, match="rope needs equal lengths"):
        make_dense(rope=rotated)(query[:, :1], key, value)
    with pytest.raises(ValueError, match=r"input_positions must have shape \[\*B, T\]"):
        make_dense(rope=rotated)(query, key, value, input_positions=jnp.arange(4))


@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="this version of Flax has no RoPE")
@pytest.mark.compat
def test_nnx_layer_passes_its_positions():
    x, positions = tokens(2, LENGTH), jnp.arange(LENGTH)
    layer = nnx_layer(make_dense(is_causal=None, rope=nnx.RoPE()))
    out = layer(x, is_causal=True, input_positions=positions)
    close(layer(x, is_causal=True), out)
    close(layer(x, is_causal=True, input_positions=positions + 5), out, 1e-3)
    assert np.abs(np.asarray(out - nnx_layer(make_dense())(x, is_causal=True))).max() > 0.01
    with pytest.raises(NotImplementedError, match="input_positions"):
        nnx_layer(make_dense())(x, input_positions=positions)


def test_strict_promotion_vmap_and_gradients():
    arrays = heads(3, 6, 2, 4)
    attend = lla.nn.attention_fn(ridge=RIDGE)
    mask = jnp.tril(jnp.ones((1, 1, 6, 6), jnp.float32))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        out = jax.jit(attend)(*arrays, mask=mask)
        mapped = jax.jit(jax.vmap(functools.partial(attend, mask=mask[0])))(*arrays)
        close(mapped, out)

        def loss(*arrays, function):
            return jnp.sum(function(*arrays) ** 2)

        ours = functools.partial(loss, function=functools.partial(attend, mask=mask))
        by_hand = functools.partial(
            loss,
            function=functools.partial(
                lla.local_linear_attention, ridge=RIDGE, implementation="reference"
            ),
        )
        gradients, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*arrays) for f in (ours, by_hand))
        jax.tree.map(lambda a, b: close(a, b, 1e-3), gradients, expected)


def test_importing_the_library_leaves_flax_alone():
    code = "import sys, lla; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_examples_in_docstrings_run():
    for module in (lla.nn.drop_in, lla.nn.layer):
        failed, attempted = doctest.testmod(module)
        assert attempted > 0 and failed == 0
