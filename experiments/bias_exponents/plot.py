"""Draws the figure of a work directory from its files alone.

python experiments/bias_exponents/plot.py                  # the committed results
python experiments/bias_exponents/plot.py runs/bias_exponents
"""

import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np

from lla.experiments.bias_exponents import population, summary
from lla.runs import command, figures, styles, tables
from lla.runs.workdir import read_config

RESULTS = pathlib.Path(__file__).parent / "results"
# Softmax attention is the local constant fit, LLA the local linear one.
_COLOURS = {"constant": styles.style("softmax").colour, "linear": styles.style("lla").colour}
_MARKERS = {"constant": styles.style("softmax").marker, "linear": styles.style("lla").marker}
_NAMES = {"constant": "constant", "linear": "linear"}


def draw(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes summary.csv and the figure, PNG and SVG, into the work directory; returns paths."""
    path = pathlib.Path(path)
    config, rows = read_config(path), summary.table(path)
    figure = make(config, rows)
    written = tables.write_csv(path / "summary.csv", rows)
    return [written, *figures.save(figure, path, "bias exponents")]


def make(config, rows):
    """The figure, from the config and the rows of summary.csv."""
    figure, axes = figures.new(2, 2, height=6.6)
    _bias(axes[0, 0], rows, "integrated")
    axes[0, 0].set_title("squared bias, integrated, d = 1")
    _bias(axes[0, 1], rows, "boundary")
    axes[0, 1].set_title("squared bias at the boundary point, d = 1")
    _slopes(axes[1, 0], rows)
    if config["seeds"]:
        _random(axes[1, 1], config, rows)
    else:
        axes[1, 1].set_axis_off()
    for axis in axes.flat:
        if not axis.has_data():
            continue
        axis.set_xlabel("bandwidth b")
        figures.log_axis(axis, "x")
        if axis is not axes[1, 0]:
            figures.log_axis(axis)
        axis.grid(True, axis="both")
        # Below the axis, where it covers no data.
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=6.8,
            handlelength=1.8, columnspacing=1.0,
        )  # fmt: skip
    figure.suptitle("Local constant fit (softmax attention) and local linear fit (LLA)")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for every file
    return figure


def _bias(axis, rows, quantity):
    where = summary.settings(rows, "integrals")[0]
    target = population.TARGETS[where["target"]]
    for fit, colour in _COLOURS.items():
        x, y = summary.curve(rows, quantity, fit=fit, **where)
        axis.plot(x, y, color=colour, linewidth=1.4, label=f"{_NAMES[fit]}, integral")
        if where["dim"] == 1 and where["ridge"] == "0":
            terms = [population.leading_terms(target, b)[fit][quantity] for b in x]
            power = round(population.exponent(x, np.array(terms)))
            style = {"color": colour, "linestyle": (0, (2, 2)), "linewidth": 1}
            axis.plot(x, terms, label=f"{_NAMES[fit]}, leading: $b^{power}$", **style)
        grids = [g for g in summary.settings(rows, "grid") if g["target"] == where["target"]]
        for grid in grids[:1]:
            x, y = summary.curve(rows, quantity, fit=fit, **grid)
            style = {"color": colour, "linestyle": "none", "marker": _MARKERS[fit]}
            label = f"{_NAMES[fit]}, operator"
            axis.plot(x, y, markerfacecolor="none", label=label, **style)
    axis.set_yscale("log")
    axis.set_ylabel("squared bias")


def _slopes(axis, rows):
    """Exponents between neighbouring bandwidths, by dimension and for other ridges."""
    chosen = summary.settings(rows, "integrals")
    first = chosen[0]
    dashes = {1: "-", 2: (0, (5, 2)), 3: (0, (1, 1.5))}
    for where in chosen:
        plain = where["ridge"] == first["ridge"]
        if where["target"] != first["target"] or (where["dim"] > 1 and not plain):
            continue
        for fit, colour in _COLOURS.items():
            if fit == "constant" and not plain:
                continue  # it has no ridge
            x, y = summary.curve(rows, "integrated", fit=fit, **where)
            slope = np.diff(np.log(y)) / np.diff(np.log(x))
            style = {"color": colour, "linestyle": dashes[where["dim"]]}
            label = f"{_NAMES[fit]}, d = {where['dim']}"
            if not plain:
                index = [w["ridge"] for w in chosen if w["ridge"] != first["ridge"]].index(
                    where["ridge"]
                )
                style = {"color": "0.45", "linestyle": "none", "marker": "sxv+"[index % 4]}
                style |= {"markersize": 3}
                ridge = re.sub(r"b\^(\d+)", r"$b^\1$", where["ridge"])
                label = f"{_NAMES[fit]}, ridge {ridge}"
            axis.plot(np.sqrt(x[1:] * x[:-1]), slope, label=label, **style)
    for power in (3, 4):
        axis.axhline(power, color="0.7", linewidth=1, zorder=0)
    axis.set_ylabel("exponent between neighbours")
    axis.set_ylim(2, 4.2)
    axis.set_yticks((2, 2.5, 3, 3.5, 4))
    axis.set_title("exponent of the integrated squared bias")


def _random(axis, config, rows):
    (where,) = summary.settings(rows, "random")
    lines = {"error": ("-", 1.4), "bias": ((0, (5, 2)), 1.0), "variance": ((0, (1, 1.5)), 1.0)}
    for fit, colour in _COLOURS.items():
        for name, (dash, width) in lines.items():
            wanted = where | {"fit": fit, "quantity": f"{name}_integrated"}
            line = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
            x, y, low, high = (
                np.array([row[key] for row in line])
                for key in ("bandwidth", "value", "low", "high")
            )
            label = f"{_NAMES[fit]}, {name}"
            axis.plot(x, y, color=colour, linestyle=dash, linewidth=width, label=label)
            axis.fill_between(
                x, np.maximum(low, y / 10), high, color=colour, alpha=0.2, linewidth=0
            )
        exact = summary.settings(rows, "integrals")[0]
        if exact["target"] != where["target"]:
            continue
        x, y = summary.curve(rows, "integrated", fit=fit, **exact)
        inside = (x >= min(config["sample_bandwidths"])) & (x <= max(config["sample_bandwidths"]))
        label = f"{_NAMES[fit]}, bias, integral"
        style = {"color": colour, "linestyle": "none", "markerfacecolor": "none"}
        style |= {"marker": _MARKERS[fit]}
        axis.plot(x[inside], y[inside], label=label, **style)
    axis.set_yscale("log")
    axis.set_ylabel("integrated square")
    title = f"random keys, n = {config['sample_keys']}, noise {config['noise']:g}\n"
    title += f"(bands: least to largest of {len(config['seeds'])} seeds)"
    axis.set_title(title)


def main(argv: Sequence[str]) -> int:
    """`plot.py [WORKDIR ...]`; returns the exit status."""
    return command.for_each_result(draw, RESULTS, argv, "Draws figures and writes summary.csv.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
