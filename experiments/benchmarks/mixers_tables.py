"""Tables of `mixers.py` and `mixer_updates.py`, for `report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import report

_FLOOR = "softmax"


def markdown(document: Mapping) -> str:
    """Provenance and tables of a result file of `mixers.py`."""
    return f"{report.provenance(document)}\n\n{tables(document['records'])}"


def tables(records: Sequence[Mapping]) -> str:
    """One table a dtype and size with a row for every mixer, and reasons of what was not timed."""
    fields = ("dtype", "batch", "n", "width", "heads")
    parts = []
    for size in dict.fromkeys(tuple(record[name] for name in fields) for record in records):
        here = [r for r in records if tuple(r[name] for name in fields) == size]
        dtype, batch, n, width, heads = size
        parts.append(
            f"**{dtype}**, batch {batch}, {n} tokens, width {width}, {heads} heads: median "
            "(fastest) ms; relative error of the output, or of the worse of the gradients of "
            "input and parameters; the time relative to softmax attention.\n\n" + _table(here)
        )
    lines = [
        f"- {r['implementation']}, {r['dtype']}, {report.PASSES[r['pass']]}: {r['status']}: "
        f"{r['reason']}"
        for r in records
        if r["status"] != "timed"
    ]
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def _table(records: Sequence[Mapping]) -> str:
    cells = {(record["implementation"], record["pass"]): record for record in records}
    rows = []
    for name in dict.fromkeys(record["implementation"] for record in records):
        found = {which: cells.get((name, which)) for which in report.PASSES}
        some = next(record for record in found.values() if record)
        label = f"{name} ({some['served_by']})" if "served_by" in some else name
        row = [label, str(some.get("parameters", ""))]
        for which, record in found.items():
            row += [report.cell_text(record), _ratio(record, cells.get((_FLOOR, which)))]
            row += [f"{record['temp_bytes'] / 2**20:.4g}" if "temp_bytes" in (record or {}) else ""]
        rows.append([*row, "; ".join(f"{r['compile_s']:.1f}" for r in found.values() if r)])
    columns = [name for title in report.PASSES.values() for name in (title, "/ softmax", "MiB")]
    return report.table(["mixer", "parameters", *columns, "compiled in s"], rows)


def _ratio(record: Mapping | None, floor: Mapping | None) -> str:
    if not all(r and r["status"] == "timed" for r in (record, floor)):
        return ""
    return f"{record['time_median_s'] / floor['time_median_s']:.2f}"


def updates_markdown(document: Mapping) -> str:
    """Provenance and tables of a result file of `mixer_updates.py`."""
    columns = {
        "forward": "layer, forward",
        "forward_backward": "layer, forward + backward",
        "update": "update of 29M parameters",
        "runs": "update of 8 small models",
    }
    records = [record for record in document["records"] if record["status"] == "timed"]
    columns = {k: v for k, v in columns.items() if any(r["pass"] == k for r in records)}
    rows = []
    for name in dict.fromkeys(record["implementation"] for record in records):
        found = {r["pass"]: r for r in records if r["implementation"] == name}
        row = [name]
        for which in columns:
            record = found.get(which)
            row += [_milliseconds(record)]
            if which == "update":
                row += [f"{record['tokens_per_s'] / 1e3:.0f}" if record else ""]
        compared = [r["errors"]["bfloat16"] for r in found.values() if r["errors"]]
        errors = [f"{e['output']:.1e}, {e['parameters']:.1e}" for e in compared[:1]]
        rows.append([*row, *(errors or ["not compared"])])
    heads = []
    for which, title in columns.items():
        heads += [title, "thousand tokens / s"] if which == "update" else [title]
    parts = [
        report.provenance(document),
        "Median ms, and in brackets the time over that of softmax attention; errors of the layer "
        "in bfloat16, projections included: output, all gradients of parameters together.",
        report.table(["mixer", *heads, "errors"], rows),
    ]
    if found := document["header"].get("operators"):
        names = list(next(iter(found.values())))
        lines = [
            [name, *(f"{max(errors[form]):.1e}" for form in names)]
            for name, errors in found.items()
        ]
        parts += [
            "Recurrences alone: the worst relative error of output and gradients.",
            report.table(["recurrence", *names], lines),
        ]
    return "\n\n".join(parts)


def _milliseconds(record: Mapping | None) -> str:
    if record is None:
        return ""
    ratio = record.get("times_softmax")
    text = f"{record['time_median_s'] * 1e3:.2f}"
    return text if ratio is None else f"{text} ({ratio:.2f})"
