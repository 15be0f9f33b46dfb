"""Checkpoints of the training state, by Orbax."""

import os
import pathlib
import shutil
import warnings

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from lla.runs.workdir import WorkdirError
from lla.training.program import TrainState


class Checkpoints:
    """The checkpoints in one directory, numbered by step.

    Writing is synchronous, and a checkpoint appears under its name only when it is complete: after
    a kill at any instant the directory holds whole checkpoints, and at most one temporary folder
    that the next start removes.

    Args:
      path: the directory; made if it does not exist, unless `read_only`.
      keep: how many of the latest stay; None for all.
      read_only: changes nothing in the directory, which another process may be writing to.
    """

    def __init__(
        self, path: str | os.PathLike, keep: int | None = None, *, read_only: bool = False
    ):
        self.path, self.read_only = pathlib.Path(path).resolve(), read_only
        writes = dict(max_to_keep=keep, cleanup_tmp_directories=True)
        reads = dict(read_only=True, save_interval_steps=0, create=False)
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False, **(reads if read_only else writes)
        )
        # With the handler named, it is not guessed from a checkpoint that may be damaged.
        self._manager = ocp.CheckpointManager(
            self.path, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Writes the checkpoint of `state.step`, unless it exists; returns when it is on disk."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The latest checkpoint that can be read, or that of `step`; None if there is none.

        Damaged checkpoints are passed over with a warning and, unless the directory is opened to
        read only, renamed to "damaged_STEP", so that the run can write them again.

        Args:
          like: shapes, dtypes and shardings, `Program.abstract_state`.

        Raises:
          WorkdirError: there are checkpoints, and none can be read, or not that of `step`.
        """
        steps = self.steps() if step is None else [step]
        failures = {}
        for candidate in reversed(steps):
            try:
                _verify(self.path / str(candidate))
                state = self._manager.restore(candidate, args=ocp.args.StandardRestore(like))
            except Exception as error:  # of a damaged checkpoint, Orbax raises almost anything
                failures[candidate] = error
                continue
            if failures:
                self._pass_over(failures, candidate)
            return state
        if self.read_only and step is None:
            # While these were read, the process that trains may have replaced all of them.
            self._manager.reload()
            if self.steps() != steps:
                return self.restore(like)
        if failures:
            last, error = next(iter(failures.items()))
            raise WorkdirError(
                f"{self.path / str(last)} cannot be read, and there is no other checkpoint that "
                f"can ({_first_line(error)}). Delete {self.path} to begin at the first step."
            ) from error
        return None

    def _pass_over(self, failures, step):
        for damaged, error in failures.items():
            folder = self.path / str(damaged)
            done = ""
            if not self.read_only:
                aside = self.path / f"damaged_{damaged}"
                if jax.process_index() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.replace(aside)
                done = f" It is {aside.name} now."
            warnings.warn(
                f"checkpoint {folder} cannot be read ({_first_line(error)}): that of step {step} "
                f"is used in its place.{done}",
                RuntimeWarning,
                stacklevel=3,
            )
        if not self.read_only:
            self._manager.reload()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _verify(checkpoint):
    """Raises ValueError or OSError if the arrays cannot be read.

    Orbax would raise as well, but it reads them all at once and leaves the reads behind that have
    not failed yet: they print tracebacks, "Event loop is closed", at any later time.
    """
    item = checkpoint / "default"
    if not item.is_dir():
        raise FileNotFoundError(f"{item} does not exist")
    base = {"driver": "file", "path": f"{item}/"}
    arrays = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = arrays.list().result()
    if not keys:
        raise ValueError(f"{item} holds no arrays")
    for key in keys:
        arrays.read(key).result()


def _first_line(error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}..."
