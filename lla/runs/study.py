"""Experiments that are a list of independent trials, each of which gives one record."""

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

_NAME = "piece"  # of the field with the name of a trial; committed records have it


class Trial(Protocol):
    """What one record is computed from.

    Attributes:
      id: a name that no other trial of the study has.
      cost: its share of the work in any unit, to estimate the time left.
    """

    @property
    def id(self) -> str: ...

    @property
    def cost(self) -> float: ...


class Study(Protocol):
    """A list of trials and how to run one of them."""

    def trials(self) -> Sequence[Trial]:
        """All trials, in the order in which they are run."""

    def run(self, trial: Any) -> Mapping[str, Any]:
        """The record of a trial, without its name."""


def run_trials(study: Study, workdir: Workdir) -> None:
    """Runs the trials that have no record in `workdir`, one after the other.

    Prints how many trials there are and how many were finished. Progress goes to standard error.
    `environment.json` describes the last call that had a trial to run.

    Args:
      study: the trials.
      workdir: opened with the config of this study.

    Raises:
      ValueError: a record contains NaN.
      WorkdirError: the records cannot be read.
    """
    finished = {record[_NAME] for record in workdir.read()}
    trials = study.trials()
    left = [trial for trial in trials if trial.id not in finished]
    print(f"{len(trials)} trials, {len(trials) - len(left)} already finished, in {workdir.path}")
    if left:
        origin = json.dumps(environment.describe(), indent=2) + "\n"
        write_whole(workdir.path / "environment.json", origin)
    total, todo = (sum(trial.cost for trial in part) for part in (trials, left))
    progress = Progress(total, done=total - todo)
    for trial in left:
        workdir.write({_NAME: trial.id, **study.run(trial)})
        progress.advance(trial.cost, trial.id)


def run_study(
    argv: Sequence[str],
    study: type[Study],
    config: ConfigDict,
    path: str | os.PathLike,
    draw: Callable[[pathlib.Path], Sequence[pathlib.Path]],
) -> None:
    """The main function of an experiment: from the values of its flags to records and figures.

    Args:
      argv: what is left of the command line, beginning with the name of the program.
      study: a dataclass with the fields of the config and the methods of `Study`.
      config: the value of the flag.
      path: the work directory. If it exists, the missing trials are run.
      draw: writes the figures of a work directory and returns their paths, which are printed.

    Raises:
      absl.app.UsageError: there are arguments besides the flags, `study` refuses the config, or the
        work directory has another config or is in use by another process; nothing was written. Or
        the records cannot be read, or an optional package is missing.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        chosen = from_config(study, config)
        chosen.trials()  # may refuse the config, before anything is written
        path = directory(path)
        check_config(path, config.to_dict())
    except ValueError as error:  # a WorkdirError is one
        raise app.UsageError(str(error)) from error
    try:
        with exclusive(path):
            run_trials(chosen, Workdir(path, config.to_dict()))
            for file in draw(path):
                print(file)
    except ImportError as error:  # an optional package; what is computed stays
        raise app.UsageError(f"{error}, and give the command again.") from error
    except WorkdirError as error:
        raise app.UsageError(str(error)) from error
