"""Trains the points of sweeps one after another, without letting the device wait.

While one program trains, a thread compiles the next. Processes that share work directories take
different points, so that one process per device can share a grid.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import jax

from lla.runs.lock import claimed
from lla.training.loop import fit
from lla.training.settings import Sharding
from lla.training.sharding import make_mesh
from lla.training.sweep import Grid, GridPoint
from lla.training.trainer import Runs, Trainer

Estimate = Callable[[GridPoint, Runs], float]


@dataclasses.dataclass
class _Stage:
    """A phase of a point; `last`, of the last phase, releases the lock of the point."""

    grid: Grid
    point: GridPoint
    phase: str
    trainer: concurrent.futures.Future
    last: contextlib.ExitStack | None


class Queue:
    """The open phases of all points of `grids`, in the order of the grids and their points.

    Args:
      grids: the sweeps.
      order: sort key of the points, called with a grid and a point; None keeps their order.
      begin_before: seconds from now after which no phase begins.
      end_before: seconds from now at which training pauses, with a checkpoint that the next call
        resumes from.
      estimate: upper bound of the seconds that a phase of a point takes; a phase that would not
        end before `end_before` does not begin. None begins all.
      stream: for progress; standard error if None.
      report: called with a line of text for each point.
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        *,
        order: Callable[[Grid, GridPoint], float] | None = None,
        begin_before: float = math.inf,
        end_before: float = math.inf,
        estimate: Estimate | None = None,
        stream: TextIO | None = None,
        report: Callable[[str], None] = print,
    ):
        self._points = [(grid, point) for grid in grids for point in grid.points]
        if order is not None:
            self._points.sort(key=lambda point: order(*point))
        now = time.monotonic()
        self._begin_before, self._end_before = now + begin_before, now + end_before
        self._estimate = (lambda point, runs: 0.0) if estimate is None else estimate
        self._stream, self._report = stream, report

    def run(self) -> None:
        """Trains until no phase is left that may begin.

        Raises:
          RefusedError: a model does not support its settings; its point does not begin.
          WorkdirError: the directory of a point has another config, or damaged files.
          RuntimeError: the device failed in some phases; all others were trained.
        """
        with contextlib.ExitStack() as cleanup:
            pool = cleanup.enter_context(concurrent.futures.ThreadPoolExecutor(1))
            stages, failed = self._stages(pool, cleanup), []
            stage = next(stages, None)
            while stage is not None:
                trainer = stage.trainer.result()
                following = next(stages, None)  # starts to compile
                try:
                    self._train(stage, trainer)
                except jax.errors.JaxRuntimeError as error:
                    # Such as a program too large for the device; others may fit.
                    failed.append(f"{stage.point.name}, {stage.phase}: {error}")
                    self._report(f"{stage.point.name}  {stage.phase}  failed")
                finally:
                    if stage.last is not None:
                        stage.last.close()
                stage, trainer = following, None
                if stage is not None:
                    # JAX keeps compiled programs until its caches are cleared, which must not
                    # happen while the thread traces. The next stage holds its own program.
                    concurrent.futures.wait([stage.trainer])
                jax.clear_caches()
        if failed:
            raise RuntimeError("\n".join(["these phases failed:", *failed]))

    def _train(self, stage, trainer):
        grid, point, phase = stage.grid, stage.point, stage.phase
        waits = grid.open_phases(point)[0] != phase  # an earlier phase is not finished
        if waits or not self._fits(grid, point, phase):
            reason = "the previous phase is not finished" if waits else "the limit is reached"
            self._report(f"{point.name}  {phase}  not begun: {reason}")
            return
        trainer.runs = grid.runs(point, phase)
        folder, record = grid.folder(point, phase), point.record(trainer.runs)
        result = fit(trainer, folder, record, stream=self._stream, pause_at=self._end_before)
        self._report(f"{point.name}  {phase}  {result['status']} at step {result['steps']}")
        grid.write()

    def _fits(self, grid, point, phase) -> bool:
        now = time.monotonic()
        seconds = self._estimate(point, grid.phases()[phase])
        return now <= self._begin_before and now + seconds <= self._end_before

    def _stages(self, pool, cleanup) -> Iterator[_Stage]:
        total = len(self._points)
        for number, (grid, point) in enumerate(self._points, 1):
            name = f"{number}/{total}  {point.name}"
            with contextlib.ExitStack() as held:
                holder = held.enter_context(claimed(grid.path / "locks" / point.name))
                if holder is not None:
                    self._report(f"{name}  another process trains it")
                    continue
                phases = grid.open_phases(point)
                if not phases:
                    self._report(f"{name}  already finished")
                    continue
                if not self._fits(grid, point, phases[0]):
                    self._report(f"{name}  not begun: the limit is reached")
                    continue
                self._report(f"{name}  training")
                last = held.pop_all()
                cleanup.callback(last.close)  # in case of an error
            for phase in phases:
                trainer = pool.submit(_compiled, point, grid.phases()[phase])
                yield _Stage(grid, point, phase, trainer, last if phase == phases[-1] else None)


def _compiled(point: GridPoint, runs: Runs) -> Trainer:
    trainer = Trainer(point.settings, make_mesh(Sharding(1, 1), jax.devices()[:1]), runs)
    trainer.check()
    trainer.compile()
    return trainer
