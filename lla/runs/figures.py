"""Figures at the size in which they are printed, and as files.

A figure is as wide as a column (`COLUMN`) or as a page (`PAGE`) of a paper, in inches, with text
of 7 to 8 points. Matplotlib, which the library does not need, is imported where it is used.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lla.runs.styles import Style, rank_of_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.8  # inches
_SETTINGS = {
    "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5, "figure.titlesize": 8,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False,
    "legend.handlelength": 2.4, "legend.columnspacing": 1.4, "legend.labelspacing": 0.35,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "xtick.major.size": 2.5,
    "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlepad": 4,
    "lines.linewidth": 1.1, "lines.markersize": 4.5, "lines.markeredgewidth": 0.7,
    "grid.linewidth": 0.5, "grid.color": "0.92", "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 0.03, "figure.constrained_layout.w_pad": 0.03,
}  # fmt: skip


def new(
    rows: int = 1, columns: int = 1, *, width: float = PAGE, height: float, **options: Any
) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes `[rows, columns]`, laid out by itself.

    Args:
      rows, columns: of axes.
      width, height: in inches.
      **options: of `matplotlib.figure.Figure.subplots`.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without a window, and of nobody's list of figures

    matplotlib.rcParams.update(_SETTINGS)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def marks(
    axis: Axes,
    style: Style,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    **options: Any,
) -> None:
    """A mark for every point at its own place, with error bars; a line if there are three or more.

    Args:
      axis: where.
      style: of the series.
      x, y: of the points, in the order of the line.
      low, high: how far the error bars reach down and up; None for none. On a logarithmic axis one
        that would reach zero is cut at a tenth of the value.
      **options: of `Axes.errorbar`, over those of `style`.
    """
    options = {"label": style.name, "capsize": 1.6, "elinewidth": 0.7, "capthick": 0.7} | options
    options = style.options() | {"zorder": 5 if style.name.startswith("LLA") else 3} | options
    if len(x) < 3:
        options["linestyle"] = "none"
    bars = None
    if low is not None:
        cut = axis.get_yscale() == "log"
        down = [min(b, 0.9 * a) if cut else b for a, b in zip(y, low, strict=True)]
        bars = [down, list(low if high is None else high)]
    axis.errorbar(x, y, bars, **options)


def length_axis(axis: Axes, values: Sequence[float], most: int = 6) -> None:
    """A horizontal axis of sizes, logarithmic, with a tick for each of `values`.

    All of them are labelled, or every second and so on if they are more than `most`, in multiples
    of k = 1024 from there on.
    """
    values = sorted(set(values))
    axis.set_xscale("log", base=2)
    step, last = math.ceil(len(values) / most), len(values) - 1
    labels = ["" if (last - place) % step else _size(value) for place, value in enumerate(values)]
    axis.set_xticks(values, labels=labels)
    axis.minorticks_off()


def _size(value):
    return f"{value // 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def log_axis(axis: Axes, which: Literal["x", "y"] = "y", most: int = 7) -> None:
    """A logarithmic axis with three or more labelled ticks, once everything is drawn.

    They are at 1, 2 and 5 times powers of ten, or fewer or more multiples, so that there are
    between 3 and `most`. Where some are far from 1, powers of ten are preferred and written as
    such.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter

    getattr(axis, f"set_{which}scale")("log")
    low, high = sorted(getattr(axis, f"get_{which}lim")())
    far = low < 1e-3 or high > 1e5
    ticks = log_ticks(low, high, most, powers=far)
    side = getattr(axis, f"{which}axis")
    side.set_major_locator(FixedLocator(ticks))
    side.set_major_formatter(lambda value, _: _power(value) if far else f"{value:g}")
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = len(decades) <= 4
    minor = [k * 10.0**d for d in decades for k in (range(1, 10) if few else (1,))]
    side.set_minor_locator(FixedLocator([tick for tick in minor if low <= tick <= high]))
    side.set_minor_formatter(NullFormatter())
    axis.grid(True, axis=which)
    getattr(axis, f"set_{which}lim")(low, high)


def log_ticks(low: float, high: float, most: int = 7, powers: bool = False) -> list[float]:
    """Round numbers between `low` and `high`, at least 3 and, where possible, at most `most`.

    With `powers`, powers of ten if they are enough.

    Raises:
      ValueError: `low` is not positive or not below `high`.
    """
    if not 0 < low < high:
        raise ValueError(f"a logarithmic axis needs 0 < low < high, got {low} and {high}.")
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def inside(multiples, stride=1):
        shown = [d for d in decades if d % stride == 0]
        ticks = (float(f"{m}e{d}") for d in shown for m in multiples)
        return [tick for tick in ticks if low <= tick <= high]

    choices = [inside((1,), stride) for stride in range(1, len(decades) + 1)]
    several = [inside((1, 2, 5)), inside((1, 3))]
    choices = choices + several if powers else several + choices
    for ticks in choices:
        if 3 <= len(ticks) <= most:
            return ticks
    for multiples in ((1, 1.5, 2, 3, 5, 7), range(1, 10), [m / 10 for m in range(10, 100)]):
        if len(ticks := inside(multiples)) >= 3:
            return ticks[:: math.ceil(len(ticks) / most)]
    return [low, math.sqrt(low * high), high]


def _power(value):
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10.0**exponent
    return f"$10^{{{exponent}}}$" if math.isclose(factor, 1) else f"${factor:g}·10^{{{exponent}}}$"


def legend(figure: Figure, axes: Sequence[Axes], beside: bool = False) -> None:
    """One legend for all `axes`, every name once, below them or `beside` them.

    Series come first, in the order of `lla.runs.styles`, what is no series after them.
    """
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        for handle, name in zip(handles, names, strict=True):
            entries.setdefault(name, handle)
    add_legend(figure, [entries[name] for name in sorted(entries, key=rank_of_name)], beside)


def add_legend(figure: Figure, handles: Sequence[Any], beside: bool = False) -> None:
    """A legend of `handles` with labels, in as many columns as the figure has room for."""
    names = [handle.get_label() for handle in handles]
    if beside:
        figure.legend(handles, names, loc="outside right center")
        return
    for columns in range(min(6, len(names)), 0, -1):
        made = figure.legend(handles, names, loc="outside lower center", ncols=columns)
        if columns == 1 or made.get_window_extent().width < 0.98 * figure.bbox.width:
            return
        made.remove()


def save(
    figure: Figure,
    folder: str | os.PathLike,
    salt: str,
    *,
    name: str = "figure",
    dpi: float = 220,
    png_metadata: Mapping[str, str | None] | None = None,
) -> list[pathlib.Path]:
    """Writes a figure as PNG and SVG and, if it is Pyplot's, closes it; returns the two paths.

    Equal figures give equal bytes with one version of Matplotlib: no date, no random ids.

    Args:
      figure: of Matplotlib.
      folder: created if it does not exist.
      salt: what the ids of the SVG are made from, beside the figure.
      name: of the files, without an ending.
      dpi: resolution of the PNG.
      png_metadata: changes to Matplotlib's own; `{"Software": None}` leaves out its version.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    import matplotlib
    from matplotlib import pyplot

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        for kind, metadata in (("png", png_metadata), ("svg", {"Date": None})):
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=dpi, metadata=metadata)
    pyplot.close(figure)
    return written
