"""The two solvers of the Hopper kernels; see README.md beside this file.

    python experiments/benchmarks/hopper_solvers.py [--limit SECONDS] [--output FILE]

Conjugate gradients against the direct solver, which exists up to 32 dimensions: error against the
exact result in float64, iterations and time, for all kinds of inputs and ridges. Only what is right
is timed. ``Solver(method="auto")`` takes its thresholds from the committed results.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import hopper
import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
import solvers_tables
from hopper_cells import HOSTILE, Cell, Program, make_inputs, on_device

import lla

METHODS = ("cg", "direct")
KEY_FIELDS = ("method", "pass", "head_dim", "ridge", "inputs", "n")
KINDS = ("normal", *HOSTILE)
PASSES = ("forward", "forward_backward")


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
    add("--repeats", type=int, default=5)
    add("--budget", type=float, default=0.5, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=8, help="threads that compile")
    add("--limit", type=float, default=1e9, help="seconds after which it stops with what it has")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/hopper_solvers_<device>.json")
    return parser.parse_args(argv)


def program(options, which: str, head_dim: int, ridge: float, *, small: bool) -> Program:
    """What is compiled for one pass, either to be compared or to be timed."""
    sizes = (options.batch, options.heads, options.heads, options.length)
    if small:
        sizes = (1, 2, 1, options.accuracy_length)
    return Program(
        options.implementation, "lla", which, *sizes, head_dim, ridge, "static", options.dtype
    )


def compile_all(options, head_dim: int, deadline: float) -> dict:
    """By method, program; both methods at the same time, so that neither takes it all."""

    def compile_method(method):
        wanted = []
        for ridge in options.ridges:
            small = program(options, PASSES[1], head_dim, ridge, small=True)
            large = [program(options, which, head_dim, ridge, small=False) for which in PASSES]
            wanted += [*([small.truth()] if method == METHODS[0] else []), small, *large]
        workers = max(1, options.workers // len(METHODS))
        compiled = hopper.compile_all(wanted, workers, deadline, lla.Solver(method=method))
        return {(method, case): result for case, result in compiled.items()}

    with concurrent.futures.ThreadPoolExecutor(len(METHODS)) as pool:
        return {k: v for found in pool.map(compile_method, METHODS) for k, v in found.items()}


def compare(options, compiled: Mapping, head_dim: int, ridge: float, kind: str) -> dict:
    """Method to the fields that say how right it is."""
    small = program(options, PASSES[1], head_dim, ridge, small=True)
    cell = Cell("accuracy", kind, small)
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
        verdict = hopper.verdict(cell, got, want)
        verdict["truth"] += f", n = {small.n}"
        fields[method] = {**verdict, "accuracy_iterations": iterations}
    return fields


def run(options, compiled: Mapping, results, head_dim: int, ridge: float, kind: str) -> None:
    """Compares and times both methods and passes."""
    known = compare(options, compiled, head_dim, ridge, kind)
    large = program(options, PASSES[1], head_dim, ridge, small=False)
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
            given = inputs if which == PASSES[1] else needed
            out = jax.block_until_ready(found.call(given))
            if "iterations" in out:
                record["mean_iterations"] = float(out["iterations"])
            if not all(bool(jnp.isfinite(array).all()) for array in out.values()):
                record |= {"status": "refused", "reason": "a result is not finite"}
                continue
            calls[method, which] = functools.partial(found.call, given)
    timings = measure.time_interleaved(calls, options.repeats, options.budget)
    for key, timing in timings.items():
        records[key].update(dataclasses.asdict(timing))
    results.add(list(records.values()))
    for record in records.values():
        where = [str(record[name]) for name in KEY_FIELDS]
        hopper.say(f"{' '.join(where)}{report.progress_line(record, ())}")


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    unsaid = ("head_dims", "ridges", "inputs", "output", "commit", "limit", "workers", "lock")
    settings = {name: value for name, value in vars(options).items() if name not in unsaid}
    header = measure.make_header("hopper_solvers", settings)
    return {**header, "commit": options.commit or header["commit"]}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output or measure.RESULTS / f"hopper_solvers_{measure.device_name()}.json"
    results = measure.Results(output, make_header(options), KEY_FIELDS)
    start = time.monotonic()
    compiled = {}
    for head_dim in options.head_dims:
        compiled |= compile_all(options, head_dim, start + 0.7 * options.limit)
    with measure.exclusive(options.lock):
        for head_dim in options.head_dims:
            for ridge in options.ridges:
                for kind in options.inputs:
                    if time.monotonic() - start < options.limit:
                        run(options, compiled, results, head_dim, ridge, kind)
    print(solvers_tables.markdown(results.document()), flush=True)
    return int(any(record["status"] == "refused" for record in results.records))


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    hopper.end_at_the_limit(parse(None).limit + 8.0)
    sys.exit(main())
