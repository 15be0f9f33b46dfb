"""Sweeps: every point of a grid is one program that trains all its seeds and learning rates."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from lla.experiment import lock
from lla.experiment.boundary import from_config, plain
from lla.experiment.workdir import read_config, read_records, write_whole
from lla.training.loop import fit
from lla.training.program import Program, Runs, abstract_model
from lla.training.settings import Settings, Sharding, Sweep, override, resolve
from lla.training.sharding import make_mesh
from lla.training.unused import check_used

_RESULT_COLUMNS = (
    "seed",
    "learning_rate",
    "status",
    "steps",
    "headline",
    "mode",
    "final",
    "best",
)
_FURTHER = "final:"  # columns of the headline metric's value on other splits begin with this


@dataclasses.dataclass(frozen=True)
class Cell:
    """A point of the grid.

    Attributes:
      name: of its folder, made of the choices.
      choices: column -> value: "case" where there are several, and the grid's dotted paths.
      settings: what is trained; its seed and learning rate are not used.
    """

    name: str
    choices: dict[str, Any]
    settings: Settings


def cells(config: Mapping[str, Any]) -> tuple[Sweep, list[Cell]]:
    """The sweep that `config` describes, and its points.

    Points that differ only in what does not apply to them, such as an option of another mechanism,
    are one point: the first.

    Raises:
      ValueError: an unknown key or impossible value in any of the points, or an axis or an override
        of a case that none of them reads.
    """
    config = {key: plain(entry) for key, entry in config.items()}
    sweep = from_config(Sweep, config.pop("sweep", {}), "config.sweep")
    if config.get("sharding", {}) not in ({}, dataclasses.asdict(Sharding())):
        raise ValueError("a sweep trains each point on one device: leave config.sharding alone.")
    axes = dict(_axes(sweep.grid))
    for path, values in axes.items():
        if not isinstance(values, tuple) or not values:
            raise ValueError(f"config.sweep.grid.{path} must be a tuple of values, got {values!r}.")
    found: list[Cell] = []
    seen = []
    for case in sweep.cases or {"": {}}:
        base = override(config, sweep.cases[case]) if case else config
        for point in itertools.product(*axes.values()):
            choices = dict(zip(axes, point, strict=True))
            changed = base
            for path, value in choices.items():
                changed = override(changed, _nested(path, value))
            settings = resolve(changed)
            record = settings.record()
            if record in seen:
                continue
            seen.append(record)
            abstract_model(settings.model_config(settings.create_task()))  # its checks
            # What belongs to another mechanism is no choice of this point.
            used = {
                path: value
                for path, value in choices.items()
                if not path.startswith("mixers.") or path.split(".")[1] == settings.model.mixer.name
            }
            labels = ({"case": case} if case else {}) | used
            found.append(Cell(_folder(labels), labels, settings))
    paths = [*axes, *(path for case in sweep.cases.values() for path, _ in _axes(case))]
    check_used(paths, {cell.settings.model.mixer.name: None for cell in found}, sweeps=True)
    return sweep, found


def run(
    config: Mapping[str, Any],
    path: str | os.PathLike,
    *,
    part: tuple[int, int] = (0, 1),
    limit: float = math.inf,
    stream: TextIO | None = None,
    report: Callable[[str], None] = print,
) -> pathlib.Path:
    """Trains the points of a sweep that are not finished.

    `path/cells/NAME/` is the work directory of one point (`lla.training.fit`), with checkpoints of
    its own; `path/results.csv` is written anew after each point, with a row for every run of every
    finished point: the choices, "seed", "learning_rate", "status" ("finished", "stopped" or
    "diverged"), "steps" (for a diverged run the update that failed), "headline" (name of the
    metric), "mode" ("max" or "min"), "final" and "best"; and where the task has further splits, the
    last value of the same metric there, such as "final:test_long/accuracy".

    Args:
      config: the whole config, section `sweep` included.
      path: the directory of the sweep.
      part: (i, n) for every n-th point from the i-th on. Processes that share `path` need none:
        each takes the points that no other one is at.
      limit: seconds after which no further point is begun.
      stream: for progress; standard error if None.
      report: called with a line of text for each point.

    Returns:
      The path of `results.csv`.

    Raises:
      ValueError: settings that make no sense, or a folder of a point with another config in it.
    """
    path = pathlib.Path(path)
    sweep, points = cells(config)
    index, parts = part
    if not 0 <= index < parts:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part}.")
    runs = Runs(sweep.seeds, sweep.learning_rates)
    mine = points[index::parts]
    start = time.monotonic()
    for number, cell in enumerate(mine, 1):
        if time.monotonic() - start > limit:
            report(f"{number}/{len(mine)}  {cell.name}  not begun: the limit is reached")
            break
        with _claimed(path / "locks" / cell.name) as claimed:
            folder = path / "cells" / cell.name
            done = "already finished" if (folder / "result.json").exists() else "training"
            done = done if claimed else "another process is at it"
            report(f"{number}/{len(mine)}  {cell.name}  {done}")
            if claimed:
                program = Program(cell.settings, make_mesh(Sharding(1, 1), jax.devices()[:1]), runs)
                fit(program, folder, _record(cell, runs), stream=stream)
                # A sweep holds many programs, and compiled ones are not dropped by themselves.
                del program
                jax.clear_caches()
                write_results(path)
    return write_results(path)


def write_results(path: str | os.PathLike) -> pathlib.Path:
    """Collects every finished point below `path` into `path/results.csv`; returns its path."""
    path = pathlib.Path(path)
    rows = [row for folder in sorted((path / "cells").glob("*")) for row in _rows(folder)]
    columns = dict.fromkeys(column for row in rows for column in row)
    choices = [column for column in columns if _is_choice(column)]
    further = [column for column in columns if column.startswith(_FURTHER)]
    columns = [*choices, *_RESULT_COLUMNS, *further]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / "results.csv", text.getvalue())
    return path / "results.csv"


def read_results(file: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of `results.csv`; numbers are numbers, and what is empty is None."""
    with pathlib.Path(file).open(encoding="utf-8", newline="") as lines:
        return [
            {column: _parsed(text) for column, text in row.items()} for row in csv.DictReader(lines)
        ]


def select(rows: Iterable[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """The learning rate of every group of runs: best mean over seeds of the final headline metric.

    A rate with which any run diverged is not taken unless all rates have such a run; then the
    group's "mean" is None. Of equal rates the lowest is taken. This is the selection rule of every
    figure that shows trained models [ours].

    Args:
      rows: of `read_results`.
      by: columns that make a group, such as ("model.mixer.name", "task.segment_length"). Options
        that are not among them are selected like the learning rate.

    Returns:
      For each group its columns, all choices and the "learning_rate" selected, "mean" and "std"
      (of the seeds, with n - 1; 0 for one seed), "best" (mean over seeds of the runs' best values),
      "seeds" (their number), "diverged" (runs of the group at any rate), "headline" and "mode".
    """
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in by), []).append(row)
    return [_selected(members) for members in groups.values()]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of text for every choice but options of mechanisms, with the best learning rate."""
    columns = dict.fromkeys(column for row in rows for column in row)
    by = [c for c in columns if _is_choice(c) and not c.startswith("mixers.")]
    lines = []
    for found in select(rows, by):
        name = ", ".join(f"{column}={found[column]}" for column in by) or "all"
        value = (
            "diverged"
            if found["mean"] is None
            else f"{found['mean']:.4g} +- {found['std']:.2g} ({found['seeds']} seeds)"
        )
        lines.append(f"{name}: {found['headline']} {value} at {found['learning_rate']:.3g}")
    return lines


@contextlib.contextmanager
def _claimed(file: pathlib.Path) -> Iterator[bool]:
    """Whether no other process is inside with the same `file`; a process that dies lets it go."""
    with lock.claimed(file) as holder:
        yield holder is None


def _selected(members):
    candidates: dict[tuple, list] = {}
    for row in members:
        choice = {k: v for k, v in row.items() if _is_choice(k)}
        key = (row["learning_rate"], *choice.items())
        candidates.setdefault(key, []).append((choice, row))
    modes = {row["mode"] for row in members}
    if len(modes) > 1:
        raise ValueError("rows of a group must share one headline metric.")
    (mode,) = modes
    sign = -1.0 if mode == "max" else 1.0

    def quality(item):
        _, runs = item
        finals = [row["final"] for _, row in runs]
        bad = any(row["status"] == "diverged" for _, row in runs) or None in finals
        mean = math.inf if bad else sign * float(np.mean(finals))
        return mean, runs[0][1]["learning_rate"]

    _, runs = min(candidates.items(), key=quality)
    choice, first = runs[0]
    sound = math.isfinite(quality((None, runs))[0])
    finals = [row["final"] for _, row in runs] if sound else []
    return {
        **choice,
        "learning_rate": first["learning_rate"],
        "mean": float(np.mean(finals)) if sound else None,
        "std": (float(np.std(finals, ddof=1)) if len(finals) > 1 else 0.0) if sound else None,
        "best": float(np.mean([row["best"] for _, row in runs])) if sound else None,
        "seeds": len(runs),
        "diverged": sum(row["status"] == "diverged" for row in members),
        "headline": first["headline"],
        "mode": mode,
    }


def _record(cell: Cell, runs: Runs) -> dict[str, Any]:
    record = cell.settings.record()
    del record["training"]["seed"], record["optimizer"]["learning_rate"], record["sharding"]
    return {**record, "runs": dataclasses.asdict(runs), "choices": cell.choices}


def _rows(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    if not (folder / "result.json").exists():
        return
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    config = read_config(folder)
    further = _further(folder, result["headline"])
    for i, seed in enumerate(config["runs"]["seeds"]):
        for j, rate in enumerate(config["runs"]["learning_rates"]):
            failed = result["failed_at"][i][j]
            diverged = failed >= 0
            yield {
                **config["choices"],
                "seed": seed,
                "learning_rate": rate,
                "status": "diverged" if diverged else result["status"],
                "steps": failed if diverged else result["steps"],
                "headline": result["headline"],
                "mode": result["mode"],
                # The parameters of a diverged run are those before it: no result of training.
                "final": "" if diverged else result["final"][i][j],
                "best": result["best"][i][j],
                **{k: "" if diverged else values[i][j] for k, values in further.items()},
            }


def _further(folder, headline):
    """Column -> last values [seed][rate] of the headline metric on the other splits."""
    metric = headline.partition("/")[2]
    last = [record for record in read_records(folder) if record["kind"] == "eval"][-1]
    return {
        f"{_FURTHER}{name}": values
        for name, values in last.items()
        if name.partition("/")[2] == metric and name != headline
    }


def _is_choice(column):
    return column not in _RESULT_COLUMNS and not column.startswith(_FURTHER)


def _axes(grid: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in grid.items():
        inner = f"{path}.{key}" if path else key
        if isinstance(entry, Mapping):
            yield from _axes(entry, inner)
        else:
            yield inner, entry


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _folder(labels: Mapping[str, Any]) -> str:
    parts = [f"{path}={value}" for path, value in labels.items()]
    return re.sub(r"[^\w.=,+-]", "_", ",".join(parts)) or "all"


def _parsed(text: str) -> Any:
    if text in ("", "None"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
