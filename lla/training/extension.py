"""More steps for a run that exists: where it can go on from, and why it cannot.

An extended run is the one that would have been trained with the new settings from the beginning. So
it goes on from a checkpoint of a step up to which the old and the new schedule have the same
learning rates. Schedules are in fractions of all steps: with more steps the warm-up takes longer
unless `optimizer.warmup_fraction` is lowered, and a cosine has other rates from the first step on.
A "wsd" schedule is flat until its decay, and `lla.training.fit` keeps a checkpoint from before it.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lla.runs.config import from_config
from lla.runs.lock import exclusive
from lla.runs.workdir import (
    Workdir,
    WorkdirError,
    directory,
    flat,
    read_config,
    read_json,
    read_records,
    write_whole,
)
from lla.training.optimizer import schedule
from lla.training.settings import Optimizer, Settings

BEFORE_DECAY = "before_decay"  # folder of the checkpoint from before the decay
_CHANGES = (
    "training.steps",
    "optimizer.schedule",
    "optimizer.warmup_fraction",
    "optimizer.decay_fraction",
    "optimizer.final_fraction",
)


@dataclasses.dataclass(frozen=True)
class Extension:
    """How the run in the work directory `path` goes on from the checkpoint of `step`."""

    path: pathlib.Path
    settings: Settings
    step: int
    old_steps: int

    def apply(self) -> None:
        """Changes the work directory; training then resumes from `step`.

        `config.json` changes last, so that a process that is killed meanwhile leaves the old run,
        unfinished. The old result stays as `result_STEPS.json`.
        """
        with exclusive(self.path):
            checkpoints = self.path / "checkpoints"
            if (result := self.path / "result.json").exists():
                result.replace(self.path / f"result_{self.old_steps}.json")
            kept, target = self.path / BEFORE_DECAY / str(self.step), checkpoints / str(self.step)
            if not target.exists():
                partial = self.path / f"{BEFORE_DECAY}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(kept, partial)
                partial.replace(target)
            for step in _steps(checkpoints):
                if step > self.step:
                    shutil.rmtree(checkpoints / str(step))
            record = self.settings.record()
            write_whole(self.path / "config.json", _pretty(record))
            every = self.settings.training.eval_every
            # The last evaluation is one that the longer run may not have.
            Workdir(self.path, record).keep(
                lambda entry: (
                    entry["step"] <= self.step
                    and entry["kind"] != "test"
                    and not (entry["kind"] == "eval" and entry["step"] % every)
                )
            )


def differs_by_length(settings: Settings, path: str | os.PathLike) -> bool:
    """Whether the run in `path` has these settings but for its steps and its schedule."""
    path = pathlib.Path(path)
    if not (path / "config.json").exists():
        return False
    changed = _changed(read_config(path), settings)
    return bool(changed) and changed <= set(_CHANGES)


def plan(settings: Settings, path: str | os.PathLike) -> Extension | None:
    """How to extend the run in the work directory `path` to the steps of `settings`.

    Changes nothing.

    Returns:
      None if the run has these settings already: it only resumes.

    Raises:
      WorkdirError: there is no run with other steps and otherwise these settings, or it cannot be
        extended; the message says why.
    """
    path = directory(path)
    record = read_config(path)
    changed = _changed(record, settings)
    if not changed:
        return None
    if others := sorted(changed - set(_CHANGES)):
        raise WorkdirError(
            f"{path} cannot be extended: the settings differ in {', '.join(others)}, and only the "
            f"steps and the schedule may differ."
        )
    old, new = int(record["training"]["steps"]), settings.training.steps
    if new <= old:
        raise WorkdirError(
            f"{path} cannot be extended: it has {old} steps, and training.steps is {new}."
        )
    if (file := path / "result.json").exists():
        result = read_json(file, "Delete it, and the run resumes from its latest checkpoint.")
        for name, why in (
            ("stopped_at", "it reached training.stop_at"),
            ("failed_at", "its loss or gradient was not finite"),
        ):
            if result[name] >= 0:
                raise WorkdirError(f"{path} cannot be extended: {why} at step {result[name]}.")
    before = from_config(Optimizer, record["optimizer"], "config.optimizer")
    same = _same_updates(before, old, settings.optimizer, new)
    every = settings.training.log_every
    known = {*_steps(path / "checkpoints"), *_steps(path / BEFORE_DECAY)}
    records = {entry["step"] for entry in read_records(path) if entry["kind"] == "train"}
    usable = [step for step in known if step <= same and step % every == 0 and step in records]
    if not usable:
        raise WorkdirError(
            f"{path} cannot be extended from {old} to {new} steps: "
            + _reason(before, old, settings.optimizer, new, same, known)
        )
    return Extension(path, settings, max(usable), old)


def last_record_before_decay(settings: Settings) -> int | None:
    """The step of the last training record before a "wsd" schedule decays; None if there is none.

    A run can be extended from a checkpoint of this step.
    """
    options = settings.training
    if settings.optimizer.schedule != "wsd":
        return None
    stable = options.steps - round(settings.optimizer.decay_fraction * options.steps)
    step = stable - stable % options.log_every
    return step if 0 < step < options.steps else None


def _changed(record: Mapping[str, Any], settings: Settings) -> set[str]:
    """Dotted names of the settings that differ."""
    ours, theirs = flat(json.loads(json.dumps(settings.record()))), flat(record)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def _same_updates(before: Optimizer, old: int, after: Optimizer, new: int) -> int:
    """The number of first updates that both schedules make at the same rates."""
    numbers = jnp.arange(old, dtype=jnp.float32)
    rates = [
        np.broadcast_to(schedule(optimizer, steps)(numbers), (old,))
        for optimizer, steps in ((before, old), (after, new))
    ]
    differ = np.flatnonzero(rates[0] != rates[1])
    return int(differ[0]) if differ.size else old


def _reason(before, old, after, new, same, known) -> str:
    if "cosine" in (before.schedule, after.schedule) and before.final_fraction != 1.0:
        return (
            "a cosine schedule depends on all steps, and the longer run has other learning rates "
            f'from step {same} on. Only runs with optimizer.schedule="wsd" can be extended.'
        )
    warmups = [round(o.warmup_fraction * steps) for o, steps in ((before, old), (after, new))]
    if warmups[0] != warmups[1]:
        return (
            f"the warm-up would take {warmups[1]} updates instead of {warmups[0]}. Give "
            f"--config.optimizer.warmup_fraction={warmups[0] / new:.6g}."
        )
    there = ", ".join(map(str, sorted(known))) or "none"
    return (
        f"the learning rates are the same up to step {same} only, and there is no checkpoint of a "
        f"record up to there (there are: {there})."
    )


def _steps(folder: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def _pretty(record) -> str:
    return json.dumps(record, indent=2, sort_keys=True) + "\n"
