"""Records as text: cells of tables, ratios, growth with the length, provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
MIB = 1 << 20

# Implementations: their name in tables, and their style in figures.
LABELS = {
    "reference": ("reference", "dense"),
    "xla_cg": ("xla, cg", "lla_cg"),
    "xla_direct": ("xla, direct", "lla_direct"),
    "xla_softmax": ("xla, softmax", "softmax"),
    "jax_softmax": ("jax.nn softmax", "jax_softmax"),
    "jax_softmax_cudnn": ("cuDNN softmax", "cudnn"),
}


# ---------------------------------------------------------------------------------------------
# Numbers from records


def fit_exponent(sizes: Sequence[float], amounts: Sequence[float]) -> float | None:
    """Least-squares exponent b of ``amount = a * size^b``; None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(amounts), 1)[0])


def series(records, implementation: str, which: str, head_dim: int, field: str) -> dict[int, float]:
    """`field` by length, where it was measured."""
    return {
        record["n"]: record[field]
        for record in sorted(records, key=lambda record: record["n"])
        if record["implementation"] == implementation
        and (record["pass"], record["head_dim"]) == (which, head_dim)
        and field in record
    }


def faster_from(fast: Mapping[int, float], slow: Mapping[int, float]) -> int | None:
    """The length from which on `fast` takes less time wherever both were measured."""
    first = None
    for n in sorted(set(fast) & set(slow)):
        if fast[n] >= slow[n]:
            first = None
        elif first is None:
            first = n
    return first


def break_even(direct: Mapping[float, float], cg: Mapping[float, float]) -> dict[str, float | None]:
    """The ridge below which the direct solver is faster.

    Args:
      direct, cg: time by ridge.

    Returns:
      "measured": the largest ridge such that direct is faster there and at every smaller ridge
      measured; None if there is none. "estimate": where the times are equal between that ridge and
      the next larger one, interpolated in logarithms; None if direct always or never wins.
    """
    ridges = sorted(set(direct) & set(cg))
    gains = [math.log(cg[ridge] / direct[ridge]) for ridge in ridges]
    wins = next((i for i, gain in enumerate(gains) if gain <= 0), len(gains))
    if wins == 0:
        return {"measured": None, "estimate": None}
    measured, estimate = ridges[wins - 1], None
    if wins < len(ridges):
        share = gains[wins - 1] / (gains[wins - 1] - gains[wins])
        estimate = measured * (ridges[wins] / measured) ** share
    return {"measured": measured, "estimate": estimate}


# ---------------------------------------------------------------------------------------------
# Text


def milliseconds(seconds: float) -> str:
    """Three digits, and all digits before the decimal point."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_text(record: Mapping | None) -> str:
    """Median and, in brackets, fastest time in milliseconds; the status if it was not timed."""
    if record is None:
        return ""
    if record["status"] != "timed":
        return record["status"]
    return f"{milliseconds(record['time_median_s'])} ({milliseconds(record['time_min_s'])})"


def cell_text(record: Mapping | None) -> str:
    """`time_text`, and the error of the output or of the worst gradient."""
    text = time_text(record)
    if record is None or record["status"] != "timed":
        return text
    errors = record["errors"]
    gradients = [error for name, error in errors.items() if name != "output"]
    return f"{text}; {max(gradients) if gradients else errors['output']:.0e}"


def mebibytes(record: Mapping | None) -> str:
    """Temporary memory in MiB; empty if it is not known."""
    return number(record, "temp_bytes", ".4g", MIB)


def number(record: Mapping | None, field: str, form: str, unit: float = 1.0) -> str:
    """A field in `unit`s; empty if the record or the field is missing."""
    value = None if record is None else record.get(field)
    return "" if value is None else f"{value / unit:{form}}"


def ratio(record: Mapping | None, base: Mapping | None) -> str:
    """The quotient of two median times; empty unless both were timed."""
    if not all(r and r["status"] == "timed" for r in (record, base)):
        return ""
    return f"{record['time_median_s'] / base['time_median_s']:.2f}"


def progress_line(record: Mapping, key_fields: Sequence[str] = ()) -> str:
    """A record in one line."""
    where = ", ".join(f"{name} {record[name]}" for name in key_fields)
    if record["status"] == "timed":
        return f"{where}: ms (fastest); error: {cell_text(record)}"
    return f"{where}: {record['status']}: {record['reason']}"


def exponents(values: Mapping[int, float]) -> str:
    """The exponent fitted to all lengths and, in brackets, to the last two."""
    whole = fit_exponent(list(values), list(values.values()))
    if whole is None:
        return ""
    last = dict(list(values.items())[-2:])
    return f"{whole:.2f} ({fit_exponent(list(last), list(last.values())):.2f})"


def provenance(document: Mapping) -> str:
    """Machine, versions, date, commits, settings and command of a result file."""
    header = document["header"]
    device, versions = header["device"], header["versions"]
    settings = ", ".join(f"{name} {value}" for name, value in header["settings"].items())
    machine = f"{device['cpu']}, {device['cores']} cores"
    if header["platform"] != "cpu":
        machine = f"{device['kind']} ({machine})"
    commits = sorted({(record["commit"] or "unknown")[:10] for record in document["records"]})
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Measured on {machine}; {names}; {header['date'][:10]}; commit {', '.join(commits)}"
        f"{' with uncommitted changes' if header['uncommitted_changes'] else ''}; {settings}.\n"
        f"Command: `{header['command']}`"
    )
