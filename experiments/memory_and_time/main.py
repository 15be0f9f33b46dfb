"""Memory and time of a call against the sequence length; see README.md beside this file.

    python experiments/memory_and_time/main.py [--memory_only] [--out results.json]

What is in the result file is skipped, so that the same command continues a run. What is wrong is
not timed, and the exit status is then 1.
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

from lla.experiments.benchmarks import truth
from lla.experiments.benchmarks.formatting import progress_line
from lla.experiments.benchmarks.results import GIB, Results, device_name, load, make_header
from lla.experiments.benchmarks.timing import (
    START,
    Timing,
    device_lock,
    error_line,
    exit_after,
    log,
    time_interleaved,
)
from lla.experiments.memory_and_time import cases
from lla.experiments.memory_and_time.cases import KEY_FIELDS, Case

# Several processes may share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
NOT_RUN = "not run"
TOO_SLOW = "too slow"
OUT_OF_MEMORY = "out of memory"
_SETTINGS = ("ridge", "repeats", "seconds_per_cell", "memory_limit_gib", "call_limit", "seed")
_GRACE = 20.0  # seconds beyond the budget after which the process is ended


def _part(text: str) -> tuple[int, int]:
    index, parts = (int(word) for word in text.split("/"))
    if not 1 <= index <= parts:
        raise ValueError
    return index, parts


def parser() -> argparse.ArgumentParser:
    """The flags."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = out.add_argument
    add("--series", nargs="+", choices=cases.SERIES, default=list(cases.SERIES))
    add("--heads", type=int, nargs="+", default=[8, 1, 16], help="B*H; in order of importance")
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--lengths", type=int, nargs="+", default=[2**power for power in range(9, 17)])
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    add("--ridge", type=float, default=1.0)
    add("--memory_only", action="store_true", help="compile, and run nothing")
    add("--compile_all", action="store_true", help="compile what cannot fit, too")
    add("--memory_limit_gib", type=float, default=60.0, help="beyond it a call is not run")
    add("--run_limit_gib", type=float, default=1e9, help="beyond it a call is left for a later run")
    add("--call_limit", type=float, default=3.0, help="seconds; slower calls end their series")
    add(
        "--checked",
        type=int,
        default=2048,
        help="tokens compared with exact results",
    )
    add("--truths", help="folder that keeps exact results between runs")
    add("--truths_only", action="store_true", help="only fill that folder")
    add("--repeats", type=int, default=7)
    add("--seconds_per_cell", type=float, default=0.3, help="for the repeats")
    add("--compile_seconds", type=float, default=10.0, help="then what has been compiled is run")
    add("--seed", type=int, default=0)
    add("--budget_seconds", type=float, default=1e9, help="seconds; then it stops with what it has")
    add("--part", type=_part, default=(1, 1), help="i/n: this process does every n-th series")
    add("--lock", help="file shared by processes that take turns on one device")
    add("--commit", help="recorded where there is no git history")
    add("--out", type=pathlib.Path, help="default: results/<device>.json")
    add("--resume", action="store_true", help="keep earlier records, whatever code they measured")
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


def run_header(options: argparse.Namespace) -> dict[str, Any]:
    """The header of the result file. Its command omits flags that do not affect results."""
    settings = {name: getattr(options, name) for name in _SETTINGS}
    header = make_header("memory_and_time", settings, options.commit)
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
    return header


# ---------------------------------------------------------------------------------------------
# Compiling


class CompiledCase(NamedTuple):
    """A compiled call and the check of its results, or why there is none."""

    call: Any
    check: Any
    memory: dict[str, int]
    seconds: float
    reason: str | None = None
    predicted: float | None = None  # bytes


def checked_length(options, case: Case) -> int:
    """How many first tokens are compared with exact ones."""
    mechanism = cases.make_implementation(case.series, case.dtype, jax.default_backend())[
        1
    ].mechanism
    return cases.checked_length(case, mechanism, options.checked)


def compile_case(options, case: Case) -> CompiledCase:
    """Compiles a call without inputs."""
    start, check = time.monotonic(), None
    implementation = cases.make_implementation(case.series, case.dtype, jax.default_backend())[1]
    try:
        call, memory = truth.compile_call(implementation, case.which, cases.shapes(case))
        seconds = time.monotonic() - start
        if not options.memory_only and memory["temp_bytes"] <= limit_bytes(options):
            check = cases.compile_check(case, implementation, checked_length(options, case))
    except Exception as error:  # one failure must not stop the others
        return CompiledCase(None, None, {}, time.monotonic() - start, error_line(error))
    return CompiledCase(call, check, memory, seconds)


def limit_bytes(options) -> float:
    """Temporary memory beyond which a call is not run."""
    return options.memory_limit_gib * GIB


def extrapolate(memory: Mapping[int, int], n: int) -> float | None:
    """Bytes at `n`, extrapolated from the two longest lengths below it; None for fewer."""
    known = sorted(length for length in memory if length < n and memory[length] > 0)[-2:]
    if len(known) < 2:
        return None
    short, long = known
    power = np.log(memory[long] / memory[short]) / np.log(long / short)
    return float(memory[long] * (n / long) ** power)


def compile_some(options, unit: Sequence[Case], known: dict[int, int], end: float) -> dict:
    """Compiles the first cases: those whose turn comes within some seconds and before `end`.

    On a GPU, a case that would need more than twice the memory limit by extrapolation is not
    compiled: the compiler would spend a long time looking for a way to make it fit.

    Args:
      known: temporary bytes by length, of cases that are finished; extended in place.
    """
    skip = jax.default_backend() == "gpu" and not (options.compile_all or options.memory_only)
    compiled, start = {}, time.monotonic()
    for case in unit:
        now = time.monotonic()
        if now > end or (compiled and now > start + options.compile_seconds):
            break
        predicted = extrapolate(known, case.n)
        if skip and predicted is not None and predicted > 2 * limit_bytes(options):
            reason = f"{OUT_OF_MEMORY} (predicted {predicted / GIB:.4g} GiB from shorter n)"
            compiled[case] = CompiledCase(None, None, {}, 0.0, reason, predicted)
            continue
        found = compiled[case] = compile_case(options, case)
        if found.memory:
            known[case.n] = found.memory["temp_bytes"]
        log(f"compiled {'-'.join(map(str, case))}: {found.seconds:.1f} s")
    return compiled


# ---------------------------------------------------------------------------------------------
# Running


def is_slow(record: Mapping, call_limit: float) -> bool:
    """Whether longer calls of this series are too slow to be timed."""
    timed = record["status"] == "timed" and record["time_min_s"] > call_limit
    return timed or record.get("reason", "").startswith(TOO_SLOW)


def measure_case(options, case: Case, found: CompiledCase, slow: bool) -> dict[str, Any]:
    """The record of a compiled case."""
    name, implementation = cases.make_implementation(case.series, case.dtype, jax.default_backend())
    record = {**case.fields(), "runs": name, **found.memory}
    record["compile_s"] = round(found.seconds, 2)
    if found.predicted is not None:
        return record | {
            "predicted_bytes": found.predicted, "status": "memory only", "reason": found.reason,
        }  # fmt: skip
    if found.call is None:
        exhausted = "RESOURCE_EXHAUSTED" in found.reason
        reason = f"{OUT_OF_MEMORY} when compiled: {found.reason}" if exhausted else found.reason
        return record | {"status": "memory only" if exhausted else "unavailable", "reason": reason}
    gib = found.memory["temp_bytes"] / GIB
    if gib > options.memory_limit_gib:
        reason = f"{OUT_OF_MEMORY} (predicted {gib:.4g} GiB)"
        return record | {"status": "memory only", "reason": reason}
    if slow:
        reason = f"{TOO_SLOW}: a shorter call takes more than {options.call_limit:g} s"
        return record | {"status": "memory only", "reason": reason}
    if options.memory_only or gib > options.run_limit_gib:
        return record | {"status": "memory only", "reason": NOT_RUN}
    try:
        return record | run(options, case, implementation, found)
    except Exception as error:  # one failure must not stop the others
        reason = error_line(error)
        if "RESOURCE_EXHAUSTED" in reason:
            reason = f"{OUT_OF_MEMORY} when run (predicted {gib:.4g} GiB)"
            return record | {"status": "memory only", "reason": reason}
        return record | {"status": "unavailable", "reason": reason}


def run(
    options, case: Case, implementation: truth.Implementation, found: CompiledCase
) -> dict[str, Any]:
    """Checks a call and, if it is right, times it; a call beyond the limit is timed once."""
    exact = cases.exact_results(
        implementation.mechanism, checked_length(options, case), case.head_dim, options.ridge,
        options.seed, options.truths,
    )  # fmt: skip
    inputs = cases.make_inputs(case, max(options.lengths), options.ridge, options.seed)
    inputs = jax.block_until_ready(jax.device_put(inputs))
    start = time.perf_counter()
    got = jax.block_until_ready(found.call(inputs))
    first = time.perf_counter() - start
    compared, finite = found.check(got)
    verdict = cases.judge(case, implementation, compared, bool(finite), exact, options.ridge)
    del got
    if verdict["status"] != "timed":
        return verdict
    if first > options.call_limit:
        timing = Timing(first, first, 1, 1.0)
    else:
        timed = time_interleaved(
            {"": lambda: found.call(inputs)}, options.repeats, options.seconds_per_cell
        )
        timing = timed[""]
    load = round(os.getloadavg()[0], 2)
    return verdict | {**dataclasses.asdict(timing), "load_average": load}


def key(record: Mapping) -> tuple:
    """What identifies a record."""
    return tuple(record[name] for name in KEY_FIELDS)


def is_finished(options, record: Mapping) -> bool:
    """Whether a case with this record is not measured again."""
    return options.memory_only or record.get("reason") != NOT_RUN


def same_series(record: Mapping, case: Case) -> bool:
    """Whether a record differs from a case at most in the length."""
    return key({**record, "n": case.n}) == tuple(case)


def run_unit(options, unit: Sequence[Case], path: pathlib.Path, header: dict, end: float) -> int:
    """Compiles and measures the cases of a series; returns how many are left at the end."""

    def load():
        return Results(path, header, KEY_FIELDS, options.resume)

    results = load()
    finished = {key(record) for record in results.records if is_finished(options, record)}
    left = [case for case in unit if tuple(case) not in finished]
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
        with device_lock(options.lock):
            results = load()  # other processes have written meanwhile
            earlier = [record for record in results.records if same_series(record, unit[0])]
            slow_from = [r["n"] for r in earlier if is_slow(r, options.call_limit)]
            for case, found in compiled.items():
                if time.monotonic() > end:
                    return len(left)
                slow = any(n < case.n for n in slow_from)
                record = measure_case(options, case, found, slow)
                if is_slow(record, options.call_limit):
                    slow_from.append(case.n)
                results.add([record])
                left.remove(case)
                size = f", {record['temp_bytes'] / 2**20:.4g} MiB" if found.memory else ""
                log(progress_line(record, KEY_FIELDS) + size)
        if time.monotonic() > end:
            break
    return len(left)


def prepare(options, unit: Sequence[Case]) -> None:
    """Computes exact results on the CPU, and inputs, both of which are cached."""
    mechanism = cases.make_implementation(unit[0].series, unit[0].dtype, jax.default_backend())[
        1
    ].mechanism
    with jax.default_device(jax.devices("cpu")[0]):
        for length in sorted({checked_length(options, case) for case in unit}):
            cases.exact_results(
                mechanism, length, unit[0].head_dim, options.ridge, options.seed, options.truths
            )
    if not options.truths_only:
        cases.make_inputs(unit[0], max(options.lengths), options.ridge, options.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all cases of the flags; returns the exit status."""
    options = parse(argv)
    path = options.out or RESULTS / f"{device_name()}.json"
    header = run_header(options)
    end = START + options.budget_seconds
    units = cases.make_units(
        options.series, options.dtype, options.heads, options.head_dims, options.lengths,
        options.part,
    )  # fmt: skip
    if options.truths_only:
        for unit in units:
            prepare(options, unit)
        return 0
    total, done, missing = sum(map(len, units)), 0, 0
    log(f"{jax.devices()[0].device_kind}, {total} cases, results in {path}")
    for unit in units:
        missing += run_unit(options, unit, path, header, end)
        done += len(unit)
        log(f"{done} of {total} cases, {missing} without time")
    records = load(path)["records"] if path.exists() else []
    return int(any(record["status"] == "refused" for record in records))


if __name__ == "__main__":
    exit_after(parse(None).budget_seconds + _GRACE)
    sys.exit(main())
