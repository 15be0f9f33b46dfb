"""One decoding case of the Hopper kernels in the GPU interpreter, as a process of its own.

    python tests/kernels/interpret_decode.py CASE [--races]

Prints one line of JSON: errors of the output and of the log-sum-exp against the exact reference in
float64, and (with ``--races``) the number of kernels in which the detector has found a race.
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


@dataclasses.dataclass(frozen=True)
class Case:
    member: str
    visible: tuple[tuple[int, int], ...]
    num_keys: int = 200
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 64
    splits: int = 2
    ridge: float = 0.1
    precise: bool = True


CASES = {
    "softmax": Case("softmax", ((0, 200), (0, 1)), group=2),
    "parallax": Case("parallax", ((70, 190), (0, 0))),
    "lla": Case("lla", ((0, 200), (5, 70), (0, 0), (0, 1))),
    "lla_grouped": Case("lla", ((0, 130),), num_keys=130, kv_heads=2, group=2, splits=3),
    "lla_one_part": Case("lla", ((0, 200),), ridge=10.0, precise=False),
    "lla_head_dim_128": Case("lla", ((3, 170),), head_dim=128, splits=1),
}


def run(case: Case, races: bool) -> dict:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    import lla
    from lla.kernels.mosaic_gpu.decode import Cache
    from lla.kernels.mosaic_gpu.decode_attend import attend_cache

    rng = np.random.default_rng(0)
    b, d = len(case.visible), case.head_dim
    cache = Cache(
        b, case.num_keys, case.kv_heads, case.group, d, jnp.dtype(jnp.bfloat16), case.splits
    )

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(jnp.bfloat16)

    query, probe = normal(b, cache.heads, d), normal(b, cache.heads, d) / 8
    key, value = (normal(b, case.num_keys, case.kv_heads, d) for _ in range(2))
    key = (key.astype(np.float32) + 3).astype(key.dtype)  # a common offset
    visible = np.asarray(case.visible, np.int32)
    rows = (b, cache.heads)
    extra = {}
    if case.member == "parallax":
        extra["probe"] = probe.astype(jnp.bfloat16)
    if case.member == "lla":
        extra["ridge"] = np.full(rows, case.ridge, np.float32)
    states = record_race_detectors()
    got = attend_cache(
        cache, case.member, query, key, value, (visible[:, 0], visible[:, 1]),
        np.full(rows, d**-0.5, np.float32), **extra, precise=case.precise,
        interpret=plgpu.InterpretGPUParams(detect_races=races),
    )  # fmt: skip
    positions = np.arange(case.num_keys)
    mask = (positions >= visible[:, :1]) & (positions < visible[:, 1:])
    function = {
        "lla": lla.local_linear_attention,
        "parallax": lla.parallax_attention,
        "softmax": lla.softmax_attention,
    }[case.member]
    with jax.enable_x64(True):
        names = {n: jnp.asarray(np.asarray(a, np.float64))[:, None] for n, a in extra.items()}
        arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in (key, value)]
        out, stats = function(
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
        "error": float(np.linalg.norm(actual - exact) / np.linalg.norm(exact)),
        "log_sum_exp": float(np.abs(found[seen] - lse[seen]).max()),
        "iterations": float(np.asarray(got.iterations).max()),
        "kernels": len(states),
        "races": sum(bool(state.races_found) for state in states),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--races", action="store_true", help="with the race detector")
    given = parser.parse_args()
    print(json.dumps(run(CASES[given.case], given.races)))
