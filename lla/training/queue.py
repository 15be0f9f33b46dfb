"""Works off the points of sweeps, one after another, on one device that never waits.

While a program trains, a thread compiles the next one. Processes that share work directories take
different points, so that one process for each device works off a grid together.
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
from lla.training.program import Program, Runs
from lla.training.settings import Sharding
from lla.training.sharding import make_mesh
from lla.training.sweep import Cell, Grid

Estimate = Callable[[Cell, Runs], float]


@dataclasses.dataclass
class _Stage:
    """A phase of a point; if it is the last one, `last` lets other processes have the point."""

    grid: Grid
    cell: Cell
    phase: str
    program: concurrent.futures.Future
    last: contextlib.ExitStack | None


class Queue:
    """The open phases of all points of `grids`, in the order of the grids and of their points.

    Args:
      grids: what to do.
      order: key by which all points are sorted, called with a grid and a point; None leaves them.
      begin_before: seconds from now after which no phase is begun.
      end_before: seconds from now at which training pauses, with a checkpoint from which the next
        call goes on.
      estimate: seconds that a phase of a point takes at most; what would not be over at
        `end_before` is not begun. None begins everything.
      stream: for progress; standard error if None.
      report: called with a line of text for each point.
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        *,
        order: Callable[[Grid, Cell], float] | None = None,
        begin_before: float = math.inf,
        end_before: float = math.inf,
        estimate: Estimate | None = None,
        stream: TextIO | None = None,
        report: Callable[[str], None] = print,
    ):
        self._points = [(grid, cell) for grid in grids for cell in grid.points]
        if order is not None:
            self._points.sort(key=lambda point: order(*point))
        now = time.monotonic()
        self._begin_before, self._end_before = now + begin_before, now + end_before
        self._estimate = (lambda cell, runs: 0.0) if estimate is None else estimate
        self._stream, self._report = stream, report

    def run(self) -> None:
        """Trains until nothing is left that may be begun.

        Raises:
          RefusedError: a model cannot compute with its settings; its point is not begun.
          WorkdirError: a point's directory has another config, or damaged files.
          RuntimeError: the device failed at some of the phases; all others were trained.
        """
        with contextlib.ExitStack() as cleanup:
            pool = cleanup.enter_context(concurrent.futures.ThreadPoolExecutor(1))
            stages, failed = self._stages(pool, cleanup), []
            stage = next(stages, None)
            while stage is not None:
                program = stage.program.result()
                following = next(stages, None)  # it is compiled from here on
                try:
                    self._train(stage, program)
                except jax.errors.JaxRuntimeError as error:
                    # Such as a program too large for the device: the others may go on.
                    failed.append(f"{stage.cell.name}, {stage.phase}: {error}")
                    self._report(f"{stage.cell.name}  {stage.phase}  failed")
                finally:
                    if stage.last is not None:
                        stage.last.close()
                stage, program = following, None
                if stage is not None:
                    # Compiled programs are not dropped by themselves; that of the next stage is
                    # held by it, and nothing may be traced meanwhile.
                    concurrent.futures.wait([stage.program])
                jax.clear_caches()
        if failed:
            raise RuntimeError("\n".join(["these phases failed:", *failed]))

    def _train(self, stage, program):
        grid, cell, phase = stage.grid, stage.cell, stage.phase
        waits = grid.open_phases(cell)[0] != phase  # for the phase before it
        if waits or not self._fits(grid, cell, phase):
            reason = "the phase before it is not finished" if waits else "the limit is reached"
            self._report(f"{cell.name}  {phase}  not begun: {reason}")
            return
        program.runs = grid.runs(cell, phase)
        folder, record = grid.folder(cell, phase), cell.record(program.runs)
        result = fit(program, folder, record, stream=self._stream, pause_at=self._end_before)
        self._report(f"{cell.name}  {phase}  {result['status']} at step {result['steps']}")
        grid.write()

    def _fits(self, grid, cell, phase) -> bool:
        now = time.monotonic()
        seconds = self._estimate(cell, grid.phases()[phase])
        return now <= self._begin_before and now + seconds <= self._end_before

    def _stages(self, pool, cleanup) -> Iterator[_Stage]:
        total = len(self._points)
        for number, (grid, cell) in enumerate(self._points, 1):
            name = f"{number}/{total}  {cell.name}"
            with contextlib.ExitStack() as held:
                holder = held.enter_context(claimed(grid.path / "locks" / cell.name))
                if holder is not None:
                    self._report(f"{name}  another process is at it")
                    continue
                phases = grid.open_phases(cell)
                if not phases:
                    self._report(f"{name}  already finished")
                    continue
                if not self._fits(grid, cell, phases[0]):
                    self._report(f"{name}  not begun: the limit is reached")
                    continue
                self._report(f"{name}  training")
                last = held.pop_all()
                cleanup.callback(last.close)  # should an error end everything
            for phase in phases:
                program = pool.submit(_compiled, cell, grid.phases()[phase])
                yield _Stage(grid, cell, phase, program, last if phase == phases[-1] else None)


def _compiled(cell: Cell, runs: Runs) -> Program:
    program = Program(cell.settings, make_mesh(Sharding(1, 1), jax.devices()[:1]), runs)
    program.check()
    program.compile()
    return program
