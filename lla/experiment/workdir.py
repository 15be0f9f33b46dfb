"""A directory that holds one experiment: its resolved config and its records.

`config.json` is written once and never changed; `metrics.jsonl` grows, one JSON object a line. A
run that is started again with the same directory and config finds what is finished; one with
another config is refused before anything is written.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any


class WorkdirError(ValueError):
    """The directory belongs to another config, or its files cannot be read."""


class Workdir:
    """Opens or creates the directory `path` for the experiment described by `config`.

    Args:
      path: created if it does not exist.
      config: the resolved config; anything JSON can hold.

    Raises:
      WorkdirError: the directory holds results of a different config; it lists the differences
        and leaves everything as it was.
    """

    def __init__(self, path: str | os.PathLike, config: Mapping[str, Any]):
        self.path = pathlib.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        file = self.path / "config.json"
        if file.exists():
            _refuse_other(file, config)
        elif self.metrics.exists() and self.metrics.stat().st_size:
            raise WorkdirError(f"{self.metrics} exists without a config.json beside it.")
        else:
            write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
        self._drop_torn_line()

    @property
    def metrics(self) -> pathlib.Path:
        """The file of records."""
        return self.path / "metrics.jsonl"

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record and makes sure that it is on disk. NaN is refused (ValueError)."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return read_records(self.path)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the records that are not `wanted`: a resumed run will compute them again.

        Lines that stay are not rewritten, and the file is replaced as a whole.
        """
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line, record in zip(lines, self.read(), strict=True) if wanted(record)]
        if len(kept) < len(lines):
            write_whole(self.metrics, "".join(kept))

    def _drop_torn_line(self) -> None:
        # A run that was killed while it wrote leaves half a line: that piece is not finished.
        if not self.metrics.exists():
            return
        text = self.metrics.read_bytes()
        if text and not text.endswith(b"\n"):
            os.truncate(self.metrics, text.rfind(b"\n") + 1)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Records of the work directory `path`, oldest first; [] if there are none.

    Raises:
      WorkdirError: a line is not JSON.
    """
    file = pathlib.Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise WorkdirError(f"{file}, line {number}: not JSON ({error}).") from error
    return records


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The resolved config of the work directory `path`."""
    return json.loads((pathlib.Path(path) / "config.json").read_text(encoding="utf-8"))


def _refuse_other(file, config):
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WorkdirError(f"{file} is not JSON ({error}).") from error
    ours, theirs = _flat(config), _flat(stored)
    differences = [
        f"  {key}: {theirs.get(key, 'absent')} there, {ours.get(key, 'absent')} now"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, "absent") != theirs.get(key, "absent")
    ]
    if differences:
        raise WorkdirError(
            f"{file.parent} holds an experiment with another config; nothing was changed. "
            "Choose another --workdir or the same config:\n" + "\n".join(differences)
        )


def _flat(entry, prefix=""):
    if isinstance(entry, dict) and entry:
        parts = [_flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in entry.items()]
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {prefix: json.dumps(entry)}


def write_whole(file: pathlib.Path, text: str) -> None:
    """Writes `file` so that at any instant it holds all of the old or all of the new text."""
    # Processes that share a directory must not write into each other's temporary files.
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
