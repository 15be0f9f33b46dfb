"""Tables of `peers.py`, for `report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import report

_MEMBERS = ("softmax", "parallax", "lla", "mesanet")
_NAMES = {
    "cudnn": "cuDNN through JAX",
    "torch_flash": "PyTorch, flash",
    "torch_cudnn": "PyTorch, cuDNN",
    "fla": "flash-linear-attention",
    "flash_lla": "FlashLLA",
}
_FLOOR = ("softmax", "cudnn", None)
_GRADIENTS = ("query", "key", "value", "probe")


def markdown(document: Mapping) -> str:
    """Provenance and tables of a result file of `peers.py`."""
    return f"{report.provenance(document)}\n\n{table(document['records'])}"


def table(records: Sequence[Mapping]) -> str:
    """One table a size: times, their ratio to cuDNN's softmax attention, and all errors.

    The errors of what is refused are shown without a time. Reasons follow below.
    """
    fields = ("batch", "heads", "n", "head_dim")
    parts = []
    for size in sorted({tuple(record[name] for name in fields) for record in records}):
        here = [r for r in records if tuple(r[name] for name in fields) == size]
        batch, heads, n, head_dim = size
        parts.append(
            f"**Head dimension {head_dim}**, batch {batch}, {heads} heads, n = {n}: median "
            "(fastest) ms, and the ratio to cuDNN's softmax attention; relative errors of output "
            "and gradients against float64.\n\n" + _size(here)
        )
    notes: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "timed":
            where = f"{_label(_key(record))}, head dimension {record['head_dim']}"
            labels = notes.setdefault(f"{record['status']}: {record['reason']}", [])
            labels += [where] if where not in labels else []
    lines = [f"- {'; '.join(labels)}: {reason}" for reason, labels in notes.items()]
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def _key(record: Mapping) -> tuple:
    return record["member"], record["implementation"], record["ridge"]


def _order(key: tuple) -> tuple:
    member, name, ridge = key
    peers = list(_NAMES)
    return (_MEMBERS.index(member), -(ridge or 0), peers.index(name) + 1 if name in peers else 0)


def _label(key: tuple) -> str:
    member, name, ridge = key
    text = f"{_NAMES.get(name, name)}, {member}"
    return text if ridge is None else f"{text}, ridge {ridge:g}"


def _size(records: Sequence[Mapping]) -> str:
    cells = {(_key(record), record["pass"]): record for record in records}
    rows = []
    for key in sorted({key for key, _ in cells}, key=_order):
        found = {which: cells.get((key, which)) for which in report.PASSES}
        row = [_label(key)]
        for which, record in found.items():
            row += [_time(record), _ratio(record, cells.get((_FLOOR, which)))]
        # The pass with the gradients has all errors; the forward pass alone, the output's.
        best = next((r for r in reversed(found.values()) if r and "errors" in r), {})
        errors = best.get("errors", {})
        row += [_error(errors, "output"), _error(best, "worst_row")]
        rows.append(row + [_error(errors, name) for name in _GRADIENTS])
    times = [name for title in report.PASSES.values() for name in (title, "/ cuDNN")]
    return report.table(["call", *times, "output", "worst row", *_GRADIENTS], rows)


def _time(record: Mapping | None) -> str:
    if record is None or record["status"] != "timed":
        return "" if record is None else record["status"]
    return report.cell_text(record).split(";")[0]


def _ratio(record: Mapping | None, floor: Mapping | None) -> str:
    if not all(r and r["status"] == "timed" for r in (record, floor)):
        return ""
    return f"{record['time_median_s'] / floor['time_median_s']:.2f}"


def _error(values: Mapping, name: str) -> str:
    if name not in values:
        return ""
    return "not finite" if values[name] is None else f"{values[name]:.1e}"
