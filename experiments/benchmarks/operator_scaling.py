"""Time and memory of the operator against the sequence length; see pages/operator_scaling.md.

    python experiments/benchmarks/operator_scaling.py [--max_length N] [--repeats R] [--output FILE]

Before an implementation is timed, it is compared with the exact result in float64. If it is wrong,
it is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lla.experiments.benchmarks import truth
from lla.experiments.benchmarks.formatting import (
    LABELS,
    PASSES,
    cell_text,
    exponents,
    faster_from,
    mebibytes,
    progress_line,
    provenance,
    series,
)
from lla.experiments.benchmarks.results import GIB, Results, add_options, open_results
from lla.runs import figures, styles, tables

CAPTION = "Time and memory against length"
NAMES = ("reference", "xla_cg", "xla_direct", "xla_softmax", "jax_softmax")
SETTINGS = (
    "batch", "heads", "ridge", "repeats", "budget", "memory_limit_gib", "seed", "dtype",
)  # fmt: skip
KEY_FIELDS = ("implementation", "pass", "n", "head_dim")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--min_length", type=int, default=256)
    add("--max_length", type=int, default=8192, help="lengths are min_length times powers of two")
    add("--head_dims", type=int, nargs="+", default=[64])
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=4)
    add("--ridge", type=float, default=1.0)
    add("--implementations", nargs="+", choices=NAMES, default=list(NAMES))
    add_options(parser, "seed output resume", repeats=9, budget=20.0)
    add("--memory_limit_gib", type=float, default=6.0, help="compiled only beyond this, not run")
    options = parser.parse_args(argv)
    options.dtype = "float32"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    name = f"operator_scaling_{jax.default_backend()}"
    results = open_results("operator_scaling", options, SETTINGS, KEY_FIELDS, name=name)
    for head_dim in options.head_dims:
        length = options.min_length
        while length <= options.max_length:
            run_length(options, results, head_dim, length)
            length *= 2
    print(markdown(results.document()))
    refused = [record for record in results.records if record["status"] == "refused"]
    for record in refused:
        where = ", ".join(f"{name}={record[name]}" for name in KEY_FIELDS)
        print(f"not timed: {where}: {record['reason']}", file=sys.stderr)
    return 1 if refused else 0


def run_length(options, results: Results, head_dim: int, length: int) -> None:
    """Measures both passes of all implementations at one length."""
    cells = {}
    for which in truth.PASSES:
        for name in options.implementations:
            cell = {"implementation": name, "pass": which, "n": length, "head_dim": head_dim}
            if not results.has(cell):
                cells[which, name] = cell
    if not cells:
        return
    inputs = truth.with_ridge(
        truth.normal_inputs(
            options.batch, length, options.heads, head_dim, jnp.float32, options.seed
        ),
        options.ridge,
    )
    limit = options.memory_limit_gib * GIB
    compiled, records = {}, []
    for (which, name), cell in cells.items():
        call, memory = truth.compile_call(truth.IMPLEMENTATIONS[name], which, inputs)
        if memory["temp_bytes"] <= limit:
            compiled[which, name] = call, memory
            continue
        reason = f"temporary memory exceeds {options.memory_limit_gib:g} GiB"
        records.append({**cell, **memory, "status": "memory only", "reason": reason})
    mechanisms = {truth.IMPLEMENTATIONS[name].mechanism for _, name in compiled}
    truths = {mechanism: truth.exact(mechanism, inputs) for mechanism in sorted(mechanisms)}
    for which in truth.PASSES:
        chosen = {name: cells[w, name] for w, name in compiled if w == which}
        records += truth.measure_group(
            chosen, truth.IMPLEMENTATIONS, inputs, truths,
            {name: compiled[which, name] for name in chosen},
            ridge=options.ridge, repeats=options.repeats, budget=options.budget,
        )  # fmt: skip
        busy = round(os.getloadavg()[0], 2)
        results.add([{**record, "load_average": busy} for record in records])
        for record in records:
            print(progress_line(record, KEY_FIELDS), file=sys.stderr, flush=True)
        records = []


# ---------------------------------------------------------------------------------------------
# Tables and figure


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    records = document["records"]
    parts = [provenance(document)]
    names = [name for name in LABELS if any(r["implementation"] == name for r in records)]
    labels = [LABELS[name][0] for name in names]
    cells = {(r["head_dim"], r["pass"], r["n"], r["implementation"]): r for r in records}
    lengths = sorted({record["n"] for record in records})
    for head_dim in sorted({record["head_dim"] for record in records}):
        for which, title in PASSES.items():
            what = "output" if which == "forward" else "gradients, the worst"
            rows = [
                [str(n), *(cell_text(cells.get((head_dim, which, n, name))) for name in names)]
                for n in lengths
            ]
            parts.append(
                f"**Head dimension {head_dim}, {title}**: median (fastest) ms; relative error of "
                f"the {what}.\n\n" + tables.markdown(["n", *labels], rows)
            )
            rows = []
            for n in lengths:
                found = [cells.get((head_dim, which, n, name)) for name in names]
                rows.append([str(n), *map(mebibytes, found)])
            parts.append(
                f"Head dimension {head_dim}, {title}: compiled temporary memory, MiB.\n\n"
                + tables.markdown(["n", *labels], rows)
            )
        parts.append(_growth(records, names, head_dim))
    return "\n\n".join(parts)


def _growth(records, names: Sequence[str], head_dim: int) -> str:
    rows, sentences = [], []
    for which, title in PASSES.items():
        times = {n: series(records, n, which, head_dim, "time_median_s") for n in names}
        floor = times.get("jax_softmax", {})
        for name in names:
            memory = series(records, name, which, head_dim, "temp_bytes")
            common = sorted(set(times[name]) & set(floor))
            ratio = f"{times[name][common[-1]] / floor[common[-1]]:.1f}" if common else ""
            at = str(common[-1]) if common else ""
            growth = [exponents(times[name]), exponents(memory)]
            rows.append([LABELS[name][0], title, *growth, ratio, at])
        for name in ("xla_cg", "xla_direct"):
            common = set(times.get(name, {})) & set(times.get("reference", {}))
            if common:
                first = faster_from(times[name], times["reference"])
                where = "nowhere" if first is None else f"from n = {first}"
                sentences.append(
                    f"{LABELS[name][0]}, {title}: faster than the reference {where} (both timed "
                    f"for n = {min(common)} to {max(common)})."
                )
    head = ["implementation", "pass", "time exponent", "memory exponent", "time / jax.nn", "at n"]
    return (
        f"Head dimension {head_dim}: fitted exponents in n (in brackets: the last doubling alone), "
        "and time relative to `jax.nn.dot_product_attention`.\n\n"
        + tables.markdown(head, rows)
        + "".join(f"\n\n- {s}" if i == 0 else f"\n- {s}" for i, s in enumerate(sentences))
    )


def draw(records):
    """The figure: time and memory against length."""
    head_dims = sorted({record["head_dim"] for record in records})
    panels = [(which, field) for field in ("time_median_s", "temp_bytes") for which in PASSES]
    figure, axes = figures.new(
        len(head_dims), len(panels), height=0.85 + 1.75 * len(head_dims), sharex=True
    )
    for row, head_dim in zip(axes, head_dims, strict=True):
        for axis, (which, field) in zip(row, panels, strict=True):
            axis.set_yscale("log")
            unit = 1e3 if field == "time_median_s" else 2.0**-20
            for name, (_, series_name) in LABELS.items():
                values = series(records, name, which, head_dim, field)
                if not values:
                    continue
                values = {n: unit * value for n, value in values.items()}
                bars = None
                if field == "time_median_s":
                    least = series(records, name, which, head_dim, "time_min_s")
                    bars = [values[n] - unit * least[n] for n in values]
                figures.marks(
                    axis, styles.style(series_name), list(values), list(values.values()), bars,
                    bars and [0.0] * len(bars),
                )  # fmt: skip
            figures.length_axis(axis, [record["n"] for record in records], most=4)
            figures.log_axis(axis, most=6)
            axis.grid(True, axis="x")
        row[0].set_ylabel(f"d = {head_dim}: time, ms")
        row[2].set_ylabel(f"d = {head_dim}: memory, MiB")
    for axis, (which, field) in zip(axes[0], panels, strict=True):
        what = "time" if field == "time_median_s" else "temporary memory"
        axis.set_title(f"{what},\n{PASSES[which]}")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length n")
    figures.legend(figure, axes.flat)
    return figure


if __name__ == "__main__":
    sys.exit(main())
