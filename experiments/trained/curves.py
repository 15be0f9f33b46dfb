"""Learning curves of the points of a figure.

A result file has them in its column "curve": the metric of the sweep at every evaluation of a run,
"eval_every" steps apart. Beside an older file NAME.csv there is curves/NAME.csv instead, with a row
for each evaluation: the columns that identify the run, "step", and metrics. A file in curves/
without a result file of the same name is ignored.
"""

import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from lla.experiments.trained.results import PHASE, Experiment, Point
from lla.training import sweep

Curve = tuple[np.ndarray, np.ndarray]  # steps, and values [seeds, steps]


def read(
    experiment: Experiment, found: Sequence[Point], folder: pathlib.Path
) -> tuple[str, list[tuple[Point, Curve]]]:
    """The metric of the curves, and the points `found` that have a curve, with it.

    The metric is that of the validation split if the files have it. After its last evaluation, a
    run that stopped keeps its value. The curve of a point is that of its final runs if it has any,
    else of the runs at the selected learning rate.
    """
    metric = experiment.validation
    curves = [(point, _curve(_in_rows(point))) for point in found]
    if all(curve is None for _, curve in curves):
        rows = [row for file in files(folder) for row in sweep.read_results(file)]
        if not any(row.get(metric) is not None for row in rows):
            metric = experiment.metric
        rows = [row for row in rows if row.get(metric) is not None]
        curves = [(point, _curve(_in_files(rows, point, metric))) for point in found]
    return metric, [(point, curve) for point, curve in curves if curve is not None]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files in curves/ that belong to result files in `folder`."""
    beside = sorted((folder / "curves").glob("*.csv"))
    return [file for file in beside if (folder / file.name).exists()]


def _in_rows(point) -> Iterable[tuple[int, int, float]]:
    """Seed, step and value of every evaluation of the runs of a point."""
    for row in point.rows:
        values = row.get("curve")
        if values is None:
            continue
        values = values if isinstance(values, tuple) else str(values).split()
        for number, value in enumerate(values):
            yield row["seed"], min(number * row["eval_every"], row["steps"]), float(value)


def _in_files(rows, point, metric) -> Iterable[tuple[int, int, float]]:
    options = {f"mixers.{point.mechanism}.{name}": v for name, v in point.options.items()}
    same = {PHASE: point.phase, "learning_rate": point.learning_rate, **options, **point.choices}
    for row in rows:
        if all(row.get(column) == value for column, value in same.items()):
            yield row["seed"], row["step"], row[metric]


def _curve(evaluations):
    runs: dict[int, dict[int, float]] = {}
    for seed, step, value in evaluations:
        if math.isfinite(value):
            runs.setdefault(seed, {})[step] = value
    if not runs:
        return None
    steps = sorted({step for run in runs.values() for step in run})
    first = max(min(run) for run in runs.values())
    steps = [step for step in steps if step >= first]
    values = [[run[max(s for s in run if s <= step)] for step in steps] for run in runs.values()]
    return np.array(steps), np.array(values)
