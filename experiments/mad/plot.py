"""Macro accuracy on the six tasks of MAD by mechanism, drawn from the result files alone.

python experiments/mad/plot.py                                   # the committed results
python experiments/mad/plot.py runs/mad_sweep
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # of configs and experiments

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.mad import summary
from lla import tasks
from lla.experiment import figures

# Okabe and Ito's palette, told apart under the common colour-vision deficiencies.
_COLOURS = {
    "lla": "#D55E00", "parallax": "#E69F00", "softmax": "#0072B2", "mesanet": "#009E73",
    "deltanet": "#CC79A7", "gated_deltanet": "#CC79A7", "gla": "#8C8C8C", "mamba": "#56B4E9",
    "mamba2": "#56B4E9", "hyena": "#000000",
}  # fmt: skip


def draw(found: Sequence[summary.Score], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes figure.png and figure.svg into `folder`; returns their paths.

    There is a panel for each task in its baseline setting, in which every mechanism has a line of
    its own: mean, standard deviation and all seeds. A dotted line shows guessing.
    """
    shown = [one for one in found if one.case in summary.SHORT]
    labels = list(dict.fromkeys(one.label for one in shown))
    settings = {"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(
            2, 3, figsize=(6.8, 1.3 + 0.3 * len(labels)), sharex=True, sharey=True,
            layout="constrained",
        )  # fmt: skip
        for axis, (kind, name) in zip(axes.flat, summary.SHORT.items(), strict=True):
            for one in shown:
                if one.case != kind or not one.values:
                    continue
                at, colour = labels.index(one.label), _COLOURS.get(one.mechanism, "#555555")
                spread = np.std(one.values, ddof=1) if len(one.values) > 1 else 0.0
                axis.errorbar(
                    [one.mean], [at], xerr=[spread], marker="o", markersize=4, color=colour,
                    capsize=1.6, elinewidth=0.8,
                )  # fmt: skip
                axis.plot(
                    one.values, [at] * len(one.values), linestyle="none", marker="|",
                    markersize=6, color=colour, alpha=0.5,
                )  # fmt: skip
            chance = tasks.create("mad", kind=kind).baselines()["chance"]
            axis.axvline(chance, color="0.4", linestyle=":", linewidth=0.9)
            axis.set_title(name, fontsize=8)
            axis.set(xlim=(-0.03, 1.03), ylim=(len(labels) - 0.4, -0.6))
            axis.set_xticks((0, 0.25, 0.5, 0.75, 1), labels=("0", "", "0.5", "", "1"))
            axis.set_yticks(range(len(labels)), labels=labels)
            axis.grid(color="0.92", linewidth=0.5)
            axis.set_axisbelow(True)
            axis.tick_params(axis="y", length=0)
        for axis in axes[-1]:
            axis.set_xlabel("macro accuracy")
        figure.suptitle("MAD, baseline settings: mean ± standard deviation; dotted: guessing")
        return figures.save(figure, folder, "trained figures")


def main(argv: Sequence[str]) -> int:
    """`plot.py [FOLDER]`; the exit status."""
    command = argparse.ArgumentParser(description="Draws figure.png and figure.svg.")
    default = summary.FOLDER / "results"
    command.add_argument("folder", nargs="?", type=pathlib.Path, default=default)
    folder = command.parse_args(argv).folder
    try:
        print(*draw(summary.scores(folder), folder), sep="\n")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
