"""Learning curves of the points of a figure, from the result files and from those beside them.

Result files have a column "curve": the headline metric of the sweep at every evaluation of a run,
"eval_every" steps apart. Older ones NAME.csv have curves/NAME.csv instead: its columns that make a
run, the column "step", and metrics of the evaluations. What has no result file of the same name is
in no figure.
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
    """The metric of the curves, and the curve of each of the points `found` that has one.

    The metric is that of the validation split where the files have it. A run that stopped keeps
    its last value. Of a point with final runs these are shown, of any other the runs at the rate
    selected.
    """
    metric = experiment.validation
    curves = [(point, _curve(_in_rows(point))) for point in found]
    if all(curve is None for _, curve in curves):
        rows = [row for file in files(folder) for row in sweep.read_results(file)]
        if not any(row.get(metric) is not None for row in rows):
            metric = experiment.headline
        rows = [row for row in rows if row.get(metric) is not None]
        curves = [(point, _curve(_in_files(rows, point, metric))) for point in found]
    return metric, [(point, curve) for point, curve in curves if curve is not None]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of curves that belong to result files in `folder`."""
    beside = sorted((folder / "curves").glob("*.csv"))
    return [file for file in beside if (folder / file.name).exists()]


def _in_rows(point) -> Iterable[tuple[int, int, float]]:
    """Seed, step and value of every evaluation of the runs shown."""
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
