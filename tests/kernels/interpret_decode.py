"""Runs one case of the decoding kernels for Hopper in the GPU interpreter.

    python -m tests.kernels.interpret_decode CASE [--races]

Prints one line of JSON: errors of the output and of the log-sum-exp against the exact reference in
float64, and (with ``--races``) the number of kernels with a race. The cases `step` and
`step_gradient` compare `lla.decode_step`, with all of its options, with the XLA implementation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

os.environ["NPROC"] = "16"  # see interpret.py
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.interpret import record_race_detectors
from tests.ops.harness import FUNCTIONS, relative_error


@dataclasses.dataclass(frozen=True)
class Case:
    mechanism: str
    visible: tuple[tuple[int, int], ...]
    num_keys: int = 200
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 64
    splits: int = 2
    ridge: float = 0.1
    bf16x2: bool = True
    one_number: bool = False  # whether scale and ridge are ``[1, 1]``


CASES = {
    "softmax": Case("softmax", ((0, 200), (0, 1))),
    "parallax": Case("parallax", ((70, 190), (0, 0)), one_number=True),
    "lla": Case("lla", ((0, 200), (5, 70), (0, 0), (0, 1))),
    "lla_grouped": Case("lla", ((0, 130),), num_keys=130, kv_heads=2, group=2, splits=3),
    "lla_one_part": Case("lla", ((0, 200),), ridge=10.0, bf16x2=False),
    "lla_head_dim_128": Case("lla", ((3, 170),), head_dim=128, splits=1, one_number=True),
    # One program instance for the query heads of a group.
    "softmax_group_4": Case("softmax", ((0, 200), (70, 70), (130, 190)), kv_heads=2, group=4),
    "softmax_group_7": Case("softmax", ((0, 200), (0, 1)), group=7),
    "softmax_group_4_head_dim_128": Case(
        "softmax", ((0, 200), (7, 60)), group=4, head_dim=128, splits=1
    ),
    "parallax_group_2": Case("parallax", ((70, 190), (0, 0)), kv_heads=2, group=2, one_number=True),
    "parallax_group_16_head_dim_128": Case("parallax", ((0, 200),), group=16, head_dim=128),
    # More tiles than the ring holds.
    "softmax_long_group": Case("softmax", ((10, 1000),), num_keys=1000, group=4, splits=1),
    "parallax_long_group": Case(
        "parallax", ((0, 700),), num_keys=700, group=2, head_dim=128, splits=1
    ),
    "softmax_long": Case("softmax", ((10, 1000),), num_keys=1000, splits=1),
    "lla_one_number": Case("lla", ((0, 200), (5, 70)), kv_heads=2, one_number=True),
    "lla_long_head_dim_128": Case("lla", ((0, 650),), num_keys=650, head_dim=128, splits=1),
}


def run(case: Case, races: bool) -> dict:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from lla.kernels.mosaic_gpu.decode import CacheShape
    from lla.kernels.mosaic_gpu.decode_attend import attend_cache

    rng = np.random.default_rng(0)
    b, d = len(case.visible), case.head_dim
    cache = CacheShape(
        b, case.num_keys, case.kv_heads, case.group, d, jnp.dtype(jnp.bfloat16), case.splits
    )

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(jnp.bfloat16)

    query, probe = normal(b, cache.heads, d), normal(b, cache.heads, d) / 8
    key, value = (normal(b, case.num_keys, case.kv_heads, d) for _ in range(2))
    key = (key.astype(np.float32) + 3).astype(key.dtype)  # a common offset
    visible = np.asarray(case.visible, np.int32)
    positions = np.arange(case.num_keys)
    mask = (positions >= visible[:, :1]) & (positions < visible[:, 1:])
    # Hidden tokens may hold anything.
    key, value = (np.where(mask[..., None, None], a, np.nan).astype(a.dtype) for a in (key, value))
    rows = (b, cache.heads)
    extra = {}
    if case.mechanism == "parallax":
        extra["probe"] = probe.astype(jnp.bfloat16)
    # A different number for every query head, or one for all.
    spread = np.ones((1, 1)) if case.one_number else rng.uniform(0.9, 1.1, rows)
    scale = (d**-0.5 * spread).astype(np.float32)
    if case.mechanism == "lla":
        extra["ridge"] = (case.ridge * spread).astype(np.float32)
    states = record_race_detectors()
    got = attend_cache(
        cache, case.mechanism, query, key, value, (visible[:, 0], visible[:, 1]),
        scale, **extra, bf16x2=case.bf16x2,
        interpret=plgpu.InterpretGPUParams(detect_races=races),
    )  # fmt: skip
    with jax.enable_x64(True):
        names = {"scale": scale, **extra}
        names = {n: jnp.asarray(np.asarray(a, np.float64))[:, None] for n, a in names.items()}
        arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in (key, value)]
        out, stats = FUNCTIONS[case.mechanism](
            query=jnp.asarray(np.asarray(query, np.float64))[:, None],
            key=arrays[0], value=arrays[1], **names, is_causal=False,
            mask=jnp.asarray(mask)[:, None, None], implementation="reference", return_stats=True,
        )  # fmt: skip
        exact, lse = np.asarray(out)[:, 0], np.asarray(stats.lse)[:, 0]
    actual, found = np.asarray(got.out, np.float64), np.asarray(got.log_sum_exp, np.float64)
    seen = np.isfinite(lse)
    assert (np.isfinite(found) == seen).all()
    assert not actual[~seen].any()
    return {
        "error": relative_error(actual, exact),
        "log_sum_exp": float(np.abs(found[seen] - lse[seen]).max()),
        "iterations": float(np.asarray(got.iterations).max()),
        "kernels": len(states),
        "races": sum(bool(state.races_found) for state in states),
    }


def run_step(gradient: bool) -> dict:
    """One step of sequences of different lengths, with a window and a padding row."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    import lla
    from lla.ops import BACKENDS, Backend, Decoder
    from lla.ops.mosaic_gpu import decode, hopper

    interpret = plgpu.InterpretGPUParams()
    served = []
    whole = hopper.attend

    def step_kernels(problem, with_stats):
        served.append("step")
        return decode.attend(problem, with_stats, interpret=interpret)

    def whole_kernels(problem, with_stats=True, **options):
        served.append("whole")
        return whole(problem, with_stats, **{**options, "interpret": interpret})

    hopper.attend = whole_kernels  # which the gradient of a step takes, too
    decoder = Decoder(decode.unsupported, step_kernels)
    BACKENDS["mosaic_gpu"] = Backend("mosaic_gpu", hopper.unsupported_shape, whole_kernels, decoder)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    lengths = jnp.asarray([0, 3, 70, 99], jnp.int32)
    cache = lla.KVCache(normal(4, 100, 1, 64), normal(4, 100, 1, 64), lengths)
    query, key, value = normal(4, 1, 2, 64), normal(4, 1, 1, 64), normal(4, 1, 1, 64)
    ridge = jnp.asarray([[[0.1, 0.5]]] * 4, jnp.float32)
    options = dict(
        local_window_size=40, new_lengths=jnp.asarray([1, 0, 1, 1]), return_stats=True,
        scale=0.1,
    )  # fmt: skip

    def step(query, ridge, implementation):
        return lla.decode_step(
            query, key, value, cache, ridge=ridge, implementation=implementation, **options
        )

    if gradient:

        def loss(query, ridge, implementation):
            return step(query, ridge, implementation)[0].astype(jnp.float32).sum()

        def gradients(implementation):
            return jax.grad(loss, (0, 1))(query, ridge, implementation)

        usual = gradients("mosaic_gpu")
        # With few rows, errors within the tolerance do not average out in the ridge's gradient.
        options["solver"] = lla.Solver(tol=1e-4, backward_tol=1e-4)
        tight, exact = gradients("mosaic_gpu"), gradients("xla")
        return {
            "usual": [relative_error(*pair) for pair in zip(usual, exact, strict=True)],
            "tight": [relative_error(*pair) for pair in zip(tight, exact, strict=True)],
            "served": served,
        }
    (out, grown, stats), (exact, _, wanted) = (
        step(query, ridge, name) for name in ("mosaic_gpu", "xla")
    )
    assert not np.asarray(out, np.float32)[1].any() and grown.lengths.tolist() == [1, 3, 71, 100]
    # A single ridge takes another path than an array.
    alike = relative_error(*(step(query, 0.3, name)[0] for name in ("mosaic_gpu", "xla")))
    some = np.isfinite(np.asarray(wanted.lse))
    assert (np.isfinite(np.asarray(stats.lse)) == some).all()
    bad, *_ = jax.jit(lambda ridge: step(query, ridge, "mosaic_gpu"))(-ridge)
    assert np.isnan(np.asarray(bad, np.float32)[[0, 2, 3]]).all()
    return {
        "error": max(relative_error(out, exact), alike),
        "log_sum_exp": relative_error(stats.lse[some], wanted.lse[some]),
        "iterations": int(stats.iterations.max()),
        "residual": float(stats.residual.max()),
        "served": served,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=[*CASES, "step", "step_gradient"])
    parser.add_argument("--races", action="store_true", help="with the race detector")
    given = parser.parse_args()
    if given.case in CASES:
        print(json.dumps(run(CASES[given.case], given.races)))
    else:
        print(json.dumps(run_step(given.case == "step_gradient")))
