"""Accuracy against the number of items, drawn from the result files alone.

python experiments/state_tracking/plot.py                        # the committed results
python experiments/state_tracking/plot.py runs/state_tracking_sweep
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # of configs and experiments

from experiments import trained_figures as shared
from experiments import trained_plots as plots
from experiments.state_tracking import summary


def draw(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> list[pathlib.Path]:
    """Writes figure.png and figure.svg into `folder`; a panel for the long test if it is there."""

    def items(point):
        return point.choices[summary.ITEMS]

    trained, long = summary.swaps(found, folder, variant)
    panels = [(trained, lambda point: point.values)]
    if any(summary.long_values(point) for point in found):
        panels.append((long, summary.long_values))
    figure, axes = plots.new_figure(len(panels))
    for axis, (title, values) in zip(axes, panels, strict=True):
        plots.draw_lines(axis, found, items, values)
        numbers = sorted({items(point) for point in found})
        span = np.linspace(numbers[0] - 0.3, numbers[-1] + 0.3, 99)
        axis.plot(span, 1 / span, color="0.4", linestyle=":", label="chance, 1/N")
        axis.set(xlabel="items N", ylim=(0, 1.04))
        axis.set_title(title, fontsize=11)
    axes[0].set(ylabel="accuracy")
    title = f"State tracking: mean ± standard deviation, {shared.seeds(found)}"
    figure.suptitle(title, fontsize=11)
    return plots.save(figure, axes, folder)


if __name__ == "__main__":
    sys.exit(plots.plot_command(summary.EXPERIMENT, draw, sys.argv[1:]))
