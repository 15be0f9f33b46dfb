"""Tables of the README from the result files alone.

python experiments/memory_and_time/summary.py            # prints the tables
python experiments/memory_and_time/summary.py --check    # exit status 1 if README.md differs
python experiments/memory_and_time/summary.py --write    # renews README.md
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence

from lla.experiments.benchmarks.formatting import (
    PASSES,
    exponents,
    provenance,
)
from lla.experiments.benchmarks.results import GIB, load
from lla.runs import blocks, styles, tables

FOLDER = pathlib.Path(__file__).resolve().parent
README = FOLDER / "README.md"
RESULTS = FOLDER / "results"
# Series, in the order of tables and legends.
NAMES = styles.ordered(
    ("dense", "dense_matrices", "lla_direct", "lla_cg", "mesanet", "softmax", "jax_softmax")
)
LABELS = {name: styles.style(name).name for name in NAMES}
SHORT = 1e-3  # seconds, see `settled`
SPREAD = 1.25
QUEUE = 2.0


def state(record: Mapping) -> str:
    """`timed`, `not run`, `out of memory`, `too slow`, `refused` or `unavailable`."""
    if record["status"] != "memory only":
        return record["status"]
    known = ("out of memory", "too slow", "not run")
    return next(name for name in known if record["reason"].startswith(name))


def memory(record: Mapping) -> float | None:
    """Temporary bytes, as compiled or extrapolated; None if neither is known."""
    return record.get("temp_bytes", record.get("predicted_bytes"))


def series(records: Sequence[Mapping], **fields) -> dict[int, Mapping]:
    """The records with the given fields, by length; `which` is the pass."""
    if "which" in fields:
        fields["pass"] = fields.pop("which")
    chosen = [r for r in records if all(r[name] == value for name, value in fields.items())]
    return {record["n"]: record for record in sorted(chosen, key=lambda record: record["n"])}


def settled(found: Mapping[int, Mapping]) -> dict[int, Mapping]:
    """The timed records of a series, by length, whose time is that of the device.

    A launch takes some tenths of a millisecond, which hides shorter calls. So a time below `SHORT`
    is left out if the host set the pace: if fewer than `QUEUE` calls were queued at the last
    launch. For records without that number, it is left out if the median is more than `SPREAD`
    times the fastest, or if a longer sequence took less time. If a length is left out, so are all
    shorter ones.
    """
    timed = {n: record for n, record in found.items() if record["status"] == "timed"}

    def of_the_device(n, record):
        if record["time_median_s"] >= SHORT:
            return True
        if "calls_in_queue" in record:
            return record["calls_in_queue"] >= QUEUE
        longer = [other["time_median_s"] for m, other in timed.items() if m > n]
        agree = record["time_median_s"] <= SPREAD * record["time_min_s"]
        return agree and all(record["time_median_s"] <= time for time in longer)

    first = max((n for n, record in timed.items() if not of_the_device(n, record)), default=0)
    return {n: record for n, record in timed.items() if n > first}


def _size(amount: float) -> str:
    """Bytes as MiB or GiB."""
    if amount >= 10 * GIB:
        return f"{amount / GIB:.4g} GiB"
    return f"{amount / 2**20:.4g} MiB"


def _time(record: Mapping | None) -> str:
    if record is None:
        return ""
    found = state(record)
    if found != "timed":
        return "" if found == "not run" else found
    milliseconds = 1e3 * record["time_median_s"]
    once = " (once)" if record["repeats"] == 1 else ""
    return (f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}") + once


def _memory(record: Mapping | None) -> str:
    if record is None or memory(record) is None:
        return ""
    return ("~" if "temp_bytes" not in record else "") + _size(memory(record))


def markdown(document: Mapping) -> str:
    """All tables of one result file."""
    records = document["records"]
    parts = [provenance(document), _growth(records)]
    settings = dict.fromkeys((r["heads"], r["head_dim"]) for r in records)
    # The setting of the figure first.
    for heads, head_dim in sorted(settings, key=lambda pair: (pair[0] != 8, *pair)):
        here = [r for r in records if (r["heads"], r["head_dim"]) == (heads, head_dim)]
        names = [name for name in LABELS if any(r["implementation"] == name for r in here)]
        head = ["n", *(LABELS[name] for name in names)]
        for which, title in PASSES.items():
            columns = [series(here, implementation=name, which=which) for name in names]
            lengths = sorted(set().union(*columns))
            if not lengths:
                continue
            where = f"B*H = {heads}, d = {head_dim}, {title}"
            rows = [[str(n), *(_memory(column.get(n)) for column in columns)] for n in lengths]
            parts.append(f"**{where}**: temporary memory.\n\n{tables.markdown(head, rows)}")
            rows = [[str(n), *(_time(column.get(n)) for column in columns)] for n in lengths]
            rows = [row for row in rows if any(row[1:])]
            if rows:
                parts.append(f"{where}: median time, ms.\n\n{tables.markdown(head, rows)}")
    if errors := _errors(records):
        parts.append(errors)
    reasons = dict.fromkeys(
        f"- {LABELS[r['implementation']]}, {PASSES[r['pass']]}, B*H = {r['heads']}, "
        f"d = {r['head_dim']}, n = {r['n']}: {r['status']}: {r['reason']}"
        for r in records
        if r["status"] in ("refused", "unavailable")
    )
    if reasons:
        parts.append("\n".join(reasons))
    return "\n\n".join(parts)


def _growth(records) -> str:
    """Exponents in n, and time against softmax attention at the longest common length."""
    rows = []
    keys = sorted({(r["heads"] != 8, r["heads"], r["head_dim"]) for r in records})
    for _, heads, head_dim in keys:
        for which, title in PASSES.items():
            here = {
                name: series(
                    records, implementation=name, which=which, heads=heads, head_dim=head_dim
                )
                for name in LABELS
            }
            times = {
                name: {n: r["time_median_s"] for n, r in found.items() if r["status"] == "timed"}
                for name, found in here.items()
            }
            for name, found in here.items():
                if not found:
                    continue
                amounts = {n: r["temp_bytes"] for n, r in found.items() if r.get("temp_bytes")}
                common = sorted(set(times[name]) & set(times["softmax"]))
                ratio = (
                    f"{times[name][common[-1]] / times['softmax'][common[-1]]:.3g}"
                    if common
                    else ""
                )
                rows.append([
                    str(heads), str(head_dim), title, LABELS[name], exponents(amounts),
                    exponents(times[name]), ratio, str(common[-1]) if common else "",
                ])  # fmt: skip
    head = ["B*H", "d", "pass", "series", "memory", "time", "time / softmax", "at n"]
    return (
        "Exponents in n of memory and time, fitted over all lengths and, in brackets, over the "
        "last doubling; time relative to softmax attention of this library at the longest length "
        f"that both were timed at.\n\n{tables.markdown(head, rows)}"
    )


def _errors(records) -> str:
    """The largest errors of each series."""
    rows = []
    for name, label in LABELS.items():
        for head_dim in sorted({record["head_dim"] for record in records}):
            row = [label, str(head_dim)]
            for which in PASSES:
                found = [
                    record["errors"]
                    for record in records
                    if (record["implementation"], record["head_dim"], record["pass"])
                    == (name, head_dim, which)
                    and record["status"] == "timed"
                ]
                outputs = [errors["output"] for errors in found]
                worst = [
                    error
                    for errors in found
                    for result, error in errors.items()
                    if result != "output"
                ]
                row.append(f"{max(outputs):.1e}" if outputs else "")
                if which == "forward_backward":
                    row.append(f"{max(worst):.1e}" if worst else "")
            if any(row[2:]):
                rows.append(row)
    head = ["series", "d", "output", "output, with gradients", "worst gradient"]
    if not rows:
        return ""
    text = "Largest relative errors of what was timed, over all lengths and B*H."
    return f"{text}\n\n{tables.markdown(head, rows)}"


def render(text: str, results: pathlib.Path = RESULTS) -> str:
    """README text with the block of every result file renewed.

    Raises:
      ValueError: a result file has no block, or a block no result file.
    """
    found = {path.stem: path for path in results.glob("*.json")}
    return blocks.renew(text, lambda name: f"{markdown(load(found[name]))}\n", found)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints, checks or writes the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare README.md with the results")
    parser.add_argument("--write", action="store_true", help="renew README.md")
    options = parser.parse_args(argv)
    if not (options.check or options.write):
        for path in sorted(RESULTS.glob("*.json")):
            print(f"{path.stem}\n\n{markdown(load(path))}\n")
        return 0
    text = README.read_text(encoding="utf-8")
    renewed = render(text)
    if options.write:
        README.write_text(renewed, encoding="utf-8")
        return 0
    print("README.md is up to date" if renewed == text else "README.md is out of date")
    return int(renewed != text)


if __name__ == "__main__":
    sys.exit(main())
