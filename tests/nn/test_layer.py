"""The layer: what it computes, its parameters, its ridge, and what it refuses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lla
import lla.nn
from lla.nn.rope import rotate

WIDTH = 24


@nnx.jit
def call(layer, *args, **options):
    """Compiled as a whole: op by op, the first run takes seconds."""
    return layer(*args, **options)


@functools.partial(jax.jit, static_argnames=("function", "implementation", "is_causal"))
def attend(function, *args, implementation="reference", **options):
    return function(*args, implementation=implementation, **options)


def make_layer(seed=0, **options):
    # Dense by default, which compiles several times faster; where it matters tests say None.
    defaults = dict(num_heads=4, in_features=WIDTH, head_dim=8, implementation="reference")
    options = defaults | options
    return lla.nn.LocalLinearAttention(**options, rngs=nnx.Rngs(seed))


def tokens(*shape, seed=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def shapes(layer):
    state = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {".".join(map(str, path)): variable.shape for path, variable in state}


def close(actual, expected, tolerance=2e-4):
    """Relative Frobenius; 2e-4: float32 at a ridge of 0.1 or more is held to 1e-4, here twice."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def test_parameters_have_a_head_axis_and_the_documented_shapes():
    layer = make_layer(
        num_kv_heads=2, value_dim=6, out_features=10, ridge_type="per_token", use_bias=True
    )
    assert shapes(layer) == {
        "query.kernel": (WIDTH, 4, 8),
        "query.bias": (4, 8),
        "key.kernel": (WIDTH, 2, 8),
        "key.bias": (2, 8),
        "value.kernel": (WIDTH, 2, 6),
        "value.bias": (2, 6),
        "out.kernel": (4, 6, 10),
        "query_norm.scale": (8,),
        "key_norm.scale": (8,),
        "ridge.kernel": (WIDTH, 4),
        "ridge.bias": (4,),
    }
    assert "ridge.bias" not in shapes(make_layer())
    assert "query_norm.scale" not in shapes(make_layer(qk_norm=False))
    assert shapes(make_layer(mechanism="parallax"))["probe.kernel"] == (WIDTH, 4, 8)
    assert nnx.eval_shape(lambda m, x: m(x), layer, tokens(2, 5, WIDTH)).shape == (2, 5, 10)


def test_equals_projections_normalisation_and_reference_written_out():
    layer = make_layer(num_kv_heads=2, value_dim=6, ridge=0.5, use_bias=True, implementation=None)
    x = tokens(3, 2, 11, WIDTH)

    def project(linear):
        bias = linear.bias[...]
        heads = jnp.einsum("...i,inh->...nh", x, linear.kernel[...], precision="highest")
        return heads + jnp.broadcast_to(bias, heads.shape)

    def normalise(heads):
        return heads / np.sqrt(np.mean(np.square(heads), -1, keepdims=True) + 1e-6)

    out = attend(
        lla.local_linear_attention,
        normalise(project(layer.query)),
        normalise(project(layer.key)),
        project(layer.value),
        ridge=0.5,
    )
    close(
        call(layer, x),
        jnp.einsum("...nh,nho->...o", out, layer.out.kernel[...], precision="highest"),
    )


@pytest.mark.parametrize("mechanism", ["parallax", "softmax"])
def test_relatives_are_those_of_the_operator(mechanism):
    layer = make_layer(mechanism=mechanism, num_kv_heads=2, rope_theta=100.0, implementation=None)
    x = tokens(2, 9, WIDTH)
    query, key, value = nnx.jit(lambda m, x: m.heads(x))(layer, x)
    softmax = layer.out(attend(lla.softmax_attention, query, key, value))
    close(call(layer, x), softmax)
    if mechanism == "parallax":
        layer.probe.kernel[...] = tokens(WIDTH, 4, 8, seed=5)
        with_probe = call(layer, x)
        assert np.abs(with_probe - softmax).max() > 0.01
        gradient = nnx.jit(nnx.grad(lambda m: jnp.sum(m(x) ** 2)))(layer)
        assert np.abs(gradient["probe"]["kernel"][...]).min() > 0


@pytest.mark.parametrize("ridge", [0.02, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("ridge_type", ["fixed", "per_head", "per_token"])
def test_initial_ridge_is_the_argument_in_every_dtype(ridge, ridge_type):
    for dtype in (jnp.float32, jnp.bfloat16):
        layer = make_layer(ridge=ridge, ridge_type=ridge_type, dtype=dtype, param_dtype=dtype)
        value = layer.ridge(tokens(2, 5, WIDTH, dtype=dtype))
        assert jnp.asarray(value).dtype == jnp.float32
        assert (
            np.shape(value) == {"fixed": (), "per_head": (4,), "per_token": (2, 5, 4)}[ridge_type]
        )
        np.testing.assert_allclose(value, ridge, rtol=1e-6)


def test_ridge_gradient_is_that_of_the_reference():
    x = tokens(2, 12, WIDTH)
    gradients = []
    for implementation in ("reference", None):
        layer = make_layer(ridge=2.0, ridge_type="per_token", implementation=implementation)
        layer.ridge.bias[...] = jnp.linspace(-1.0, 1.0, 4)
        grad = nnx.jit(nnx.grad(lambda m: jnp.sum(m(x) ** 2)))(layer)
        gradients.append(jax.tree.map(np.asarray, nnx.to_pure_dict(grad)))
    expected, actual = gradients
    assert np.abs(actual["ridge"]["bias"]).min() > 0
    jax.tree.map(lambda a, b: close(a, b, 2e-4), actual, expected)
    assert np.abs(actual["ridge"]["kernel"]).min() > 0


def test_learned_ridge_stays_above_its_minimum():
    layer = make_layer(ridge=1.0, ridge_type="per_head", ridge_min=0.25)
    layer.ridge.bias[...] = jnp.array([-100.0, -1.0, 0.0, 100.0])
    ridge = layer.ridge(tokens(1, 2, WIDTH))
    np.testing.assert_allclose(ridge[0], 0.25, rtol=1e-6)
    assert (np.diff(ridge) > 0).all()


def test_weight_decay_leaves_only_the_ridge_alone():
    model = nnx.List([make_layer(ridge=1.0, ridge_type="per_token")])
    for params in (nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        leaves = jax.tree_util.tree_leaves_with_path(lla.nn.weight_decay_mask(params))
        spared = {jax.tree_util.keystr(path) for path, decays in leaves if not decays}
        assert len(leaves) == 8 and len(spared) == 2 and all("ridge" in path for path in spared)

    # Without gradients all that an AdamW step does is to decay.
    layer = model[0]
    layer.ridge.bias[...] += 1.0
    layer.ridge.kernel[...] += 1.0
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    tx = optax.adamw(0.1, weight_decay=0.5, mask=lla.nn.weight_decay_mask)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    chex.assert_trees_all_equal(after.pop("ridge"), before.pop("ridge"))
    jax.tree.map(lambda a, b: close(a, 0.95 * b, 1e-6), after, before)


def test_trains_with_every_parameter_moving():
    layer = make_layer(
        ridge_type="per_token", use_bias=True, use_out_bias=True, implementation=None
    )
    # Keys and values share directions with neither zero, so no gradient vanishes by symmetry.
    x, y = tokens(4, 16, WIDTH), tokens(4, 16, WIDTH, seed=2)
    optimizer = nnx.Optimizer(layer, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(layer)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            optimizer.update(layer, grads)
        return loss

    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    losses = [float(step(layer, optimizer)) for _ in range(5)]
    after = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), after, before)
    assert all(jax.tree.leaves(moved)), moved


def test_rope_depends_on_relative_positions_only():
    # Non-causal, so that shifting the whole context must change nothing but rounding.
    layer = make_layer(rope_theta=100.0, is_causal=False, ridge=0.5)
    x = tokens(2, 10, WIDTH)
    query, key, value = nnx.jit(lambda m, x: m.heads(x, query_offset=0))(layer, x)
    positions = jnp.arange(10, dtype=jnp.int32)

    def shifted(shift):
        args = (rotate(a, positions + shift, 100.0) for a in (query, key))
        return attend(lla.local_linear_attention, *args, value, ridge=0.5, is_causal=False)

    close(shifted(0), shifted(7))
    plain = call(make_layer(is_causal=False, ridge=0.5), x)
    assert np.abs(call(layer, x) - plain).max() > 1e-3
    # A rotation: norms survive, position 0 stays as it is.
    unrotated = nnx.jit(lambda m, x: m.query_norm(m.query(x)))(layer, x)
    norms = (np.linalg.norm(a, axis=-1) for a in (query, unrotated))
    np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_allclose(query[:, 0], unrotated[:, 0], rtol=1e-5)
    assert np.abs(query - unrotated)[:, 1:].max() > 0.1


@pytest.mark.parametrize("per_sequence, mechanism", [(False, "lla"), (True, "parallax")])
def test_chunk_with_offset_equals_its_rows_of_the_whole(per_sequence, mechanism):
    layer = make_layer(rope_theta=50.0, mechanism=mechanism)
    if mechanism == "parallax":
        layer.probe.kernel[...] = 0.3 * tokens(WIDTH, 4, 8, seed=5)
    x = tokens(2, 12, WIDTH)
    whole = call(layer, x)
    if per_sequence:
        chunk = jnp.stack([x[0, 3:7], x[1, 6:10]])
        expected = jnp.stack([whole[0, 3:7], whole[1, 6:10]])
        offset = jnp.array([3, 6], jnp.int32)
    else:
        chunk, expected, offset = x[:, 5:9], whole[:, 5:9], 5
    close(call(layer, chunk, x, query_offset=offset), expected)


@nnx.jit
def decode(layer, x, state, new_lengths=None):
    return layer.decode(x, state, new_lengths)


DECODING = {
    "rope": dict(rope_theta=50.0, num_kv_heads=2, value_dim=6, out_features=10, ridge=0.5),
    "per_token": dict(ridge_type="per_token", qk_norm=False, use_bias=True, use_out_bias=True),
    "parallax": dict(mechanism="parallax", rope_theta=50.0, local_window_size=4),
}


@pytest.mark.parametrize("name", DECODING)
def test_decoding_in_pieces_equals_the_whole(name):
    layer = make_layer(implementation=None, **DECODING[name])
    if name == "parallax":
        layer.probe.kernel[...] = 0.3 * tokens(WIDTH, 4, 8, seed=5)
    if name == "per_token":  # the ridge of a token has to be its own
        layer.ridge.kernel[...] = 0.3 * tokens(WIDTH, 4, seed=6)
    x = tokens(2, 9, WIDTH)
    expected = call(layer, x)
    parts, state = [], layer.init_state(2, 9)
    for first, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        out, state = decode(layer, x[:, first:end], state)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), expected, 1e-4)
    assert state.cache.lengths.tolist() == [9, 9] and not state.convolutions


def test_decoding_ragged_sequences_of_any_leading_axes():
    """Each sequence rotates by its own position, and what pads one is not read."""
    layer = make_layer(rope_theta=50.0, ridge_type="per_token")
    x = tokens(2, 1, 8, WIDTH)
    expected = call(layer, x)
    out, state = decode(
        layer, x[..., :4, :], layer.init_state((2, 1), 8), jnp.array([[4], [1]], jnp.int32)
    )
    close(out[1, 0, :1], expected[1, 0, :1])
    out, state = decode(layer, jnp.stack([x[0, :, 4:8], x[1, :, 1:5]]), state)
    close(out, jnp.stack([expected[0, :, 4:8], expected[1, :, 1:5]]))
    assert state.cache.lengths.tolist() == [[8], [5]]


def test_the_cache_may_be_narrower_than_the_layer():
    layer, x = make_layer(), tokens(2, 6, WIDTH)
    out, state = decode(layer, x, layer.init_state(2, 6, jnp.bfloat16))
    assert state.cache.key.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    with pytest.raises(AssertionError):
        close(out, call(layer, x), 1e-4)
    close(out, call(layer, x), 2e-2)


def test_layers_that_cannot_decode_say_so():
    for options in (dict(is_causal=False), dict(in_kv_features=6)):
        with pytest.raises(ValueError, match="decoding needs a causal layer"):
            make_layer(**options).init_state(2, 4)
    layer = make_layer()
    with pytest.raises(ValueError, match=rf"x must have shape \[\*B, T, {WIDTH}\]"):
        layer.decode(tokens(2, 1, 5), layer.init_state(2, 4))
    with pytest.raises(ValueError, match=r"new_lengths must .* \(2,\)"):
        layer.decode(tokens(2, 1, WIDTH), layer.init_state(2, 4), jnp.array([1]))
    with pytest.raises(ValueError, match=r"x must have the leading axes \(2,\) of the state"):
        layer.decode(tokens(3, 1, WIDTH), layer.init_state(2, 4))


@pytest.mark.parametrize("options", [dict(mechanism="softmax"), dict(ridge=0.5)])
def test_packed_pieces_of_sequences_with_several_leading_axes(options):
    layer, x = make_layer(rope_theta=100.0, **options), tokens(2, 1, 9, WIDTH)
    ids = jnp.array([[[1, 1, 1, 2, 2, 2, 2, 2, 2]], [[0, 0, 0, 0, 0, 0, 4, 4, 4]]], jnp.int32)
    state, outs = layer.init_state((2, 1), 9), []
    for first, last in ((0, 5), (5, 6), (6, 9)):
        piece = slice(first, last)
        y, state = layer.decode(x[..., piece, :], state, segment_ids=ids[..., piece])
        outs.append(y)
    out = np.concatenate(outs, axis=-2)
    for i, first in ((0, 3), (1, 6)):
        close(out[i, :, :first], call(layer, x[i, :, :first]), 1e-4)
        close(out[i, :, first:], call(layer, x[i, :, first:]), 1e-4)
    assert state.cache.lengths.tolist() == [[6], [3]]
    assert state.segment.tolist() == [[2], [4]]


def test_positions_are_those_of_the_rotation():
    layer, x = make_layer(rope_theta=100.0), tokens(2, 7, WIDTH)
    far = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7))
    np.testing.assert_array_equal(layer(x, positions=far), layer(x))
    assert np.abs(layer(x, positions=3 * far) - layer(x)).max() > 1e-3
    cross = make_layer(is_causal=False)
    with pytest.raises(ValueError, match="positions are those of x"):
        cross(x, x, positions=far)


def test_packed_padded_and_masked_sequences_equal_separate_ones():
    layer = make_layer(ridge=0.5)
    a, b = tokens(1, 7, WIDTH, seed=2), tokens(1, 5, WIDTH, seed=3)
    packed = jnp.concatenate([a, b], axis=1)
    ids = jnp.array([[0] * 7 + [1] * 5], jnp.int32)
    both = jnp.concatenate([call(layer, a), call(layer, b)], axis=1)
    close(call(layer, packed, segment_ids=ids), both)
    close(call(layer, packed, packed, segment_ids=(ids, ids)), both)
    close(call(layer, packed, mask=ids[:, None, :, None] == ids[:, None, None, :]), both)
    lengths = jnp.array([7], jnp.int32)
    close(call(layer, packed, key_value_seq_lengths=lengths)[:, :7], both[:, :7])


def test_cross_attention_and_missing_keys():
    layer = make_layer(in_kv_features=6, is_causal=False, use_out_bias=True)
    x, context = tokens(2, 4, WIDTH), tokens(2, 9, 6, seed=3)
    out, stats = nnx.jit(lambda m, *args: m(*args, return_stats=True))(layer, x, context)
    assert out.shape == x.shape and stats.lse.shape == (2, 4, 4)
    query, key, value = nnx.jit(lambda m, *args: m.heads(*args))(layer, x, context)
    by_hand = attend(lla.local_linear_attention, query, key, value, ridge=1.0, is_causal=False)
    close(out, layer.out(by_hand))
    layer.out.bias[...] = jnp.arange(WIDTH, dtype=jnp.float32)
    nothing = call(layer, x, context, mask=jnp.zeros((1, 1, 1, 9), bool))
    np.testing.assert_array_equal(nothing, np.broadcast_to(layer.out.bias[...], x.shape))


def test_window_limits_what_a_token_depends_on():
    layer = make_layer(local_window_size=(2, 0))
    x = tokens(1, 8, WIDTH)
    jacobian = jax.jit(jax.grad(lambda x: layer(x)[0, 6].sum()))(x)[0]
    depends = np.abs(jacobian).sum(-1) > 0
    np.testing.assert_array_equal(depends, np.isin(np.arange(8), [4, 5, 6]))


def test_bfloat16_stays_close_to_float32():
    x = tokens(2, 40, WIDTH, dtype=jnp.bfloat16)
    options = dict(ridge_type="per_token", rope_theta=100.0, implementation=None)
    out = call(make_layer(dtype=jnp.bfloat16, **options), x)
    assert out.dtype == jnp.bfloat16
    # Projections, normalisation and attention each round to eight bits.
    close(out, call(make_layer(**options), x.astype(jnp.float32)), 2e-2)
    layer = make_layer(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **options)
    dtypes = {v.dtype.name for _, v in nnx.to_flat_state(nnx.state(layer))}
    assert dtypes == {"bfloat16", "float32"} and layer.ridge.kernel[...].dtype == jnp.float32
    assert nnx.eval_shape(lambda m, x: m(x), layer, x).dtype == jnp.bfloat16


def test_vmap_and_leading_axes_agree():
    layer = make_layer(ridge_type="per_token", num_kv_heads=2, implementation=None)
    x = tokens(3, 2, 9, WIDTH)
    expected = call(layer, x)
    close(nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0)))(layer, x), expected)
    close(jnp.stack([jnp.stack([call(layer, x) for x in row]) for row in x]), expected)


def test_equal_inputs_give_bit_equal_outputs_and_gradients():
    x = tokens(2, 20, WIDTH)
    run = nnx.jit(nnx.value_and_grad(lambda m, x: jnp.sum(m(x) ** 2)))
    first, second = (
        run(make_layer(ridge_type="per_head", implementation=None), x) for _ in range(2)
    )
    chex.assert_trees_all_equal(first, second)


def test_scan_over_layers_and_remat():
    x = tokens(2, 8, WIDTH)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return lla.nn.LocalLinearAttention(4, WIDTH, head_dim=8, ridge_type="per_head", rngs=rngs)

    layers = stack(nnx.Rngs(0))
    assert layers.query.kernel.shape == (3, WIDTH, 4, 8) and layers.ridge.bias.shape == (3, 4)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def forward(layer, x):
        return x + layer(x)

    expected = x
    for i in range(3):
        graph, state = nnx.split(layers)
        layer = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
        expected = expected + call(layer, expected)
    close(nnx.jit(forward)(layers, x), expected)


def test_kernels_carry_metadata_for_sharding():
    layer = make_layer(kernel_metadata={"note": "heads"}, out_kernel_metadata={"note": "out"})
    notes = [getattr(layer, name).kernel.note for name in ("query", "key", "value", "out")]
    assert notes == ["heads", "heads", "heads", "out"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(head_dim=None, num_heads=5), r"in_features \(24\)"),
        (dict(num_kv_heads=3), r"num_kv_heads \(3\)"),
        (dict(num_kv_heads=0), r"num_kv_heads \(0\)"),
        (dict(head_dim=7, rope_theta=10.0), "even head_dim"),
        (dict(mechanism="linear"), "mechanism"),
        (dict(mechanism="softmax", ridge=1.0), "no ridge"),
        (dict(mechanism="parallax", ridge_type="per_head"), "no ridge"),
        (dict(ridge_type="per_layer"), "ridge_type"),
        (dict(ridge=0.0), "ridge must be positive"),
        (dict(ridge=float("nan")), "ridge must be positive"),
        (dict(ridge=1.0, ridge_min=1.0, ridge_type="per_head"), "ridge_min"),
        (dict(ridge=1.0, ridge_min=0.0, ridge_type="per_token"), "ridge_min"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


def test_bad_inputs_are_named():
    layer, x = make_layer(), tokens(2, 6, WIDTH)
    cases = [
        ((x[..., :5],), {}, "x must have shape"),
        ((x[0, 0],), {}, "x must have shape"),
        ((x, x[..., :5]), {}, "context must have shape"),
        ((x, x[0]), {}, "context must have shape"),
        ((x[:, :3], x), {}, "query_offset"),
        ((x,), {"query_offset": 1}, "context"),
        ((x,), {"mask": jnp.ones((1, 1, 6, 5), bool)}, "mask"),
        ((x,), {"mask": jnp.ones((6, 6))}, "mask must be boolean"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            layer(*args, **options)
    with pytest.raises(ValueError, match="context of width 5"):
        make_layer(in_kv_features=5)(x)
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        make_layer(implementation="mosaic_gpu")(x)


@pytest.mark.parametrize("mechanism", ["lla", "parallax", "softmax"])
def test_bias_of_the_logits(mechanism):
    """Handed to the operator with its gradient; and tokens that do not exist attend to nothing."""
    layer = make_layer(mechanism=mechanism, implementation=None, use_out_bias=True)
    if mechanism == "parallax":
        layer.probe.kernel[...] = 0.1 * tokens(*layer.probe.kernel.shape, seed=3)
    x, bias = tokens(2, 9, WIDTH), tokens(4, 9, 9, seed=2)
    lengths = jnp.array([9, 4])
    query, key, value = layer.heads(x)
    function = {
        "lla": functools.partial(lla.local_linear_attention, ridge=1.0),
        "parallax": lla.parallax_attention,
        "softmax": lla.softmax_attention,
    }[mechanism]
    args = (query, *((layer.probe(x),) if mechanism == "parallax" else ()), key, value)

    def through(bias):
        out = layer(x, bias=bias, query_seq_lengths=lengths)
        return jnp.sin(out).sum(), out

    def by_hand(bias):
        out = function(*args, bias=bias, query_seq_lengths=lengths, implementation="reference")
        return jnp.sin(layer.out(out)).sum(), out

    got, out = jax.jit(jax.grad(through, has_aux=True))(bias)
    want, attended = jax.jit(jax.grad(by_hand, has_aux=True))(bias)
    close(out, layer.out(attended))
    close(got, want)
    nothing = np.broadcast_to(layer.out.bias[...], (5, WIDTH))
    np.testing.assert_array_equal(out[1, 4:], nothing)
