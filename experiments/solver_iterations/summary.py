"""Tables from the records alone: means and ranges over seeds.

python experiments/solver_iterations/summary.py               # the committed results
python experiments/solver_iterations/summary.py runs/solver_iterations
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lla.runs import command, tables
from lla.runs.workdir import read_records

Row = dict[str, Any]


def table(path: str | os.PathLike) -> list[Row]:
    """One row for each kind of inputs, dimension, dtype, ridge, solver and number of iterations.

    `solver` is "fixed" (that many iterations), "adaptive" (`lla.Solver()`, its mean iterations),
    "softmax" (no iteration) or "rounding" (the exact output rounded to the dtype).
    """
    groups: dict[tuple, list[Row]] = {}
    for record in read_records(path):
        setting = (record["inputs"], record["dim"])
        for result in record["results"]:
            point = (*setting, result["dtype"], record["ridge"])
            for entry in result["fixed"]:
                groups.setdefault((*point, "fixed", entry["iterations"]), []).append(entry)
            for solver in ("adaptive", "softmax", "rounding"):
                groups.setdefault((*point, solver, 0), []).append(result[solver])
    return [_row(*key, entries) for key, entries in groups.items()]


def _row(inputs, dim, dtype, ridge, solver, iterations, entries):
    errors = [entry["error"] for entry in entries]
    most = iterations
    if solver == "adaptive":
        iterations = float(np.mean([entry["iterations"] for entry in entries]))
        most = max(entry["max_iterations"] for entry in entries)
    return {
        "inputs": inputs,
        "dim": dim,
        "dtype": dtype,
        "ridge": ridge,
        "solver": solver,
        "iterations": iterations,
        "max_iterations": most,
        "error": float(np.mean(errors)),
        "error_min": min(errors),
        "error_max": max(errors),
        "worst_row": max(entry["worst_row"] for entry in entries),
        "seeds": len(entries),
    }


def bound(dtype: str, ridge: float, rounding: float) -> float:
    """The error of an output that the top-level README allows, which defines "enough"."""
    return max(1e-5, 1e-5 / ridge) if dtype == "float32" else 2 * rounding


def sufficient(rows: list[Row]) -> dict[tuple, int | None]:
    """For each point the smallest count that is enough for all seeds, or None."""
    points = _points(rows)
    found = {}
    for point, solvers in points.items():
        limit = bound(point[2], point[3], solvers["rounding"]["error"])
        within = [n for n, row in solvers["fixed"].items() if row["error_max"] <= limit]
        found[point] = min(within, default=None)
    return found


def markdown(rows: list[Row]) -> str:
    """The tables of the README, one for each dtype and one of the counts that suffice."""
    points, enough = _points(rows), sufficient(rows)
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        here = {point: solvers for point, solvers in points.items() if point[2] == dtype}
        counts = list(next(iter(here.values()))["fixed"])
        head = ["inputs", "d", "ridge", "softmax", *counts, "default", "rounding"]
        lines = []
        for (inputs, dim, _, ridge), solvers in here.items():
            end = solvers["adaptive"]
            cells = [inputs, dim, f"{ridge:g}", _short(solvers["softmax"]["error"])]
            cells += [_short(solvers["fixed"][count]["error"]) for count in counts]
            cells += [f"{_short(end['error'])} ({end['iterations']:.1f}; {end['max_iterations']})"]
            cells += [_short(solvers["rounding"]["error"])]
            lines.append(cells)
        parts.append(f"**{dtype}**\n\n{tables.markdown(head, lines)}")
    ridges = list(dict.fromkeys(row["ridge"] for row in rows))
    head = ["inputs", "d", "dtype", *(f"ridge {ridge:g}" for ridge in ridges)]
    lines = []
    for inputs, dim, dtype in dict.fromkeys(point[:3] for point in points):
        cells = [enough[inputs, dim, dtype, ridge] or "more" for ridge in ridges]
        lines.append([inputs, dim, dtype, *cells])
    return "\n\n".join([*parts, tables.markdown(head, lines)]) + "\n"


def _points(rows):
    points: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        point = (row["inputs"], row["dim"], row["dtype"], row["ridge"])
        solvers = points.setdefault(point, {"fixed": {}})
        if row["solver"] == "fixed":
            solvers["fixed"][row["iterations"]] = row
        else:
            solvers[row["solver"]] = row
    return points


def _short(error):
    return f"{error:.2g}" if error >= 0.01 else f"{error:.1e}".replace("e-0", "e-")


def main(argv: Sequence[str]) -> int:
    """`summary.py [WORKDIR ...]`; returns the exit status."""
    results = pathlib.Path(__file__).parent / "results"

    def show(path):
        return [markdown(table(path)).rstrip()]

    return command.for_each_result(show, results, argv, "Prints the tables of the README.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
