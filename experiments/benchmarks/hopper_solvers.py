"""The two solvers of the Hopper kernels; see pages/hopper_solvers.md.

    python experiments/benchmarks/hopper_solvers.py [--limit SECONDS] [--output FILE]

Conjugate gradients against the direct solver, which exists for up to 32 dimensions: error against
the exact result in float64, iterations and time, for all kinds of inputs and ridges. What is wrong
is not timed. ``Solver(method="auto")`` takes its thresholds from the committed results.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.experiments.benchmarks import hopper
from lla.experiments.benchmarks.compilation import compile_all
from lla.experiments.benchmarks.formatting import (
    PASSES,
    break_even,
    cell_text,
    progress_line,
    provenance,
)
from lla.experiments.benchmarks.hopper_programs import (
    HOSTILE,
    Case,
    Program,
    make_inputs,
    on_device,
)
from lla.experiments.benchmarks.results import add_options, open_results
from lla.experiments.benchmarks.timing import GRACE, device_lock, exit_after, log, time_interleaved
from lla.runs import tables

METHODS = {"cg": "conjugate gradients", "direct": "direct"}
KEY_FIELDS = ("method", "pass", "head_dim", "ridge", "inputs", "n")
KINDS = ("normal", *HOSTILE)
BOTH = "forward_backward"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--implementation", default="mosaic_gpu", choices=("mosaic_gpu", "xla"))
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--head_dims", type=int, nargs="+", default=[16, 32])
    add("--ridges", type=float, nargs="+", default=[10.0, 1.0, 0.1, 0.01, 0.001])
    add("--inputs", nargs="+", choices=KINDS, default=list(KINDS))
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=4096, help="of what is timed")
    add("--accuracy_length", type=int, default=1024)
    add_options(parser, "seed limit lock commit output", repeats=5, budget=0.5, workers=8)
    return parser.parse_args(argv)


def program(options, which: str, head_dim: int, ridge: float, *, small: bool) -> Program:
    """The program of a pass: a small one to be compared with exact results, or one to be timed."""
    sizes = (options.batch, options.heads, options.heads, options.length)
    if small:
        sizes = (1, 2, 1, options.accuracy_length)
    return Program(
        options.implementation, "lla", which, *sizes, head_dim, ridge, "static", options.dtype
    )


def compile_methods(options, head_dim: int, deadline: float) -> dict:
    """Compiled programs by method and program. The methods compile at the same time."""

    def compile_method(method):
        wanted = []
        for ridge in options.ridges:
            small = program(options, BOTH, head_dim, ridge, small=True)
            large = [program(options, which, head_dim, ridge, small=False) for which in PASSES]
            wanted += [*([small.truth()] if method == "cg" else []), small, *large]
        workers = max(1, options.workers // len(METHODS))
        solver = lla.Solver(method=method)
        compiled = compile_all(
            wanted, lambda program: hopper.compile_program(program, solver), workers, deadline
        )
        return {(method, case): result for case, result in compiled.items()}

    with concurrent.futures.ThreadPoolExecutor(len(METHODS)) as pool:
        return {k: v for found in pool.map(compile_method, METHODS) for k, v in found.items()}


def compare(options, compiled: Mapping, head_dim: int, ridge: float, kind: str) -> dict:
    """Method -> errors, bounds and status."""
    small = program(options, BOTH, head_dim, ridge, small=True)
    accuracy = Case("accuracy", kind, small)
    arrays = make_inputs(small, kind, options.seed)
    truths = {p: result for (_, p), result in compiled.items() if p.implementation == "reference"}
    want = hopper.exact(small, arrays, truths)
    fields = {}
    for method in METHODS:
        found = compiled.get((method, small))
        if found is None or found.call is None:
            reason = "the time ran out" if found is None else found.error
            fields[method] = {"status": "unavailable", "reason": reason}
            continue
        got = jax.tree.map(np.asarray, found.call(on_device(small, arrays)))
        iterations = float(got.pop("iterations"))
        verdict = hopper.verdict(accuracy, got, want)
        verdict["truth"] += f", n = {small.n}"
        fields[method] = {**verdict, "accuracy_iterations": iterations}
    return fields


def run(options, compiled: Mapping, results, head_dim: int, ridge: float, kind: str) -> None:
    """Compares and times both methods and passes."""
    known = compare(options, compiled, head_dim, ridge, kind)
    large = program(options, BOTH, head_dim, ridge, small=False)
    inputs = on_device(large, make_inputs(large, kind, options.seed))
    records, calls = {}, {}
    for method in METHODS:
        for which in PASSES:
            case = program(options, which, head_dim, ridge, small=False)
            record = records[method, which] = {
                "implementation": case.implementation, "method": method, "pass": which,
                "head_dim": head_dim, "ridge": ridge, "inputs": kind, "n": case.n,
                "batch": case.batch, "heads": case.heads,
                **known[method],
            }  # fmt: skip
            found = compiled.get((method, case))
            if record["status"] != "timed":
                continue
            if found is None or found.call is None:
                reason = "the time ran out" if found is None else found.error
                record |= {"status": "unavailable", "reason": reason}
                continue
            record |= found.memory
            needed = {name: a for name, a in inputs.items() if name != "cotangent"}
            given = inputs if which == BOTH else needed
            out = jax.block_until_ready(found.call(given))
            if "iterations" in out:
                record["mean_iterations"] = float(out["iterations"])
            if not all(bool(jnp.isfinite(array).all()) for array in out.values()):
                record |= {"status": "refused", "reason": "a result is not finite"}
                continue
            calls[method, which] = functools.partial(found.call, given)
    timings = time_interleaved(calls, options.repeats, options.budget)
    for key, timing in timings.items():
        records[key].update(dataclasses.asdict(timing))
    results.add(list(records.values()))
    for record in records.values():
        where = [str(record[name]) for name in KEY_FIELDS]
        log(f"{' '.join(where)}{progress_line(record)}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    unsaid = {"head_dims", "ridges", "inputs", "output", "commit", "limit", "workers", "lock"}
    settings = [name for name in vars(options) if name not in unsaid]
    results = open_results("hopper_solvers", options, settings, KEY_FIELDS)
    start = time.monotonic()
    compiled = {}
    for head_dim in options.head_dims:
        compiled |= compile_methods(options, head_dim, start + 0.7 * options.limit)
    with device_lock(options.lock):
        for head_dim in options.head_dims:
            for ridge in options.ridges:
                for kind in options.inputs:
                    if time.monotonic() - start < options.limit:
                        run(options, compiled, results, head_dim, ridge, kind)
    print(markdown(results.document()), flush=True)
    return int(any(record["status"] == "refused" for record in results.records))


# ---------------------------------------------------------------------------------------------
# Tables


def crossing(
    records, head_dim: int, which: str = "forward_backward", kind: str | None = None
) -> dict[str, Any]:
    """`break_even` of the kernels' solvers, and the "ridges" that it is based on.

    Without a `kind` of inputs the geometric means over all kinds are compared, at the ridges at
    which both solvers were timed on every kind.
    """
    times: dict[str, dict[float, dict[str, float]]] = {method: {} for method in METHODS}
    kinds = {kind} if kind else {record["inputs"] for record in records}
    for record in records:
        if (record["head_dim"], record["pass"]) != (head_dim, which):
            continue
        if record["inputs"] in kinds and record["status"] == "timed":
            found = times[record["method"]].setdefault(record["ridge"], {})
            found[record["inputs"]] = record["time_median_s"]

    direct, cg = (
        {
            ridge: statistics.geometric_mean(found.values())
            for ridge, found in times[method].items()
            if set(found) == kinds
        }
        for method in ("direct", "cg")
    )
    return {**break_even(direct, cg), "ridges": sorted(set(direct) & set(cg))}


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    records = document["records"]
    dims = sorted({record["head_dim"] for record in records})
    kinds = list(dict.fromkeys(record["inputs"] for record in records))
    rows = []
    for head_dim in dims:
        for kind in (None, *kinds):
            found = [crossing(records, head_dim, which, kind) for which in PASSES]
            name = kind or "all, geometric mean"
            rows.append([str(head_dim), name, *map(_crossing_text, found)])
    parts = [
        provenance(document),
        "Largest ridge at which, and below which, the direct solver is faster (the crossing, "
        "interpolated), of those at which both were timed [smallest].\n\n"
        + tables.markdown(["d", "inputs", *PASSES.values()], rows),
    ]
    cells = {(r["method"], r["pass"], r["head_dim"], r["ridge"], r["inputs"]): r for r in records}
    for kind in kinds:
        rows = []
        systems = {(r["head_dim"], r["ridge"]) for r in records if r["inputs"] == kind}
        for head_dim, ridge in sorted(systems, key=lambda system: (system[0], -system[1])):
            row = [str(head_dim), f"{ridge:g}"]
            for method in METHODS:
                case = (head_dim, ridge, kind)
                pair = [cells.get((method, which, *case)) for which in PASSES]
                counts = [r["mean_iterations"] for r in pair if r and "mean_iterations" in r]
                row += [f"{counts[0]:.1f}" if counts else "", *map(cell_text, pair)]
            rows.append(row)
        head = ["d", "ridge"]
        for name in METHODS.values():
            head += [f"{name}: iterations", *PASSES.values()]
        parts.append(f"**{kind}**\n\n" + tables.markdown(head, rows))
    legend = (
        "Mean forward iterations; median (fastest) ms; relative error of the output, or of the "
        "worst gradient, at the accuracy length."
    )
    return "\n\n".join([*parts[:2], legend, *parts[2:]])


def _crossing_text(found: Mapping[str, Any]) -> str:
    if not found["ridges"]:
        return ""
    text = "never" if found["measured"] is None else f"{found['measured']:g}"
    if found["estimate"] is not None:
        text += f" ({found['estimate']:.2g})"
    return f"{text} [{found['ridges'][0]:g}]"


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    exit_after(parse(None).limit + GRACE)
    sys.exit(main())
