"""Figures as files. Matplotlib, which the library does not need, is imported where it is used."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(
    figure: Figure,
    folder: str | os.PathLike,
    salt: str,
    *,
    name: str = "figure",
    dpi: float = 130,
    png_metadata: Mapping[str, str | None] | None = None,
) -> list[pathlib.Path]:
    """Writes a figure as PNG and SVG and closes it; returns the two paths.

    Equal figures give equal bytes with one version of Matplotlib: no date, no random ids.

    Args:
      figure: of `matplotlib.pyplot`.
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
