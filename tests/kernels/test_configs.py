"""Launch configurations: the table against the committed times, and what is refused."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11"),
]
TIMES = Path(__file__).parents[2] / "experiments/benchmarks/tuning/hopper_configs.json"
NOISE = 1.08  # ratio of the times of equal runs on different days


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    "kernel",
    [
        "solve", "solve_bf16x2", "solve_mixed", "attend", "attend_bf16x2", "query_gradients",
        "key_gradients",
    ],
)  # fmt: skip
def test_table_is_among_the_fastest(kernel, head_dim):
    from lla.kernels.mosaic_gpu import configs, launch

    records = json.loads(TIMES.read_text(encoding="utf-8"))["records"]
    times = {
        launch.Config(**{**r["config"], "registers": tuple(r["config"]["registers"])}): r[
            "milliseconds"
        ]
        for r in records
        if (r["kernel"], r["head_dim"]) == (kernel, head_dim) and "milliseconds" in r
    }
    assert len(times) > 1
    assert times[getattr(configs.choose(head_dim), kernel)] <= NOISE * min(times.values())


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    "kernel", ["solve", "solve_bf16x2", "adjoint_mixed", "attend", "attend_bf16x2"]
)
def test_tuning_candidates_are_valid(kernel, head_dim):
    from lla.experiments.benchmarks import tune_hopper

    base = tune_hopper.table_config(kernel, head_dim)
    found = tune_hopper.candidates(kernel, head_dim, base)
    assert found[0] == base and len(set(found)) == len(found) > 2
    for config in found:
        config.check_registers()


def test_too_much_shared_memory_is_refused():
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from lla.kernels.mosaic_gpu import launch, solve, tile

    # A union counts once. Alignment adds less than 1 KiB to a buffer, and barriers are small.
    wide, small = plgpu.SMEM((2, 64, 64), jnp.float32), plgpu.SMEM((3,), jnp.int32)
    scratch = {"a": wide, "b": (plgpu.RefUnion(wide, small), plgpu.Barrier(num_barriers=3))}
    least = 2 * 4 * 2 * 64 * 64
    assert least < launch.shared_bytes(scratch) < least + 3 * 1024

    shape = launch.Shape(2, 768, 768, 4, 1, 64, jnp.dtype(jnp.bfloat16))
    rows, masking = (
        shape.rows(),
        launch.Masking(jax.ShapeDtypeStruct((2, 2), jnp.int32), None, None),
    )

    def trace(stages):
        config, mask = launch.Config(stages=stages), tile.MaskSpec(True, None, False)
        call = functools.partial(solve.solve, shape, mask, config, solve.CGOptions(3e-3, 32))
        jax.eval_shape(call, shape.queries(), shape.keys(), rows, rows, masking)

    trace(4)
    limit = f"bytes of shared memory, there are {launch.SHARED_MEMORY}"
    with pytest.raises(ValueError, match=rf"stages=20.*needs \d+ {limit}"):
        trace(20)


def test_sum_products_with_wide_tiles_are_refused():
    from lla.kernels.mosaic_gpu import launch

    shape = launch.Shape(1, 128, 128, 1, 1, 64, jnp.dtype(jnp.bfloat16))
    assert launch.ones_scratch(shape, launch.Config(block=128)) == {}
    with pytest.raises(ValueError, match=r"sum_products needs.*64 rows.*block=128"):
        launch.ones_scratch(shape, launch.Config(block=128, sum_products=True))


@pytest.mark.parametrize(("warpgroups", "registers"), [(3, (168, 24)), (2, (236, 24))])
def test_too_many_registers_are_refused(warpgroups, registers):
    from lla.kernels.mosaic_gpu.launch import Config

    with pytest.raises(ValueError, match=f"warpgroups={warpgroups}.*registers"):
        Config(warpgroups=warpgroups, registers=registers).check_registers()
