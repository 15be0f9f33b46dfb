"""Draws the figure of a work directory from its files alone.

python experiments/test_time_regression/plot.py                  # the committed results
python experiments/test_time_regression/plot.py runs/test_time_regression
"""

import itertools
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from lla.experiments.test_time_regression import summary
from lla.runs import command, figures, styles, tables
from lla.runs.workdir import read_config, read_records

RESULTS = pathlib.Path(__file__).parent / "results"


def draw(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes summary.csv and the figure, PNG and SVG, into the work directory; returns paths."""
    path = pathlib.Path(path)
    figure, rows = make(path)
    written = tables.write_csv(path / "summary.csv", rows)
    return [written, *figures.save(figure, path, "test-time regression")]


def make(path: pathlib.Path):
    """The figure and the rows of summary.csv."""
    config = read_config(path)
    if config["experiment"] == "series":
        rows = summary.series_table(path)
        figure = _series(path, rows)
    else:
        rows = summary.synthetic_table(path)
        if not config["segment_lengths"]:
            figure = _dimensions(rows, config)
        else:
            figure = _synthetic(config, summary.select(read_records(path)), rows)
    return figure, rows


def _synthetic(config, chosen, rows):
    kinds = [kind for kind in ("iid_keys", "smooth") if kind in config["kinds"]]
    figure, axes = figures.new(2, 2, height=5.5)
    dim, segment_length = config["dim"], config["segment_length"]
    _by_position(axes[0, 0], config, chosen)
    at_dim = [row for row in rows if row["kind"] == "piecewise" and row["dim"] == dim]
    _scan(axes[0, 1], at_dim, "segment_length", "error")
    axes[0, 1].set(xlabel="segment length S", ylabel="mean squared error")
    axes[0, 1].set_title(f"total error against segment length, d = {dim}")
    at_length = [
        row
        for row in rows
        if row["kind"] == "piecewise" and row["segment_length"] == segment_length
    ]
    _scan(axes[1, 0], at_length, "dim", "ratio_to_lla", "ratio_band95")
    axes[1, 0].axhline(1.0, color=styles.style("lla").colour, linewidth=1.8)
    axes[1, 0].set(xlabel="dimension d", ylabel="error / error of LLA")
    axes[1, 0].set_title(f"ratio to LLA against dimension, S = {segment_length}")
    _kinds(axes[1, 1], rows, ["piecewise", *kinds], dim, segment_length)
    for axis in axes.flat:
        figures.log_axis(axis)
    figures.legend(figure, [axes[0, 1]])
    bars = f"{config['sequences']} sequences"
    if config["scan_sequences"] != config["sequences"]:
        bars += f" at d = {dim}, S = {segment_length}, {config['scan_sequences']} elsewhere"
    figure.suptitle(f"n = {config['length']}; bands and bars: 95 % over {bars}")
    return figure


def _by_position(axis, config, chosen):
    dim, segment_length = config["dim"], config["segment_length"]
    width = config["position_bin"]
    axis.set_yscale("log")
    records = {k[3]: r for k, r in chosen.items() if k[:3] == ("piecewise", dim, segment_length)}
    for label in styles.ordered(records):
        error = np.asarray(records[label]["by_position"])
        half = 1.96 * np.asarray(records[label]["by_position_stderr"])
        x = (np.arange(len(error)) + 0.5) * width
        style, every = styles.style(label), max(1, len(error) // 8)
        look = {"markevery": (every // 2, every), "zorder": 5 if label == "lla" else 3}
        axis.plot(x, error, **style.options() | look)
        low = np.maximum(error - half, error / 10)  # a log axis has no room for zero
        axis.fill_between(x, low, error + half, color=style.colour, alpha=0.2, linewidth=0)
    for start in range(segment_length, config["length"], segment_length):
        axis.axvline(start, color="0.75", linewidth=0.8, zorder=0)
    axis.set(xlabel="position (grey: a new segment begins)", ylabel="mean squared error")
    axis.set(xlim=(0, config["length"]))
    axis.set_title(f"error by position, d = {dim}, S = {segment_length}")


def _scan(axis, rows, by, column, band=None):
    axis.set_yscale("log")
    for label in styles.ordered(row["label"] for row in rows):
        if label == "lla" and column.startswith("ratio"):
            continue  # 1 by definition: a line across, drawn by the caller
        line = sorted((row for row in rows if row["label"] == label), key=lambda row: row[by])
        x, y, half = (
            [row[key] for row in line] for key in (by, column, band or f"{column}_band95")
        )
        figures.marks(axis, styles.style(label), x, y, half)
    figures.length_axis(axis, [row[by] for row in rows])


def _kinds(axis, rows, kinds, dim, segment_length):
    """All estimators side by side, grouped by the law of the data."""
    titles = {
        "piecewise": "piecewise\nlinear",
        "iid_keys": "same keys in\nevery segment",
        "smooth": "one smooth\nmap",
    }
    axis.set_yscale("log")
    at, starts = 0, [0]
    for kind in kinds:
        here = {
            row["label"]: row
            for row in rows
            if (row["kind"], row["dim"], row["segment_length"]) == (kind, dim, segment_length)
        }
        for label in styles.ordered(here):
            row = here[label]
            figures.marks(axis, styles.style(label), [at], [row["error"]], [row["error_band95"]])
            at += 1
        at += 2
        starts.append(at)
    middles = [(low + high) / 2 - 1.5 for low, high in itertools.pairwise(starts)]
    axis.set_xticks(middles, labels=[titles[kind] for kind in kinds])
    axis.tick_params(axis="x", length=0)
    for start in starts[1:-1]:
        axis.axvline(start - 1.5, color="0.75", linewidth=0.8)
    axis.set(ylabel="mean squared error", xlim=(-1.5, starts[-1] - 1.5))
    axis.set_title(f"other laws of the data, d = {dim}, S = {segment_length}")


def _dimensions(rows, config):
    figure, axes = figures.new(width=5.0, height=3.1)
    axis = axes[0, 0]
    _scan(axis, rows, "dim", "error")
    figures.log_axis(axis)
    axis.set(xlabel="dimension d", ylabel="mean squared error")
    tuned = any("grid" in entry for entry in config["estimators"].values())
    what = "every estimator tuned at every dimension" if tuned else "fixed options"
    axis.set_title(f"S = {config['segment_length']}: {what}")
    figures.legend(figure, [axis], beside=True)
    return figure


def _series(path, rows):
    names = sorted({row["series"] for row in rows}, reverse=True)
    figure, axes = figures.new(2, len(names), height=5.6, height_ratios=(2, 3))
    for column, name in enumerate(names):
        _forecast(axes[0, column], summary.select_series(path, name))
        _errors(axes[1, column], [row for row in rows if row["series"] == name])
    figures.legend(figure, axes[0])
    return figure


def _forecast(axis, best):
    source, record = best["persistence"], best["lla"]
    times, observed = np.asarray(source["times"]), np.asarray(source["observed"])
    axis.plot(times, observed, color="0.6", linewidth=0.7, label="observed")
    index = record["target_index"]
    shown = index >= record["selection_end"]
    prediction = np.asarray(record["prediction"])[shown]
    look = styles.style("lla")
    label = f"{look.name}, one step ahead"
    axis.plot(times[index[shown]], prediction, color=look.colour, linewidth=0.7, label=label)
    first, end = times[record["first_reported"]], times[record["selection_end"]]
    axis.axvspan(times[0], first, color="0.93", zorder=0, label="scaling only")
    axis.axvspan(first, end, color="#FFF3D6", zorder=0, label="options chosen here")
    axis.set(xlabel="year", ylabel=source["unit"], title=source["title"])
    axis.margins(x=0)


def _errors(axis, rows):
    rows = sorted(rows, key=lambda row: -row["rmse"])
    for place, row in enumerate(rows):
        low, high = row["rmse"] - row["rmse_low95"], row["rmse_high95"] - row["rmse"]
        bars = [[max(low, 0.0)], [max(high, 0.0)]]
        look = {"linestyle": "none", "xerr": bars, "label": None}
        figures.marks(axis, styles.style(row["label"]), [row["rmse"]], [place], **look)
    names = []
    for row in rows:
        against = f"x{row['rmse_over_lla']:.2f} [{row['over_lla_low95']:.2f}, "
        against += f"{row['over_lla_high95']:.2f}]"
        own = row["label"] == "lla"
        names.append(styles.style(row["label"]).name + ("" if own else f"\n{against} of LLA"))
    axis.set_yticks(range(len(rows)), labels=names)
    axis.set_xlabel("RMSE, one step ahead\n(95 %, block bootstrap)")
    axis.grid(True, axis="x")


def main(argv: Sequence[str]) -> int:
    """`plot.py [WORKDIR ...]`; returns the exit status."""
    return command.for_each_result(draw, RESULTS, argv, "Draws figures and writes summary.csv.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
