"""Tables of `decoding.py`, for `report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import report

_FLOOR = "softmax"
# Implementation -> its series in figures.
_SERIES = {
    "softmax": "softmax",
    "cudnn": "cudnn",
    "parallax": "parallax",
    "lla_10": "lla_10",
    "lla_0.1": "lla_0.1",
}


SYSTEM = ("implementation", "batch", "kv_heads", "head_dim", "ridge")
_SOLVERS = ("cg", "cholesky")


def markdown(document: Mapping) -> str:
    """Provenance and tables of a result file of `decoding.py`."""
    return f"{report.provenance(document)}\n\n{tables(document['records'])}"


def copy_speed(records: Sequence[Mapping]) -> float | None:
    """Bytes read and written in a second by a copy, where it was measured."""
    found = [record["bytes_per_s"] for record in records if record["pass"] == "copy"]
    return max(found) if found else None


def tables(records: Sequence[Mapping]) -> str:
    """One table a size of the model, with a row for every batch, length and implementation."""
    speed = copy_speed(records)
    cells = [record for record in records if record["pass"] == "decode"]
    fields = ("dtype", "kv_heads", "group", "head_dim")
    parts = [] if speed is None else [f"A copy reads and writes {speed / 1e12:.2f} TB/s."]
    for size in dict.fromkeys(tuple(record[name] for name in fields) for record in cells):
        here = [r for r in cells if tuple(r[name] for name in fields) == size]
        dtype, kv_heads, group, head_dim = size
        parts.append(
            f"**{dtype}, head_dim {head_dim}**, {kv_heads} key heads, {kv_heads * group} query "
            "heads: time of a step, its ratio to softmax attention, the bytes of the cache over "
            "that time (as a part of the copy), relative error of the output, and memory beside "
            "cache and tokens.\n\n" + _table(here, speed)
        )
    missing = [
        f"- {r['implementation']}, head_dim {r['head_dim']}, batch {r['batch']}, {r['n']} tokens: "
        f"{r['status']}: {r['reason']}"
        for r in cells
        if r["status"] != "timed"
    ]
    return "\n\n".join([*parts, "\n".join(missing)] if missing else parts)


def _table(records: Sequence[Mapping], speed: float | None) -> str:
    places = ("batch", "n")
    timed = [record for record in records if record["status"] == "timed"]
    rows = []
    for batch, n in dict.fromkeys(tuple(record[name] for name in places) for record in timed):
        here = [r for r in timed if (r["batch"], r["n"]) == (batch, n)]
        floor = next((r["time_median_s"] for r in here if r["implementation"] == _FLOOR), None)
        for record in here:
            seconds = record["time_median_s"]
            rate = record["cache_bytes"] / seconds
            part = "" if speed is None else f" ({rate / speed:.0%})"
            rows.append(
                [
                    str(batch),
                    str(n),
                    record["implementation"].replace("lla_", "lla, ridge "),
                    f"{seconds * 1e6:.4g}",
                    "" if floor is None else f"{seconds / floor:.2f}",
                    f"{rate / 1e12:.3g}{part}",
                    f"{record['errors']['output']:.1e}",
                    f"{record['temp_bytes'] / 2**20:.3g}",
                ]
            )
    head = ["batch", "tokens", "attention", "µs", "/ softmax", "TB/s", "error", "MiB"]
    return report.table(head, rows)


def _drawn(records: Sequence[Mapping]) -> list[Mapping]:
    return [
        r for r in records if r["pass"] == "decode" and r["status"] == "timed" and r["group"] == 1
    ]


def panels(records: Sequence[Mapping]) -> list[list[tuple[int, int]]]:
    """Head dimension and batch of each panel of the figure, row by row; at most two a row."""
    cells = _drawn(records)
    rows = []
    for head_dim in sorted({r["head_dim"] for r in cells}):
        batches = sorted({r["batch"] for r in cells if r["head_dim"] == head_dim})
        rows.append([(head_dim, batch) for batch in batches[:2]])
    return rows


def draw(records: Sequence[Mapping]):
    """Time of a step against the length of the cache: a figure with the panels of `panels`."""
    from lla.runs import figures, styles

    cells, rows = _drawn(records), panels(records)
    columns = max(map(len, rows), default=1)
    figure, axes = figures.new(max(1, len(rows)), columns, height=0.8 + 1.9 * max(1, len(rows)))
    for row, places in zip(rows, axes, strict=False):
        for axis in places[len(row) :]:
            axis.set_axis_off()
        for (head_dim, batch), axis in zip(row, places, strict=False):
            axis.set_yscale("log")
            panel = [r for r in cells if (r["head_dim"], r["batch"]) == (head_dim, batch)]
            for name, series in _SERIES.items():
                here = sorted(
                    (r for r in panel if r["implementation"] == name), key=lambda r: r["n"]
                )
                if here:
                    median = [1e6 * r["time_median_s"] for r in here]
                    bars = [1e6 * (r["time_median_s"] - r["time_min_s"]) for r in here]
                    lengths = [r["n"] for r in here]
                    style = styles.style(series)
                    figures.marks(axis, style, lengths, median, bars, [0.0] * len(bars))
            axis.set(xlabel="tokens in the cache", ylabel="time, µs")
            axis.set_title(f"batch {batch}, d = {head_dim}")
            figures.length_axis(axis, [r["n"] for r in panel])
            figures.log_axis(axis)
    figures.legend(figure, axes.flat)
    return figure


def solvers_markdown(document: Mapping) -> str:
    """Provenance and table of a result file of `decoding_solvers.py`."""
    cells = {tuple(r[name] for name in SYSTEM): r for r in document["records"]}
    rows = []
    for batch, heads, head_dim, ridge in dict.fromkeys(key[1:] for key in cells):
        row = [str(head_dim), str(batch * heads), f"{ridge:g}"]
        for name in _SOLVERS:
            record = cells.get((name, batch, heads, head_dim, ridge))
            if record is None or record["status"] != "timed":
                row += ["–" if record is None else record["status"], ""]
            else:
                row += [f"{record['time_median_s'] * 1e6:.3g}", f"{record['errors']['output']:.1e}"]
        rows.append(row)
    head = ["d", "systems", "ridge"]
    for name in ("kernel, cg", "Cholesky"):
        head += [f"{name}: µs", "error"]
    return f"{report.provenance(document)}\n\n{report.table(head, rows)}"


def traffic_markdown(document: Mapping) -> str:
    """Provenance and table of a result file of `decoding_traffic.py`."""
    rows = [
        [
            str(r["head_dim"]),
            str(r["group"]),
            str(r["batch"]),
            str(r["n"]),
            r["implementation"].replace("lla_", "lla, ridge "),
            f"{r['cache_bytes'] / 2**20:.4g}",
            f"{r['moved_bytes'] / 2**20:.4g}",
            f"{r['moved_bytes'] / r['cache_bytes']:.3f}",
        ]
        for r in document["records"]
        if "moved_bytes" in r
    ]
    head = ["d", "query heads of a key head", "batch", "tokens", "attention"]
    table = report.table([*head, "cache, MiB", "moved a step, MiB", "moved / cache"], rows)
    return f"{report.provenance(document)}\n\n{table}"


def draw_traffic(records: Sequence[Mapping]):
    """Bytes moved over those of the cache: a figure with a panel for each head dimension."""
    from lla.runs import figures, styles

    cells = [r for r in records if "moved_bytes" in r and r["group"] == 1]
    batch = max((r["batch"] for r in cells), default=0)
    head_dims = sorted({r["head_dim"] for r in cells})
    figure, axes = figures.new(1, max(1, len(head_dims)), height=2.6, sharey=True)
    for axis, head_dim in zip(axes[0], head_dims, strict=False):
        panel = [r for r in cells if (r["head_dim"], r["batch"]) == (head_dim, batch)]
        for name, series in _SERIES.items():
            points = sorted(
                (r["n"], r["moved_bytes"] / r["cache_bytes"])
                for r in panel
                if r["implementation"] == name
            )
            if points:
                figures.marks(axis, styles.style(series), *zip(*points, strict=True))
        axis.axhline(1, color="#8C8C8C", linewidth=0.8, linestyle=":")
        axis.set(xlabel="tokens in the cache")
        axis.set_title(f"batch {batch}, d = {head_dim}")
        figures.length_axis(axis, [r["n"] for r in panel])
        axis.grid(True, axis="y")
    axes[0, 0].set_ylabel("moved / cache")
    figures.legend(figure, axes[0])
    return figure
