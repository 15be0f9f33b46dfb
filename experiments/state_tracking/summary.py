"""Tables of permutation state tracking, from the result files alone.

python experiments/state_tracking/summary.py                     # of the committed results
python experiments/state_tracking/summary.py runs/state_tracking_sweep
python experiments/state_tracking/summary.py --write  # renew the README; --check compares
"""

import pathlib
import sys
from collections.abc import Sequence

from lla.experiments.trained import tables as shared

ITEMS = "task.num_items"
LONG = "test_long/accuracy"  # up to twice as many swaps as in training


def swaps(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> tuple[str, str]:
    """Numbers of swaps in training and the test, and in the long test, in words."""
    settings = shared.task_settings(EXPERIMENT, folder, variant)
    task = shared.task(settings, found[0].choices)
    fewest, most = task.min_swaps, task.max_swaps
    return f"{fewest} to {most} swaps, as in training", f"{most + 1} to {2 * most} swaps"


def long_values(point: shared.Point) -> tuple[float, ...]:
    """Accuracies of the seeds in the long test; empty where the file does not have them."""
    return point.further.get(LONG, ())


def tables(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> list[str]:
    """Accuracies by mechanism and number of items, the long test if there; rates selected."""

    def items(point):
        return point.choices[ITEMS]

    numbers = sorted({items(point) for point in found})
    heads = {number: f"N = {number}" for number in numbers}
    chance = [["chance", *(f"{1 / number:.3f}" for number in numbers)]]
    trained, long = swaps(found, folder, variant)
    parts = [
        f"Accuracy after the last step, mean ± standard deviation of {shared.seeds(found)}, "
        f"{shared.protocol(found)}; {trained}:",
        shared.grid_table(found, items, heads, lambda p: shared.value_cell(p.values), chance),
    ]
    measured = [point for point in found if long_values(point)]
    if measured:
        cells = shared.grid_table(
            measured, items, heads, lambda p: shared.value_cell(long_values(p)), chance
        )
        parts += [f"The same models, {long}:", cells]
    if any(point.updates for point in found):
        cells = shared.grid_table(found, items, heads, shared.updates_cell)
        text = "Updates after which training stopped at its goal, and how many of the seeds did:"
        parts += [text, cells]
    rates = shared.grid_table(found, items, heads, shared.rate_cell)
    return [*parts, shared.RATES_CAPTION, rates]


EXPERIMENT = shared.Experiment(
    name="state_tracking",
    columns=(shared.MECHANISM, ITEMS),
    metric="test/accuracy",
    published={},
    tables=tables,
    variant="figure",  # scaled down
)

if __name__ == "__main__":
    sys.exit(shared.summary_command(EXPERIMENT, sys.argv[1:]))
