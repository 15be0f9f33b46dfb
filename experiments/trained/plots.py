"""Drawing the figures of trained models: lines, learning curves, files.

The plot.py of in_context_regression/, mqar/ and state_tracking/ use this module.
"""

import math
import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from lla.experiments.trained import curves
from lla.experiments.trained import tables as shared
from lla.runs import figures

SALT = "trained figures"
SEEDS = {"linestyle": "none", "marker": "o", "markersize": 2.2, "markeredgewidth": 0, "alpha": 0.45}


def draw_lines(
    axis,
    found: Sequence[shared.Point],
    x: Callable[[shared.Point], float],
    values: Callable[[shared.Point], Sequence[float]] = lambda point: point.values,
) -> None:
    """Mean and standard deviation of every point, with a line for each mechanism.

    Points that diverged are left out. Fewer than three points are not joined by a line.

    Args:
      axis: of Matplotlib. If its vertical scale is to be logarithmic, set that before.
      found: at most one point for each label and value of `x`.
      x, values: of a point; the values are those of its seeds.
    """
    for label in dict.fromkeys(point.label for point in found):
        here = sorted((p for p in found if p.label == label and values(p)), key=x)
        if here:
            mean, std = zip(*(shared.mean_std(values(point)) for point in here), strict=True)
            figures.marks(axis, here[0].style, [x(point) for point in here], mean, std)


def curves_figure(
    experiment: shared.Experiment,
    found: Sequence[shared.Point],
    folder: pathlib.Path,
    panel: Callable[[shared.Point], Hashable],
    titles: Mapping[Hashable, str],
    *,
    columns: int | None = None,
    log: bool = False,
):
    """The learning curves of the points `found`, or None if the folder has none.

    A curve is the mean of the seeds. Mechanisms with a filled marker have a band from the smallest
    to the largest value; the others have none, to keep the figure legible.

    Args:
      experiment, found, folder: as in `curves.read`.
      panel: the panel that a point belongs to.
      titles: panel -> its title, in order. Panels without curves are left out.
      columns: panels in a row; by default up to four.
      log: whether the vertical axes are logarithmic.
    """
    metric, known = curves.read(experiment, found, folder)
    titles = {key: text for key, text in titles.items() if any(panel(p) == key for p, _ in known)}
    if not titles:
        return None
    if columns is None:
        columns = 3 if len(titles) in (5, 6, 9) else min(len(titles), 4)
    rows = math.ceil(len(titles) / columns)
    figure, axes = figures.new(rows, columns, height=0.9 + 1.45 * rows, sharey=True)
    flat = list(axes.flat)
    for axis, (key, title) in zip(flat, titles.items(), strict=False):
        here = [(point, curve) for point, curve in known if panel(point) == key]
        if log:
            axis.set_yscale("log")
        for point, (steps, values) in here:
            trained = steps > 0  # zero has no place on a logarithmic axis
            steps, values = steps[trained], values[:, trained]
            style = point.style
            last = {"markevery": [len(steps) - 1], "zorder": 4 if point.mechanism == "lla" else 3}
            axis.plot(steps, values.mean(0), label=style.name, **style.options() | last)
            if style.filled:
                low, high = values.min(0), values.max(0)
                axis.fill_between(steps, low, high, color=style.colour, alpha=0.13, linewidth=0)
        axis.set_title(title)
        axis.grid(True, axis="y")
        figures.log_axis(axis, "x", most=4 if columns > 3 else 5)
    for axis in flat[len(titles) :]:
        axis.set_axis_off()
    for axis in flat[max(0, len(titles) - columns) : len(titles)]:
        axis.set_xlabel("updates")
    for axis in axes[:, 0]:
        axis.set_ylabel(metric.replace("/", " "))
        if log:
            figures.log_axis(axis, "y")
        else:
            axis.set_ylim(0, 1.03)
    figure.suptitle(f"Mean of {shared.seeds(found)}; bands from the least to the largest")
    figures.legend(figure, flat)
    return figure


def save(drawn: Mapping[str, object], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes figures into `folder`; `drawn` has them, or None, by the name of their files."""
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            paths += figures.save(figure, folder, SALT, name=name)
    return paths


def plot_command(
    experiment: shared.Experiment, draw: Callable[..., Mapping[str, object]], argv: Sequence[str]
) -> int:
    """`plot.py [FOLDER] [--variant V]`.

    `draw` takes points, folder and variant, and returns the figures by the names of their files.
    """
    command = shared.parser(experiment, "Draws the figures as PNG and SVG.")
    options = command.parse_args(argv)

    def work():
        found = experiment.points(options.folder)
        return save(draw(found, options.folder, options.variant), options.folder)

    return shared.report(work)


def seed_marks(axis, at: float, values: Sequence[float], colour: str) -> None:
    """A small mark for each of the values of a point's seeds, on the horizontal line at `at`."""
    axis.plot(values, np.full(len(values), at), color=colour, zorder=2, **SEEDS)
