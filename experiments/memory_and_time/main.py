"""Memory and time of a call against the sequence length; see README.md beside this file.

    python experiments/memory_and_time/main.py [--memory_only] [--out results.json]

Cells that are in the result file are skipped, so that a run can be continued. Nothing wrong is
timed; the exit status is 1 if something was refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Several processes may share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from benches import hopper, measure, report, subjects
from cells import KEY_FIELDS, Cell

from lla.experiments.memory_and_time import cells

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
NOT_RUN = "not run"
TOO_SLOW = "too slow"
OUT_OF_MEMORY = "out of memory"
_SETTINGS = ("ridge", "repeats", "seconds_per_cell", "memory_limit_gib", "call_limit", "seed")
_GRACE = 20.0  # seconds beyond the budget after which the process is ended
_START = time.monotonic()


def _part(text: str) -> tuple[int, int]:
    index, parts = (int(word) for word in text.split("/"))
    if not 1 <= index <= parts:
        raise ValueError
    return index, parts


def parser() -> argparse.ArgumentParser:
    """The flags."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = out.add_argument
    add("--series", nargs="+", choices=cells.SERIES, default=list(cells.SERIES))
    add("--heads", type=int, nargs="+", default=[8, 1, 16], help="B*H; in order of importance")
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--lengths", type=int, nargs="+", default=[2**power for power in range(9, 17)])
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    add("--ridge", type=float, default=1.0)
    add("--memory_only", action="store_true", help="compile, and run nothing")
    add("--compile_all", action="store_true", help="also what surely does not fit")
    add("--memory_limit_gib", type=float, default=60.0, help="beyond it a call is not run")
    add("--run_limit_gib", type=float, default=1e9, help="beyond it a call waits")
    add("--call_limit", type=float, default=3.0, help="seconds; slower calls end their series")
    add("--checked", type=int, default=2048, help="most tokens that are compared with exact ones")
    add("--truths", help="folder that keeps exact results between runs")
    add("--truths_only", action="store_true", help="only fill that folder")
    add("--repeats", type=int, default=7)
    add("--seconds_per_cell", type=float, default=0.3, help="for the repeats")
    add("--compile_seconds", type=float, default=10.0, help="then it runs what it has compiled")
    add("--seed", type=int, default=0)
    add("--budget_seconds", type=float, default=1e9, help="then it stops with what it has")
    add("--part", type=_part, default=(1, 1), help="i/n: this process does every n-th series")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--out", type=pathlib.Path, help="default: results/<device>.json")
    add("--resume", action="store_true", help="keep finished cells, whatever code they measured")
    return out


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags as a namespace.

    Raises:
      SystemExit: if they do not fit together.
    """
    flags = parser()
    options = flags.parse_args(argv)
    if options.part[1] > 1 and not options.lock:
        flags.error("--part needs --lock, because all parts write the same file")
    if options.truths_only and not options.truths:
        flags.error("--truths_only needs --truths")
    if options.dtype is None:
        options.dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return options


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    """The header of the result file; the command leaves out what says where and when it ran."""
    settings = {name: getattr(options, name) for name in _SETTINGS}
    header = measure.make_header("memory_and_time", settings)
    default, words = parser().parse_args([]), []
    unsaid = (
        "compile_seconds",
        "out",
        "lock",
        "part",
        "commit",
        "truths",
        "resume",
        "budget_seconds",
        "dtype",
    )
    for name, value in vars(options).items():
        if name not in unsaid and value != getattr(default, name):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
    header["command"] = shlex.join(["python", "experiments/memory_and_time/main.py", *words])
    header["commit"] = options.commit or header["commit"]
    return header


# ---------------------------------------------------------------------------------------------
# Compiling


class Compiled(NamedTuple):
    """A compiled call and the check of its results, or why there is none."""

    call: Any
    check: Any
    memory: dict[str, int]
    seconds: float
    reason: str | None = None
    predicted: float | None = None  # bytes


def checked_length(options, cell: Cell) -> int:
    """How many first tokens are compared with exact ones."""
    member = cells.make_subject(cell.series, cell.dtype, jax.default_backend())[1].member
    return cells.checked_length(cell, member, options.checked)


def compile_cell(options, cell: Cell) -> Compiled:
    """Compiles a call without inputs."""
    start, check = time.monotonic(), None
    subject = cells.make_subject(cell.series, cell.dtype, jax.default_backend())[1]
    try:
        call, memory = subjects.compile_call(subject, cell.which, cells.shapes(cell))
        seconds = time.monotonic() - start
        if not options.memory_only and memory["temp_bytes"] <= limit_bytes(options):
            check = cells.compile_check(cell, subject, checked_length(options, cell))
    except Exception as error:  # one that does not compile must not stop the others
        return Compiled(None, None, {}, time.monotonic() - start, hopper.brief(error))
    return Compiled(call, check, memory, seconds)


def limit_bytes(options) -> float:
    """Temporary memory beyond which a call is not run."""
    return options.memory_limit_gib * measure.GIB


def extrapolate(memory: Mapping[int, int], n: int) -> float | None:
    """Bytes at `n` if memory goes on growing as between the two longest lengths below it."""
    known = sorted(length for length in memory if length < n and memory[length] > 0)[-2:]
    if len(known) < 2:
        return None
    short, long = known
    power = np.log(memory[long] / memory[short]) / np.log(long / short)
    return float(memory[long] * (n / long) ** power)


def compile_some(options, unit: Sequence[Cell], known: dict[int, int], end: float) -> dict:
    """Compiled calls of the first cells, as many as are begun within some seconds and before `end`.

    What would need more than twice the memory limit, by extrapolation, is not compiled on a GPU:
    the compiler would search for long for a way to fit it in.

    Args:
      known: temporary bytes by length, of cells that are finished; extended in place.
    """
    skip = jax.default_backend() == "gpu" and not (options.compile_all or options.memory_only)
    compiled, start = {}, time.monotonic()
    for cell in unit:
        now = time.monotonic()
        if now > end or (compiled and now > start + options.compile_seconds):
            break
        predicted = extrapolate(known, cell.n)
        if skip and predicted is not None and predicted > 2 * limit_bytes(options):
            reason = f"{OUT_OF_MEMORY} (predicted {predicted / measure.GIB:.4g} GiB from shorter n)"
            compiled[cell] = Compiled(None, None, {}, 0.0, reason, predicted)
            continue
        found = compiled[cell] = compile_cell(options, cell)
        if found.memory:
            known[cell.n] = found.memory["temp_bytes"]
        hopper.say(f"compiled {'-'.join(map(str, cell))}: {found.seconds:.1f} s")
    return compiled


# ---------------------------------------------------------------------------------------------
# Running


def is_slow(record: Mapping, call_limit: float) -> bool:
    """Whether the series of this record ends with it."""
    timed = record["status"] == "timed" and record["time_min_s"] > call_limit
    return timed or record.get("reason", "").startswith(TOO_SLOW)


def measure_cell(options, cell: Cell, found: Compiled, slow: bool) -> dict[str, Any]:
    """The record of a compiled cell."""
    name, subject = cells.make_subject(cell.series, cell.dtype, jax.default_backend())
    record = {**cell.fields(), "runs": name, **found.memory}
    record["compile_s"] = round(found.seconds, 2)
    if found.predicted is not None:
        return record | {
            "predicted_bytes": found.predicted, "status": "memory only", "reason": found.reason,
        }  # fmt: skip
    if found.call is None:
        exhausted = "RESOURCE_EXHAUSTED" in found.reason
        reason = f"{OUT_OF_MEMORY} when compiled: {found.reason}" if exhausted else found.reason
        return record | {"status": "memory only" if exhausted else "unavailable", "reason": reason}
    gib = found.memory["temp_bytes"] / measure.GIB
    if gib > options.memory_limit_gib:
        reason = f"{OUT_OF_MEMORY} (predicted {gib:.4g} GiB)"
        return record | {"status": "memory only", "reason": reason}
    if slow:
        reason = f"{TOO_SLOW}: a shorter call takes more than {options.call_limit:g} s"
        return record | {"status": "memory only", "reason": reason}
    if options.memory_only or gib > options.run_limit_gib:
        return record | {"status": "memory only", "reason": NOT_RUN}
    try:
        return record | run(options, cell, subject, found)
    except Exception as error:  # one that does not run must not stop the others
        reason = hopper.brief(error)
        if "RESOURCE_EXHAUSTED" in reason:
            reason = f"{OUT_OF_MEMORY} when run (predicted {gib:.4g} GiB)"
            return record | {"status": "memory only", "reason": reason}
        return record | {"status": "unavailable", "reason": reason}


def run(options, cell: Cell, subject: subjects.Subject, found: Compiled) -> dict[str, Any]:
    """Checks a call and times it if it is right; a call beyond the limit is timed once."""
    exact = cells.truth(
        subject.member, checked_length(options, cell), cell.head_dim, options.ridge, options.seed,
        options.truths,
    )  # fmt: skip
    inputs = cells.make_inputs(cell, max(options.lengths), options.ridge, options.seed)
    inputs = jax.block_until_ready(jax.device_put(inputs))
    start = time.perf_counter()
    got = jax.block_until_ready(found.call(inputs))
    first = time.perf_counter() - start
    compared, finite = found.check(got)
    verdict = cells.judge(cell, subject, compared, bool(finite), exact, options.ridge)
    del got
    if "reason" in verdict:
        return verdict | {"status": "refused"}
    if first > options.call_limit:
        timing = measure.Timing(first, first, 1, 1.0)
    else:
        timed = measure.time_interleaved(
            {"": lambda: found.call(inputs)}, options.repeats, options.seconds_per_cell
        )
        timing = timed[""]
    load = round(os.getloadavg()[0], 2)
    return verdict | {"status": "timed", **dataclasses.asdict(timing), "load_average": load}


def key(record: Mapping) -> tuple:
    """What tells records apart."""
    return tuple(record[name] for name in KEY_FIELDS)


def is_finished(options, record: Mapping) -> bool:
    """Whether a cell with this record is left alone."""
    return options.memory_only or record.get("reason") != NOT_RUN


def same_series(record: Mapping, cell: Cell) -> bool:
    """Whether a record differs from a cell in the length at most."""
    return key({**record, "n": cell.n}) == tuple(cell)


def run_unit(options, unit: Sequence[Cell], path: pathlib.Path, header: dict, end: float) -> int:
    """Compiles and measures cells of one series; returns how many are left when the time is up."""

    def load():
        return measure.Results(path, header, KEY_FIELDS, options.resume)

    results = load()
    finished = {key(record) for record in results.records if is_finished(options, record)}
    left = [cell for cell in unit if tuple(cell) not in finished]
    if not left:
        return 0
    known = {
        record["n"]: record["temp_bytes"]
        for record in results.records
        if same_series(record, unit[0]) and "temp_bytes" in record
    }
    while left:
        compiled = compile_some(options, left, known, end)
        if not options.memory_only and compiled and time.monotonic() < end:
            # Exact results and inputs need no turn on the device.
            prepare(options, list(compiled))
        with measure.exclusive(options.lock):
            results = load()  # other processes have written meanwhile
            earlier = [record for record in results.records if same_series(record, unit[0])]
            slow_from = [r["n"] for r in earlier if is_slow(r, options.call_limit)]
            for cell, found in compiled.items():
                if time.monotonic() > end:
                    return len(left)
                slow = any(n < cell.n for n in slow_from)
                record = measure_cell(options, cell, found, slow)
                if is_slow(record, options.call_limit):
                    slow_from.append(cell.n)
                results.records = [old for old in results.records if key(old) != key(record)]
                results.add([record])
                left.remove(cell)
                size = f", {record['temp_bytes'] / 2**20:.4g} MiB" if found.memory else ""
                hopper.say(report.progress_line(record, KEY_FIELDS) + size)
        if time.monotonic() > end:
            break
    return len(left)


def prepare(options, unit: Sequence[Cell]) -> None:
    """Computes exact results, on the CPU, and inputs, so that both are at hand later."""
    member = cells.make_subject(unit[0].series, unit[0].dtype, jax.default_backend())[1].member
    with jax.default_device(jax.devices("cpu")[0]):
        for length in sorted({checked_length(options, cell) for cell in unit}):
            cells.truth(
                member, length, unit[0].head_dim, options.ridge, options.seed, options.truths
            )
    if not options.truths_only:
        cells.make_inputs(unit[0], max(options.lengths), options.ridge, options.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all cells of the flags; returns the exit status."""
    options = parse(argv)
    path = options.out or RESULTS / f"{measure.device_name()}.json"
    header = make_header(options)
    end = _START + options.budget_seconds
    units = cells.make_units(
        options.series, options.dtype, options.heads, options.head_dims, options.lengths,
        options.part,
    )  # fmt: skip
    if options.truths_only:
        for unit in units:
            prepare(options, unit)
        return 0
    total, done, missing = sum(map(len, units)), 0, 0
    hopper.say(f"{jax.devices()[0].device_kind}, {total} cells, results in {path}")
    for unit in units:
        missing += run_unit(options, unit, path, header, end)
        done += len(unit)
        hopper.say(f"{done} of {total} cells, {missing} without time")
    records = measure.load(path)["records"] if path.exists() else []
    return int(any(record["status"] == "refused" for record in records))


if __name__ == "__main__":
    hopper.end_at_the_limit(parse(None).budget_seconds + _GRACE)
    sys.exit(main())
