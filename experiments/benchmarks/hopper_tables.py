"""Tables and figure of `hopper.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lla.experiments.benchmarks.formatting import (
    PASSES,
    cell_text,
    exponents,
    mebibytes,
    number,
    provenance,
    ratio,
    series,
)
from lla.runs import figures, styles, tables

CAPTION = "Time against length and ridge"
_MECHANISMS = ("softmax", "parallax", "lla")


def _rows(records) -> list[tuple]:
    """The rows of a table: implementation, mechanism, ridge, kind of ridge, inputs."""
    fields = ("implementation", "mechanism", "ridge", "ridge_kind", "inputs")
    keys = {tuple(record[name] for name in fields) for record in records}
    order = ("normal", "anisotropic", "clustered", "offset", "sharp")
    return sorted(
        (key for key in keys if key[1] in _MECHANISMS),
        key=lambda key: (
            _MECHANISMS.index(key[1]), key[0] in ("cudnn", "torch_flash"), order.index(key[4]),
            key[3] or "", -(key[2] or 0), key[0],
        ),
    )  # fmt: skip


def _cells(records, key: tuple) -> dict[str, dict]:
    """The records of a row, by pass."""
    fields = ("implementation", "mechanism", "ridge", "ridge_kind", "inputs")
    return {r["pass"]: r for r in records if tuple(r[name] for name in fields) == key}


def _label(key: tuple) -> str:
    names = {"cudnn": "cuDNN", "torch_flash": "PyTorch flash"}
    text = f"{names.get(key[0], key[0])}, {key[1]}"
    if key[2] is not None:
        text += f", ridge {key[2]:g}" + (" as an array" if key[3] == "array" else "")
    return text


def _rate(record: Mapping | None) -> str:
    if not record or record["status"] != "timed" or "flops" not in record:
        return ""
    return f"{record['flops'] / record['time_median_s'] / 1e12:.0f}"


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    groups = {name: [] for name in ("accuracy", "speed", "growth")}
    for record in document["records"]:
        groups[record["group"]].append(record)
    parts = [provenance(document)]
    peak = [_rate(r) for r in groups["speed"] if r["mechanism"] == "matmul"]
    if peak and peak[0]:
        parts.append(f"Matrix product on the same card: {peak[0]} TFLOP/s.")
    attention = [r for r in groups["speed"] if r["mechanism"] != "matmul"]
    for size in sorted({(r["head_dim"], r["batch"], r["heads"], r["n"]) for r in attention}):
        here = [r for r in attention if (r["head_dim"], r["batch"], r["heads"], r["n"]) == size]
        floor = _cells(here, ("cudnn", "softmax", None, None, "normal"))
        rows = []
        for key in _rows(here):
            found = _cells(here, key)
            row = [_label(key), number(next(iter(found.values())), "mean_iterations", ".1f")]
            for which in PASSES:
                record = found.get(which)
                row += [cell_text(record), ratio(record, floor.get(which)), _rate(record)]
                row.append(mebibytes(record))
            rows.append(row)
        columns = [[title, "/ cuDNN", "TFLOP/s", "MiB"] for title in PASSES.values()]
        parts.append(
            f"**Speed, head dimension {size[0]}**, batch {size[1]}, {size[2]} heads, "
            f"n = {size[3]}: median (fastest) ms; relative error of the output, or of the worst "
            "gradient.\n\n"
            + tables.markdown(["call", "iterations", *columns[0], *columns[1]], rows)
        )
    parts += [_growth(groups["growth"], attention)] if groups["growth"] else []
    for head_dim in sorted({r["head_dim"] for r in groups["accuracy"]}):
        here = [r for r in groups["accuracy"] if r["head_dim"] == head_dim]
        gradients = ("query", "key", "value", "probe", "ridge")
        rows = []
        for key in _rows(here):
            record = next(iter(_cells(here, key).values()))
            errors = record.get("errors", {})
            row = [_label(key), key[4], number(record, "mean_iterations", ".1f")]
            row += [number(errors, "output", ".1e"), number(record, "worst_row", ".1e")]
            row += [number(errors, name, ".1e") for name in gradients]
            same = {True: "yes", False: "no", None: ""}[record.get("repeatable")]
            rows.append([*row, same, record["status"].replace("timed", "within bounds")])
        head = ["call", "inputs", "iterations", "output", "worst row", *gradients]
        parts.append(
            f"**Accuracy, head dimension {head_dim}**, n = {here[0]['n']}: relative errors of the "
            "output and of the gradients.\n\n"
            + tables.markdown([*head, "repeatable", "verdict"], rows)
        )
    return "\n\n".join(parts)


def _growth(records, speed) -> str:
    rows, names, notes = [], list(PASSES), []
    for n, batch, heads in sorted({(r["n"], r["batch"], r["heads"]) for r in records}):
        found = {
            r["pass"]: r for r in records if (r["n"], r["batch"], r["heads"]) == (n, batch, heads)
        }
        row = [str(n), str(batch * heads)]
        for which in names:
            row += [
                cell_text(found.get(which)),
                mebibytes(found.get(which)),
            ]
        rows.append(row)
        for which in names:
            alike = ("head_dim", "ridge", "mechanism")
            key = [next(iter(found.values()))[name] for name in alike]
            more = [r for r in speed if r["pass"] == which and r["n"] == n and r["batch"] > 1
                    and [r[name] for name in alike] == key]  # fmt: skip
            factor = ratio(more[0], found.get(which)) if more and heads > 1 else ""
            if factor:
                times = more[0]["batch"] * more[0]["heads"] / (batch * heads)
                notes.append(
                    f"- {PASSES[which]}, {times:g} times the heads: {factor} times as long."
                )
    for which in names:
        found = [r for r in records if r["pass"] == which and r["heads"] > 1]
        name, head_dim = records[0]["implementation"], records[0]["head_dim"]
        time = exponents(series(found, name, which, head_dim, "time_median_s"))
        memory = exponents(series(found, name, which, head_dim, "temp_bytes"))
        if time:
            notes.append(f"- {PASSES[which]}: exponent of time {time}, of memory {memory}.")
    columns = [name for title in PASSES.values() for name in (title, "MiB")]
    return (
        f"**Growth**, head dimension {records[0]['head_dim']}, ridge {records[0]['ridge']:g}.\n\n"
        + tables.markdown(["n", "batch x heads", *columns], rows) + "\n\n" + "\n".join(notes)
    )  # fmt: skip


def draw(records):
    """The figure: time against length, and time relative to cuDNN's softmax against the ridge."""
    figure, axes = figures.new(1, 2, height=2.9)
    growth = [r for r in records if r["group"] == "growth" and r["heads"] > 1]
    look = styles.style("lla")
    dims = {
        r["head_dim"]
        for r in records
        if r["group"] == "speed" and r["mechanism"] == "lla" and r["ridge_kind"] == "static"
    }
    # The fill of a marker tells the pass, its shape the head dimension.
    forms = dict(zip(sorted(dims | {r["head_dim"] for r in growth}), "o^Ds", strict=False))
    for axis in axes[0]:
        axis.set_yscale("log")
    for which, title in PASSES.items():
        pass_ = {"filled": which == "forward", "line": "-" if which == "forward" else "--"}
        for name, head_dim in sorted({(r["implementation"], r["head_dim"]) for r in growth}):
            style = dataclasses.replace(
                look, name=f"{title}, d = {head_dim}", marker=forms[head_dim], **pass_
            )
            found = [
                series(growth, name, which, head_dim, field)
                for field in ("time_median_s", "time_min_s")
            ]
            _marks(axes[0, 0], style, found[0], found[1], 1e3)
        speed = [r for r in records if r["group"] == "speed" and r["pass"] == which]
        for head_dim in sorted(dims):
            here = [r for r in speed if r["head_dim"] == head_dim and r["status"] == "timed"]
            floor = [r["time_median_s"] for r in here if r["implementation"] == "cudnn"]
            lla = sorted((r for r in here if r["ridge_kind"] == "static"), key=lambda r: r["ridge"])
            if floor and lla:
                style = dataclasses.replace(
                    look, name=f"{title}, d = {head_dim}", marker=forms[head_dim], **pass_
                )
                median, least = (
                    {r["ridge"]: r[field] for r in lla} for field in ("time_median_s", "time_min_s")
                )
                _marks(axes[0, 1], style, median, least, 1 / floor[0])
    axes[0, 0].set(xlabel="sequence length n", ylabel="time, ms")
    axes[0, 1].set(xlabel="ridge", ylabel="time / Softmax, cuDNN")
    for axis in axes[0]:
        if axis.lines:
            figures.log_axis(axis)
    if axes[0, 0].lines:
        figures.length_axis(axes[0, 0], [r["n"] for r in growth])
    if axes[0, 1].lines:
        figures.log_axis(axes[0, 1], "x")
    figures.legend(figure, axes[0, ::-1])
    return figure


def _marks(axis, style, median, least, unit):
    """Medians, with bars down to the fastest times."""
    if median:
        bars = [unit * (median[x] - least[x]) for x in median]
        values = [unit * value for value in median.values()]
        figures.marks(axis, style, list(median), values, bars, [0.0] * len(bars))
