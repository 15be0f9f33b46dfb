"""Checkpoints of the training state, with Orbax."""

import dataclasses
import os
import pathlib
import shutil
import warnings

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from lla.runs.workdir import WorkdirError
from lla.training.trainer import TrainState

# Fields whose names in checkpoints are others, so that earlier checkpoints can be read.
_SAVED_NAMES = {"opt_state": "moments"}


class Checkpoints:
    """The checkpoints in one directory, numbered by step.

    Writing is synchronous, and a checkpoint gets its name only once it is complete. A process that
    is killed leaves complete checkpoints and at most one temporary folder, which the next start
    removes.

    Args:
      path: the directory; made if it does not exist, unless `read_only`.
      keep: number of latest checkpoints to keep; None for all.
      read_only: leaves the directory unchanged; another process may be writing to it.
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
        # Without a handler Orbax would infer one from a checkpoint, which may be damaged.
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
            self._manager.save(step, args=ocp.args.StandardSave(_as_saved(state)))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The latest checkpoint that can be read, or that of `step`; None if there is none.

        Damaged checkpoints are skipped with a warning. Unless the directory is read-only they are
        renamed to "damaged_STEP", so that the run can write them again.

        Args:
          like: shapes, dtypes and shardings, `Trainer.abstract_state`.

        Raises:
          WorkdirError: there are checkpoints, but none can be read, or that of `step` cannot.
        """
        steps = self.steps() if step is None else [step]
        failures = {}
        for candidate in reversed(steps):
            try:
                _verify(self.path / str(candidate))
                saved = ocp.args.StandardRestore(_as_saved(like))
                state = _from_saved(self._manager.restore(candidate, args=saved))
            except Exception as error:  # Orbax raises many types for damaged checkpoints
                failures[candidate] = error
                continue
            if failures:
                self._pass_over(failures, candidate)
            return state
        if self.read_only and step is None:
            # The process that trains may have replaced all of them in the meantime.
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
                done = f" It was renamed to {aside.name}."
            warnings.warn(
                f"checkpoint {folder} cannot be read ({_first_line(error)}): using that of step "
                f"{step} instead.{done}",
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


def _as_saved(state):
    """The tree that a checkpoint holds; the optimiser's state is called "moments" in it."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {_SAVED_NAMES.get(name, name): leaf for name, leaf in fields.items()}


def _from_saved(tree):
    names = {saved: name for name, saved in _SAVED_NAMES.items()}
    return TrainState(**{names.get(name, name): leaf for name, leaf in tree.items()})


def _verify(checkpoint):
    """Raises ValueError or OSError if the arrays cannot be read.

    Orbax would raise as well, but it starts all reads at once and abandons those that have not
    failed yet; they print tracebacks, "Event loop is closed", at some later time.
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
