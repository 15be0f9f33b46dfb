"""Figures at the size of print, and as files.

A figure is between a column (`COLUMN`) and a page (`PAGE`) of a paper wide, in inches, and its text
has 7 to 8 points. The library does not need Matplotlib, which is imported where it is used.
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
    """A figure with constrained layout, and its axes `[rows, columns]`.

    Args:
      rows, columns: number of axes.
      width, height: in inches.
      **options: for `matplotlib.figure.Figure.subplots`.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not Pyplot's, which keeps figures and opens windows
    except ImportError as error:
        raise ImportError('figures need Matplotlib: pip install "lla-jax[plot]"') from error

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
    """Draws points with error bars, joined by a line if there are three or more.

    Args:
      axis: to draw on.
      style: of the series.
      x, y: of the points, in the order of the line.
      low, high: how far the error bars reach down and up; None for no bars. On a logarithmic axis,
        a bar that would reach zero ends at a tenth of the value.
      **options: for `Axes.errorbar`; they override those of `style`.
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
    """Makes the horizontal axis logarithmic, with a tick for each of `values`.

    If there are more than `most`, only every second, third and so on has a label. From 1024 on,
    labels are in multiples of k = 1024.
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
    """Makes an axis logarithmic, with at least three labelled ticks. To be called last.

    Ticks are at 1, 2 and 5 times powers of ten, or at fewer or more multiples, so that there are
    between 3 and `most`. If the axis reaches far from 1, ticks are powers of ten, if possible, and
    written as powers.
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
    """Round numbers between `low` and `high`: at least 3 and, if possible, at most `most`.

    With `powers`, powers of ten, if there are enough of them.

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
    """Adds one legend for all `axes`, below them or `beside` them, with every name once.

    Series come first, in the order of `lla.runs.styles`, and other entries after them.
    """
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        for handle, name in zip(handles, names, strict=True):
            entries.setdefault(name, handle)
    add_legend(figure, [entries[name] for name in sorted(entries, key=rank_of_name)], beside)


def add_legend(figure: Figure, handles: Sequence[Any], beside: bool = False) -> None:
    """Adds a legend of labelled `handles`, in as many columns as fit."""
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
    """Writes a figure as PNG and SVG, and closes it if it is Pyplot's; returns the two paths.

    With one version of Matplotlib, equal figures give equal bytes: there are no dates and no random
    ids in the files.

    Args:
      figure: of Matplotlib.
      folder: created if it does not exist.
      salt: the ids in the SVG depend on it.
      name: of the files, without an ending.
      dpi: resolution of the PNG.
      png_metadata: changes to Matplotlib's metadata; `{"Software": None}` omits its version.

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
