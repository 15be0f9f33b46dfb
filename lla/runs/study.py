"""Experiments that are a list of independent pieces, each giving one record."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import app
from ml_collections import ConfigDict

from lla.runs import environment
from lla.runs.config import from_config
from lla.runs.lock import exclusive
from lla.runs.progress import Progress
from lla.runs.workdir import Workdir, WorkdirError, check_config, directory, write_whole


class Piece(Protocol):
    """A part of the work.

    Attributes:
      id: its name, equal for equal work and for nothing else.
      cost: its share of the work in any unit, for the time left alone.
    """

    @property
    def id(self) -> str: ...

    @property
    def cost(self) -> float: ...


class Job(Protocol):
    """What there is to compute."""

    def pieces(self) -> Sequence[Piece]:
        """All pieces in the order in which they are computed."""

    def run(self, piece: Any) -> Mapping[str, Any]:
        """The record of one of them, without the key "piece"."""


def run_pieces(job: Job, workdir: Workdir) -> None:
    """Computes the pieces whose records `workdir` lacks and appends these, one after the other.

    A record is `{"piece": id, **job.run(piece)}`. Prints how many pieces there are and how many of
    them were finished; progress goes to standard error. `environment.json` is that of the last call
    that had something to compute.

    Args:
      job: says what the pieces are and computes them.
      workdir: of this job's config.

    Raises:
      ValueError: a record holds NaN.
      WorkdirError: the records cannot be read.
    """
    finished = {record["piece"] for record in workdir.read()}
    pieces = job.pieces()
    left = [piece for piece in pieces if piece.id not in finished]
    print(f"{len(pieces)} pieces, {len(pieces) - len(left)} already finished, in {workdir.path}")
    if left:
        origin = json.dumps(environment.describe(), indent=2) + "\n"
        write_whole(workdir.path / "environment.json", origin)
    costs = [sum(piece.cost for piece in part) for part in (pieces, left)]
    progress = Progress(costs[0], done=costs[0] - costs[1])
    for piece in left:
        workdir.write({"piece": piece.id, **job.run(piece)})
        progress.advance(piece.cost, piece.id)


def run_study(
    argv: Sequence[str],
    study: type[Job],
    config: ConfigDict,
    path: str | os.PathLike,
    draw: Callable[[pathlib.Path], Sequence[pathlib.Path]],
) -> None:
    """The main of an experiment: from the flags' values to records and figures.

    Args:
      argv: what is left of the command line, the program's name first.
      study: a dataclass with the fields of the config and the methods of `Job`.
      config: as the flag has it.
      path: of the work directory; if it exists, what it lacks is computed.
      draw: writes the figures of a work directory and returns the paths, which are printed.

    Raises:
      absl.app.UsageError: arguments beside the flags, a config that `study` refuses, or a work
        directory of another config or that another process is at. Nothing was written then.
        Or records that cannot be read.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        job = from_config(study, config)
        job.pieces()  # may refuse the config, which is to happen before anything is written
        path = directory(path)
        check_config(path, config.to_dict())
    except ValueError as error:  # a WorkdirError is one
        raise app.UsageError(str(error)) from error
    try:
        with exclusive(path):
            run_pieces(job, Workdir(path, config.to_dict()))
            for file in draw(path):
                print(file)
    except WorkdirError as error:
        raise app.UsageError(str(error)) from error
