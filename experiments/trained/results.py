"""Result files of trained models, and the points of a figure that they make.

The files are the `results.csv` of `experiments/sweep.py`; all CSV files of a folder count together.
Rows of the phase "select" decide the learning rate, by the validation split. Rows of the phase
"final" are shown, by the test split. In older files, without a column "phase", the same rows do
both.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lla.runs import styles
from lla.training import sweep

Row = dict[str, Any]

MECHANISM = "model.mixer.name"
FURTHER = "final:"  # prefix of the columns of further metrics
PHASE = "phase"  # column: "select" or "final"
_RUN = ("seed", "learning_rate", "status", "steps", "metric", "mode", "final", "best")
# Columns that are not settings.
_ABOUT = (*_RUN, PHASE, "split", "settings", "seconds", "eval_every", "curve")
# Options that turn a mechanism into another one, with a row or line of its own.
_OPTIONS = ("short_conv", "qk_norm")
_TRUTH = {"True": True, "False": False}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One figure.

    Attributes:
      name: of its folder here and of its config.
      columns: the columns of result files that identify a point, the mechanism first.
      metric: shown in the figure; it is in the column "metric" of result files.
      published: dotted path of a setting -> (values, source), for the table of settings. A setting
        with another value, or that is not listed, is ours.
      tables: makes the tables of the results, as Markdown, from points and their folder.
      optional: those of `columns` that a file may lack; they are None then.
      variant: of the config that the committed results were made with.
      goal: in words, if plot.py draws the updates to it as results/updates.png.
    """

    name: str
    columns: tuple[str, ...]
    metric: str
    published: Mapping[str, tuple[tuple, str]]
    tables: Callable[[list["Point"], pathlib.Path, str | None], list[str]]
    optional: tuple[str, ...] = ()
    variant: str = "full"
    goal: str | None = None

    @property
    def folder(self) -> pathlib.Path:
        """The folder of its scripts and its README."""
        return pathlib.Path(__file__).resolve().parents[1] / self.name

    @property
    def validation(self) -> str:
        """The metric on the validation split."""
        return f"validation/{self.metric.partition('/')[2]}"

    def points(self, folder: pathlib.Path) -> list["Point"]:
        """The points of the result files in `folder`; see `read` and `points`."""
        return points(read(self, folder), self)


@dataclasses.dataclass(frozen=True)
class Point:
    """A mechanism at one setting, at the learning rate selected for it.

    Attributes:
      choices: column -> value.
      options: of the mechanism, those that turn it into another one; None if the files do not say.
      learning_rate: the selected one.
      edge: whether it is the lowest or highest of several that were tried.
      values: of the metric after the last step, by seed; empty if runs diverged at every rate.
      further: values of the other metrics that the file has a column for.
      rows: the rows that `values` come from; those of diverged runs if there are no others.
      diverged, runs: the number of diverged runs and of all runs, at all rates.
    """

    choices: Row
    options: Row
    learning_rate: float
    edge: bool
    values: tuple[float, ...]
    further: dict[str, tuple[float, ...]]
    rows: tuple[Row, ...]
    diverged: int
    runs: int

    @property
    def mechanism(self) -> str:
        """Its name in the configs."""
        return self.choices[MECHANISM]

    @property
    def phase(self) -> str | None:
        """The phase of the rows that `values` come from; None if the files do not say."""
        return self.rows[0].get(PHASE)

    @property
    def updates(self) -> tuple[int, ...]:
        """The updates that each of the shown runs took to its goal, where it stopped.

        Empty for older files, which have no phase: there runs at all learning rates stopped
        together.
        """
        if self.phase is None:
            return ()
        return tuple(row["steps"] for row in self.rows if row["status"] == "stopped")

    @property
    def style(self) -> styles.Style:
        """How it is drawn."""
        return styles.style(self.mechanism, **self.options)

    @property
    def label(self) -> str:
        """The mechanism and its options as printed in tables and legends."""
        return self.style.name


def read(experiment: Experiment, folder: pathlib.Path) -> list[Row]:
    """The rows of all CSV files in `folder`; every row has the columns of all files.

    The column "metric" of every row is the metric of `experiment`: if a file has that of the
    validation split there, the two are exchanged. If any file has final runs, rows without a phase
    are left out.

    Raises:
      ValueError: there are no results, a file lacks a column or has another metric, or two rows
        are the same run.
    """
    files = {file: sweep.read_results(file) for file in sorted(folder.glob("*.csv"))}
    if any(row.get(PHASE) == "final" for rows in files.values() for row in rows):
        files = {file: [row for row in rows if row.get(PHASE)] for file, rows in files.items()}
    files = {file: [_row(experiment, file, row) for row in rows] for file, rows in files.items()}
    columns = dict.fromkeys(column for rows in files.values() for row in rows for column in row)
    columns |= dict.fromkeys(experiment.columns)
    found, origin = [], {}
    for file, rows in files.items():
        for row in rows:
            row = columns | row
            run = (row["seed"], row["learning_rate"], row.get(PHASE), *_choices(row).items())
            if run in origin:
                what = ", ".join(f"{k}={v}" for k, v in _choices(row).items() if v is not None)
                raise ValueError(
                    f"a run is there twice, in {origin[run]} and in {file}: {what}, seed "
                    f"{row['seed']}, learning rate {row['learning_rate']}."
                )
            origin[run] = file
            found.append(row)
    if not found:
        raise ValueError(f"{folder} has no results: no CSV file with rows in it.")
    return found


def _row(experiment, file, row):
    """The row with the metric of `experiment`, and with truth values as such."""
    if lacking := sorted({*_RUN, *experiment.columns} - {*experiment.optional} - row.keys()):
        raise ValueError(
            f"{file} is no result file of {experiment.name}: it lacks {', '.join(lacking)}."
        )
    if row.get(PHASE) not in (None, "select", "final"):
        raise ValueError(f"{file} has the phase {row[PHASE]!r}; known: select, final.")
    row = {k: _TRUTH.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
    test, validation = FURTHER + experiment.metric, FURTHER + experiment.validation
    if row["metric"] == experiment.validation and test in row:
        value = row.pop(test)
        row |= {validation: row["final"], "final": value, "metric": experiment.metric}
    if row["metric"] != experiment.metric:
        raise ValueError(
            f"{file} has the metric {row['metric']}, {experiment.name} shows {experiment.metric}."
        )
    return row


def points(rows: Sequence[Row], experiment: Experiment) -> list[Point]:
    """The points of `rows`, in the order of `lla.runs.styles`, then by columns.

    A mechanism with and without short convolutions or QK-norm counts as two. Rows of the phase
    "select" alone make no point.

    Raises:
      ValueError: a point has final runs at several learning rates or options, or there is no point.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (*(row[column] for column in experiment.columns), *_options(row).values())
        groups.setdefault(key, []).append(row)
    found = [
        _point(members, experiment)
        for members in groups.values()
        if any(row.get(PHASE) != "select" for row in members)
    ]
    if not found:
        raise ValueError("all rows are of the phase 'select': there is nothing to show yet.")

    def place(point):
        style, values = point.style, [point.choices[column] for column in experiment.columns]
        own = styles.rank(point.mechanism), not style.filled, style.name
        return (*own, [(isinstance(v, str), v or 0) for v in values])

    return sorted(found, key=place)


def _point(members, experiment):
    final = [row for row in members if row.get(PHASE) == "final"]
    trials = [row for row in members if row.get(PHASE) != "final"]
    full = _most_seeds(trials)
    if final:
        kinds = {(row["learning_rate"], *_choices(row).items()) for row in final}
        if len(kinds) > 1:
            where = ", ".join(f"{column}={members[0][column]}" for column in experiment.columns)
            raise ValueError(f"final runs differ in more than their seed, at {where}: {kinds}.")
        full = full or final
        runs = [row for row in final if row["final"] is not None] or final
        sound = runs[0]["final"] is not None
    else:
        best = _select(full, experiment)
        sound = best["mean"] is not None
        runs = [
            row
            for row in full
            if row["learning_rate"] == best["learning_rate"]
            and all(best[column] == value for column, value in _choices(row).items())
        ]
    further = {
        column.removeprefix(FURTHER): tuple(row[column] for row in runs)
        for column in runs[0]
        if column.startswith(FURTHER) and sound and all(row[column] is not None for row in runs)
    }
    rate, rates = runs[0]["learning_rate"], {row["learning_rate"] for row in full}
    return Point(
        choices={column: members[0][column] for column in experiment.columns},
        options=_options(members[0]),
        learning_rate=rate,
        edge=len(rates) > 1 and rate in (min(rates), max(rates)),
        values=tuple(row["final"] for row in runs) if sound else (),
        further=further,
        rows=tuple(runs),
        diverged=sum(row["status"] == "diverged" for row in members),
        runs=len(members),
    )


def _most_seeds(rows):
    """The rows of the rates and options with the largest number of seeds."""
    kinds = [(row["learning_rate"], *_choices(row).items()) for row in rows]
    most = max(map(kinds.count, kinds), default=0)
    return [row for row, kind in zip(rows, kinds, strict=True) if kinds.count(kind) == most]


def _select(rows, experiment):
    """What `lla.training.sweep.select` selects, by the validation split if all rows have it."""
    column = FURTHER + experiment.validation
    judged = all(row.get(column) is not None or row["final"] is None for row in rows)
    # `select` treats every column that it does not know as a setting.
    known = [{name: row[name] for name in (*_choices(row), *_RUN)} for row in rows]
    if judged:
        known = [run | {"final": row.get(column)} for run, row in zip(known, rows, strict=True)]
    (best,) = sweep.select(known, experiment.columns)
    return best


def _options(row):
    return {option: row.get(f"mixers.{row[MECHANISM]}.{option}") for option in _OPTIONS}


def _choices(row):
    """The settings of a row, without the options of other mechanisms."""
    others = [k for k in row if k.startswith("mixers.") and row[MECHANISM] != k.split(".")[1]]
    return {
        k: v for k, v in row.items() if k not in (*_ABOUT, *others) and not k.startswith(FURTHER)
    }


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
