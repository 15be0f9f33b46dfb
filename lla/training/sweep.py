"""Sweeps: for every point of a grid, one program trains all seeds and learning rates."""

import dataclasses
import functools
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
from lla.training.results import FINAL, SELECT, read_results, select, summary, write_results
from lla.training.settings import Settings, Sharding, Sweep, defaults, override, resolve
from lla.training.trainer import Runs, abstract_model
from lla.training.unused import check_used

__all__ = [
    "Grid",
    "GridPoint",
    "grid_points",
    "read_results",
    "run",
    "select",
    "summary",
    "write_results",
]


@dataclasses.dataclass(frozen=True)
class GridPoint:
    """A point of the grid of a sweep.

    Attributes:
      name: of its folder, made from the choices.
      choices: column -> value: "case" where there are several, and the grid's dotted paths.
      settings: of its runs; seed and learning rate are not used.
    """

    name: str
    choices: dict[str, Any]
    settings: Settings

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the settings that differ from the defaults, twelve hexadecimal digits.

        Rows of results have it in the column "settings", which tells results of other settings
        apart. An option that is added later, with a default that changes nothing, does not change
        it.
        """
        record = _shared_settings(self)
        usual = defaults(self.settings.task.name)
        table = usual.pop("mixers")
        options = table[self.settings.model.mixer.name]
        usual["model"]["mixer"] = {"name": None, **options}
        usual["model"]["other_mixers"] = {
            other: table[other] for other in record["model"].get("other_mixers", ())
        }
        usual["task"]["name"] = None
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "steps_per_call"):
            del record["training"][name]  # these change no result
        text = json.dumps(_changed(record, usual), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def record(self, runs: Runs) -> dict[str, Any]:
        """The resolved config of the work directory of these runs."""
        shared = {**_shared_settings(self), "choices": self.choices, "settings": self.digest}
        return {**shared, "runs": dataclasses.asdict(runs)}


def grid_points(config: Mapping[str, Any]) -> tuple[Sweep, list[GridPoint]]:
    """The sweep that `config` describes, and its points.

    Points that differ only in options they do not use, such as those of another mixer, count once.

    Raises:
      ValueError: an unknown key or impossible value in any point, or an axis or an override of a
        case that no point uses.
    """
    config = {key: plain(entry) for key, entry in config.items()}
    sweep = from_config(Sweep, config.pop("sweep", {}), "config.sweep")
    if config.get("sharding", {}) not in ({}, dataclasses.asdict(Sharding())):
        raise ValueError("a sweep trains each point on one device: leave config.sharding alone.")
    axes = dict(_axes(sweep.grid))
    for path, values in axes.items():
        if not isinstance(values, tuple) or not values:
            raise ValueError(f"config.sweep.grid.{path} must be a tuple of values, got {values!r}.")
        override(config, _nested(path, values[0]))  # checks the path
    found: list[GridPoint] = []
    seen, labelled = [], set()
    for case in sweep.cases or {"": {}}:
        base = override(config, sweep.cases[case]) if case else config
        for point in itertools.product(*axes.values()):
            choices = dict(zip(axes, point, strict=True))
            # Options of other mixers are not choices of this point.
            name = choices.get("model.mixer.name", base["model"]["mixer"].get("name"))
            names = (name, *choices.get("model.layers", base["model"].get("layers", ())))
            used = {
                path: value
                for path, value in choices.items()
                if not path.startswith("mixers.") or path.split(".")[1] in names
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
            abstract_model(settings.model_config(settings.create_task()))  # checks the model
            found.append(GridPoint(_folder(labels), labels, settings))
    paths = [*axes, *(path for case in sweep.cases.values() for path, _ in _axes(case))]
    used = dict.fromkeys(name for point in found for name in point.settings.model.mixer_names)
    check_used(paths, used, sweeps=True)
    return sweep, found


@dataclasses.dataclass(frozen=True)
class Grid:
    """A sweep and where its results go.

    Attributes:
      sweep, points: from `grid_points`.
      path: the work directory.
      known: rows of results from elsewhere, whose runs are not trained again.
      copies: files that get a copy of `results.csv`.
    """

    sweep: Sweep
    points: list[GridPoint]
    path: pathlib.Path
    known: Sequence[Mapping[str, Any]] = ()
    copies: tuple[pathlib.Path, ...] = ()

    def phases(self) -> dict[str, Runs]:
        """The phases of every point in order, with their runs; see `Sweep.selection_seeds`.

        The learning rate of the phase after a selection is a placeholder for the selected one.
        """
        sweep = self.sweep
        if not sweep.selection_seeds:
            return {FINAL: Runs(sweep.seeds, sweep.learning_rates)}
        return {
            SELECT: Runs(sweep.selection_seeds, sweep.learning_rates, one_rate=True),
            FINAL: Runs(sweep.seeds, sweep.learning_rates[:1]),
        }

    def folder(self, point: GridPoint, phase: str) -> pathlib.Path:
        """The work directory of a phase."""
        return self.path / "cells" / point.name / phase

    def open_phases(self, point: GridPoint) -> list[str]:
        """The phases that are neither finished below `path` nor known.

        Raises:
          WorkdirError: a finished phase has another config.
        """
        found = []
        for phase, runs in self.phases().items():
            folder = self.folder(point, phase)
            if (folder / "result.json").exists():
                check_config(folder, point.record(self.runs(point, phase)))
            elif len(self._known(point, phase)) < len(runs.seeds) * len(runs.learning_rates):
                found.append(phase)
        return found

    def runs(self, point: GridPoint, phase: str) -> Runs:
        """The runs of a phase, once the phases before it are finished."""
        runs = self.phases()[phase]
        if phase == FINAL and self.sweep.selection_seeds:
            rows = list(results.rows(self.folder(point, SELECT))) or self._known(point, SELECT)
            (best,) = select(rows, ())
            runs = dataclasses.replace(runs, learning_rates=(best["learning_rate"],))
        return runs

    def write(self) -> pathlib.Path:
        """Writes `results.csv`; returns its path."""
        return write_results(self.path, *self.copies)

    def _known(self, point, phase):
        return [
            row
            for row in self.known
            if row["settings"] == point.digest
            and row["phase"] == phase
            and all(row.get(column) == value for column, value in point.choices.items())
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
    with its own checkpoints. `path/results.csv` is rewritten after each phase, with a row for every
    run and these columns:

    - the choices, "phase" ("select" or "final"), "settings" (a digest), "seed", "learning_rate";
    - "status": "finished" (all updates), "stopped" (reached its goal), "cut" (another rate reached
      the goal first) or "diverged"; "steps" (for a diverged run, the update that failed);
    - "metric", the name of the primary metric on the validation split, "mode" ("max" or "min"),
      its "final" and "best" values, and its final value on test splits ("final:test/accuracy");
    - "seconds" that all runs of the phase took together; "curve", the metric at every evaluation,
      "eval_every" updates apart.

    Args:
      config: the whole config, including the section `sweep`.
      path: the directory of the sweep.
      part: (i, n) for every n-th point from the i-th on. Processes that share `path` do not need
        it: each takes points that no other process trains.
      limit: seconds after which no further phase begins.
      stream: for progress; standard error if None.
      report: called with a line of text for each point.

    Returns:
      The path of `results.csv`.

    Raises:
      ValueError: invalid settings, or the folder of a point has another config.
    """
    from lla.training.queue import Queue  # which imports this module

    index, parts = part
    if not 0 <= index < parts:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part}.")
    sweep, points = grid_points(config)
    grid = Grid(sweep, points[index::parts], pathlib.Path(path))
    Queue([grid], begin_before=limit, stream=stream, report=report).run()
    return grid.write()


def _shared_settings(point: GridPoint) -> dict[str, Any]:
    """The settings that all runs of a point share."""
    record = point.settings.record()
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
