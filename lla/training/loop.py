"""The host side of training: when to evaluate, log, checkpoint, stop, and where to resume."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from lla.runs import Progress, Workdir, WorkdirError, environment
from lla.runs.lock import exclusive
from lla.runs.workdir import check_config, directory, read_json, read_records, write_whole
from lla.training import extension
from lla.training.checkpoint import Checkpoints
from lla.training.records import NoRecords, Records, plain_numbers
from lla.training.trainer import Sums, Trainer, means


class NonFiniteError(RuntimeError):
    """The loss or a gradient was not finite; the message says where the state is saved."""


def train(
    trainer: Trainer,
    path: str | os.PathLike,
    *,
    profile: int = 0,
    stream: TextIO | None = None,
    extend: bool = False,
) -> dict[str, Any]:
    """Trains one run in the work directory `path`, or resumes it.

    Args:
      trainer: what to train.
      path: for `config.json`, `metrics.jsonl`, `timing.jsonl`, `environment.json`, `checkpoints/`,
        `before_decay/` (a checkpoint, with the schedule "wsd"), `tensorboard/` (where that is
        installed) and, at the end, `result.json`.
      profile: number of calls of the compiled step to trace into `profile/`, from the second on.
      stream: for the progress line; standard error if None.
      extend: whether a run of fewer steps in `path` becomes this one, if its schedule allows that;
        see `lla.training.extension`. The same call resumes an extended run that was killed.

    Returns:
      What `fit` returns.

    Raises:
      RefusedError: the model does not support its settings; nothing was written.
      WorkdirError: as `fit`; or the run cannot be extended, and why.
      NonFiniteError: see there; also for a directory whose run ended this way.
    """
    path = directory(path)
    if extend and (longer := extension.plan(trainer.settings, path)):
        trainer.check()
        if jax.process_index() == 0:
            longer.apply()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("extended")
    if not (path / "result.json").exists():
        trainer.check()
    result = fit(trainer, path, trainer.settings.record(), profile=profile, stream=stream)
    if result["status"] == "non_finite":
        raise NonFiniteError(
            f"the loss or its gradient was not finite at step {result['failed_at']}: the state "
            f"before that update is in {path / 'non_finite'}, and the batch is a function of seed "
            "and step."
        )
    return result


def fit(
    trainer: Trainer,
    path: str | os.PathLike,
    record: Mapping[str, Any],
    *,
    profile: int = 0,
    stream: TextIO | None = None,
    pause_at: float = math.inf,
) -> dict[str, Any]:
    """Trains to the end: one run, or several at once.

    `metrics.jsonl` has records of kind "train", means over `log_every` steps; of kind "eval", on
    the validation split before the first step, every `eval_every` steps and after the last one; and
    at the end one of kind "test". A run stops at the evaluation that reaches `stop_at`. Training
    ends when all runs have stopped or failed, or all runs of one learning rate have stopped, for
    `Runs.one_rate`. A run that is killed resumes from its latest checkpoint: later records are
    dropped and computed again, so that on one device the file is byte for byte that of a run that
    was never killed. On a GPU this needs deterministic kernels and a compiler that chooses the
    same ones again.

    Args:
      trainer: of the runs.
      path: the work directory.
      record: the resolved config of the directory.
      profile, stream: as in `train`.
      pause_at: `time.monotonic()` after which training pauses at the next record, with a checkpoint
        that the next call resumes from.

    Returns:
      {"status", "steps", "metric", "mode", "final", "best", "test", "failed_at", "stopped_at"},
      as in `result.json`. "status" is "finished" (all steps), "stopped" (`stop_at` was reached) or
      "non_finite". "metric" is the name of the task's primary metric on the validation split,
      "mode" is "max" or "min", "final" and "best" are its values, and "test" has its value on each
      test split, by name. Values are nested lists, like "failed_at" and "stopped_at" of
      `TrainState`, where there are several runs. After a pause there are only {"status": "paused",
      "steps"}, and no `result.json`.

    Raises:
      WorkdirError: the directory has another config, another process is using it, or one of its
        files is damaged. A damaged checkpoint is skipped with a warning if there is an earlier one.
    """
    path = directory(path)
    if (path / "result.json").exists():
        return _finished(path, record)
    lock = exclusive(path) if jax.process_index() == 0 else contextlib.nullcontext()
    with lock:
        return _fit(trainer, path, record, profile, stream, pause_at)


def _fit(trainer, path, record, profile, stream, pause_at):
    if jax.process_index() == 0:
        workdir = Workdir(path, record)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("work directory")
    finished = path / "result.json"
    if finished.exists():  # another process has finished it in the meantime
        return _finished(path, record)
    with Checkpoints(
        path / "checkpoints", trainer.settings.training.keep_checkpoints
    ) as checkpoints:
        state = checkpoints.restore(trainer.abstract_state)
        start = -1 if state is None else int(state.step)
        known = _records_until(path, start)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("records read")
        if jax.process_index() == 0:
            records = Records(workdir, start)
            write_whole(path / "environment.json", _pretty(environment.describe()))
        else:
            records = NoRecords()
        state = trainer.init() if state is None else state
        job = _Fit(trainer, path, records, checkpoints, known, profile, stream, pause_at)
        try:
            result = job.run(state, start)
        finally:
            job.close()
            records.close()
    if jax.process_index() == 0 and result["status"] != "paused":
        write_whole(finished, _pretty(result))
    return result


def _finished(path, record):
    """The result of a finished run; writes nothing."""
    check_config(path, record)
    file = path / "result.json"
    return read_json(file, f"Delete {file}, and the run resumes from its latest checkpoint.")


def _records_until(path, start):
    """The records up to step `start`, the step of the checkpoint to resume from, -1 for none."""
    records, file = read_records(path), path / "metrics.jsonl"
    for number, entry in enumerate(records, 1):
        if not isinstance(entry.get("step"), int) or "kind" not in entry:
            raise WorkdirError(
                f"{file}, line {number} is damaged: no record of training. Delete that line and "
                "those below it."
            )
    # The test split is read once, after the last step; a resumed run reads it again.
    known = [entry for entry in records if entry["step"] <= start and entry["kind"] != "test"]
    if start >= 0 and (not known or known[0]["step"] > 0 or known[-1]["step"] < start):
        raise WorkdirError(
            f"{file} is damaged: it lacks records up to step {start}, where the latest checkpoint "
            f"is. Put the file back, or delete {path / 'checkpoints'} to begin at the first step."
        )
    return known


class _Fit:
    """One pass from a state to the end, and what changes on the way."""

    def __init__(self, trainer, path, records, checkpoints, known, profile, stream, pause_at):
        self.trainer, self.options = trainer, trainer.settings.training
        self.path, self.records, self.checkpoints = path, records, checkpoints
        self.evaluations = [entry for entry in known if entry["kind"] == "eval"]
        self.profile, self.stream, self.pause_at = profile, stream, pause_at
        # Of a single run: runs of sweeps are not extended.
        single = trainer.runs is None
        self.before_decay = extension.last_record_before_decay(trainer.settings) if single else None
        self.window: list[Sums] = []  # sums since the last training record
        self.pending = None  # (step, metrics) of a call that may still be running
        self.failed_at = self.stopped_at = np.full(trainer.shape, -1)
        self.clock = (0, time.monotonic())
        self.tracing = False

    def run(self, state, start: int) -> dict[str, Any]:
        step, steps = max(start, 0), self.options.steps
        self.failed_at, self.stopped_at = jax.device_get((state.failed_at, state.stopped_at))
        if start < 0:
            state = self._evaluate(0, state)
        self.progress = Progress(max(steps, 1), self.stream, done=step)
        self.clock = (step, time.monotonic())
        calls = 0
        while step < steps and not self._over():
            self._trace(calls)
            if self._ends_window():
                # The time of a finished window is taken now: the next call may block until it is
                # done, as on a GPU, where the host drives the loop.
                self._fetch()
            end = min(steps, step + self.options.log_every - step % self.options.log_every)
            count = min(self.options.steps_per_call, end - step)
            state, metrics = self.trainer.advance(state, np.int32(count), self._places())
            step, calls = step + count, calls + 1
            self._fetch()  # metrics of the previous call, while the device runs this one
            self.pending = (step, metrics)
            last = step == steps
            if not (last or step % self.options.log_every == 0):
                continue
            evaluates = last or step % self.options.eval_every == 0
            pauses = not last and time.monotonic() > self.pause_at
            saves = last or pauses or step % self.options.checkpoint_every == 0
            if evaluates or saves:
                self._fetch()
            if evaluates and not self._all_failed():
                state = self._evaluate(step, state)
            if step == self.before_decay and not self._all_failed():
                self._fetch()
                with Checkpoints(self.path / extension.BEFORE_DECAY, keep=1) as checkpoints:
                    checkpoints.save(state)
                self._restart_clock()
            if (saves or self._over()) and not self._all_failed():
                self.checkpoints.save(state)
                self._restart_clock()
            if pauses and not self._over():
                return {"status": "paused", "steps": step}
        self._fetch()
        return self._finish(state, step)

    def close(self):
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    def _places(self):
        """Indices of the seeds to update, if a program of at most half of them pays; else None.

        It depends on the state alone, so that a resumed run goes on with the same program. To
        compile it pays where a fifth of the updates is left. It has room for a power of two of
        seeds, so that few are compiled.
        """
        if self.trainer.runs is None:
            return None
        early = (self.stopped_at >= 0) & (self.stopped_at <= 0.8 * self.options.steps)
        over = early.all(axis=1)
        going = int(np.sum(~over))
        size = 1 << max(going - 1, 0).bit_length()
        if 2 * size > len(over):
            return None
        return np.sort(np.argsort(over, kind="stable")[:size]).astype(np.int32)

    def _ends_window(self) -> bool:
        """Whether the pending call is the last one of a training record."""
        return self.pending is not None and self.pending[0] % self.options.log_every == 0

    def _fetch(self):
        """Fetches the metrics of the pending call, and writes a record if they end a window."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        if self._all_failed():
            return
        metrics = jax.device_get(metrics)
        self.failed_at = metrics["failed_at"]
        self.window.append(metrics["sums"])
        if step != self.options.steps and step % self.options.log_every:
            return
        values = means(_add(self.window))
        self.window = []
        self.records.write("train", step, values)
        self._report(step, values)

    def _report(self, step, values):
        (before, then), now = self.clock, time.monotonic()
        self.clock = (step, now)
        speed = (step - before) / max(now - then, 1e-9)
        runs = math.prod(self.trainer.shape)
        timing = {
            "seconds": now - then,
            "steps_per_second": speed,
            "sequences_per_second": speed * runs * self.trainer.batch_size,
        }
        self.records.time(step, timing)
        loss = values["loss"]
        shown = f"loss {float(loss):.4g}" if loss.ndim == 0 else f"loss >= {_lowest(loss):.4g}"
        if self.evaluations:
            value = self.evaluations[-1].get(self.trainer.primary_metric)
            shown += f"  {self.trainer.primary_metric} {_short(value)}"
        self.progress.advance(step - before, f"step {step}  {shown}  {speed:.3g} steps/s")

    def _evaluate(self, step, state):
        """Writes the record; the state, in which the runs that are where they were to get stop."""
        found = means(jax.device_get(self.trainer.evaluate(state.params)))
        self.records.write("eval", step, found)
        values = {name: plain_numbers(value) for name, value in found.items()}
        self.evaluations.append({"kind": "eval", "step": step, **values})
        there = self._reached() & (self.stopped_at < 0) & (self.failed_at < 0)
        if there.any():
            self.stopped_at = np.where(there, step, self.stopped_at).astype(np.int32)
            placed = jax.device_put(self.stopped_at, state.stopped_at.sharding)
            state = dataclasses.replace(state, stopped_at=placed)
        self._restart_clock()
        return state

    def _restart_clock(self):
        self.clock = (self.clock[0], time.monotonic())  # only training steps are timed

    def _all_failed(self) -> bool:
        return bool(np.all(self.failed_at >= 0))

    def _over(self) -> bool:
        """Whether all runs have failed or stopped; those of one rate for `Runs.one_rate`."""
        stopped, runs = self.stopped_at >= 0, self.trainer.runs
        if runs is not None and runs.one_rate and stopped.all(axis=0).any():
            return True
        return bool(np.all((self.failed_at >= 0) | stopped))

    def _reached(self):
        goal = self.options.stop_at
        if goal is None:
            return np.zeros(self.trainer.shape, bool)
        value = _array(self.evaluations[-1][self.trainer.primary_metric])
        return value >= goal if self._mode() == "max" else value <= goal

    def _mode(self):
        return self.trainer.task.metric_mode

    def _trace(self, calls):
        # Not the first call, which compiles.
        if self.profile and calls == 1:
            jax.profiler.start_trace(str(self.path / "profile"))
            self.tracing = True
        if self.tracing and calls == 1 + self.profile:
            self._fetch()
            self.close()

    def _finish(self, state, step) -> dict[str, Any]:
        status = "stopped" if step < self.options.steps else "finished"
        if self._all_failed():
            status = "non_finite"
            if not self.trainer.shape:
                step = int(self.failed_at)
                self._save_failure(state, step)
                self.records.write("non_finite", step, {})
        test = {} if self._all_failed() else means(jax.device_get(self.trainer.test(state.params)))
        if test:
            self.records.write("test", step, test)
        metric = self.trainer.task.primary_metric
        history = np.stack(
            [_array(entry[self.trainer.primary_metric]) for entry in self.evaluations]
        )
        best = np.fmax if self._mode() == "max" else np.fmin
        return {
            "status": status,
            "steps": step,
            "metric": self.trainer.primary_metric,
            "mode": self._mode(),
            "final": plain_numbers(history[-1]),
            "best": plain_numbers(best.reduce(history)),
            "test": {
                name: plain_numbers(values)
                for name, values in test.items()
                if name.partition("/")[2] == metric
            },
            "failed_at": self.failed_at.tolist(),
            "stopped_at": self.stopped_at.tolist(),
        }

    def _save_failure(self, state, step):
        placed = jax.device_put(np.int32(step), state.step.sharding)
        with Checkpoints(self.path / "non_finite") as checkpoints:
            checkpoints.save(dataclasses.replace(state, step=placed))


def _add(window: list[Sums]) -> Sums:
    return {
        name: tuple(
            np.sum([np.asarray(sums[name][i], np.float64) for sums in window], axis=0)
            for i in range(2)
        )
        for name in window[0]
    }


def _array(value) -> np.ndarray:
    return np.asarray(value, np.float64)  # None becomes NaN


def _lowest(values: np.ndarray) -> float:
    return float(np.nanmin(values)) if np.isfinite(values).any() else math.nan


def _short(value) -> str:
    array = _array(value)
    if array.ndim == 0:
        return f"{float(array):.4g}"
    if not np.isfinite(array).any():
        return "nan"
    return f"{np.nanmin(array):.4g}..{np.nanmax(array):.4g}"


def _pretty(entry) -> str:
    return json.dumps(entry, indent=2, allow_nan=False) + "\n"
