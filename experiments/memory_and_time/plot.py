"""Draws the figure from a result file alone.

python experiments/memory_and_time/plot.py               # results/figure.png and figure.svg
python experiments/memory_and_time/plot.py FILE FOLDER   # of another result file
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from matplotlib.lines import Line2D

from lla.experiments.benchmarks.formatting import PASSES
from lla.experiments.benchmarks.results import load
from lla.experiments.memory_and_time import summary
from lla.runs import figures, styles

HEADS = 8  # of the figure, if they were measured
PANELS = [(field, which) for field in ("memory", "time") for which in PASSES]
_CROSS = {"linestyle": "none", "marker": "x", "markeredgewidth": 1.1}


def main_result(results: pathlib.Path = summary.RESULTS) -> pathlib.Path:
    """The result file of the figure: an accelerator's if there is one."""
    return min(results.glob("*.json"), key=lambda path: (path.stem == "cpu", path.stem))


def draw(path: str | pathlib.Path, folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes figure.png and figure.svg of a result file into `folder`; returns paths."""
    figure = make(load(path))
    return figures.save(figure, folder, "memory and time", png_metadata={"Software": None})


def make(document):
    """The figure of a result file: memory and time by length, a row for each head dimension."""
    every = document["records"]
    counts = {record["heads"] for record in every}
    heads = HEADS if HEADS in counts else min(counts)
    records = [record for record in every if record["heads"] == heads]
    head_dims = sorted({record["head_dim"] for record in records})
    limit = document["header"]["settings"]["memory_limit_gib"]
    figure, axes = figures.new(
        len(head_dims), len(PANELS), height=0.85 + 1.75 * len(head_dims), sharex=True
    )
    for row, head_dim in zip(axes, head_dims, strict=True):
        here = [record for record in records if record["head_dim"] == head_dim]
        for axis, (field, which) in zip(row, PANELS, strict=True):
            (_memory if field == "memory" else _time)(axis, here, which, limit)
        row[0].set_ylabel(f"d = {head_dim}: memory, MiB")
        row[2].set_ylabel(f"d = {head_dim}: time, ms")
    for axis, (field, which) in zip(axes[0], PANELS, strict=True):
        what = "temporary memory" if field == "memory" else "time"
        axis.set_title(f"{what},\n{PASSES[which]}")
    lengths = sorted({record["n"] for record in records})
    # One scale for both passes and all dimensions, with room for the crosses above the times.
    for pair, room in ((axes[:, :2], 1.0), (axes[:, 2:], 12.0)):
        limits = [axis.get_ylim() for axis in pair.flat]
        low, high = min(low for low, _ in limits), max(high for _, high in limits) * room
        for axis in pair.flat:
            axis.set_ylim(low, high)
            figures.length_axis(axis, lengths, most=4)
            figures.log_axis(axis, most=6)
            axis.grid(True, axis="x")
    for column in (1, 3):
        for axis in axes[:, column]:
            axis.tick_params(labelleft=False)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length n")
    names = [name for name in summary.NAMES if any(r["implementation"] == name for r in records)]
    handles = [
        Line2D([], [], label=styles.style(name).name, **styles.style(name).options())
        for name in names
    ]
    label = f"out of memory: above {limit:g} GiB, not run"
    handles.append(Line2D([], [], label=label, color="red", markersize=5, **_CROSS))
    figures.add_legend(figure, handles)
    dtypes = ", ".join(sorted({record["dtype"] for record in records}))
    device = document["header"]["device"]["kind"]
    figure.suptitle(f"{device}, {dtypes}, causal, B*H = {heads}")
    return figure


def _lost(found):
    return [n for n, record in found.items() if summary.state(record) == "out of memory"]


def _memory(axis, records, which, limit):
    """Temporary memory as compiled, with crosses where a call was not run."""
    axis.set_yscale("log")
    for name in summary.NAMES:
        found = summary.series(records, implementation=name, which=which)
        known = {n: summary.memory(record) for n, record in found.items()}
        known = {n: amount / 2**20 for n, amount in known.items() if amount}
        if known:
            figures.marks(axis, styles.style(name), list(known), list(known.values()))
        lost = [n for n in _lost(found) if n in known]
        axis.plot(lost, [known[n] for n in lost], color="red", markersize=5, zorder=6, **_CROSS)
    axis.axhline(limit * 2**10, color="0.5", linestyle=":", zorder=0)


def _time(axis, records, which, limit):
    """Median times, with bars down to the fastest; crosses for calls that were not run."""
    del limit
    axis.set_yscale("log")
    place = 0.96
    for name in summary.NAMES:
        found = summary.series(records, implementation=name, which=which)
        timed, look = summary.settled(found), styles.style(name)
        if timed:
            median = [1e3 * record["time_median_s"] for record in timed.values()]
            least = [1e3 * record["time_min_s"] for record in timed.values()]
            down = [high - low for high, low in zip(median, least, strict=True)]
            figures.marks(axis, look, list(timed), median, down, [0.0] * len(down))
        if lost := _lost(found):
            axis.plot(
                lost, [place] * len(lost), color=look.colour, markersize=4, label=None,
                transform=axis.get_xaxis_transform(), **_CROSS,
            )  # fmt: skip
            place -= 0.055


def main(argv: Sequence[str]) -> int:
    """`plot.py [FILE] [FOLDER]`; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draws figure.png and figure.svg.")
    parser.add_argument(
        "file", nargs="?", type=pathlib.Path, default=main_result(), help="a result file"
    )
    parser.add_argument(
        "folder", nargs="?", type=pathlib.Path, default=summary.RESULTS, help="for the figure"
    )
    options = parser.parse_args(argv)
    print(*draw(options.file, options.folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
