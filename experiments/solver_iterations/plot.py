"""Draws the figure of a work directory from its files alone.

python experiments/solver_iterations/plot.py                  # the committed results
python experiments/solver_iterations/plot.py runs/solver_iterations
"""

import pathlib
import sys
from collections.abc import Sequence

from matplotlib.lines import Line2D

from lla.experiments.solver_iterations import summary
from lla.runs import command, figures, tables
from lla.runs.workdir import read_config

RESULTS = pathlib.Path(__file__).parent / "results"
# From dark to light with the ridge: matplotlib's cividis, made for the common colour-vision
# deficiencies, without its lightest part.
_COLOURS = ("#00224E", "#35456C", "#666970", "#948E77", "#C8B866", "#E3CD53")
_MARKERS = ("s", "^", "D", "o", "v", "P")


def draw(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes summary.csv and the figure, PNG and SVG, into the work directory; returns paths."""
    path = pathlib.Path(path)
    config, rows = read_config(path), summary.table(path)
    figure = make(config, rows)
    written = tables.write_csv(path / "summary.csv", rows, digits=4)
    return [written, *figures.save(figure, path, "solver iterations")]


def make(config, rows):
    """The figure, from the config and the rows of summary.csv."""
    dtypes, settings = config["dtypes"], config["settings"]
    figure, axes = figures.new(
        len(dtypes), len(settings), height=1.05 + 1.75 * len(dtypes), sharex=True, sharey="row"
    )
    for place, dtype in enumerate(dtypes):
        for axis, (inputs, dim) in zip(axes[place], settings, strict=True):
            here = [r for r in rows if (r["inputs"], r["dim"], r["dtype"]) == (inputs, dim, dtype)]
            _panel(axis, config, here)
            axis.set_title(f"{inputs}, d = {dim}, {dtype}")
        figures.log_axis(axes[place, 0], most=6)
    for axis in axes[-1]:
        axis.set_xlabel("iterations of CG")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    figures.add_legend(figure, _legend(config))
    title = f"Error of the output against float64, n = {config['length']}, {config['heads']} heads,"
    title += f" causal; bands: least to largest of {len(config['seeds'])} seeds"
    figure.suptitle(title)
    return figure


def _panel(axis, config, rows):
    for index, ridge in enumerate(config["ridges"]):
        colour, marker = _style(index)
        line = [row for row in rows if row["ridge"] == ridge and row["solver"] == "fixed"]
        x = [row["iterations"] for row in line]
        axis.plot(x, [row["error"] for row in line], color=colour, marker=marker, markersize=3.5)
        low, high = ([row[key] for row in line] for key in ("error_min", "error_max"))
        axis.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        (end,) = (row for row in rows if row["ridge"] == ridge and row["solver"] == "adaptive")
        bars = [[end["error"] - end["error_min"]], [end["error_max"] - end["error"]]]
        axis.errorbar(
            end["iterations"], end["error"], bars, marker="*", markersize=9, color=colour,
            markeredgecolor="black", zorder=5, capsize=1.6, elinewidth=0.7, linestyle="none",
        )  # fmt: skip
    rounding = [row["error"] for row in rows if row["solver"] == "rounding"]
    if min(rounding) > 1e-6:  # in float32 it lies far below everything else
        axis.axhline(max(rounding), color="0.3", linestyle=":")
    axis.axvline(config["published_iterations"], color="0.6", linestyle="--", zorder=0)
    axis.set_yscale("log")
    figures.length_axis(axis, config["iterations"])
    axis.grid(True, axis="y")


def _style(index):
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def _legend(config):
    handles = []
    for index, ridge in enumerate(config["ridges"]):
        colour, marker = _style(index)
        handles.append(Line2D([], [], color=colour, marker=marker, label=f"ridge {ridge:g}"))
    star = {"marker": "*", "markersize": 9, "color": "white", "markeredgecolor": "black"}
    published = f"{config['published_iterations']}: published kernels"
    return [
        *handles,
        Line2D([], [], linestyle="none", label="lla.Solver(): mean iterations", **star),
        Line2D([], [], color="0.6", linestyle="--", label=published),
        Line2D([], [], color="0.3", linestyle=":", label="rounded to bfloat16"),
    ]


def main(argv: Sequence[str]) -> int:
    """`plot.py [WORKDIR ...]`; returns the exit status."""
    return command.for_each_result(draw, RESULTS, argv, "Draws figures and writes summary.csv.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
