"""Conjugate gradients against the direct solver; see README.md beside this file.

    python experiments/benchmarks/solver_choice.py [--length N] [--output FILE]

Time of both solvers over head dimension, ridge and dtype at default tolerances, on standard normal
data. ``Solver(method="auto")`` takes its thresholds from the committed results.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import measure
import report
import subjects
from subjects import SUBJECTS

import lla

SOLVERS = {"xla_cg": "cg", "xla_direct": "direct"}
KERNEL = "mosaic_gpu"  # conjugate gradients, too; measured where it can serve
KEY_FIELDS = ("implementation", "pass", "head_dim", "dtype", "ridge")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--length", type=int, default=1024)
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=4)
    add("--head_dims", type=int, nargs="+", default=[16, 32, 64, 128])
    add("--ridges", type=float, nargs="+", default=[10.0, 1.0, 0.1, 0.01, 0.001])
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add("--repeats", type=int, default=7)
    add("--budget", type=float, default=10.0, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, help="default: results/solver_choice_<platform>.json")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="threads that compile")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--resume", action="store_true", help="keep finished cells, whatever code they measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output
    if output is None:
        output = measure.RESULTS / f"solver_choice_{jax.default_backend()}.json"
    settings = {
        name: getattr(options, name)
        for name in ("length", "batch", "heads", "repeats", "budget", "seed")
    }
    header = measure.make_header("solver_choice", settings)
    header = {**header, "commit": options.commit or header["commit"]}
    results = measure.Results(output, header, KEY_FIELDS, options.resume)
    for head_dim in options.head_dims:
        for dtype in options.dtypes:
            inputs = subjects.normal_inputs(
                options.batch, options.length, options.heads, head_dim, dtype, options.seed
            )
            run_solvers(options, results, inputs)
            run_softmax(options, results, inputs)
    print(report.choice_markdown(results.document()))
    refused = [record for record in results.records if record["status"] == "refused"]
    for record in refused:
        where = ", ".join(f"{name}={record[name]}" for name in KEY_FIELDS)
        print(f"not timed: {where}: {record['reason']}", file=sys.stderr)
    # Softmax attention that is not ours may be what is too inexact: it decides nothing here.
    return 1 if any(SUBJECTS[record["implementation"]].ours for record in refused) else 0


def run_solvers(options, results: measure.Results, inputs) -> None:
    """Both solvers and passes for every ridge, which is an argument of the compiled calls."""
    names = [*SOLVERS, KERNEL] if _kernel_serves(inputs) else list(SOLVERS)
    todo = {ridge: _cells(results, inputs, names, ridge) for ridge in options.ridges}
    if not any(todo.values()):
        return
    ridges = [ridge for ridge, cells in todo.items() if cells]
    given = {ridge: subjects.with_ridge(inputs, ridge) for ridge in ridges}
    example = given[ridges[0]]
    count = jax.jit(_count, static_argnames="name")

    def count_all(name):
        arrays = ([given[r][key] for key in ("query", "key", "value", "ridge")] for r in ridges)
        return [float(count(*each, name=name)) for each in arrays]

    with concurrent.futures.ThreadPoolExecutor(options.workers) as executor:
        calls = {
            (which, name): executor.submit(subjects.compile_call, SUBJECTS[name], which, example)
            for which in subjects.PASSES
            for name in names
        }
        counts = dict(zip(names, executor.map(count_all, names), strict=True))
        truths = {ridge: {"lla": subjects.exact("lla", given[ridge])} for ridge in ridges}
        compiled = {key: call.result() for key, call in calls.items()}
    with measure.exclusive(options.lock):
        for ridge in ridges:
            for which in subjects.PASSES:
                chosen = {
                    name: {**cell, "mean_iterations": counts[name][ridges.index(ridge)]}
                    for (w, name), cell in todo[ridge].items()
                    if w == which
                }
                records = subjects.measure_group(
                    chosen, SUBJECTS, given[ridge], truths[ridge],
                    {name: compiled[which, name] for name in chosen},
                    ridge=ridge, repeats=options.repeats, budget=options.budget,
                )  # fmt: skip
                _add(results, records)


def _kernel_serves(inputs) -> bool:
    arrays = [inputs[name] for name in ("query", "key", "value")]
    return lla.explain(*arrays, implementation=KERNEL)[KERNEL] is None


def _count(query, key, value, ridge, name: str) -> jax.Array:
    implementation = KERNEL if name == KERNEL else "xla"
    method = SOLVERS.get(name, "cg")
    return subjects.mean_iterations(query, key, value, ridge, method, implementation)


def run_softmax(options, results: measure.Results, inputs) -> None:
    """Softmax attention on the same tensors, the floor; on a GPU also by cuDNN in 16 bits."""
    names = ["xla_softmax", "jax_softmax"]
    if jax.default_backend() == "gpu" and inputs["query"].dtype == jnp.bfloat16:
        names.append("jax_softmax_cudnn")
    cells = _cells(results, inputs, names, None)
    if not cells:
        return
    inputs = subjects.with_ridge(inputs, 1.0)
    truths = {"softmax": subjects.exact("softmax", inputs)}
    for which in subjects.PASSES:
        chosen, compiled, records = {}, {}, []
        for (w, name), cell in cells.items():
            if w != which:
                continue
            try:
                compiled[name] = subjects.compile_call(SUBJECTS[name], which, inputs)
                chosen[name] = cell
            except (ValueError, RuntimeError, NotImplementedError) as error:
                if SUBJECTS[name].ours:
                    raise
                reason = str(error).splitlines()[0][:200]
                records.append({**cell, "status": "unavailable", "reason": reason})
        with measure.exclusive(options.lock):
            records += subjects.measure_group(
                chosen, SUBJECTS, inputs, truths, compiled,
                ridge=1.0, repeats=options.repeats, budget=options.budget,
            )  # fmt: skip
        _add(results, records)


def _cells(results, inputs, names, ridge: float | None) -> dict[tuple[str, str], dict]:
    """Unfinished cells by pass and implementation."""
    cells = {}
    for which in subjects.PASSES:
        for name in names:
            cell = {
                "implementation": name,
                "pass": which,
                "n": inputs["query"].shape[1],
                "head_dim": inputs["query"].shape[-1],
                "dtype": inputs["query"].dtype.name,
                "ridge": ridge,
            }
            if not results.finished(**cell):
                cells[which, name] = cell
    return cells


def _add(results: measure.Results, records: list[dict]) -> None:
    load = round(os.getloadavg()[0], 2)
    results.add([{**record, "load_average": load} for record in records])
    for record in records:
        print(report.progress_line(record, KEY_FIELDS), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
