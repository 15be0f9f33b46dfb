"""Conjugate gradients against the direct solver; see pages/solver_choice.md.

    python experiments/benchmarks/solver_choice.py [--length N] [--output FILE]

Time of both solvers over head dimension, ridge and dtype at default tolerances, on standard normal
data. ``Solver(method="auto")`` takes its thresholds from the committed results.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import os
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

import lla
from lla.experiments.benchmarks import truth
from lla.experiments.benchmarks.formatting import (
    LABELS,
    PASSES,
    break_even,
    cell_text,
    progress_line,
    provenance,
)
from lla.experiments.benchmarks.results import Results, add_options, open_results
from lla.experiments.benchmarks.timing import device_lock
from lla.runs import tables

SOLVERS = {"xla_cg": "cg", "xla_direct": "direct"}
TITLES = {**SOLVERS, "mosaic_gpu": "kernel (cg)"}
KERNEL = "mosaic_gpu"  # by conjugate gradients; measured if it can serve
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
    add_options(parser, "seed output lock commit resume", repeats=7, budget=10.0, workers=4)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    name = f"solver_choice_{jax.default_backend()}"
    settings = ("length", "batch", "heads", "repeats", "budget", "seed")
    results = open_results("solver_choice", options, settings, KEY_FIELDS, name=name)
    for head_dim in options.head_dims:
        for dtype in options.dtypes:
            inputs = truth.normal_inputs(
                options.batch, options.length, options.heads, head_dim, dtype, options.seed
            )
            run_solvers(options, results, inputs)
            run_softmax(options, results, inputs)
    print(markdown(results.document()))
    refused = [record for record in results.records if record["status"] == "refused"]
    for record in refused:
        where = ", ".join(f"{name}={record[name]}" for name in KEY_FIELDS)
        print(f"not timed: {where}: {record['reason']}", file=sys.stderr)
    # No decision depends on the accuracy of somebody else's softmax attention.
    return (
        1 if any(truth.IMPLEMENTATIONS[record["implementation"]].ours for record in refused) else 0
    )


def run_solvers(options, results: Results, inputs) -> None:
    """Measures both solvers and passes; the ridge is an argument of the compiled calls."""
    names = [*SOLVERS, KERNEL] if _kernel_serves(inputs) else list(SOLVERS)
    todo = {ridge: _cells(results, inputs, names, ridge) for ridge in options.ridges}
    if not any(todo.values()):
        return
    ridges = [ridge for ridge, cells in todo.items() if cells]
    given = {ridge: truth.with_ridge(inputs, ridge) for ridge in ridges}
    example = given[ridges[0]]
    count = jax.jit(_count, static_argnames="name")

    def count_all(name):
        arrays = ([given[r][key] for key in ("query", "key", "value", "ridge")] for r in ridges)
        return [float(count(*each, name=name)) for each in arrays]

    with concurrent.futures.ThreadPoolExecutor(options.workers) as executor:
        calls = {
            (which, name): executor.submit(
                truth.compile_call, truth.IMPLEMENTATIONS[name], which, example
            )
            for which in truth.PASSES
            for name in names
        }
        counts = dict(zip(names, executor.map(count_all, names), strict=True))
        truths = {ridge: {"lla": truth.exact("lla", given[ridge])} for ridge in ridges}
        compiled = {key: call.result() for key, call in calls.items()}
    with device_lock(options.lock):
        for ridge in ridges:
            for which in truth.PASSES:
                chosen = {
                    name: {**cell, "mean_iterations": counts[name][ridges.index(ridge)]}
                    for (w, name), cell in todo[ridge].items()
                    if w == which
                }
                records = truth.measure_group(
                    chosen, truth.IMPLEMENTATIONS, given[ridge], truths[ridge],
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
    return truth.mean_iterations(query, key, value, ridge, method, implementation)


def run_softmax(options, results: Results, inputs) -> None:
    """Measures softmax attention on the same tensors; on a GPU in 16 bits also cuDNN's."""
    names = ["xla_softmax", "jax_softmax"]
    if jax.default_backend() == "gpu" and inputs["query"].dtype == jnp.bfloat16:
        names.append("jax_softmax_cudnn")
    cells = _cells(results, inputs, names, None)
    if not cells:
        return
    inputs = truth.with_ridge(inputs, 1.0)
    truths = {"softmax": truth.exact("softmax", inputs)}
    for which in truth.PASSES:
        chosen, compiled, records = {}, {}, []
        for (w, name), cell in cells.items():
            if w != which:
                continue
            try:
                compiled[name] = truth.compile_call(truth.IMPLEMENTATIONS[name], which, inputs)
                chosen[name] = cell
            except (ValueError, RuntimeError, NotImplementedError) as error:
                if truth.IMPLEMENTATIONS[name].ours:
                    raise
                reason = str(error).splitlines()[0][:200]
                records.append({**cell, "status": "unavailable", "reason": reason})
        with device_lock(options.lock):
            records += truth.measure_group(
                chosen, truth.IMPLEMENTATIONS, inputs, truths, compiled,
                ridge=1.0, repeats=options.repeats, budget=options.budget,
            )  # fmt: skip
        _add(results, records)


def _cells(results, inputs, names, ridge: float | None) -> dict[tuple[str, str], dict]:
    """The fields of the missing records, by pass and implementation."""
    cells = {}
    for which in truth.PASSES:
        for name in names:
            cell = {
                "implementation": name,
                "pass": which,
                "n": inputs["query"].shape[1],
                "head_dim": inputs["query"].shape[-1],
                "dtype": inputs["query"].dtype.name,
                "ridge": ridge,
            }
            if not results.has(cell):
                cells[which, name] = cell
    return cells


def _add(results: Results, records: list[dict]) -> None:
    busy = round(os.getloadavg()[0], 2)
    results.add([{**record, "load_average": busy} for record in records])
    for record in records:
        print(progress_line(record, KEY_FIELDS), file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Tables


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    records = document["records"]
    parts = [provenance(document), _break_even_table(records)]
    fields = ("dtype", "head_dim", "ridge", "implementation", "pass")
    cells = {tuple(record[name] for name in fields): record for record in records}
    systems = sorted(
        {(r["dtype"], r["head_dim"], r["ridge"]) for r in records if r["ridge"] is not None},
        key=lambda system: (system[0], system[1], -system[2]),
    )
    for dtype in sorted({record["dtype"] for record in records}, reverse=True):
        rows = []
        measured = {r["implementation"] for r in records if r["dtype"] == dtype}
        solvers = [name for name in TITLES if name in measured]
        for system in systems:
            if system[0] != dtype:
                continue
            row = [str(system[1]), f"{system[2]:g}"]
            for name in solvers:
                pair = [cells.get((*system, name, which)) for which in PASSES]
                count = next((f"{r['mean_iterations']:.1f}" for r in pair if r), "")
                row += [count, *map(cell_text, pair)]
            rows.append(row)
        head = ["d", "ridge"]
        for name in solvers:
            head += [f"{TITLES[name]}: iterations", "forward", "forward + backward"]
        parts.append(
            f"**{dtype}**: mean forward iterations; median (fastest) ms; relative error of the "
            "output, or of the worst gradient.\n\n" + tables.markdown(head, rows)
        )
    floor = [record for record in records if record["ridge"] is None]
    if floor:
        keys = sorted({(r["dtype"], r["head_dim"], r["implementation"]) for r in floor})
        rows = [
            [
                d,
                str(h),
                LABELS[name][0],
                *(cell_text(cells.get((d, h, None, name, w))) for w in PASSES),
            ]
            for d, h, name in sorted(keys, key=lambda key: (key[0] != "float32", *key[1:]))
        ]
        parts.append(
            "Softmax attention on the same tensors.\n\n"
            + tables.markdown(["dtype", "d", "implementation", *PASSES.values()], rows)
        )
    return "\n\n".join(parts)


def _break_even_table(records) -> str:
    rows = []
    systems = {
        (r["head_dim"], r["dtype"], r["implementation"])
        for r in records
        if r["ridge"] is not None and r["implementation"] != "xla_direct"
    }
    for head_dim, dtype, name in sorted(systems, key=lambda s: (s[1] != "float32", s[2], *s[:2])):
        row = [dtype, str(head_dim), TITLES[name]]
        for which in PASSES:
            found = measured_break_even(records, which, head_dim, dtype, name)
            if found["range"] is None:
                text = "not measured"
            elif found["measured"] is None:
                text = f"never (down to {found['range'][0]:g})"
            elif found["estimate"] is None:
                text = f"always (up to {found['range'][1]:g})"
            else:
                text = f"<= {found['measured']:g}, crossing near {found['estimate']:.2g}"
            row.append(text)
        rows.append(row)
    return "Ridge below which the direct solver is faster.\n\n" + tables.markdown(
        ["dtype", "d", "than", *PASSES.values()], rows
    )


def times_by_ridge(records, name: str, which: str, head_dim: int, dtype: str) -> dict[float, float]:
    """Median seconds by ridge; infinite where the record was refused."""
    wanted = (name, which, head_dim, dtype)
    return {
        record["ridge"]: record.get("time_median_s", math.inf)
        for record in records
        if (record["implementation"], record["pass"], record["head_dim"], record["dtype"]) == wanted
    }


def measured_break_even(
    records, which: str, head_dim: int, dtype: str, iterative: str = "xla_cg"
) -> dict:
    """`break_even` over the ridges at which both solvers were timed, and their "range"."""
    cg, direct = (
        times_by_ridge(records, name, which, head_dim, dtype) for name in (iterative, "xla_direct")
    )
    both = {r for r in set(cg) & set(direct) if math.isfinite(cg[r] + direct[r])}
    found = break_even({r: direct[r] for r in both}, {r: cg[r] for r in both})
    return {**found, "range": (min(both), max(both)) if both else None}


if __name__ == "__main__":
    sys.exit(main())
