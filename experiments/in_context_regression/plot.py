"""Error against segment length, and learning curves, drawn from the result files alone.

python experiments/in_context_regression/plot.py                 # the committed results
python experiments/in_context_regression/plot.py runs/in_context_regression_sweep
"""

import pathlib
import sys
from collections.abc import Sequence

from lla.experiments.in_context_regression import baselines, summary
from lla.experiments.trained import plots
from lla.experiments.trained import tables as shared
from lla.runs import figures


def draw(found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None) -> dict:
    """The figures by name: errors and learning curves; baselines.json if it lacks a length."""

    def length(point):
        return point.choices[summary.LENGTH]

    lengths = sorted({length(point) for point in found})
    floor = summary.baselines(folder)
    if not set(lengths) <= floor.keys():
        baselines.measure(found, folder, variant)
        floor = summary.baselines(folder)
    figure, axes = figures.new(width=4.8, height=3.0)
    axis = axes[0, 0]
    axis.set_yscale("log")
    plots.draw_lines(axis, found, length)
    oracle = [floor[length]["oracle"] for length in lengths]
    axis.plot(lengths, oracle, color="0.2", linestyle="--", label="Oracle (segments known)")
    axis.axhline(1.0, color="0.4", linestyle=":", label="predicting zero")
    axis.set(xlabel="segment length S (pairs)", ylabel="squared error")
    axis.set_title(f"mean ± standard deviation of {shared.seeds(found)}")
    figures.length_axis(axis, lengths)
    figures.log_axis(axis)
    figures.legend(figure, [axis], beside=True)
    curves = plots.curves_figure(
        summary.EXPERIMENT, found, folder, length, {s: f"S = {s}" for s in lengths}, log=True
    )
    return {"figure": figure, "curves": curves}


def main(argv: Sequence[str]) -> int:
    """`plot.py [FOLDER] [--variant V]`; returns the exit status."""
    return plots.plot_command(summary.EXPERIMENT, draw, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
