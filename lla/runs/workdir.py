"""Work directories: the resolved config and the records of one experiment.

`config.json` is written once and never changed. `metrics.jsonl` grows by one JSON object a line. A
run that is started again with the same directory and config finds what is finished. A run with
another config is refused before anything is written.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lla import paths


class WorkdirError(ValueError):
    """The directory belongs to another config or process, or its files cannot be read."""


def directory(path: str | os.PathLike) -> pathlib.Path:
    """`path` as a directory that exists or can be created, with `~` expanded.

    Creates nothing.

    Raises:
      WorkdirError: an empty path, a file, or a path below a file.
    """
    if not os.fspath(path):
        raise WorkdirError("the work directory must have a name, got ''.")
    try:
        path = pathlib.Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise WorkdirError(f"{path} cannot be a work directory: {error}.") from error
    for folder in (path, *path.parents):
        if folder.exists():
            if not folder.is_dir():
                raise WorkdirError(f"{path} cannot be a work directory: {folder} is a file.")
            break
    return path


def check_config(path: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Compares `config` with the config of the work directory `path`; writes nothing.

    Raises:
      WorkdirError: the directory has results of another config (the message lists the
        differences), or its config cannot be read.
    """
    path = pathlib.Path(path)
    file, metrics = path / "config.json", path / "metrics.jsonl"
    if file.exists():
        _refuse_other(file, json.loads(json.dumps(config)))  # tuples become lists, as in the file
    elif metrics.exists() and metrics.stat().st_size:
        raise WorkdirError(f"{metrics} exists without a config.json beside it.")


class Workdir:
    """Opens or creates the directory `path` for an experiment with this config.

    Args:
      path: created if it does not exist; see `directory`.
      config: the resolved config; anything that JSON can represent.

    Raises:
      WorkdirError: as for `check_config`, or `path` cannot be a directory. Nothing was changed.
    """

    def __init__(self, path: str | os.PathLike, config: Mapping[str, Any]):
        self.path = directory(path)
        check_config(self.path, config)
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "config.json"
        if not file.exists():
            write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
        self._drop_torn_line()

    @property
    def metrics(self) -> pathlib.Path:
        """The file with the records."""
        return self.path / "metrics.jsonl"

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record and flushes it to disk. Raises ValueError for NaN."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return read_records(self.path)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the records that are not `wanted`. A resumed run computes them again.

        Lines that stay keep their bytes, and the file is replaced in one step.
        """
        if not self.metrics.exists():
            return
        lines = _lines(self.metrics)
        kept = [line for line, record in zip(lines, self.read(), strict=True) if wanted(record)]
        if len(kept) < len(lines):
            write_whole(self.metrics, b"".join(kept).decode("utf-8"))

    def _drop_torn_line(self) -> None:
        # A run that was killed while writing leaves half a line, which is not a record.
        if not self.metrics.exists():
            return
        text = self.metrics.read_bytes()
        if text and not text.endswith(b"\n"):
            os.truncate(self.metrics, text.rfind(b"\n") + 1)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of the work directory `path`, oldest first; [] if there are none.

    A last line without its end, which is being written, is not read.

    Raises:
      WorkdirError: a line is not a JSON object.
    """
    file = pathlib.Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    return [
        _parsed(line, f"{file}, line {number}", "Delete that line and those below it.")
        for number, line in enumerate(_lines(file), 1)
    ]


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The resolved config of the work directory `path`.

    Raises:
      WorkdirError: there is none, or it is not a JSON object.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.exists():
        raise WorkdirError(
            f"{path} is no work directory: it has no config.json."
            + paths.hint(pathlib.Path(path), lambda beside: (beside / "config.json").exists())
        )
    return read_json(file, f"Without it {path} cannot be read; choose another directory.")


def read_json(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `file`.

    Args:
      file: an existing file.
      remedy: a sentence on what to do if the file is damaged; the error message ends with it.

    Raises:
      WorkdirError: the file is damaged.
    """
    return _parsed(file.read_bytes(), str(file), remedy)


def _lines(file):
    lines = file.read_bytes().splitlines(keepends=True)
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def _parsed(text, place, remedy):
    try:
        entry = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        found = f"not JSON ({error})" if text.strip() else "empty"
        raise WorkdirError(f"{place} is damaged: {found}. {remedy}") from error
    if not isinstance(entry, dict):
        raise WorkdirError(f"{place} is damaged: not a JSON object. {remedy}")
    return entry


def _refuse_other(file, config):
    stored = read_json(file, f"Choose another directory, or delete {file.parent} and start anew.")
    ours, theirs = flat(config), flat(stored)
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


def flat(entry: Any, prefix: str = "") -> dict[str, str]:
    """Dotted path -> leaf, as JSON, of a nested config."""
    if isinstance(entry, dict) and entry:
        parts = [flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in entry.items()]
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {prefix: json.dumps(entry)}


def write_whole(file: pathlib.Path, text: str) -> None:
    """Replaces `file` in one step: a reader sees either the old text or the new one."""
    # Each process has a temporary file of its own.
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
