"""Times, machine description and result files, shared by the benchmarks of this folder.

A result file is one JSON object ``{"header": ..., "records": [...]}``: one record per cell, a cell
being one implementation with one set of sizes. It is rewritten after every group of cells, so an
interrupted run keeps what it has measured and goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
GIB = 1 << 30

STATUSES = ("timed", "memory only", "refused", "unavailable")
_MEASURED = ("time_min_s", "time_median_s", "repeats")
_HEADER = (
    "benchmark", "platform", "device", "versions", "date", "commit", "uncommitted_changes",
    "source_digest", "command", "settings",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Time


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call over `repeats` measurements.

    Attributes:
      time_min_s, time_median_s: the least and the median.
      repeats: measurements, of several calls each where they are short.
      calls_in_queue: how many calls' time passed between the last launch of a measurement and its
        end, the median. About 1 or less means that the device waited for the host, whose launches
        were measured then.
    """

    time_min_s: float
    time_median_s: float
    repeats: int
    calls_in_queue: float


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, budget: float
) -> dict[str, Timing]:
    """Times compiled and warmed-up `calls` in turns, so that a slow phase hits all of them.

    Args:
      calls: name to a function without arguments that returns JAX arrays.
      repeats: measurements of each.
      budget: seconds after which a call gets no more turns, once it has had two.
    """
    spent = dict.fromkeys(calls, 0.0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    queues: dict[str, list[float]] = {name: [] for name in calls}
    inner = {name: _calls_per_sample(call) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            if len(samples[name]) >= 2 and spent[name] > budget:
                continue
            start = time.perf_counter()
            for _ in range(inner[name]):
                out = call()
            launched = time.perf_counter()
            jax.block_until_ready(out)
            end = time.perf_counter()
            spent[name] += end - start
            samples[name].append((end - start) / inner[name])
            queues[name].append((end - launched) / samples[name][-1])
    return {
        name: Timing(
            min(times), statistics.median(times), len(times), statistics.median(queues[name])
        )
        for name, times in samples.items()
    }


@contextlib.contextmanager
def exclusive(path: str | os.PathLike | None):
    """Waits until no other process is inside with the same `path`; does nothing for None.

    Several processes can compile at once, each on cores of its own, and measure in turns.
    """
    if path is None:
        yield
        return
    import fcntl

    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _calls_per_sample(call) -> int:
    """An accelerator's queue hides the launch of a short call, as it does in a real program.

    So many calls follow one another that they take 50 ms: a queue is filled after some tens of
    them, and what the first launches take no longer counts.
    """
    if jax.default_backend() == "cpu":
        return 1
    start = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, min(1000, math.ceil(0.05 / (time.perf_counter() - start))))


# ---------------------------------------------------------------------------------------------
# Description of the run


def make_header(benchmark: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed to repeat a run; `settings` are the options that change a cell's result."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "lla", "kernels", "experiments/benchmarks/*.py")
    script = pathlib.Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return {
        "benchmark": benchmark,
        "platform": jax.default_backend(),
        "device": {
            "kind": jax.devices()[0].device_kind,
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": None if changes is None else bool(changes),
        "source_digest": source_digest(),
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "settings": json.loads(json.dumps(settings)),
    }


def device_name() -> str:
    """`cpu`, `h200`, ..."""
    if jax.default_backend() == "cpu":
        return "cpu"
    kind = jax.devices()[0].device_kind.lower().replace("nvidia", "")
    return re.sub(r"\W+", "_", kind).strip("_")


def source_digest() -> str:
    """Digest of the code that is measured; commits that leave it alone keep results valid."""
    digest = hashlib.sha256()
    for folder in ("lla/ops", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------
# Result files


class Results:
    """The result file at `path`, with the records that are still valid for `header`.

    Records of an earlier run are kept when it measured the same code with the same settings,
    versions and device, or whenever `resume` is true. A record carries its own commit and date.

    Args:
      path: JSON file, created on the first `add`.
      header: of this run, from `make_header`.
      key_fields: fields of a record that tell cells apart.
      resume: keep earlier records without comparing headers.
    """

    def __init__(
        self, path: str | os.PathLike, header: dict, key_fields: Sequence[str], resume: bool = False
    ):
        self.path = pathlib.Path(path)
        self.header = header
        self.key_fields = tuple(key_fields)
        self.records: list[dict] = []
        if self.path.exists():
            earlier = load(self.path)
            same = ("benchmark", "settings", "source_digest", "versions", "device", "platform")
            if resume or all(earlier["header"].get(name) == header[name] for name in same):
                self.records = earlier["records"]
        self._finished = {self._key(record) for record in self.records}

    def _key(self, record: Mapping) -> tuple:
        return tuple(record[name] for name in self.key_fields)

    def finished(self, **cell) -> bool:
        return self._key(cell) in self._finished

    def add(self, records: Sequence[dict]) -> None:
        """Appends records and rewrites the file in one step."""
        for record in records:
            stamp = {"commit": self.header["commit"], "date": self.header["date"]}
            record = {**record, **stamp}
            check_record(record)
            self.records.append(record)
            self._finished.add(self._key(record))
        write_json(self.path, self.document())

    def document(self) -> dict:
        return {"header": self.header, "records": self.records}


def write_json(path: pathlib.Path, document: dict) -> None:
    """Replaces the file as a whole, so that no reader and no interruption sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = ",\n  ".join(json.dumps(record, allow_nan=False) for record in document["records"])
    header = json.dumps(document["header"], indent=1, allow_nan=False)
    partial.write_text(f'{{"header": {header},\n "records": [\n  {lines}\n ]}}\n', encoding="utf-8")
    os.replace(partial, path)


def load(path: str | os.PathLike) -> dict:
    """Reads and checks a result file.

    Raises:
      ValueError: if it does not have the form described in README.md.
    """
    path = pathlib.Path(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in _HEADER if name not in document.get("header", {})]
    if missing or not isinstance(document.get("records"), list):
        raise ValueError(f"{path.name} is not a result file: header lacks {missing}.")
    for record in document["records"]:
        check_record(record)
    return document


def check_record(record: Mapping) -> None:
    """Raises ValueError for a record without the fields that its status promises."""
    status = record.get("status")
    if status not in STATUSES:
        raise ValueError(f"status must be one of {STATUSES}, got {status!r} in {record}.")
    needed = ["implementation", "pass", "head_dim", "commit", "date"]
    if status == "timed":
        needed += [*_MEASURED, "errors", "bounds", "truth"]
    elif status == "refused":
        needed += ["reason", "errors", "bounds", "truth"]
    else:
        needed += ["reason"]
    missing = [name for name in needed if name not in record]
    if missing:
        raise ValueError(f"a record with status {status!r} lacks {missing}: {record}.")
    if status != "timed" and any(name in record for name in _MEASURED):
        raise ValueError(f"a record with status {status!r} holds a time: {record}.")
    if status == "timed" and not 0 < record["time_min_s"] <= record["time_median_s"]:
        raise ValueError(f"times must be positive and ordered: {record}.")
