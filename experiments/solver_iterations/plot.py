"""Figure of a work directory, from its files alone.

python experiments/solver_iterations/plot.py                  # the committed results
python experiments/solver_iterations/plot.py runs/solver_iterations
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import summary
from matplotlib.lines import Line2D

from lla.experiment import command, figures, tables
from lla.experiment.workdir import read_config

RESULTS = pathlib.Path(__file__).parent / "results"
# Okabe and Ito's palette, told apart under the common colour-vision deficiencies.
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = ("s", "^", "D", "o", "v", "P")


def draw(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes summary.csv and the figure, PNG and SVG, into the work directory; returns paths."""
    path = pathlib.Path(path)
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    config, rows = read_config(path), summary.table(path)
    figure = _figure(config, rows)
    written = tables.write_csv(path / "summary.csv", rows, digits=4)
    return [written, *figures.save(figure, path, "solver iterations")]


def _figure(config, rows):
    dtypes, settings = config["dtypes"], config["settings"]
    figure, axes = plt.subplots(
        len(dtypes), len(settings), figsize=(1.5 + 4 * len(settings), 1 + 3.9 * len(dtypes)),
        sharex=True, sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for place, dtype in enumerate(dtypes):
        for axis, (inputs, dim) in zip(axes[place], settings, strict=True):
            here = [r for r in rows if (r["inputs"], r["dim"], r["dtype"]) == (inputs, dim, dtype)]
            _panel(axis, config, here)
            axis.set_title(f"{inputs}, d = {dim}, {dtype}", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("iterations of conjugate gradients")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the output")
    figure.legend(handles=_legend(config), loc="outside lower center", ncols=4, frameon=False)
    title = f"Error against float64, n = {config['length']}, {config['heads']} heads, causal; "
    title += f"bands: least to largest of {len(config['seeds'])} seeds"
    figure.suptitle(title, fontsize=11)
    return figure


def _panel(axis, config, rows):
    for index, ridge in enumerate(config["ridges"]):
        colour, marker = _style(index)
        line = [row for row in rows if row["ridge"] == ridge and row["solver"] == "fixed"]
        x = [row["iterations"] for row in line]
        axis.plot(x, [row["error"] for row in line], color=colour, marker=marker, markersize=5)
        low, high = ([row[key] for row in line] for key in ("error_min", "error_max"))
        axis.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        (end,) = (row for row in rows if row["ridge"] == ridge and row["solver"] == "adaptive")
        axis.plot(
            end["iterations"], end["error"], marker="*", markersize=15, color=colour,
            markeredgecolor="black", zorder=5,
        )  # fmt: skip
    rounding = [row["error"] for row in rows if row["solver"] == "rounding"]
    if min(rounding) > 1e-6:  # in float32 it lies far below everything else
        axis.axhline(max(rounding), color="0.3", linestyle=":")
    axis.axvline(config["published_iterations"], color="0.6", linestyle="--", zorder=0)
    axis.set_yscale("log")
    axis.set_xscale("log", base=2)
    axis.set_xticks(config["iterations"], labels=[str(count) for count in config["iterations"]])
    axis.grid(axis="y", color="0.92", zorder=0)
    axis.set_axisbelow(True)


def _style(index):
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def _legend(config):
    handles = []
    for index, ridge in enumerate(config["ridges"]):
        colour, marker = _style(index)
        handles.append(Line2D([], [], color=colour, marker=marker, label=f"ridge {ridge:g}"))
    star = {"marker": "*", "markersize": 13, "color": "white", "markeredgecolor": "black"}
    published = f"{config['published_iterations']}, the published kernels"
    return [
        *handles,
        Line2D([], [], linestyle="none", label="lla.Solver(): mean iterations, error", **star),
        Line2D([], [], color="0.6", linestyle="--", label=published),
        Line2D([], [], color="0.3", linestyle=":", label="exact output rounded to bfloat16"),
    ]


def redraw(path: pathlib.Path) -> None:
    """Draws a work directory and prints what was written."""
    for written in draw(path):
        print(written)


if __name__ == "__main__":
    sys.exit(command.for_each_result(redraw, RESULTS, sys.argv[1:]))
