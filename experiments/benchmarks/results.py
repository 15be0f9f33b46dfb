"""Result files, with a description of the machine and the run.

A result file is one JSON object ``{"header": ..., "records": [...]}``. A record is one
implementation with one set of sizes. The file is rewritten after every group of records, so that an
interrupted run keeps what it has measured and continues where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from lla.experiments.benchmarks.timing import log

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
# Description of the run


# Options that several benchmarks have, and their usual defaults.
_OPTIONS = {
    "repeats": {"type": int},
    "budget": {"type": float, "help": "seconds for the repeats of one call"},
    "seed": {"type": int, "default": 0},
    "workers": {"type": int, "default": min(16, os.cpu_count() or 1), "help": "compiling threads"},
    "limit": {"type": float, "default": 1e9, "help": "seconds; then it stops with what it has"},
    "lock": {"help": "file shared by processes that take turns on one device"},
    "commit": {"help": "recorded in the result where there is no git history"},
    "output": {"type": pathlib.Path, "help": "result file; default: in results/"},
    "resume": {"action": "store_true", "help": "keep earlier records, whatever code they measured"},
}


def add_options(parser: argparse.ArgumentParser, names: str, **defaults: Any) -> None:
    """Adds the options in `names`, and those in `defaults` with another default."""
    for name in (*names.split(), *defaults):
        options = _OPTIONS[name] | ({"default": defaults[name]} if name in defaults else {})
        parser.add_argument(f"--{name}", **options)


def make_header(
    benchmark: str,
    settings: Mapping[str, Any],
    commit: str | None = None,
    packages: Sequence[str] = (),
    folders: Sequence[str] = (),
) -> dict[str, Any]:
    """What is needed to repeat a run.

    Args:
      benchmark: its name.
      settings: the options that affect the result of a call.
      commit: recorded if it is given, else the commit of the repository.
      packages: whose versions are recorded besides those of JAX and Flax, if installed.
      folders: with measured code, besides those that every benchmark measures.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
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
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "source_digest": source_digest(folders),
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "settings": json.loads(json.dumps(settings)),
    }


def device_name() -> str:
    """The device as part of a file name: "cpu", "h200" and so on."""
    if jax.default_backend() == "cpu":
        return "cpu"
    kind = jax.devices()[0].device_kind.lower().replace("nvidia", "")
    return re.sub(r"\W+", "_", kind).strip("_")


def source_digest(folders: Sequence[str] = ()) -> str:
    """A digest of the code that is measured. Results stay valid as long as it is the same."""
    digest = hashlib.sha256()
    for folder in ("lla/ops", "kernels", *folders):
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

    Records of an earlier run are kept if it measured the same code with the same settings,
    versions and device, or if `resume` is true. Each record carries its own commit and date.

    Args:
      path: JSON file, created on the first `add`.
      header: of this run, from `make_header`.
      key_fields: fields of a record that identify it.
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

    def key(self, record: Mapping) -> tuple:
        """What identifies a record."""
        return tuple(record[name] for name in self.key_fields)

    def has(self, fields: Mapping, statuses: Sequence[str] = STATUSES) -> bool:
        """Whether there is a record with the key of `fields` and one of `statuses`."""
        key = self.key(fields)
        return any(self.key(r) == key and r["status"] in statuses for r in self.records)

    def add(self, records: Sequence[dict]) -> None:
        """Adds records, in place of earlier ones with the same keys, and rewrites the file."""
        stamp = {"commit": self.header["commit"], "date": self.header["date"]}
        new = {self.key(record): record | stamp for record in records}
        for record in new.values():
            check_record(record)
        kept = [record for record in self.records if self.key(record) not in new]
        self.records = [*kept, *new.values()]
        write_json(self.path, self.document())

    def document(self) -> dict:
        """What is in the file."""
        return {"header": self.header, "records": self.records}


def open_results(
    benchmark: str,
    options: argparse.Namespace,
    settings: Iterable[str],
    key_fields: Sequence[str],
    *,
    name: str | None = None,
    **header: Any,
) -> Results:
    """The result file of a run with these options, which are logged.

    Args:
      benchmark: its name.
      options: of the command line; output, commit and resume are optional.
      settings: names of the options that affect the result of a call.
      key_fields: as for `Results`.
      name: of the file in results/; by default that of the benchmark and the device.
      **header: further arguments of `make_header`.
    """
    path = options.output or RESULTS / f"{name or f'{benchmark}_{device_name()}'}.json"
    chosen = {setting: getattr(options, setting) for setting in settings}
    made = make_header(benchmark, chosen, getattr(options, "commit", None), **header)
    log(f"{jax.devices()[0].device_kind}, results in {path}")
    return Results(path, made, key_fields, getattr(options, "resume", False))


def write_json(path: pathlib.Path, document: dict) -> None:
    """Replaces the file in one step, so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = ",\n  ".join(json.dumps(record, allow_nan=False) for record in document["records"])
    header = json.dumps(document["header"], indent=1, allow_nan=False)
    partial.write_text(f'{{"header": {header},\n "records": [\n  {lines}\n ]}}\n', encoding="utf-8")
    os.replace(partial, path)


def load(path: str | os.PathLike) -> dict:
    """Reads and checks a result file.

    Raises:
      ValueError: it is not a result file.
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
    """Raises ValueError if a record lacks fields that its status requires."""
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
