"""Losses of the language models relative to softmax attention, from result files.

python experiments/language_model/plot.py                        # the committed results
python experiments/language_model/plot.py runs/language_model/language_model_study
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lla.experiments.language_model import summary
from lla.experiments.trained import plots
from lla.experiments.trained import tables as shared
from lla.runs import figures

# Cases whose curves are drawn: their lines, and whether their markers are filled.
CURVES = {
    "lla_ridge_10": ("-", True),
    "lla_ridge_1": ("--", False),
    "parallax": ("-", True),
    "gated_deltanet": ("-", True),
}


def draw(found: Sequence[summary.Run], records: Sequence[Mapping[str, Any]]):
    """The figure: at the end by mechanism; during training for a few; softmax attention is 0."""
    found = summary.at_rate(found)
    apart = {
        case: list(summary.differences(found, case).values())
        for case in dict.fromkeys(run.case for run in found)
        if case != summary.BASE
    }
    apart = {case: values for case, values in apart.items() if values}
    if not apart:
        raise ValueError("there is nothing to compare: softmax attention or all others are missing")
    curves = {case: _curve(found, records, case) for case in CURVES}
    curves = {case: curve for case, curve in curves.items() if curve}
    figure, axes = figures.new(
        1, 2 if curves else 1, height=max(2.4, 1.3 + 0.15 * len(apart)), width=figures.PAGE,
        **({"width_ratios": (1.25, 1)} if curves else {}),
    )  # fmt: skip
    _at_the_end(axes[0, 0], apart)
    if curves:
        _during_training(axes[0, 1], curves)
    figure.suptitle(
        "Validation loss less that of softmax attention with the same seed, nats a token"
    )
    return figure


def _at_the_end(axis, apart):
    names = [summary.CASES[case][1] for case in apart]
    for at, (case, values) in enumerate(apart.items()):
        style = summary.style(case)
        plots.seed_marks(axis, at, values, style.colour)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures.marks(
            axis, style, [statistics.mean(values)], [at], linestyle="none", xerr=spread, label=None
        )
    axis.axvline(0, color="0.4", linewidth=0.9, linestyle=":")
    axis.set(ylim=(len(names) - 0.4, -0.6), xlabel="difference after the last update")
    axis.set_yticks(range(len(names)), labels=names)
    axis.grid(True, axis="both")
    axis.tick_params(axis="y", length=0)
    axis.locator_params(axis="x", nbins=5)


def _curve(found, records, case):
    """Steps and mean differences of the evaluations after the first."""
    keys = {run.key for run in found}
    lines: dict[str, dict[int, Mapping]] = {case: {}, summary.BASE: {}}
    for record in records:
        key = record["case"], record["seed"], record["learning_rate"]
        if record["case"] in lines and key in keys:
            lines[record["case"]][record["seed"]] = record
    seeds = sorted(lines[case].keys() & lines[summary.BASE].keys())
    if not seeds:
        return None
    steps = lines[case][seeds[0]]["steps"][1:]
    values = [
        [_loss(lines[case][seed], n) - _loss(lines[summary.BASE][seed], n) for seed in seeds]
        for n in range(1, len(steps) + 1)
    ]
    return steps, [statistics.mean(column) for column in values]


def _loss(record, number):
    return record["validation"][number]["loss"]


def _during_training(axis, curves):
    for case, (steps, values) in curves.items():
        line, filled = CURVES[case]
        style = dataclasses.replace(summary.style(case), line=line, filled=filled)
        axis.plot(steps, values, label=style.name, **style.options())
    axis.axhline(0, color="0.4", linewidth=0.9, linestyle=":")
    axis.set_xlabel("updates")
    axis.set_ylabel("difference")
    axis.locator_params(axis="x", nbins=5)
    axis.grid(True, axis="y")
    axis.legend()


def main(argv: Sequence[str]) -> int:
    """`plot.py [FOLDER]`; the exit status."""
    command = argparse.ArgumentParser(description="Draws figure.png and figure.svg.")
    default = summary.FOLDER / "results"
    command.add_argument("folder", nargs="?", type=pathlib.Path, default=default)
    folder = command.parse_args(argv).folder

    def work():
        figure = draw(summary.read(folder), summary.evaluations(folder))
        return figures.save(figure, folder, "trained figures")

    return shared.report(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
