"""The figure, from a result file alone.

python experiments/memory_and_time/plot.py               # results/figure.png and figure.svg
python experiments/memory_and_time/plot.py FILE FOLDER   # of another result file
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import summary
from benches import measure, report
from matplotlib.lines import Line2D

from lla.experiment import figures

HEADS = 8  # of the figure, if they were measured
# Okabe and Ito's palette, told apart under the common colour-vision deficiencies.
STYLES = {
    "dense": ("#000000", "X", "-"),
    "dense_matrices": ("#E69F00", "v", "-"),
    "lla_direct": ("#009E73", "^", "-"),
    "lla_cg": ("#D55E00", "o", "-"),
    "mesanet": ("#56B4E9", "p", "-"),
    "softmax": ("#0072B2", "s", "-"),
    "jax_softmax": ("#CC79A7", "D", "--"),
}
PANELS = [(field, which) for field in ("memory", "time") for which in report.PASSES]


def main_result(results: pathlib.Path = summary.RESULTS) -> pathlib.Path:
    """The result file of the figure: that of an accelerator, if there is one."""
    return min(results.glob("*.json"), key=lambda path: (path.stem == "cpu", path.stem))


def draw(path: str | pathlib.Path, folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes figure.png and figure.svg of a result file into `folder`; returns paths."""
    document = measure.load(path)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return figures.save(
        _figure(document), folder, "memory and time", dpi=120, png_metadata={"Software": None}
    )


def _figure(document):
    every = document["records"]
    counts = {record["heads"] for record in every}
    heads = HEADS if HEADS in counts else min(counts)
    records = [record for record in every if record["heads"] == heads]
    head_dims = sorted({record["head_dim"] for record in records})
    limit = document["header"]["settings"]["memory_limit_gib"]
    figure, axes = plt.subplots(
        len(head_dims), len(PANELS), figsize=(3.5 * len(PANELS), 0.9 + 3.1 * len(head_dims)),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, head_dim in zip(axes, head_dims, strict=True):
        here = [record for record in records if record["head_dim"] == head_dim]
        for axis, (field, which) in zip(row, PANELS, strict=True):
            _panel(axis, here, field, which, limit)
            axis.set_title(f"{report.PASSES[which]}, d = {head_dim}", fontsize=10)
            axis.set_ylabel("temporary memory, MiB" if field == "memory" else "time, ms")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length n")
        axis.set_xlim(auto=True)
    names = [name for name in STYLES if any(r["implementation"] == name for r in records)]
    figure.legend(handles=_legend(names, limit), loc="outside lower center", ncols=5, frameon=False)
    dtypes = ", ".join(sorted({record["dtype"] for record in records}))
    device = document["header"]["device"]["kind"]
    figure.suptitle(f"{device}, {dtypes}, causal, B*H = {heads}", fontsize=11)
    return figure


def _panel(axis, records, field, which, limit):
    for place, (name, (colour, marker, line)) in enumerate(STYLES.items()):
        found = summary.series(records, implementation=name, which=which)
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
        if field == "memory":
            known = {n: summary.memory(record) for n, record in found.items()}
            known = {n: amount / 2**20 for n, amount in known.items() if amount}
            axis.plot(list(known), list(known.values()), **style)
        else:
            timed = {n: record for n, record in found.items() if record["status"] == "timed"}
            milliseconds = [1e3 * record["time_median_s"] for record in timed.values()]
            axis.plot(list(timed), milliseconds, **style)
        lost = [n for n, record in found.items() if summary.state(record) == "out of memory"]
        if field == "memory":
            axis.plot(
                [n for n in lost if n in known], [known[n] for n in lost if n in known], "x",
                color="red", markersize=9, markeredgewidth=1.6, zorder=5,
            )  # fmt: skip
        else:
            # At the top of the panel, one line for each series.
            axis.plot(
                lost, [0.98 - 0.045 * place] * len(lost), "x", color=colour, markersize=7,
                markeredgewidth=1.6, transform=axis.get_xaxis_transform(),
            )  # fmt: skip
    if field == "memory":
        axis.axhline(limit * 2**10, color="0.5", linestyle=":", zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(color="0.92", zorder=0)
    axis.set_axisbelow(True)


def _legend(names, limit):
    handles = []
    for name in names:
        colour, marker, line = STYLES[name]
        label = summary.LABELS[name]
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=line, label=label))
    cross = {"linestyle": "none", "marker": "x", "color": "red", "markersize": 8}
    handles.append(Line2D([], [], label=f"out of memory: above {limit:g} GiB, not run", **cross))
    return handles


def main(arguments: Sequence[str]) -> int:
    """Draws the figure of the committed results, or of FILE into FOLDER."""
    path, folder = arguments or (main_result(), summary.RESULTS)
    for written in draw(path, folder):
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
