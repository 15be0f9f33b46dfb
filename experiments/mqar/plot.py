"""Accuracy against width and against length, drawn from the result files alone.

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


def draw(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> list[pathlib.Path]:
    """Writes figure.png and figure.svg into `folder`.

    There is a panel over widths for each case that was run at several, and one over lengths at the
    width that has most points, of equal ones the least. What was run at one width and one length
    only is in the latter.
    """
    tasks = summary.case_tasks(found, folder, variant)

    def width(point):
        return point.choices[summary.WIDTH]

    def length(point):
        return tasks[point.choices["case"]].length

    by_case = {case: [p for p in found if p.choices["case"] == case] for case in tasks}
    scanned = {case: here for case, here in by_case.items() if len({*map(width, here)}) > 1}
    by_width = {number: [p for p in found if width(p) == number] for number in map(width, found)}
    fixed = min(by_width, key=lambda number: (-len(by_width[number]), number))
    across = len({*map(length, by_width[fixed])}) > 1 or not scanned

    figure, axes = plots.new_figure(len(scanned) + across)
    for axis, (case, here) in zip(axes, scanned.items(), strict=False):
        plots.draw_lines(axis, here, width, log2=True, dots=True)
        context = tasks[case].baselines()["context"]
        axis.axhline(context, color="0.4", linestyle=":", label="a value of the context, 1/D")
        axis.set(xlabel="model width")
        axis.set_title(f"N = {tasks[case].length}, D = {tasks[case].pairs}", fontsize=11)
    if across:
        axis, here = axes[-1], by_width[fixed]
        plots.draw_lines(axis, here, length, log2=True, dots=True)
        shown = [task for task in tasks.values() if task.length in {*map(length, here)}]
        context = [task.baselines()["context"] for task in shown]
        axis.plot(
            [task.length for task in shown], context, color="0.4", linestyle=":",
            label="a value of the context, 1/D", marker="_",
        )  # fmt: skip
        ticks = {task.length: f"{task.length}\nD = {task.pairs}" for task in shown}
        axis.set_xticks(list(ticks), labels=list(ticks.values()))
        axis.set(xlabel="length N (tokens) and pairs D")
        axis.set_title(f"width {fixed}", fontsize=11)
    for axis in axes:
        axis.set(ylim=(0, 1.04))
    axes[0].set(ylabel="accuracy at the queries")
    title = f"MQAR: mean of {shared.seeds(found)}; faint dots: single seeds"
    figure.suptitle(title, fontsize=11)
    return plots.save(figure, axes, folder)


if __name__ == "__main__":
    sys.exit(plots.plot_command(summary.EXPERIMENT, draw, sys.argv[1:]))
