"""Every configuration of the TPU kernels lowers for a TPU, on a machine without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import lla
from lla.compat import lowering_for
from lla.ops.mosaic_tpu.backend import attend_shielded
from lla.ops.problem import make_problem
from tests.kernels.tpu_cases import MASKS, program


def lower(*arguments, **options) -> str:
    """The text of the lowered program of `tpu_cases.program`."""
    function, structs = program(*arguments, **options)
    return jax.jit(function).trace(*structs).lower(lowering_platforms=("tpu",)).as_text()


def count_kernels(text: str) -> int:
    return text.count("tpu_custom_call")


@pytest.mark.compat
@pytest.mark.parametrize("mechanism", ["softmax", "parallax", "lla"])
def test_mechanisms(mechanism):
    forward = count_kernels(lower(mechanism, 64, forward_only=True))
    assert 0 < forward < count_kernels(lower(mechanism, 64))


def test_other_dims_masks_and_float32():
    lower("lla", 16, value_dim=48, mask="segments")
    lower("lla", 256, mask="window", dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("mechanism", ["softmax", "parallax", "lla"])
def test_every_configuration(mechanism, head_dim, dtype, mask):
    assert count_kernels(lower(mechanism, head_dim, dtype=dtype, mask=mask)) > 0


@pytest.mark.parametrize("mechanism", ["softmax", pytest.param("lla", marks=pytest.mark.slow)])
def test_few_queries(mechanism):
    """As in decoding; and with gradients, for which the rows are padded."""
    options = {"queries": 1, "keys": 2000, "heads": 16, "mask": "lengths"}
    forward = count_kernels(lower(mechanism, 64, forward_only=True, **options))
    assert 0 < forward < count_kernels(lower(mechanism, 64, **options))


def call(query, key, value, cotangent, offset=None):
    def forward(query, key, value):
        problem = make_problem("lla", query, key, value, ridge=1.0, query_offset=offset)
        return problem.restore(attend_shielded(problem)[0])

    out, pullback = jax.vjp(forward, query, key, value)
    return out, pullback(cotangent)


def struct(*lead):
    return jax.ShapeDtypeStruct((*lead, 128, 2, 64), jnp.bfloat16)


@pytest.mark.compat
def test_vmap_launches_each_kernel_once():
    """Nested, with shared keys and an offset for every example."""
    mapped = jax.vmap(jax.vmap(call, (0, None, None, 0, None)), (0, 0, 0, 0, 0))
    offsets = jax.ShapeDtypeStruct((5,), jnp.int32)
    arguments = (struct(5, 3, 1), struct(5, 1), struct(5, 1), struct(5, 3, 1), offsets)
    one = (*[struct(1)] * 4, jax.ShapeDtypeStruct((), jnp.int32))
    mapped, plain = (
        jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
        for function, arrays in ((mapped, arguments), (call, one))
    )
    assert count_kernels(mapped) == count_kernels(plain) > 0


@pytest.mark.compat
def test_shard_map():
    """Sharded over the sequences of a batch, with replicated keys and values.

    The devices of the mesh have to be TPUs.
    """
    tpu = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Auto,), abstract_device=tpu)
    split, whole = jax.P("x"), jax.P()
    sharded = jax.shard_map(
        call, mesh=mesh, in_specs=(split, whole, whole, split),
        out_specs=(split, (split, whole, whole)),
    )  # fmt: skip
    traced = jax.jit(sharded).trace(struct(8), struct(1), struct(1), struct(8))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert count_kernels(text) > 0
    assert "all_reduce" in text or "psum" in text


@pytest.mark.slow
def test_saved_residuals_spare_the_forward_kernel():
    """With the named residuals saved, a checkpoint launches fewer kernels."""

    def gradient(policy):
        block = jax.checkpoint(
            lambda q: make_and_run(q).astype(jnp.float32).sum(), policy=policy
        )  # fmt: skip
        return jax.jit(jax.grad(lambda q: jnp.sin(block(q))))

    def make_and_run(query):
        problem = make_problem("lla", query, query, query, ridge=1.0)
        return problem.restore(attend_shielded(problem)[0])

    def count(policy):
        traced = gradient(policy).trace(struct(1))
        return count_kernels(traced.lower(lowering_platforms=("tpu",)).as_text())

    policies = jax.checkpoint_policies
    saved = count(policies.save_only_these_names(*lla.RESIDUAL_NAMES))
    assert 0 < saved < count(policies.nothing_saveable)


# ---------------------------------------------------------------------------------------------
# Through the public functions


def decode(query, key, cache):
    return lla.decode_step(query, key, key, cache, ridge=1.0, implementation="mosaic_tpu")


@pytest.mark.compat
def test_public_functions_and_export():
    """With `lowering_for` a machine without a TPU accepts a request for the TPU kernels."""
    query = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)

    def attend(query, key):
        return lla.local_linear_attention(query, key, key, ridge=1.0, implementation="mosaic_tpu")

    with pytest.raises(NotImplementedError, match="lowering_for"):
        jax.eval_shape(attend, query, key)
    cache = lla.KVCache.create(2, 300, num_kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    step = [jax.ShapeDtypeStruct((2, 1, n, 64), jnp.bfloat16) for n in (4, 2)]
    with lowering_for("tpu"):
        assert lla.explain(query, key, key)["mosaic_tpu"] is None
        exported = jax.export.export(jax.jit(attend), platforms=["tpu"])(query, key)
        lowered = jax.jit(decode).trace(*step, cache).lower(lowering_platforms=("tpu",))
    assert exported.platforms == ("tpu",)
    assert exported.out_avals[0].shape == query.shape
    assert count_kernels(exported.mlir_module()) > 0 and count_kernels(lowered.as_text()) > 0
    assert lla.explain(query, key, key)["mosaic_tpu"] is not None


def test_lowering_for_changes_nothing_else():
    """Without a name the choice is for this machine, and other targets are refused."""
    query = np.zeros((1, 8, 2, 16), np.float32)
    with lowering_for("tpu"):
        lla.softmax_attention(query, query, query).block_until_ready()
    with pytest.raises(ValueError, match="'gpu'"), lowering_for("gpu"):
        pass
