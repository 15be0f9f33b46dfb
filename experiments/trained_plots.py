"""How the figures of trained models are drawn: lines, legend, files.

The scripts plot.py in in_context_regression/, mqar/ and state_tracking/ use it.
"""

import pathlib
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from experiments import trained_figures as shared
from lla.experiment import figures


def draw_lines(
    axis: plt.Axes,
    found: Sequence[shared.Point],
    x: Callable[[shared.Point], float],
    values: Callable[[shared.Point], Sequence[float]] = lambda point: point.values,
    *,
    log2: bool = False,
    dots: bool = False,
) -> None:
    """A line for each mechanism, mean and standard deviation; without points that diverged.

    Args:
      axis: where.
      found: at most one point for each mechanism and value of `x`.
      x, values: of a point; the values are those of its seeds.
      log2: whether the horizontal axis is logarithmic. Lines are moved a little sideways, so that
        equal values stay visible.
      dots: whether every seed is shown instead of the standard deviation.
    """
    order = list(dict.fromkeys(point.mechanism for point in found))
    for place, mechanism in enumerate(order):
        _, colour, marker, line = shared.STYLES.get(mechanism, (mechanism, "#555555", "h", "-."))
        shift = 0.25 * ((place + 0.5) / len(order) - 0.5)
        own = mechanism == "lla"
        style = {"color": colour, "zorder": 5 if own else 3}
        here = sorted((p for p in found if p.mechanism == mechanism and values(p)), key=x)
        at = np.array([x(point) * 2**shift if log2 else x(point) + shift for point in here])
        mean, std = np.array([shared.mean_std(values(point)) for point in here]).reshape(-1, 2).T
        # A logarithmic axis has no room for zero or less.
        down = np.minimum(std, 0.9 * np.abs(mean)) if axis.get_yscale() == "log" else std
        axis.errorbar(
            at, mean, None if dots else [down, std], marker=marker, linestyle=line, capsize=2,
            label=shared.label(mechanism), linewidth=2.8 if own else 1.3,
            markersize=9 if own else 6, elinewidth=1, **style,
        )  # fmt: skip
        if dots:
            for position, point in zip(at, here, strict=True):
                several = values(point)
                axis.plot(
                    [position] * len(several), several, linestyle="none", marker="o", markersize=4,
                    color=colour, alpha=0.35, markeredgewidth=0, zorder=2,
                )  # fmt: skip
    if log2:
        axis.set_xscale("log", base=2)
    ticks = sorted({x(point) for point in found})
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)


def new_figure(panels: int) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure with `panels` axes in one row."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, panels, figsize=(max(8.5, 5.2 * panels), 5.4), squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def save(figure: plt.Figure, axes: Sequence[plt.Axes], folder: pathlib.Path) -> list[pathlib.Path]:
    """Adds the legend, every name once, and writes figure.png and figure.svg; returns paths."""
    entries = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        entries |= {name: handle for handle, name in zip(handles, names, strict=True)}
    # Lines with error bars come last by themselves; the mechanisms are to come first.
    names = sorted(entries, key=lambda name: isinstance(entries[name], Line2D))
    below = {"loc": "outside lower center", "ncols": 5}
    beside = {"loc": "outside right center", "ncols": 1}
    figure.legend(
        [entries[name] for name in names], names, frameon=False, fontsize=10,
        **(below if len(axes) > 1 else beside),
    )  # fmt: skip
    return figures.save(figure, folder, "trained figures")


def plot_command(
    experiment: shared.Experiment, draw: Callable[..., list[pathlib.Path]], argv: Sequence[str]
) -> int:
    """`plot.py [FOLDER] [--variant V]`; `draw` takes points, folder and variant."""
    options = shared.parser(experiment, "Draws figure.png and figure.svg.").parse_args(argv)
    return shared.told(
        lambda: draw(experiment.points(options.folder), options.folder, options.variant)
    )
