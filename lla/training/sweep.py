"""Sweeps: every point of a grid is one program that trains all its seeds and learning rates."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from lla.runs.config import from_config, plain
from lla.runs.workdir import check_config
from lla.training import results
from lla.training.program import Runs, abstract_model
from lla.training.results import FINAL, SELECT, read_results, select, summary, write_results
from lla.training.settings import Settings, Sharding, Sweep, defaults, override, resolve
from lla.training.unused import check_used

__all__ = [
    "Cell",
    "Grid",
    "cells",
    "read_results",
    "run",
    "select",
    "summary",
    "write_results",
]


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

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the settings that differ from the defaults.

        Rows of results carry them, so that results of other settings are told apart. An option that
        is added later, with a default that changes nothing, does not change them.
        """
        record = _shared_settings(self)
        usual = defaults(self.settings.task.name)
        options = usual.pop("mixers")[self.settings.model.mixer.name]
        usual["model"]["mixer"] = {"name": None, **options}
        usual["task"]["name"] = None
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "steps_per_call"):
            del record["training"][name]  # these change no result
        text = json.dumps(_changed(record, usual), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def record(self, runs: Runs) -> dict[str, Any]:
        """The resolved config of the work directory of these runs."""
        shared = {**_shared_settings(self), "choices": self.choices, "settings": self.digest}
        return {**shared, "runs": dataclasses.asdict(runs)}


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
        override(config, _nested(path, values[0]))  # its check of the path
    found: list[Cell] = []
    seen, labelled = [], set()
    for case in sweep.cases or {"": {}}:
        base = override(config, sweep.cases[case]) if case else config
        for point in itertools.product(*axes.values()):
            choices = dict(zip(axes, point, strict=True))
            # What belongs to another mechanism is no choice of this point.
            name = choices.get("model.mixer.name", base["model"]["mixer"].get("name"))
            used = {
                path: value
                for path, value in choices.items()
                if not path.startswith("mixers.") or path.split(".")[1] == name
            }
            labels = ({"case": case} if case else {}) | used
            if _folder(labels) in labelled:
                continue
            labelled.add(_folder(labels))
            changed = base
            for path, value in used.items():
                changed = override(changed, _nested(path, value))
            settings = resolve(changed)
            record = settings.record()
            if record in seen:
                continue
            seen.append(record)
            abstract_model(settings.model_config(settings.create_task()))  # its checks
            found.append(Cell(_folder(labels), labels, settings))
    paths = [*axes, *(path for case in sweep.cases.values() for path, _ in _axes(case))]
    check_used(paths, {cell.settings.model.mixer.name: None for cell in found}, sweeps=True)
    return sweep, found


@dataclasses.dataclass(frozen=True)
class Grid:
    """A sweep with the place of its results.

    Attributes:
      sweep, points: of `cells`.
      path: the work directory.
      known: rows of results that were made elsewhere and need not be made again.
      copies: files that get a copy of `results.csv`.
    """

    sweep: Sweep
    points: list[Cell]
    path: pathlib.Path
    known: Sequence[Mapping[str, Any]] = ()
    copies: tuple[pathlib.Path, ...] = ()

    def phases(self) -> dict[str, Runs]:
        """The phases of every point in order, with their runs; see `Sweep.selection_seeds`.

        The learning rate of runs behind a selection stands for the one that will be selected.
        """
        sweep = self.sweep
        if not sweep.selection_seeds:
            return {FINAL: Runs(sweep.seeds, sweep.learning_rates)}
        return {
            SELECT: Runs(sweep.selection_seeds, sweep.learning_rates, one_rate=True),
            FINAL: Runs(sweep.seeds, sweep.learning_rates[:1]),
        }

    def folder(self, cell: Cell, phase: str) -> pathlib.Path:
        """The work directory of a phase."""
        return self.path / "cells" / cell.name / phase

    def open_phases(self, cell: Cell) -> list[str]:
        """Those that are neither finished below `path` nor known.

        Raises:
          WorkdirError: one that is finished has another config.
        """
        found = []
        for phase, runs in self.phases().items():
            folder = self.folder(cell, phase)
            if (folder / "result.json").exists():
                check_config(folder, cell.record(self.runs(cell, phase)))
            elif len(self._known(cell, phase)) < len(runs.seeds) * len(runs.learning_rates):
                found.append(phase)
        return found

    def runs(self, cell: Cell, phase: str) -> Runs:
        """The runs of a phase, once those before it are finished."""
        runs = self.phases()[phase]
        if phase == FINAL and self.sweep.selection_seeds:
            rows = list(results.rows(self.folder(cell, SELECT))) or self._known(cell, SELECT)
            (best,) = select(rows, ())
            runs = dataclasses.replace(runs, learning_rates=(best["learning_rate"],))
        return runs

    def write(self) -> pathlib.Path:
        """Writes `results.csv`; returns its path."""
        return write_results(self.path, *self.copies)

    def _known(self, cell, phase):
        return [
            row
            for row in self.known
            if row["settings"] == cell.digest
            and row["phase"] == phase
            and all(row.get(column) == value for column, value in cell.choices.items())
        ]


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

    `path/cells/NAME/PHASE/` is the work directory of one phase of a point (`lla.training.fit`),
    with checkpoints of its own; `path/results.csv` is written anew after each, with a row for every
    run: the choices, "phase" ("select" or "final"), "settings" (a digest), "seed", "learning_rate",
    "status", "steps", "headline" (name of the metric, of the validation split), "mode" ("max" or
    "min"), "final" and "best"; the last value of the same metric on the splits that results are
    reported on, such as "final:test/accuracy"; "seconds", which all runs of the phase took
    together; and the headline metric at every evaluation, "eval_every" updates apart ("curve").
    "status" is "finished" (all updates), "stopped" (at its goal, after so many updates), "cut"
    (another rate was at the goal first) or "diverged" ("steps" is the update that failed).

    Args:
      config: the whole config, section `sweep` included.
      path: the directory of the sweep.
      part: (i, n) for every n-th point from the i-th on. Processes that share `path` need none:
        each takes the points that no other one is at.
      limit: seconds after which no further phase is begun.
      stream: for progress; standard error if None.
      report: called with a line of text for each point.

    Returns:
      The path of `results.csv`.

    Raises:
      ValueError: settings that make no sense, or a folder of a point with another config in it.
    """
    from lla.training.queue import Queue  # it is made of grids

    index, parts = part
    if not 0 <= index < parts:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part}.")
    sweep, points = cells(config)
    grid = Grid(sweep, points[index::parts], pathlib.Path(path))
    Queue([grid], begin_before=limit, stream=stream, report=report).run()
    return grid.write()


def _shared_settings(cell: Cell) -> dict[str, Any]:
    """What all runs of a point share."""
    record = cell.settings.record()
    del record["training"]["seed"], record["optimizer"]["learning_rate"], record["sharding"]
    return record


def _changed(record, usual):
    """The leaves of `record` that differ from those of `usual`."""
    found = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            inner = _changed(value, usual.get(key) or {})
            found |= {key: inner} if inner else {}
        elif key not in usual or plain(usual[key]) != plain(value):
            found[key] = value
    return found


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
