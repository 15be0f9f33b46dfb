"""Figures of a work directory, from its files alone.

python experiments/test_time_regression/plot.py                  # the committed results
python experiments/test_time_regression/plot.py runs/test_time_regression
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import summary
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lla.experiment import command, figures, tables
from lla.experiment.workdir import read_config, read_records

RESULTS = pathlib.Path(__file__).parent / "results"
# Okabe and Ito's palette, told apart under the common colour-vision deficiencies; every estimator
# keeps its colour and marker in all figures.
STYLES = {
    "lla": ("LLA", "#D55E00", "o"),
    "softmax": ("Softmax", "#0072B2", "s"),
    "mesanet": ("MesaNet", "#009E73", "^"),
    "mesanet_decay": ("MesaNet, decay", "#009E73", "v"),
    "linear_attention": ("Linear attention", "#8C8C8C", "D"),
    "gated_linear_attention": ("GLA, fixed gate", "#8C8C8C", "P"),
    "deltanet": ("DeltaNet", "#CC79A7", "<"),
    "gated_deltanet": ("Gated DeltaNet", "#CC79A7", ">"),
    "persistence": ("Persistence", "#000000", "X"),
    "autoregression": ("Autoregression", "#56B4E9", "*"),
    "oracle": ("Oracle (segments known)", "#000000", "_"),
}
_DASHED = {"mesanet_decay", "gated_linear_attention", "gated_deltanet", "oracle"}


def draw(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes summary.csv and the figure, PNG and SVG, into the work directory; returns paths."""
    path = pathlib.Path(path)
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
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
    written = tables.write_csv(path / "summary.csv", rows)
    return [written, *figures.save(figure, path, "test-time regression", dpi=150)]


def _style(label):
    name, colour, marker = STYLES.get(label, (label, None, "o"))
    dash = (0, (4, 2)) if label in _DASHED else "-"
    return {"label": name, "color": colour, "marker": marker, "linestyle": dash}


def _log_axis(axis):
    """A logarithmic y axis with plain numbers at 1, 2 and 5, and light lines there."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="0.92", zorder=0)
    axis.set_axisbelow(True)


def _ordered(labels):
    known = list(STYLES)
    return sorted(labels, key=lambda label: known.index(label) if label in known else len(known))


def _synthetic(config, chosen, rows):
    kinds = [kind for kind in ("iid_keys", "smooth") if kind in config["kinds"]]
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.6), layout="constrained")
    dim, segment_length = config["dim"], config["segment_length"]
    lines = _by_position(axes[0, 0], config, chosen)
    at_dim = [row for row in rows if row["kind"] == "piecewise" and row["dim"] == dim]
    _scan(axes[0, 1], at_dim, "segment_length", "error")
    axes[0, 1].set(xlabel="segment length S", ylabel="mean squared error")
    axes[0, 1].set_title(f"Total error against segment length (d = {dim})")
    at_length = [
        row
        for row in rows
        if row["kind"] == "piecewise" and row["segment_length"] == segment_length
    ]
    _scan(axes[1, 0], at_length, "dim", "ratio_to_lla", "ratio_band95")
    axes[1, 0].axhline(1.0, color=STYLES["lla"][1], linewidth=2.5)
    axes[1, 0].set(xlabel="dimension d", ylabel="error / error of LLA")
    axes[1, 0].set_title(f"Ratio to LLA against dimension (S = {segment_length})")
    _kinds(axes[1, 1], rows, ["piecewise", *kinds], dim, segment_length)
    for axis in axes.flat:
        _log_axis(axis)
    figure.legend(handles=lines, loc="outside lower center", ncols=5, frameon=False)
    bands = f"{config['sequences']} sequences"
    if config["scan_sequences"] != config["sequences"]:
        bands += f" at d = {dim}, S = {segment_length}, {config['scan_sequences']} elsewhere"
    title = f"Test-time regression, n = {config['length']}; bands: 95 % over {bands}"
    figure.suptitle(title, fontsize=11)
    return figure


def _by_position(axis, config, chosen):
    dim, segment_length = config["dim"], config["segment_length"]
    width = config["position_bin"]
    lines = []
    records = {k[3]: r for k, r in chosen.items() if k[:3] == ("piecewise", dim, segment_length)}
    for label in _ordered(records):
        error = np.asarray(records[label]["by_position"])
        half = 1.96 * np.asarray(records[label]["by_position_stderr"])
        x = (np.arange(len(error)) + 0.5) * width
        style = _style(label) | {"markevery": max(1, len(error) // 12), "markersize": 5}
        lines += axis.plot(x, error, linewidth=2.4 if label == "lla" else 1.3, **style)
        low = np.maximum(error - half, error / 10)  # a log axis has no room for zero
        axis.fill_between(x, low, error + half, color=style["color"], alpha=0.2, linewidth=0)
    for start in range(segment_length, config["length"], segment_length):
        axis.axvline(start, color="0.75", linewidth=1, zorder=0)
    axis.set(xlabel="position (grey: a new segment begins)", ylabel="mean squared error")
    axis.set(xlim=(0, config["length"]))
    axis.set_title(f"Error by position (d = {dim}, S = {segment_length})")
    return lines


def _scan(axis, rows, by, column, band=None):
    for label in _ordered(dict.fromkeys(row["label"] for row in rows)):
        if label == "lla" and column.startswith("ratio"):
            continue  # 1 by definition: a line across, drawn by the caller
        line = sorted((row for row in rows if row["label"] == label), key=lambda row: row[by])
        x = [row[by] for row in line]
        y = np.array([row[column] for row in line])
        half = np.array([row[band or f"{column}_band95"] for row in line])
        style = _style(label)
        axis.plot(x, y, linewidth=2.4 if label == "lla" else 1.3, markersize=6, **style)
        axis.fill_between(
            x, np.maximum(y - half, y / 10), y + half, color=style["color"], alpha=0.2, linewidth=0
        )
    axis.set_xscale("log", base=2)
    ticks = sorted({row[by] for row in rows})
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])


def _kinds(axis, rows, kinds, dim, segment_length):
    titles = {
        "piecewise": "piecewise\nlinear",
        "iid_keys": "same keys in\nevery segment",
        "smooth": "one smooth\nmap",
    }
    for place, kind in enumerate(kinds):
        here = [
            row
            for row in rows
            if (row["kind"], row["dim"], row["segment_length"]) == (kind, dim, segment_length)
        ]
        labels = _ordered(dict.fromkeys(row["label"] for row in here))
        for label in labels:
            row = next(row for row in here if row["label"] == label)
            style = _style(label) | {"linestyle": "none"}
            offset = 0.07 * (list(STYLES).index(label) - 4.5) if label in STYLES else 0.0
            band = row["error_band95"]
            axis.errorbar(place + offset, row["error"], band, markersize=8, capsize=3, **style)
    axis.set_xticks(range(len(kinds)), labels=[titles[kind] for kind in kinds])
    axis.set(ylabel="mean squared error", xlim=(-0.5, len(kinds) - 0.5))
    for place in range(1, len(kinds)):
        axis.axvline(place - 0.5, color="0.75", linewidth=1)
    axis.set_title(f"Other laws of the data (d = {dim}, S = {segment_length})")


def _dimensions(rows, config):
    figure, axis = plt.subplots(figsize=(9.5, 6.2), layout="constrained")
    _scan(axis, rows, "dim", "error")
    _log_axis(axis)
    axis.set(xlabel="dimension d", ylabel="mean squared error")
    tuned = any("grid" in entry for entry in config["estimators"].values())
    what = "every estimator tuned at every dimension" if tuned else "fixed options"
    axis.set_title(f"Error against dimension, S = {config['segment_length']}: {what}", fontsize=11)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _series(path, rows):
    names = sorted({row["series"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(
        2, len(names), figsize=(7 * len(names), 9), layout="constrained", squeeze=False
    )
    for column, name in enumerate(names):
        _forecast(axes[0, column], summary.select_series(path, name))
        _errors(axes[1, column], [row for row in rows if row["series"] == name])
    return figure


def _forecast(axis, best):
    source, record = best["persistence"], best["lla"]
    times, observed = np.asarray(source["times"]), np.asarray(source["observed"])
    axis.plot(times, observed, color="0.6", linewidth=1.2, label="observed")
    index = record["target_index"]
    shown = index >= record["selection_end"]
    prediction = np.asarray(record["prediction"])[shown]
    label, colour, _ = STYLES["lla"]
    label = f"{label}, one step ahead"
    axis.plot(times[index[shown]], prediction, color=colour, linewidth=1.0, label=label)
    first, end = times[record["first_reported"]], times[record["selection_end"]]
    axis.axvspan(times[0], first, color="0.93", zorder=0, label="scaling only")
    axis.axvspan(first, end, color="#FFF3D6", zorder=0, label="options chosen here")
    axis.set(xlabel="year", ylabel=source["unit"], title=source["title"])
    axis.margins(x=0)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    axis.legend(loc="upper center", ncols=2, fontsize=9, framealpha=0.9)


def _errors(axis, rows):
    rows = sorted(rows, key=lambda row: -row["rmse"])
    for place, row in enumerate(rows):
        _, colour, marker = STYLES[row["label"]]
        low, high = row["rmse"] - row["rmse_low95"], row["rmse_high95"] - row["rmse"]
        axis.errorbar(
            row["rmse"],
            place,
            xerr=[[max(low, 0.0)], [max(high, 0.0)]],
            color=colour,
            marker=marker,
            markersize=9,
            capsize=3,
        )
    names = []
    for row in rows:
        against = f"x{row['rmse_over_lla']:.2f} [{row['over_lla_low95']:.2f}, "
        against += f"{row['over_lla_high95']:.2f}]"
        own = row["label"] == "lla"
        names.append(STYLES[row["label"]][0] + ("" if own else f"\n{against} of LLA"))
    axis.set_yticks(range(len(rows)), labels=names, fontsize=9)
    axis.set_xlabel("root mean squared error, one step ahead (95 %, block bootstrap)")
    axis.grid(axis="x", color="0.9")


def redraw(path: pathlib.Path) -> None:
    """Draws a work directory and prints what was written."""
    for written in draw(path):
        print(written)


if __name__ == "__main__":
    sys.exit(command.for_each_result(redraw, RESULTS, sys.argv[1:]))
