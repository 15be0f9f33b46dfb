"""Tables, settings and READMEs of the figures of trained models, and their command lines.

The scripts in in_context_regression/, mqar/ and state_tracking/ use this module.
"""

import argparse
import importlib
import json
import pathlib
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lla import tasks
from lla.experiments.trained import curves
from lla.experiments.trained.results import (
    FURTHER,
    MECHANISM,
    PHASE,
    Experiment,
    Point,
    Row,
    mean_std,
)
from lla.runs import blocks, styles, tables
from lla.runs.config import plain
from lla.training.settings import override

__all__ = ["FURTHER", "PHASE"]  # for the scripts

# Settings that change no result, or that the sweep replaces.
NOT_SHOWN = {
    "task.name", "model.mixer.name", "optimizer.learning_rate", "training.seed",
    "training.log_every", "training.checkpoint_every", "training.keep_checkpoints",
    "training.steps_per_call",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Settings


def config(experiment: Experiment, variant: str | None = None) -> tuple[str, dict[str, Any]]:
    """The config as a command line names it, and the config; by default that of the results."""
    get_config = importlib.import_module(f"lla.configs.{experiment.name}").get_config
    variant = experiment.variant if variant is None else variant
    path = f"configs/{experiment.name}.py" + (f":{variant}" if variant else "")
    return path, plain(get_config(variant))


def task_settings(
    experiment: Experiment, folder: pathlib.Path, variant: str | None = None
) -> dict[str | None, dict[str, Any]]:
    """Case -> settings of the task. The key None is for rows without a case.

    They come from the files of the folder if `sweep.py` wrote it, else from the config.
    """
    records = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((folder / "cells").rglob("config.json"))
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
    """Every setting of the config that affects results, as Markdown."""
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
    swept = {"seeds": full["sweep"]["seeds"]}
    if selecting := full["sweep"].get("selection_seeds"):
        swept["seeds that learning rates are selected on"] = selecting
    swept["learning rates"] = full["sweep"]["learning_rates"]
    mechanisms = grid.pop(MECHANISM, (full["model"]["mixer"]["name"],))
    for key, value in {**grid, **swept}.items():
        lines.append(f"| {key}, each | {_shown(value)} | {_source(experiment, key, value)} |")
    options = []
    for name in mechanisms:
        given = {
            key: (_shown(value) if f"mixers.{name}.{key}" not in grid else "as above")
            for key, value in full["mixers"][name].items()
            if value is not None
        }
        shown = ", ".join(f"{key} {text}" for key, text in given.items())
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
    """A Markdown table with a row for each mechanism; "–" stands for points that were not run.

    Args:
      found: points, at most one for each label and value of `across`.
      across: the value that decides the column of a point.
      heads: value -> head of its column, in order.
      cell: the text of a point.
      more: further rows, with their first cells.
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


def updates_cell(point: Point) -> str:
    """Mean ± standard deviation of the updates to the goal, and how many seeds reached it."""
    if not point.updates:
        return f"none of {len(point.rows)}"
    mean, std = mean_std(point.updates)
    return f"{mean:,.0f} ± {std:,.0f} ({len(point.updates)}/{len(point.rows)})"


def protocol(found: Sequence[Point]) -> str:
    """How learning rates were selected, in words, from the phases in the files."""
    if any(point.phase == "final" for point in found):
        return "at learning rates that other seeds selected, by the validation split"
    return "at the learning rate with the best mean over the same seeds"


RATES_CAPTION = (
    "Learning rates selected; a star marks the lowest or highest of those tried, beyond which a "
    "better one may lie:"
)


def seeds(found: Sequence[Point]) -> str:
    """ "3 seeds", or "1 to 3 seeds" if points differ."""
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
    action.add_argument(
        "--check", action="store_true", help="exit status 1 if the README is out of date"
    )
    action.add_argument("--write", action="store_true", help="renew the README's tables")
    options = command.parse_args(argv)
    if not (options.check or options.write):
        return report(lambda: _parts(experiment, options.folder, options.variant))
    if options.folder != experiment.folder / "results" or options.variant is not None:
        command.error("the README shows the committed results; name no other folder or variant.")
    file = experiment.folder / "README.md"
    new = renewed(experiment, text := file.read_text(encoding="utf-8"))
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif new != text:
        print("README.md is out of date")
    return int(options.check and new != text)


def renewed(experiment: Experiment, text: str) -> str:
    """The README `text` with its blocks "settings" and "results" renewed.

    Raises:
      ValueError: a block is missing or there are others.
    """
    results = experiment.folder / "results"
    made = {"settings": settings_tables(experiment), "results": []}
    if any(results.glob("*.csv")):
        found = experiment.points(results)
        images = [f"![{experiment.metric} of the mechanisms](results/figure.png)"]
        if experiment.goal and any(point.updates for point in found):
            images.append(f"![updates to {experiment.goal}](results/updates.png)")
        metric, known = curves.read(experiment, found, results)
        if known:
            images.append(f"![{metric} of the mechanisms during training](results/curves.png)")
        made["results"] = [*images, *experiment.tables(found, results, None)]

    def block(name):
        parts = "".join(f"\n{_wrapped(part)}\n" for part in made[name])
        return parts + "\n" if parts else ""

    return blocks.renew(text, block, made)


def _wrapped(part):
    return part if part.startswith(("|", "!")) else textwrap.fill(part, 100)


def _parts(experiment, folder, variant):
    return ["\n\n".join(experiment.tables(experiment.points(folder), folder, variant))]


def parser(experiment: Experiment, description: str) -> argparse.ArgumentParser:
    """The parser of a command that takes a folder of results and a variant of the config."""
    command = argparse.ArgumentParser(description=description)
    command.add_argument(
        "folder", nargs="?", type=pathlib.Path, default=experiment.folder / "results",
        help="with result files (CSV), such as the work directory of a sweep",
    )  # fmt: skip
    command.add_argument("--variant", help=f"of the config, if it is not {experiment.variant!r}")
    return command


def report(work: Callable[[], Sequence[Any]]) -> int:
    """Prints what `work` returns, or the message of its ValueError; returns the exit status."""
    try:
        print(*work(), sep="\n")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
