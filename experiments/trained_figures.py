"""What the figures of trained models share: result files, selection, tables, READMEs.

Used by the scripts in in_context_regression/, mqar/ and state_tracking/. Everything is made from
the `results.csv` files that `experiments/sweep.py` writes, all of those in one folder together.
Rows of the phase "select" choose the learning rate, by the validation split where they have it;
those of the phase "final" are what is shown. Where no file has a column "phase", the same rows do
both. trained_plots.py draws them.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lla import tasks
from lla.experiment import styles, tables
from lla.experiment.boundary import plain
from lla.training import sweep
from lla.training.settings import override

Row = dict[str, Any]

MECHANISM = "model.mixer.name"
VARIANT = "figure"  # of the configs: what the committed results were made with
FURTHER = "final:"  # columns of metrics beside the headline begin with this
PHASE = "phase"  # column: "select" or "final"
_RUN = ("seed", "learning_rate", "status", "steps", "headline", "mode", "final", "best")
_ABOUT = (*_RUN, PHASE, "split")  # columns that choose nothing

# Settings that change no result, or that the sweep replaces.
NOT_SHOWN = {
    "task.name", "model.mixer.name", "optimizer.learning_rate", "training.seed",
    "training.log_every", "training.checkpoint_every", "training.keep_checkpoints",
    "training.steps_per_call",
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One figure.

    Attributes:
      name: of its folder here and of its config.
      columns: of the result files that make a point of the figure, the mechanism first.
      optional: those of `columns` that a file may lack; they are None then.
      headline: the metric.
      published: dotted path of a setting: (values, source), for the table of settings. A setting
        with another value, or that is not listed, is ours.
      tables: the results as Markdown, from the points and their folder.
    """

    name: str
    columns: tuple[str, ...]
    headline: str
    published: Mapping[str, tuple[tuple, str]]
    tables: Callable[[list["Point"], pathlib.Path, str | None], list[str]]
    optional: tuple[str, ...] = ()

    @property
    def folder(self) -> pathlib.Path:
        """Where its scripts and its README are."""
        return pathlib.Path(__file__).resolve().parent / self.name

    def points(self, folder: pathlib.Path) -> list["Point"]:
        """The points that the result files in `folder` make; see `read` and `points`."""
        return points(read(self, folder), self.columns)


@dataclasses.dataclass(frozen=True)
class Point:
    """A mechanism at one setting, at the learning rate selected for it.

    Attributes:
      choices: column -> value.
      taps: of its short convolutions; None where the files do not say.
      learning_rate: the one selected.
      edge: whether it is the lowest or highest of several that were tried.
      values: of the headline metric after the last step, by seed; empty if runs diverged at every
        rate.
      further: metric -> its values, of those that the file has a column for.
      diverged, runs: how many there are at all rates.
      phase: of the rows that `values` are from; None where the files do not say.
    """

    choices: Row
    taps: int | None
    learning_rate: float
    edge: bool
    values: tuple[float, ...]
    further: dict[str, tuple[float, ...]]
    diverged: int
    runs: int
    phase: str | None = None

    @property
    def mechanism(self) -> str:
        """Its name in the configs."""
        return self.choices[MECHANISM]

    @property
    def style(self) -> styles.Style:
        """How it is drawn."""
        return styles.style(self.mechanism, self.taps)

    @property
    def label(self) -> str:
        """Mechanism and convolutions as printed: what makes a row of a table, or a line."""
        return self.style.name


def read(experiment: Experiment, folder: pathlib.Path) -> list[Row]:
    """The rows of all CSV files in `folder`; every row has the columns of all files.

    Raises:
      ValueError: there are no results, a file lacks a column or has another headline metric, or two
        rows are the same run.
    """
    files = {file: sweep.read_results(file) for file in sorted(folder.glob("*.csv"))}
    columns = dict.fromkeys(column for rows in files.values() for row in rows for column in row)
    columns |= dict.fromkeys(experiment.columns)
    needed = {*_RUN, *experiment.columns} - set(experiment.optional)
    validation = _validation(experiment.headline)
    found, origin = [], {}
    for file, rows in files.items():
        for row in rows:
            if lacking := sorted(needed - row.keys()):
                raise ValueError(
                    f"{file} is no result file of {experiment.name}: it lacks {', '.join(lacking)}."
                )
            if row.get(PHASE) not in (None, "select", "final"):
                raise ValueError(f"{file} has the phase {row[PHASE]!r}; known: select, final.")
            fits = (experiment.headline, validation if row.get(PHASE) == "select" else None)
            if row["headline"] not in fits:
                raise ValueError(
                    f"{file} has the metric {row['headline']}, {experiment.name} shows "
                    f"{experiment.headline}."
                )
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


def points(rows: Sequence[Row], by: Sequence[str]) -> list[Point]:
    """The points of `rows`, mechanisms in the order of `lla.experiment.styles`, then by columns.

    With and without short convolutions, a mechanism is two; one with trials alone is no point yet.

    Raises:
      ValueError: of a point there are final runs at several learning rates or options, or there is
        no point.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((*(row[column] for column in by), _taps(row)), []).append(row)
    found = [
        _point(members, by)
        for members in groups.values()
        if any(row.get(PHASE) != "select" for row in members)
    ]
    if not found:
        raise ValueError("all rows are of the phase 'select': there is nothing to show yet.")

    def place(point):
        values = [point.choices[column] for column in by]
        own = styles.rank(point.mechanism), point.label
        return (*own, [(isinstance(v, str), v or 0) for v in values])

    return sorted(found, key=place)


def _point(members, by):
    final = [row for row in members if row.get(PHASE) == "final"]
    trials = [row for row in members if row.get(PHASE) != "final"]
    full = _most_seeds(trials)
    if final:
        kinds = {(row["learning_rate"], *_choices(row).items()) for row in final}
        if len(kinds) > 1:
            where = ", ".join(f"{column}={members[0][column]}" for column in by)
            raise ValueError(f"final runs differ in more than their seed, at {where}: {kinds}.")
        full = full or final
        runs = [row for row in final if row["final"] is not None] or final
        sound = runs[0]["final"] is not None
    else:
        best = _select(full, by)
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
        choices={column: members[0][column] for column in by},
        taps=_taps(members[0]),
        learning_rate=rate,
        edge=len(rates) > 1 and rate in (min(rates), max(rates)),
        values=tuple(row["final"] for row in runs) if sound else (),
        further=further,
        diverged=sum(row["status"] == "diverged" for row in members),
        runs=len(members),
        phase=runs[0].get(PHASE),
    )


def _most_seeds(rows):
    """The rows of those rates and options that have as many seeds as any."""
    kinds = [(row["learning_rate"], *_choices(row).items()) for row in rows]
    most = max(map(kinds.count, kinds), default=0)
    return [row for row, kind in zip(rows, kinds, strict=True) if kinds.count(kind) == most]


def _select(rows, by):
    """What `lla.training.sweep.select` takes, by the validation split where all rows have it."""
    column = FURTHER + _validation(rows[0]["headline"])
    judged = all(row.get(column) is not None or row["final"] is None for row in rows)
    # `select` takes every column that it does not know for a choice.
    known = [{name: row[name] for name in (*_choices(row), *_RUN)} for row in rows]
    if judged:
        known = [run | {"final": row.get(column)} for run, row in zip(known, rows, strict=True)]
    (best,) = sweep.select(known, by)
    return best


def _validation(headline):
    """The headline metric on the validation split."""
    return f"validation/{headline.partition('/')[2]}"


def _taps(row):
    return row.get(f"mixers.{row[MECHANISM]}.short_conv")


def _choices(row):
    """What a row chose, without the options of other mechanisms."""
    others = [k for k in row if k.startswith("mixers.") and row[MECHANISM] != k.split(".")[1]]
    return {
        k: v for k, v in row.items() if k not in (*_ABOUT, *others) and not k.startswith(FURTHER)
    }


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------------------------
# Settings


def config(experiment: Experiment, variant: str | None = None) -> tuple[str, dict[str, Any]]:
    """How a command names the config, and the config: its variant `VARIANT` unless one is given."""
    get_config = importlib.import_module(f"configs.{experiment.name}").get_config
    variant = VARIANT if variant is None else variant
    path = f"configs/{experiment.name}.py" + (f":{variant}" if variant else "")
    return path, plain(get_config(variant))


def task_settings(
    experiment: Experiment, folder: pathlib.Path, variant: str | None = None
) -> dict[str | None, dict[str, Any]]:
    """Case -> settings of the task; None is the case of rows that have none.

    A folder that `sweep.py` wrote tells them itself; those of any other are the config's.
    """
    records = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((folder / "cells").glob("*/config.json"))
    ]
    if records:
        return {record["choices"].get("case"): record["task"] for record in records}
    _, full = config(experiment, variant)
    cases = full["sweep"]["cases"]
    return {None: full["task"]} | {case: override(full, cases[case])["task"] for case in cases}


def task(settings: Mapping[str | None, Mapping[str, Any]], choices: Row) -> tasks.Task:
    """The task of a point with these choices; `settings` come from `task_settings`.

    Raises:
      ValueError: a case that the config does not have.
    """
    case = choices.get("case")
    if case not in settings:
        known = ", ".join(str(name) for name in settings)
        raise ValueError(f"unknown case {case!r}; the config has: {known}. Give --variant.")
    options = dict(settings[case])
    name = options.pop("name")
    prefix = "task."
    options |= {k.removeprefix(prefix): v for k, v in choices.items() if k.startswith(prefix)}
    return tasks.create(name, **options)


def settings_tables(experiment: Experiment, variant: str | None = None) -> list[str]:
    """Every setting of the config that a result depends on, as Markdown."""
    path, full = config(experiment, variant)
    grid = _flat(full["sweep"]["grid"])
    cases = {name: _flat(changes) for name, changes in full["sweep"]["cases"].items()}
    by_case = {key for changes in cases.values() for key in changes}
    flat = _flat({name: full[name] for name in ("task", "model", "optimizer", "training")})
    lines = [
        f"| {key} | {_shown(value)} | {_source(experiment, key, value)} |"
        for key, value in flat.items()
        if key not in NOT_SHOWN and key not in grid and key not in by_case
    ]
    for name, changes in sorted(cases.items(), key=lambda item: (len(item[0]), item[0])):
        shown = ", ".join(
            f"{key} {_shown(value)} {_source(experiment, key, value)}"
            for key, value in changes.items()
        )
        lines.append(f"| case {name} | {shown} | |")
    swept = {"seeds": full["sweep"]["seeds"], "learning rates": full["sweep"]["learning_rates"]}
    mechanisms = grid.pop(MECHANISM, (full["model"]["mixer"]["name"],))
    for key, value in {**grid, **swept}.items():
        lines.append(f"| {key}, each | {_shown(value)} | {_source(experiment, key, value)} |")
    options = []
    for name in mechanisms:
        given = full["mixers"][name].items()
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in given if value is not None)
        options.append([styles.style(name).name, shown or "none"])
    return [
        f"All of `{path}`:",
        "\n".join([tables.markdown(["setting", "value", "source"], ()), *lines]),
        "Options of the [mechanisms](../../lla/mixers/README.md), without those that are None:",
        tables.markdown(["mechanism", "options"], options),
    ]


def _flat(entry, path=""):
    if not isinstance(entry, dict):
        return {path: entry}
    parts = [_flat(value, f"{path}.{key}" if path else key) for key, value in entry.items()]
    return {key: value for part in parts for key, value in part.items()}


def _shown(value):
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _source(experiment, key, value):
    published, source = experiment.published.get(key, ((), ""))
    return source if value in published else "[ours]"


def grid_table(
    found: Sequence[Point],
    across: Callable[[Point], Any],
    heads: Mapping[Any, str],
    cell: Callable[[Point], str],
    more: Sequence[Sequence[str]] = (),
) -> str:
    """A Markdown table: mechanisms down, the values of `across` to the right, "–" if not run.

    Args:
      found: points, at most one for each label and value of `across`.
      across: the column that a point belongs to.
      heads: value -> head of its column, in order.
      cell: text of a point.
      more: further rows below, their first cell included.
    """
    cells = {(point.label, across(point)): cell(point) for point in found}
    lines = [
        [label, *(cells.get((label, value), "–") for value in heads)]
        for label in dict.fromkeys(point.label for point in found)
    ]
    return tables.markdown(["mechanism", *heads.values()], [*lines, *more])


def value_cell(values: Sequence[float]) -> str:
    """Mean ± standard deviation to three digits."""
    if not values:
        return "diverged"
    mean, std = mean_std(values)
    return f"{mean:.3f} ± {std:.3f}"


def rate_cell(point: Point) -> str:
    """The learning rate, with a star at the edge of those tried, and how many runs diverged."""
    text = f"{point.learning_rate:.3g}" + ("\\*" if point.edge else "")
    return f"{text} ({point.diverged} of {point.runs} diverged)" if point.diverged else text


RATES_CAPTION = (
    "Learning rates selected; a star marks the lowest or highest of those tried, beyond which a "
    "better one may lie:"
)


def seeds(found: Sequence[Point]) -> str:
    """ "3 seeds", or "1 to 3 seeds" if it is not the same number everywhere."""
    counts = sorted({len(point.values) for point in found if point.values}) or [0]
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds"
    return f"{counts[0]} seed{'' if counts[0] == 1 else 's'}"


# ---------------------------------------------------------------------------------------------
# Commands


def summary_command(experiment: Experiment, argv: Sequence[str]) -> int:
    """`summary.py [FOLDER] [--variant V]`, `summary.py --check` and `summary.py --write`."""
    command = parser(experiment, "Prints the tables of a folder of results.")
    action = command.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="1 if the README is out of date")
    action.add_argument("--write", action="store_true", help="renew the README's tables")
    options = command.parse_args(argv)
    if not (options.check or options.write):
        return told(lambda: _parts(experiment, options.folder, options.variant))
    if options.folder != experiment.folder / "results" or options.variant is not None:
        command.error("the README has the tables of the committed results: give no other.")
    file = experiment.folder / "README.md"
    new = renewed(experiment, text := file.read_text(encoding="utf-8"))
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif new != text:
        print("README.md is out of date")
    return int(options.check and new != text)


def renewed(experiment: Experiment, text: str) -> str:
    """The README `text` with its blocks "settings" and "results" made anew.

    Raises:
      ValueError: a block is missing or there are others.
    """
    names = [match[2] for match in _BLOCK.finditer(text)]
    if sorted(names) != ["results", "settings"]:
        raise ValueError(f"the README must have the blocks settings and results; it has {names}.")
    results = experiment.folder / "results"
    made = {"settings": settings_tables(experiment), "results": []}
    if any(results.glob("*.csv")):
        what = f"{experiment.headline} of the mechanisms"
        images = [f"![{what}](results/figure.png)"]
        if any((results / "curves").glob("*.csv")):
            images.append(f"![{what} during training](results/curves.png)")
        made["results"] = [*images, *experiment.tables(experiment.points(results), results, None)]

    def block(match):
        parts = "".join(f"\n{_wrapped(part)}\n" for part in made[match[2]])
        return match[1] + parts + ("\n" if parts else "") + match[3]

    return _BLOCK.sub(block, text)


def _wrapped(part):
    return part if part.startswith(("|", "!")) else textwrap.fill(part, 100)


def _parts(experiment, folder, variant):
    return ["\n\n".join(experiment.tables(experiment.points(folder), folder, variant))]


def parser(experiment: Experiment, description: str) -> argparse.ArgumentParser:
    """Of a command with a folder of results and a variant of the config."""
    command = argparse.ArgumentParser(description=description)
    command.add_argument(
        "folder", nargs="?", type=pathlib.Path, default=experiment.folder / "results",
        help="with results.csv or several such files, such as the work directory of a sweep",
    )  # fmt: skip
    command.add_argument("--variant", help=f"of the config, if it is not {VARIANT!r}")
    return command


def told(work: Callable[[], Sequence[Any]]) -> int:
    """Prints what `work` returns, or what is wrong with the files; returns the exit status."""
    try:
        print(*work(), sep="\n")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
