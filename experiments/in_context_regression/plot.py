"""Error against segment length, drawn from the result files alone.

python experiments/in_context_regression/plot.py                 # the committed results
python experiments/in_context_regression/plot.py runs/in_context_regression_sweep
"""

import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # of configs and experiments

from experiments import trained_figures as shared
from experiments import trained_plots as plots
from experiments.in_context_regression import baselines, summary


def draw(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> list[pathlib.Path]:
    """Writes figure.png and figure.svg into `folder`, and baselines.json if it lacks a length."""
    lengths = sorted({point.choices[summary.LENGTH] for point in found})
    floor = summary.baselines(folder)
    if not set(lengths) <= floor.keys():
        baselines.measure(found, folder, variant)
        floor = summary.baselines(folder)
    figure, axes = plots.new_figure(1)
    (axis,) = axes
    axis.set_yscale("log")
    plots.draw_lines(axis, found, lambda point: point.choices[summary.LENGTH], log2=True)
    oracle = [floor[length]["oracle"] for length in lengths]
    axis.plot(lengths, oracle, color="0.2", linestyle="--", label="oracle (segments known)")
    axis.axhline(1.0, color="0.4", linestyle=":", label="predicting zero")
    axis.set(xlabel="segment length S (pairs)", ylabel="squared error")
    axis.set_title(
        f"In-context regression, trained: mean ± standard deviation, {shared.seeds(found)}",
        fontsize=11,
    )
    return plots.save(figure, axes, folder)


if __name__ == "__main__":
    sys.exit(plots.plot_command(summary.EXPERIMENT, draw, sys.argv[1:]))
