"""Every configuration of the Hopper kernels lowers for a GPU, on a machine without one."""

import jax
import jax.numpy as jnp
import pytest

import lla
from lla.ops.problem import make_problem

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11"),
]

MASKS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"local_window_size": (100, 0)},
    "segments": {"segments": True},
    "lengths": {"lengths": True},
}


def lower(
    mechanism,
    head_dim,
    *,
    value_dim=None,
    ridge=None,
    dtype=jnp.bfloat16,
    mask="causal",
    solver=None,
):
    """The text of the lowered forward and backward pass."""
    from lla.ops.mosaic_gpu.hopper import attend_shielded

    b, t, n, k = 2, 200, 4, 2
    value_dim = value_dim or head_dim
    shapes = {
        "query": (b, t, n, head_dim),
        "key": (b, t, k, head_dim),
        "value": (b, t, k, value_dim),
    }
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    if mechanism == "parallax":
        arrays["probe"] = arrays["query"]
    options = dict(MASKS[mask])
    if options.pop("segments", False):
        options["segment_ids"] = (jnp.zeros((b, t), jnp.int32),) * 2
    if options.pop("lengths", False):
        options["key_value_seq_lengths"] = jnp.array([200, 7], jnp.int32)
    if solver is not None:
        options["solver"] = solver
    if mechanism == "lla":
        if ridge is None:
            arrays["ridge"] = jax.ShapeDtypeStruct((b, t, n), jnp.float32)
        else:
            options["ridge"] = ridge

    def call(arrays, cotangent):
        def forward(arrays):
            problem = make_problem(mechanism, **arrays, **options)
            return problem.restore(attend_shielded(problem)[0])

        out, pullback = jax.vjp(forward, arrays)
        return out, pullback(cotangent)

    cotangent = jax.ShapeDtypeStruct((b, t, n, value_dim), dtype)
    return jax.jit(call).trace(arrays, cotangent).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text: str) -> int:
    return text.count("mosaic_gpu_v2") or text.count("mosaic_gpu")


@pytest.mark.parametrize("head_dim", [16, 128])  # padded, and not padded
@pytest.mark.parametrize("mechanism", ["softmax", "parallax", "lla"])
def test_mechanisms(mechanism, head_dim):
    kernels = {"softmax": 3, "parallax": 4, "lla": 5}[mechanism]
    assert count_kernels(lower(mechanism, head_dim)) >= kernels


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "causal"])
def test_masks(mask):
    lower("lla", 64, mask=mask)


@pytest.mark.parametrize(("ridge", "head_dim"), [(10.0, 64), (0.01, 64), (0.1, 128), (0.01, 128)])
def test_ridges(ridge, head_dim):
    lower("lla", head_dim, ridge=ridge)


@pytest.mark.parametrize("mask", ["causal", "window", "segments"])
@pytest.mark.parametrize("head_dim", [12, 32])
def test_direct(head_dim, mask):
    text = lower("lla", head_dim, value_dim=24, mask=mask, solver=lla.Solver("direct"))
    without = count_kernels(lower("lla", head_dim, value_dim=24, mask=mask, ridge=10.0))
    # In addition: statistics, products, moments and inverses. The last three are equal in both
    # passes and lowered once.
    assert without < count_kernels(text) <= without + 4


def test_float16_and_other_value_dim():
    lower("lla", 48, value_dim=128, dtype=jnp.float16)


def test_shard_map_and_vmap():
    """Sharded over the sequences of a batch, with replicated keys and values; and under `vmap`."""
    from lla.ops.mosaic_gpu.hopper import attend_shielded

    def call(query, key, value, cotangent):
        def forward(query, key, value):
            problem = make_problem("lla", query, key, value, ridge=1.0)
            return problem.restore(attend_shielded(problem)[0])

        out, pullback = jax.vjp(forward, query, key, value)
        return out, pullback(cotangent)

    def struct(*lead):
        return jax.ShapeDtypeStruct((*lead, 128, 2, 64), jnp.bfloat16)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.P("x"), jax.P()
    sharded = jax.shard_map(
        call, mesh=mesh, in_specs=(split, whole, whole, split),
        out_specs=(split, (split, whole, whole)),
    )  # fmt: skip
    arguments = (struct(8), struct(1), struct(1), struct(8))
    text = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert count_kernels(text) >= 5
    mapped = jax.jit(jax.vmap(call)).trace(*[struct(3, 1)] * 4)
    assert count_kernels(mapped.lower(lowering_platforms=("cuda",)).as_text()) >= 5


def test_equal_layers_are_lowered_once():
    """Kernels take seconds to lower and compile, and models have many equal layers."""
    from lla.ops.mosaic_gpu.hopper import attend_shielded

    def kernels(layers):
        def loss(query, key):
            for _ in range(layers):
                problem = make_problem("lla", query, key, key, ridge=1.0)
                query = problem.restore(attend_shielded(problem)[0])
            return jnp.square(query.astype(jnp.float32)).sum()

        arrays = [jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)] * 2
        traced = jax.jit(jax.vmap(jax.grad(loss))).trace(
            *[jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in arrays]
        )
        return count_kernels(traced.lower(lowering_platforms=("cuda",)).as_text())

    assert kernels(3) == kernels(1)
