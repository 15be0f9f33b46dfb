"""Accuracy and updates by mechanism, width and length, and learning curves, from result files.

python experiments/mqar/plot.py                                  # the committed results
python experiments/mqar/plot.py runs/mqar_sweep
"""

import pathlib
import sys
from collections.abc import Sequence

from lla.experiments.mqar import summary
from lla.experiments.trained import plots
from lla.experiments.trained import tables as shared
from lla.runs import figures


def draw(found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None) -> dict:
    """The figures by name: accuracies, updates to the goal, and learning curves.

    The first two have a panel for each width and length, in which every mechanism has a line of its
    own: many of them are alike, and would hide one another on a common axis.
    """
    tasks = summary.case_tasks(found, folder, variant)
    titles = {
        (width, case): f"N = {task.length}, D = {task.pairs}, width {width}"
        for width in sorted({point.choices[summary.WIDTH] for point in found})
        for case, task in tasks.items()
    }
    columns = min(len(tasks), 4) if len(tasks) > 1 else None
    curves = plots.curves_figure(summary.EXPERIMENT, found, folder, _place, titles, columns=columns)
    goal = any(point.updates for point in found)
    return {
        "figure": _accuracies(found, tasks),
        "updates": _updates(found, tasks) if goal else None,
        "curves": curves,
    }


def _place(point):
    return point.choices[summary.WIDTH], point.choices["case"]


def _panels(found, tasks):
    """A figure, and (axis, case, its points with their lines) for each of its panels."""
    widths = sorted({point.choices[summary.WIDTH] for point in found})
    labels = {
        width: list(dict.fromkeys(p.label for p in found if p.choices[summary.WIDTH] == width))
        for width in widths
    }
    figure, axes = figures.new(
        len(widths), len(tasks), sharex=True, sharey="row",
        width=figures.PAGE if len(tasks) > 1 else 3.6,
        height=0.75 + sum(0.3 + 0.125 * len(names) for names in labels.values()),
        height_ratios=[len(names) + 1.5 for names in labels.values()],
    )  # fmt: skip
    panels = []
    for row, width in zip(axes, widths, strict=True):
        names = labels[width]
        for axis, case in zip(row, tasks, strict=True):
            here = [(p, names.index(p.label)) for p in found if _place(p) == (width, case)]
            panels.append((axis, case, here))
            axis.set(ylim=(len(names) - 0.4, -0.6))
            axis.set_yticks(range(len(names)), labels=names)
            axis.grid(True, axis="both")
            axis.tick_params(axis="y", length=0)
        row[0].set_ylabel(f"width {width}")
    for axis, task in zip(axes[0], tasks.values(), strict=True):
        axis.set_title(f"N = {task.length}, D = {task.pairs}")
    figure.align_ylabels(axes[:, 0])
    return figure, axes, panels


def _title(figure, tasks, *parts):
    figure.suptitle(("; " if len(tasks) > 2 else "\n").join(parts))


def _accuracies(found, tasks):
    figure, axes, panels = _panels(found, tasks)
    for axis, case, here in panels:
        for point, at in here:
            _, std = shared.mean_std(point.values or (0,))
            _line(axis, point, at, point.values, std)
        axis.axvline(tasks[case].baselines()["context"], color="0.4", linestyle=":", linewidth=0.9)
        axis.set(xlim=(-0.03, 1.03))
        axis.set_xticks((0, 0.25, 0.5, 0.75, 1), labels=("0", "", "0.5", "", "1"))
    for axis in axes[-1]:
        axis.set_xlabel("accuracy")
    seeds = f"Mean ± standard deviation and single runs of {shared.seeds(found)}"
    _title(figure, tasks, seeds, "dotted: a value of the context, 1/D")
    return figure


def _updates(found, tasks):
    """Updates of the runs that reached the goal; a number tells how many if it was not all.

    Bars reach from the least to the largest: a standard deviation may be more than the mean, which
    a logarithmic axis has no room for.
    """
    figure, axes, panels = _panels(found, tasks)
    every = [number for point in found for number in point.updates]
    low, high = min(every) / 1.5, max(every) * 1.5
    for axis, _, here in panels:
        axis.set(xscale="log", xlim=(low, high))
        for point, at in here:
            if values := point.updates:
                mean, _ = shared.mean_std(values)
                _line(axis, point, at, values, [[mean - min(values)], [max(values) - mean]])
            if (reached := len(point.updates)) < len(point.rows):
                # In the margin: nothing is drawn there.
                text = f"{reached}/{len(point.rows)}"
                axis.annotate(
                    text, (1, at), xycoords=("axes fraction", "data"), xytext=(2, 0),
                    textcoords="offset points", va="center", annotation_clip=False, fontsize=7,
                    color=point.style.colour,
                )  # fmt: skip
        figures.log_axis(axis, "x", most=4)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    what = f"Updates to an accuracy of {summary.SOLVED}"
    seeds = f"mean, least and largest of {shared.seeds(found)}"
    _title(figure, tasks, what, seeds, "beside: how many got there, if not all")
    return figure


def _line(axis, point, at, values, error):
    """The mean with its error bar and the runs of a point, on the line at `at`."""
    if not values:
        return
    mean, _ = shared.mean_std(values)
    plots.seed_marks(axis, at, values, point.style.colour)
    look = {"linestyle": "none", "xerr": error, "label": None}
    figures.marks(axis, point.style, [mean], [at], **look)


def main(argv: Sequence[str]) -> int:
    """`plot.py [FOLDER] [--variant V]`; returns the exit status."""
    return plots.plot_command(summary.EXPERIMENT, draw, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
