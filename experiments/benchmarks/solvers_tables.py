"""The tables of `hopper_solvers.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import report

METHODS = {"cg": "conjugate gradients", "direct": "direct"}


def crossing(
    records, head_dim: int, which: str = "forward_backward", kind: str | None = None
) -> dict[str, Any]:
    """`report.break_even` of the kernels' solvers, and the "ridges" that it rests on.

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
    return {**report.break_even(direct, cg), "ridges": sorted(set(direct) & set(cg))}


def markdown(document: Mapping) -> str:
    records = document["records"]
    dims = sorted({record["head_dim"] for record in records})
    kinds = list(dict.fromkeys(record["inputs"] for record in records))
    rows = []
    for head_dim in dims:
        for kind in (None, *kinds):
            found = [crossing(records, head_dim, which, kind) for which in report.PASSES]
            name = kind or "all, geometric mean"
            rows.append([str(head_dim), name, *map(_crossing_text, found)])
    parts = [
        report.provenance(document),
        "Largest ridge at which, and below which, the direct solver is faster (the crossing, "
        "interpolated), of those at which both were timed [smallest].\n\n"
        + report.table(["d", "inputs", *report.PASSES.values()], rows),
    ]
    cells = {(r["method"], r["pass"], r["head_dim"], r["ridge"], r["inputs"]): r for r in records}
    for kind in kinds:
        rows = []
        systems = {(r["head_dim"], r["ridge"]) for r in records if r["inputs"] == kind}
        for head_dim, ridge in sorted(systems, key=lambda system: (system[0], -system[1])):
            row = [str(head_dim), f"{ridge:g}"]
            for method in METHODS:
                case = (head_dim, ridge, kind)
                pair = [cells.get((method, which, *case)) for which in report.PASSES]
                counts = [r["mean_iterations"] for r in pair if r and "mean_iterations" in r]
                row += [f"{counts[0]:.1f}" if counts else "", *map(report.cell_text, pair)]
            rows.append(row)
        head = ["d", "ridge"]
        for name in METHODS.values():
            head += [f"{name}: iterations", *report.PASSES.values()]
        parts.append(f"**{kind}**\n\n" + report.table(head, rows))
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
