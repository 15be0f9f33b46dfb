"""Layers with sharded inputs and parameters, and with sequences split over devices."""

import contextlib
import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lla.nn
import lla.sharding
from tests.measure import latin
from tests.ops.harness import relative_error

if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)

WIDTH, HEADS, LENGTH = 16, 4, 12
ATTEND = dict(ridge=1.0, is_causal=True)


def mesh_of(names=("data", "heads"), kind=AxisType.Auto, shape=(2, 4)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def inputs():
    return jax.random.normal(jax.random.key(1), (4, LENGTH, WIDTH))


def by_heads(path, leaf) -> P:
    """Kernels are split along their axis of heads, all else is copied."""
    name = jax.tree_util.keystr(path)
    if "kernel" in name and any(part in name for part in ("query", "key", "value")):
        return P(None, "heads")
    if "kernel" in name and "out" in name:
        return P("heads")
    return P()


def model(kind: str):
    """Parameters, and ``(parameters, x) -> output``."""
    if kind == "linen":
        layer = linen.MultiHeadDotProductAttention(
            num_heads=HEADS, normalize_qk=True, attention_fn=lla.nn.attention_fn(**ATTEND)
        )
        x = inputs()
        params = layer.init(jax.random.key(0), x)
        return params, lambda params, x: layer.apply(params, x)
    if kind == "nnx":
        layer = nnx.MultiHeadAttention(
            num_heads=HEADS, in_features=WIDTH, normalize_qk=True, decode=False, rngs=nnx.Rngs(0),
            attention_fn=lla.nn.attention_fn(**ATTEND),
        )  # fmt: skip
    else:
        mechanism = dict(mechanism=kind) if kind != "lla" else dict(ridge_type="per_token")
        layer = lla.nn.LocalLinearAttention(
            HEADS, WIDTH, rope_theta=100.0, rngs=nnx.Rngs(0), **mechanism
        )
    graph, params = nnx.split(layer)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def loss_and_gradients(apply):
    def loss(params, x):
        out = apply(params, x)
        return jnp.square(out).sum(), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def assert_equal(found, want, bound=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        if np.abs(np.asarray(b)).max() > 1e-6:
            assert relative_error(a, b) < bound


@pytest.mark.parametrize("kind", ["lla", "parallax", "softmax", "nnx", "linen"])
def test_sharded_batch_and_heads(kind):
    """As with one device; what is sent is the sum over heads, and sums of gradients."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params, apply = model(kind)
        x = inputs()
        want = jax.jit(loss_and_gradients(apply))(params, x)
        mesh = mesh_of()
        places = jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(mesh, by_heads(path, leaf)), params
        )
        placed = jax.device_put(params, places)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        forward = jax.jit(apply).lower(placed, x).compile()
        assert not re.search(r" all-gather(-start)?\(", forward.as_text())
        found = jax.jit(loss_and_gradients(apply))(placed, x)
        assert tuple(found[0][1].sharding.spec)[:1] == ("data",)
        assert_equal(found, want)
        spec = jax.tree.map(lambda a: tuple(a.sharding.spec), found[1][0])
        assert any(
            "heads" in leaf for leaf in jax.tree.leaves(spec, is_leaf=lambda s: type(s) is tuple)
        )


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["lla", "nnx", "linen"])
def test_sharded_batch_under_explicit_axes(kind):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params, apply = model(kind)
        x = inputs()
        want = jax.jit(apply)(params, x)
        mesh = mesh_of(kind=AxisType.Explicit)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, NamedSharding(mesh, P()))
            x = jax.device_put(x, NamedSharding(mesh, P("data")))
            found = jax.jit(apply)(placed, x)
        assert found.sharding.spec[0] == "data"
        assert_equal(found, want)


@latin("style, balanced", ["shard_map", "explicit"], [False, True])
def test_split_sequences(style, balanced):
    """Rotary positions and learned ridges are those of the tokens."""
    options = dict(rope_theta=100.0, ridge_type="per_token", num_kv_heads=2, rngs=nnx.Rngs(0))
    whole = lla.nn.LocalLinearAttention(HEADS, WIDTH, **options)
    split = lla.nn.LocalLinearAttention(
        HEADS, WIDTH, context_axis="context", context_balance=balanced, **options
    )
    _, params = nnx.split(whole)
    params = jax.tree.map(lambda a: a + 0.1, params)
    graphs = [nnx.split(layer)[0] for layer in (whole, split)]
    x = jax.random.normal(jax.random.key(1), (2, 24, WIDTH))

    def apply(graph):
        return lambda params, x: nnx.merge(graph, params)(x)

    want = jax.jit(loss_and_gradients(apply(graphs[0])))(params, x)
    kind = AxisType.Explicit if style == "explicit" else AxisType.Auto
    mesh = mesh_of(("data", "context"), kind)
    function = apply(graphs[1])
    if style == "shard_map":
        spec = P("data", "context")
        function = jax.shard_map(function, mesh=mesh, in_specs=(P(), spec), out_specs=spec)
    ordered = lla.sharding.balance(x, 4) if balanced else x
    with jax.set_mesh(mesh) if style == "explicit" else contextlib.nullcontext():
        placed = jax.device_put(params, NamedSharding(mesh, P()))
        ordered = jax.device_put(ordered, NamedSharding(mesh, P("data", "context")))
        (_, out), (d_params, d_x) = jax.jit(loss_and_gradients(function))(placed, ordered)
    assert out.sharding.spec[1] == "context"
    out, d_x = (np.asarray(a) for a in (out, d_x))
    if balanced:
        out, d_x = (lla.sharding.unbalance(a, 4) for a in (out, d_x))
    assert_equal((out, d_params, d_x), (want[0][1], *want[1]))
