"""Accuracy against the number of items, and learning curves, drawn from the result files alone.

python experiments/state_tracking/plot.py                        # the committed results
python experiments/state_tracking/plot.py runs/state_tracking_sweep
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from lla.experiments.state_tracking import summary
from lla.experiments.trained import plots
from lla.experiments.trained import tables as shared
from lla.runs import figures


def draw(found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None) -> dict:
    """The figures by name: accuracies, with a panel for the long test if there; learning curves."""

    def items(point):
        return point.choices[summary.ITEMS]

    numbers = sorted({items(point) for point in found})
    trained, long = summary.swaps(found, folder, variant)
    panels = [(trained, lambda point: point.values)]
    if any(summary.long_values(point) for point in found):
        panels.append((long, summary.long_values))
    width = figures.PAGE if len(panels) > 1 else 4.8
    figure, axes = figures.new(1, len(panels), width=width, height=2.9, sharey=True)
    for axis, (title, values) in zip(axes[0], panels, strict=True):
        plots.draw_lines(axis, found, items, values)
        span = np.linspace(numbers[0] - 0.3, numbers[-1] + 0.3, 99)
        axis.plot(span, 1 / span, color="0.4", linestyle=":", label="chance, 1/N")
        axis.set(xlabel="items N", ylim=(0, 1.04), xticks=numbers)
        axis.set_title(title)
        axis.grid(True, axis="y")
    axes[0, 0].set(ylabel="accuracy")
    figure.suptitle(f"Mean ± standard deviation of {shared.seeds(found)}")
    figures.legend(figure, axes[0], beside=len(panels) == 1)
    titles = {number: f"N = {number}" for number in numbers}
    curves = plots.curves_figure(summary.EXPERIMENT, found, folder, items, titles)
    return {"figure": figure, "curves": curves}


def main(argv: Sequence[str]) -> int:
    """`plot.py [FOLDER] [--variant V]`; returns the exit status."""
    return plots.plot_command(summary.EXPERIMENT, draw, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
