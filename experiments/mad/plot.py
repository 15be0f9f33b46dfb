"""Macro accuracy on the six tasks of MAD by mechanism, drawn from the result files alone.

python experiments/mad/plot.py                                   # the committed results
python experiments/mad/plot.py runs/mad_sweep
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Sequence

from lla import tasks
from lla.experiments.mad import summary
from lla.experiments.trained import plots
from lla.runs import figures, styles


def draw(found: Sequence[summary.Score]):
    """The figure: a panel for each task in its baseline setting.

    Every mechanism has a line of its own: mean, standard deviation and all seeds, which often are
    1 for many of them. A dotted line shows guessing.
    """
    shown = [one for one in found if one.case in summary.SHORT]
    labels = list(dict.fromkeys(one.label for one in shown))
    figure, axes = figures.new(2, 3, height=1.3 + 0.3 * len(labels), sharex=True, sharey=True)
    for axis, (kind, name) in zip(axes.flat, summary.SHORT.items(), strict=True):
        for one in shown:
            if one.case != kind or not one.values:
                continue
            at, style = labels.index(one.label), styles.style(one.mechanism)
            spread = statistics.stdev(one.values) if len(one.values) > 1 else 0.0
            plots.seed_marks(axis, at, one.values, style.colour)
            figures.marks(axis, style, [one.mean], [at], linestyle="none", xerr=spread)
        chance = tasks.create("mad", kind=kind).baselines()["chance"]
        axis.axvline(chance, color="0.4", linestyle=":", linewidth=0.9)
        axis.set_title(name)
        axis.set(xlim=(-0.03, 1.03), ylim=(len(labels) - 0.4, -0.6))
        axis.set_xticks((0, 0.25, 0.5, 0.75, 1), labels=("0", "", "0.5", "", "1"))
        axis.set_yticks(range(len(labels)), labels=labels)
        axis.grid(True, axis="both")
        axis.tick_params(axis="y", length=0)
    for axis in axes[-1]:
        axis.set_xlabel("macro accuracy")
    figure.suptitle("MAD, baseline settings: mean ± standard deviation and seeds; dotted: guessing")
    return figure


def main(argv: Sequence[str]) -> int:
    """`plot.py [FOLDER]`; the exit status."""
    command = argparse.ArgumentParser(description="Draws figure.png and figure.svg.")
    default = summary.FOLDER / "results"
    command.add_argument("folder", nargs="?", type=pathlib.Path, default=default)
    folder = command.parse_args(argv).folder
    try:
        figure = draw(summary.scores(folder))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(*figures.save(figure, folder, "trained figures"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
