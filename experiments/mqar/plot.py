"""Accuracy by mechanism, width and length, and learning curves, from the result files alone.

python experiments/mqar/plot.py                                  # the committed results
python experiments/mqar/plot.py runs/mqar_sweep
"""

import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # of configs and experiments

from experiments import trained_figures as shared
from experiments import trained_plots as plots
from experiments.mqar import summary
from lla.experiment import figures


def draw(found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None) -> dict:
    """The figures by name: accuracies and learning curves.

    Accuracies have a panel for each width and length, in which every mechanism has a line of its
    own: many of them are 1, and would hide one another on a common axis.
    """
    tasks = summary.case_tasks(found, folder, variant)

    def place(point):
        return point.choices[summary.WIDTH], point.choices["case"]

    widths = sorted({place(point)[0] for point in found})
    labels = {
        width: list(dict.fromkeys(p.label for p in found if place(p)[0] == width))
        for width in widths
    }
    figure, axes = figures.new(
        len(widths), len(tasks), sharex=True, sharey="row",
        width=figures.PAGE if len(tasks) > 1 else 3.6,
        height=0.75 + sum(0.3 + 0.125 * len(names) for names in labels.values()),
        height_ratios=[len(names) + 1.5 for names in labels.values()],
    )  # fmt: skip
    for row, width in zip(axes, widths, strict=True):
        rows = {label: number for number, label in enumerate(labels[width])}
        for axis, (case, task) in zip(row, tasks.items(), strict=True):
            here = [point for point in found if place(point) == (width, case) and point.values]
            for point in here:
                at, style = rows[point.label], point.style
                mean, std = shared.mean_std(point.values)
                plots.seed_marks(axis, at, point.values, style.colour)
                look = {"linestyle": "none", "xerr": std, "label": None}
                figures.marks(axis, style, [mean], [at], **look)
            context = task.baselines()["context"]
            axis.axvline(context, color="0.4", linestyle=":", linewidth=0.9)
            axis.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.4, -0.6))
            axis.set_xticks((0, 0.25, 0.5, 0.75, 1), labels=("0", "", "0.5", "", "1"))
            axis.set_yticks(range(len(rows)), labels=list(rows))
            axis.grid(axis="both")
            axis.tick_params(axis="y", length=0)
        row[0].set_ylabel(f"width {width}")
    for axis, task in zip(axes[0], tasks.values(), strict=True):
        axis.set_title(f"N = {task.length}, D = {task.pairs}")
    for axis in axes[-1]:
        axis.set_xlabel("accuracy")
    figure.align_ylabels(axes[:, 0])
    parts = [
        f"Mean ± standard deviation and single runs of {shared.seeds(found)}",
        "dotted: a value of the context, 1/D",
    ]
    figure.suptitle(("; " if len(tasks) > 2 else "\n").join(parts))
    titles = {
        (width, case): f"N = {task.length}, D = {task.pairs}, width {width}"
        for width in widths
        for case, task in tasks.items()
    }
    columns = min(len(tasks), 4) if len(tasks) > 1 else None
    curves = plots.curves_figure(summary.EXPERIMENT, found, folder, place, titles, columns=columns)
    return {"figure": figure, "curves": curves}


if __name__ == "__main__":
    sys.exit(plots.plot_command(summary.EXPERIMENT, draw, sys.argv[1:]))
