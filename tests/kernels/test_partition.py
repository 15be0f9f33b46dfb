"""The Hopper kernels as the compiler partitions them: every share has the promised shapes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import lla
from lla.ops.backend import BACKENDS
from lla.ops.mosaic_gpu import hopper
from lla.ops.placement import Placement

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)
if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)

MESH = {"data": 2, "heads": 2, "rows": 2}
FUNCTIONS = {
    "lla": lambda **arrays: lla.local_linear_attention(
        **arrays, ridge=1.0, implementation="mosaic_gpu"
    ),
    "parallax": lambda **arrays: lla.parallax_attention(**arrays, implementation="mosaic_gpu"),
    "softmax": lambda **arrays: lla.softmax_attention(**arrays, implementation="mosaic_gpu"),
}


def partitioned(jaxpr) -> list:
    """All calls of a program that the compiler partitions."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_partitioning":
            found.append(equation)
        leaves = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda a: hasattr(a, "jaxpr")
        )
        for leaf in leaves:
            if hasattr(leaf, "jaxpr"):
                found += partitioned(leaf.jaxpr)
    return found


@pytest.mark.parametrize(
    "mechanism, key_heads, length",
    [("lla", 4, 200), ("lla", 2, 256), ("parallax", 1, 200), ("softmax", 2, 256)],
)
def test_shares_have_their_shapes(monkeypatch, mechanism, key_heads, length):
    """Batch and heads, and queries where tiles are not cut; forward and backward."""
    able = dataclasses.replace(
        BACKENDS["mosaic_gpu"], unsupported=hopper.unsupported_shape, attend=hopper.attend
    )
    monkeypatch.setitem(BACKENDS, "mosaic_gpu", able)
    query = jax.ShapeDtypeStruct((4, length, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((4, length, key_heads, 64), jnp.bfloat16)
    arrays = dict(query=query, key=key, value=key)
    if mechanism == "parallax":
        arrays["probe"] = query

    def loss(arrays):
        return FUNCTIONS[mechanism](**arrays).astype(jnp.float32).sum()

    calls = partitioned(jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr)
    functions = [call.params["static_args"][0] for call in calls]
    assert [function.phase for function in functions] == ["forward", "backward"]
    axes = {"b0": ("data",), "n": ("heads",)} | ({"t": ("rows",)} if length % 256 == 0 else {})
    placement = Placement(axes, MESH, keys_follow=key_heads % 2 == 0)

    def share(labels, shape):
        parts = (math.prod(MESH[axis] for axis in placement.of(f)) for f in labels)
        return tuple(size // part for size, part in zip(shape, parts, strict=True))

    for function, call in zip(functions, calls, strict=True):
        shapes = [v.aval.shape for v in call.invars]
        labels = function.labels(shapes)
        local = [
            jax.ShapeDtypeStruct(share(own, v.aval.shape), v.aval.dtype)
            for own, v in zip(labels, call.invars, strict=True)
        ]
        on_device = function.on_device(placement, labels)
        found = jax.make_jaxpr(lambda *a, f=on_device: f(*a), axis_env=list(MESH.items()))(*local)
        shapes = [v.aval.shape for v in call.outvars]
        labels = function.labels(shapes, of_results=True)
        want = [share(own, shape) for own, shape in zip(labels, shapes, strict=True)]
        assert [a.shape for a in found.out_avals] == want
