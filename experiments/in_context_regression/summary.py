"""Tables of trained in-context regression, from the result files alone.

python experiments/in_context_regression/summary.py              # of the committed results
python experiments/in_context_regression/summary.py runs/in_context_regression_sweep
python experiments/in_context_regression/summary.py --write  # renew the README; --check compares
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from lla.experiments.trained import tables as shared

LENGTH = "task.segment_length"
BASELINES = "baselines.json"  # written by baselines.py


def baselines(folder: pathlib.Path) -> dict[int, dict[str, float]]:
    """Segment length -> baselines of the task; empty if they were not measured."""
    file = folder / BASELINES
    if not file.exists():
        return {}
    return {int(k): v for k, v in json.loads(file.read_text(encoding="utf-8")).items()}


def tables(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> list[str]:
    """Errors by mechanism and segment length, with the oracle's, and the rates selected."""

    def length(point):
        return point.choices[LENGTH]

    lengths = sorted({length(point) for point in found})
    heads = {number: f"S = {number}" for number in lengths}
    floor = baselines(folder)
    more = [["predicting zero", *("1" for _ in lengths)]]
    if set(lengths) <= floor.keys():
        more.append(["oracle", *(f"{floor[number]['oracle']:.3f}" for number in lengths)])

    def error(point):
        return shared.value_cell(point.values)

    return [
        f"Squared error after the last step, mean ± standard deviation of {shared.seeds(found)}, "
        f"{shared.protocol(found)}:",
        shared.grid_table(found, length, heads, error, more),
        shared.RATES_CAPTION,
        shared.grid_table(found, length, heads, shared.rate_cell),
    ]


EXPERIMENT = shared.Experiment(
    name="in_context_regression",
    columns=(shared.MECHANISM, LENGTH),
    metric="test/mse",
    published={
        "task.dim": ((32,), "[paper]"),
        "model.depth": ((2,), "[paper]"),
        "model.mlp_ratio": ((0.0,), "[paper]"),
    },
    tables=tables,
    variant="figure",  # scaled down
)

if __name__ == "__main__":
    sys.exit(shared.summary_command(EXPERIMENT, sys.argv[1:]))
