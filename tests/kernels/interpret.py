"""Runs one case of the attention kernels for Hopper in the GPU interpreter.

    python -m tests.kernels.interpret CASE [--races] [--capability 8.0]

Prints one line of JSON: relative errors of the output and of every gradient against the exact
reference in float64, whether everything is finite, and (with ``--races``) the number of kernels
with a race. A missing barrier arrival blocks the interpreter forever, so the caller has to set a
time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
from typing import Any

# The interpreter's threads wait for each other inside callbacks. XLA's thread pool, by default with
# one thread per core, needs enough threads to run the products of the others meanwhile.
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
if "direct" in str(sys.argv[1:]):  # these spend most of their time compiling
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np

import lla
from tests.ops.harness import relative_error

DIVIDED_MEMBERS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call.

    Keys and values beyond the sequence lengths are NaN.

    Attributes:
      ridge: None and "mixed" pass a traced array. None is all ones; "mixed" has tiles with small
        and with large ridges, also within one program instance.
      faint: whether the cotangent decreases from row to row, to where its square underflows.
      warpgroups: consumers of a program instance that owns queries. No number of queries below is a
        multiple of the rows of three.
      sum_products, pingpong: see `lla.kernels.mosaic_gpu.launch.Config`.
      offset: all keys share an offset of this size per coordinate. Products then truncate their
        sums as tensor cores do.
      clusters: if positive, queries and keys lie near so many points. A few keys then explain
        nearly all of the cotangents, and probes differ much in length.
      direct: whether to use the direct solver.
      single: whether the direct solver processes one sequence at a time.
      nan_from: keys and values from here on are NaN, and only rows before are compared.
      options: further arguments of the operator.
    """

    mechanism: str
    queries: int = 128
    keys: int = 128
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "bfloat16"
    ridge: float | str | None = None
    faint: bool = False
    warpgroups: int = 2
    sum_products: bool = False
    pingpong: bool = False
    offset: float = 0.0
    clusters: int = 0
    direct: bool = False
    single: bool = False
    nan_from: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "softmax_causal": Case("softmax"),
    "softmax_window": Case("softmax", 200, 200, options={"local_window_size": (40, 0)}),
    "softmax_float16": Case("softmax", dtype="float16"),
    "parallax_odd": Case(
        "parallax", 70, 150, batch=2, kv_heads=2, head_dim=32, value_dim=48,
        options={"query_offset": [80, 3]},
    ),
    "parallax_segments": Case("parallax", options={"segments": True}),
    "lla_causal": Case("lla"),
    "lla_odd": Case(
        "lla", 70, 150, batch=2, kv_heads=2, head_dim=32, value_dim=48, ridge="mixed",
        options={"query_offset": [80, 3]},
    ),
    "lla_window": Case("lla", 200, 200, options={"local_window_size": (40, 0)}),
    "lla_two_sided_window": Case(
        "lla", 200, 200, options={"local_window_size": (30, 20), "is_causal": False}
    ),
    "lla_lengths": Case(
        "lla", batch=3, options={"key_value_seq_lengths": [128, 70, 0], "is_causal": False}
    ),
    "lla_segments": Case("lla", options={"segments": True}),
    "lla_head_dim_128": Case("lla", head_dim=128, value_dim=128),
    "softmax_sum_products": Case("softmax", 200, 200, sum_products=True),
    "lla_sum_products": Case("lla", 200, 200, ridge="mixed", sum_products=True),
    "lla_pingpong": Case("lla", 200, 200, ridge="mixed", pingpong=True),
    "lla_pingpong_three_warpgroups": Case(
        "lla", 200, 200, ridge=10.0, warpgroups=3, pingpong=True, sum_products=True
    ),
    "lla_sum_products_128": Case("lla", head_dim=128, value_dim=128, ridge=10.0, sum_products=True),
    "lla_offset_sum_products": Case("lla", ridge=10.0, offset=4.0, sum_products=True),
    "lla_head_dim_32": Case("lla", 200, 200, head_dim=32, value_dim=24, ridge="mixed"),
    "lla_head_dim_32_precise": Case("lla", head_dim=32, value_dim=32, ridge=0.1),
    "lla_faint": Case("lla", faint=True),
    "softmax_three_warpgroups": Case("softmax", 200, 200, warpgroups=3),
    "lla_three_warpgroups": Case("lla", 200, 200, ridge="mixed", warpgroups=3),
    "lla_offset": Case("lla", ridge=0.01, offset=4.0),
    "lla_clustered": Case("lla", ridge=0.01, clusters=8),
    "lla_direct": Case("lla", 200, 200, head_dim=32, value_dim=24, ridge=0.01, direct=True),
    "lla_direct_float16": Case(
        "lla", head_dim=8, value_dim=16, dtype="float16", ridge=0.1, direct=True
    ),
    "lla_direct_16": Case("lla", head_dim=16, value_dim=16, ridge="mixed", direct=True),
    "lla_direct_odd": Case(
        "lla", 70, 150, batch=2, kv_heads=2, head_dim=20, value_dim=32, ridge=0.1, direct=True,
        options={"query_offset": [80, 3]},
    ),
    "lla_direct_clustered": Case(
        "lla", head_dim=32, value_dim=32, ridge=0.01, clusters=8, direct=True
    ),
    "lla_direct_offset": Case(
        "lla", head_dim=32, value_dim=32, ridge=0.01, offset=4.0, direct=True
    ),
    "lla_direct_lengths": Case(
        "lla", batch=3, head_dim=32, value_dim=32, direct=True, single=True,
        options={"key_value_seq_lengths": [128, 70, 0], "is_causal": False},
    ),
    "lla_causal_nan": Case("lla", nan_from=100),
    "parallax_causal_nan": Case("parallax", nan_from=70),
    "softmax_causal_nan": Case("softmax", nan_from=70),
    "lla_ridge_10": Case("lla", ridge=10.0),
    "lla_ridge_0.1": Case("lla", ridge=0.1),
    "lla_ridge_0.01": Case("lla", ridge=0.01),
}  # fmt: skip

_CACHE = {"query_offset": [149, 60], "key_value_seq_lengths": [150, 61]}

PORTABLE_CASES = {
    "softmax_head_dim_256": Case("softmax", head_dim=256, value_dim=200),
    "lla_head_dim_256": Case("lla", head_dim=256, value_dim=256, ridge=10.0),
    "lla_one_token": Case(
        "lla", 1, 150, batch=2, heads=8, kv_heads=2, ridge=10.0, options=dict(_CACHE)
    ),
    "parallax_one_token": Case(
        "parallax", 1, 150, batch=2, heads=8, kv_heads=2, options=dict(_CACHE)
    ),
}  # fmt: skip
"""Those that only the portable kernels serve, or serve in a way of their own."""


def record_race_detectors() -> list:
    """A list to which every kernel from now on adds its race detector; JAX keeps only the last.

    The detector assumes that any two members of a union overlap. But of the first two members of
    the unions in the kernels (`wide` and `pair`) each warpgroup uses its own slice, at the same
    bytes in both. Accesses to these two are therefore only checked against those of the same
    warpgroup.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    states, original, lock = [], gpu_callbacks.GPURaceDetectionState, threading.Lock()

    class Detector(original):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            states.append(self)

        def _check_ref_union(self, thread, clock, buffer_key, is_write, source_info):
            membership = self.ref_union_members.get(buffer_key)
            if membership is None or membership[1] >= DIVIDED_MEMBERS:
                return super()._check_ref_union(thread, clock, buffer_key, is_write, source_info)
            with lock:
                accesses = self.union_accesses[membership[0]]
                overlapping = [a for a in accesses if a[0] == thread or a[2] >= DIVIDED_MEMBERS]
                self.union_accesses[membership[0]] = list(overlapping)
                try:
                    super()._check_ref_union(thread, clock, buffer_key, is_write, source_info)
                finally:
                    new = self.union_accesses[membership[0]][len(overlapping) :]
                    accesses.extend(new)
                    self.union_accesses[membership[0]] = accesses

    gpu_callbacks.GPURaceDetectionState = Detector
    return states


def truncating_dot(arithmetic, a, b, transposed: bool):
    """A product that adds 16 terms at a time and rounds sums towards zero, as tensor cores do.

    Source: Fasi et al., PeerJ Computer Science 7, e330, 2021.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    del arithmetic
    a, b = a if isinstance(a, jax.Array) else a[...], b[...]
    b = b.T if transposed else b
    total = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
    for first in range(0, a.shape[1], 16):
        part = slice(first, first + 16)
        terms = jnp.dot(a[:, part], b[part], preferred_element_type=jnp.float32)
        new = total + terms
        back = new - total
        lost = (total - (new - back)) + (terms - back)  # the exact rounding error
        beyond = lost * jnp.sign(new) < 0
        total = jnp.where(beyond, jnp.nextafter(new, jnp.zeros_like(new)), new)
    plgpu.commit_smem()
    return total


def copy_without_barriers() -> None:
    """Replaces cp.async, which the interpreter does not know, by copies that are done at once."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from lla.kernels.mosaic_gpu_mma import launch

    def copy(source, tile, barrier):
        assert barrier is None
        tile[...] = source[...]

    launch.copy = copy
    plgpu.wait_gmem_to_smem = lambda _: None


def run(case: Case, races: bool, capability: tuple[int, int] | None = None) -> dict[str, Any]:
    """What the module prints.

    With a `capability`, of the portable kernels as for a card of that compute capability.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from lla.kernels.mosaic_gpu import configs, tile
    from lla.ops import reference
    from lla.ops.mosaic_gpu import hopper, portable
    from lla.ops.problem import make_problem

    rng = np.random.default_rng(0)
    rows = (case.batch, case.queries, case.heads)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(jnp.dtype(case.dtype))

    arrays = {
        "query": normal(*rows, case.head_dim),
        "key": normal(case.batch, case.keys, case.kv_heads, case.head_dim),
        "value": normal(case.batch, case.keys, case.kv_heads, case.value_dim),
        "scale": np.full(rows, case.head_dim**-0.5, np.float32),
    }
    if case.offset:
        offset = case.offset * rng.standard_normal(case.head_dim)
        arrays["key"] = (arrays["key"].astype(np.float32) + offset).astype(arrays["key"].dtype)
        tile.Arithmetic._dot = truncating_dot
    if case.clusters:
        centres = rng.standard_normal((case.clusters, case.head_dim))
        for name in ("query", "key"):
            array = arrays[name].astype(np.float32) * 0.1
            array = array + centres[rng.integers(case.clusters, size=array.shape[:-1])]
            arrays[name] = array.astype(arrays["query"].dtype)
    cotangent = normal(*rows, case.value_dim)
    if case.faint:
        fall = np.logspace(0, -30, case.queries, dtype=np.float32)[:, None, None]
        cotangent = (cotangent.astype(np.float32) * fall).astype(cotangent.dtype)
    if case.mechanism == "parallax":
        arrays["probe"] = (normal(*rows, case.head_dim) / 8).astype(arrays["query"].dtype)
    options = {name: option for name, option in case.options.items() if name != "segments"}
    if "segments" in case.options:
        ids = np.sort(rng.integers(0, 3, rows[:2])).astype(np.int32)
        options["segment_ids"] = (ids, ids)
    for name in ("query_offset", "key_value_seq_lengths"):
        if name in options:
            options[name] = np.asarray(options[name], np.int32)
    if case.direct:
        options["solver"] = lla.Solver("direct")
    if case.single:
        hopper._INVERSE_BYTES = 1
    if case.mechanism == "lla":
        if not isinstance(case.ridge, float):
            arrays["ridge"] = np.ones(rows, np.float32)
            if case.ridge == "mixed":
                arrays["ridge"][:, :64] = 0.1
                arrays["ridge"][..., 0] = 0.1
        else:
            options["ridge"] = case.ridge

    if "key_value_seq_lengths" in options or case.nan_from is not None:
        ends = options.get("key_value_seq_lengths", case.nan_from)
        hidden = np.arange(case.keys)[None] >= np.reshape(ends, (-1, 1))
        for name in ("key", "value"):
            array = np.where(hidden[..., None, None], np.nan, arrays[name])
            arrays[name] = array.astype(arrays[name].dtype)

    def evaluate(implementation, dtype=None):
        def forward(arrays):
            problem = make_problem(case.mechanism, **arrays, **options)
            return problem.restore(implementation(problem)[0])

        given = {n: jnp.asarray(np.asarray(a, dtype or a.dtype)) for n, a in arrays.items()}
        out, pullback = jax.vjp(forward, given)
        (gradients,) = pullback(jnp.asarray(np.asarray(cotangent, dtype or cotangent.dtype)))
        return {"output": out, **gradients}

    widest = min(max(case.head_dim, case.value_dim), configs.HEAD_DIMS[-1])
    chosen = configs.choose(next(d for d in configs.HEAD_DIMS if d >= widest))
    changes = {}
    if case.warpgroups != 2:
        changes = {"warpgroups": case.warpgroups, "registers": (160, 24), "stages": 4}
    for name in ("sum_products", "pingpong"):
        if getattr(case, name):
            changes[name] = True
    owners = ("solve", "solve_bf16x2", "solve_mixed", "attend", "attend_bf16x2")
    if not case.sum_products:
        owners += ("query_gradients",)
    chosen = dataclasses.replace(
        chosen,
        **{name: dataclasses.replace(getattr(chosen, name), **changes) for name in owners},
    )
    parameters = plgpu.InterpretGPUParams(detect_races=races)
    states = record_race_detectors()
    if capability is not None and capability < (9, 0):
        copy_without_barriers()

    def kernels(problem):
        if capability is not None:
            return portable.attend(problem, target=capability, interpret=parameters)
        return hopper.attend(problem, configs=chosen, interpret=parameters)

    actual = evaluate(kernels)
    actual = jax.tree.map(lambda a: np.asarray(a, np.float64), actual)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, evaluate(reference.attend, np.float64))
    if case.nan_from is not None:
        rows = [name for name in exact if name not in ("key", "value")]
        actual, exact = (
            {n: found[n][:, : case.nan_from] for n in rows} for found in (actual, exact)
        )
    errors = {name: relative_error(actual[name], exact[name]) for name in exact}
    finite = all(bool(np.isfinite(a).all()) for a in actual.values())
    found = sum(bool(state.races_found) for state in states)
    return {"errors": errors, "finite": finite, "kernels": len(states), "races": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES | PORTABLE_CASES)
    parser.add_argument("--races", action="store_true", help="with the race detector")
    parser.add_argument("--capability", help="of a card, for the portable kernels")
    given = parser.parse_args()
    target = given.capability and tuple(int(part) for part in given.capability.split("."))
    case = (CASES | PORTABLE_CASES)[given.case]
    print(json.dumps(run(case, given.races, target)))
