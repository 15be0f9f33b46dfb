"""Checkpoints of the training state, by Orbax."""

import os
import pathlib

import orbax.checkpoint as ocp

from lla.training.program import TrainState


class Checkpoints:
    """The checkpoints in one directory, numbered by step.

    Writing is synchronous, and a checkpoint appears under its name only when it is complete: after
    a kill at any instant the directory holds whole checkpoints, and at most one temporary folder
    that the next start removes.

    Args:
      path: the directory; made if it does not exist.
      keep: how many of the latest stay; None for all.
    """

    def __init__(self, path: str | os.PathLike, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(pathlib.Path(path).resolve(), options=options)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Writes the checkpoint of `state.step`, unless it exists; returns when it is on disk."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The latest checkpoint, or that of `step`; None if there is none.

        Args:
          like: shapes, dtypes and shardings, `Program.abstract_state`.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            return None
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()
