"""Learning curves of the points of a figure: the files `curves/*.csv` beside the result files.

The curves of NAME.csv are in curves/NAME.csv: its columns that make a run, the column "step", and
metrics of the evaluations. What has no result file of the same name is in no figure.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from experiments import trained_figures as shared
from lla.training import sweep

Curve = tuple[np.ndarray, np.ndarray]  # steps, and values [seeds, steps]


def read(
    experiment: shared.Experiment, found: Sequence[shared.Point], folder: pathlib.Path
) -> tuple[str, list[tuple[shared.Point, Curve]]]:
    """The metric of the curves, and the curve of each of the points `found` that has one.

    The metric is that of the validation split where the files have it. A run that stopped keeps
    its last value. Of a point with final runs these are shown, of any other the runs at the rate
    selected.
    """
    files = [
        file for file in sorted((folder / "curves").glob("*.csv")) if (folder / file.name).exists()
    ]
    rows = [row for file in files for row in sweep.read_results(file)]
    metric = experiment.headline
    validation = f"validation/{metric.partition('/')[2]}"
    if any(row.get(validation) is not None for row in rows):
        metric = validation
    rows = [row for row in rows if row.get(metric) is not None]
    curves = ((point, _curve(rows, point, metric)) for point in found)
    return metric, [(point, curve) for point, curve in curves if curve is not None]


def _curve(rows, point, metric):
    runs: dict[int, dict[int, float]] = {}
    for row in rows:
        same = (
            row["learning_rate"] == point.learning_rate
            and row.get(shared.PHASE) == point.phase
            and row.get(f"mixers.{point.mechanism}.short_conv") == point.taps
            and all(row.get(column) == value for column, value in point.choices.items())
        )
        if same:
            runs.setdefault(row["seed"], {})[row["step"]] = row[metric]
    if not runs:
        return None
    steps = sorted({step for run in runs.values() for step in run})
    values = [[run[max(s for s in run if s <= step)] for step in steps] for run in runs.values()]
    return np.array(steps), np.array(values)
