"""Results of sweeps: a row for every run, and the selection of the learning rate.

The work directory of a sweep has `cells/NAME/PHASE/` for every point NAME of the grid and each of
its phases: "select" and "final", or "final" alone where no seeds are set aside for the selection.
"""

import csv
import io
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lla.runs.workdir import (
    WorkdirError,
    read_config,
    read_json,
    read_records,
    write_whole,
)
from lla.training.records import training_seconds

SELECT, FINAL = "select", "final"
_COLUMNS = (
    "phase",
    "settings",
    "seed",
    "learning_rate",
    "status",
    "steps",
    "metric",
    "mode",
    "final",
    "best",
)
_LAST = ("seconds", "eval_every", "curve")
_FURTHER = "final:"  # prefix of columns with the primary metric on test splits


def is_choice(column: str) -> bool:
    """Whether the column describes a point of the grid rather than a run."""
    return column not in (*_COLUMNS, *_LAST) and not column.startswith(_FURTHER)


def write_results(path: str | os.PathLike, *copies: str | os.PathLike) -> pathlib.Path:
    """Collects every finished phase below `path` into `path/results.csv`; returns its path.

    Args:
      path: the work directory of a sweep.
      *copies: further files to write the same text to.
    """
    path = pathlib.Path(path)
    folders = sorted((path / "cells").glob("*/*"))
    found = [row for folder in folders for row in rows(folder)]
    columns = dict.fromkeys(column for row in found for column in row)
    choices = [column for column in columns if is_choice(column)]
    further = [column for column in columns if column.startswith(_FURTHER)]
    text = io.StringIO()
    columns = [*choices, *_COLUMNS, *further, *_LAST]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    path.mkdir(parents=True, exist_ok=True)
    for file in (path / "results.csv", *map(pathlib.Path, copies)):
        write_whole(file, text.getvalue())
    return path / "results.csv"


def read_results(file: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of `results.csv` with numbers parsed; empty fields are None."""
    with pathlib.Path(file).open(encoding="utf-8", newline="") as lines:
        return [
            {column: _parsed(column, text) for column, text in row.items()}
            for row in csv.DictReader(lines)
        ]


def select(rows: Iterable[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Selects the learning rate of every group of runs.

    It is the rate at which most seeds reached their goal; among those, the rate with the best mean
    over seeds of the final primary metric on the validation split; among those, the lowest. A rate
    at which any run diverged is not selected unless every rate has such a run; then the group's
    "mean" is None. All figures of trained models use this rule [ours].

    Args:
      rows: of `read_results`.
      by: columns that define the groups, such as ("model.mixer.name", "task.segment_length").
        Other options are selected like the learning rate.

    Returns:
      For each group its columns, all choices and the selected "learning_rate", "mean" and "std"
      (over seeds, with n - 1; 0 for one seed), "best" (mean over seeds of the best values), "seeds"
      (their number), "diverged" (runs of the group, at any rate), "metric" and "mode".
    """
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in by), []).append(row)
    return [_selected(mechanisms) for mechanisms in groups.values()]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of text for every choice except options of mixers, at the best learning rate.

    Runs of the phase "select" are left out.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    by = [c for c in columns if is_choice(c) and not c.startswith("mixers.")]
    lines = []
    for found in select([row for row in rows if row.get("phase", FINAL) == FINAL], by):
        name = ", ".join(f"{column}={found[column]}" for column in by) or "all"
        value = (
            "diverged"
            if found["mean"] is None
            else f"{found['mean']:.4g} +- {found['std']:.2g} ({found['seeds']} seeds)"
        )
        lines.append(f"{name}: {found['metric']} {value} at {found['learning_rate']:.3g}")
    return lines


def _selected(mechanisms):
    candidates: dict[tuple, list] = {}
    for row in mechanisms:
        choice = {k: v for k, v in row.items() if is_choice(k)}
        key = (row["learning_rate"], *choice.items())
        candidates.setdefault(key, []).append((choice, row))
    modes = {row["mode"] for row in mechanisms}
    if len(modes) > 1:
        raise ValueError("rows of a group must share one primary metric.")
    (mode,) = modes
    sign = -1.0 if mode == "max" else 1.0

    def quality(item):
        _, runs = item
        finals = [row["final"] for _, row in runs]
        bad = any(row["status"] == "diverged" for _, row in runs) or None in finals
        mean = math.inf if bad else sign * float(np.mean(finals))
        there = 0 if bad else sum(row["status"] == "stopped" for _, row in runs)
        return -there, mean, runs[0][1]["learning_rate"]

    _, runs = min(candidates.items(), key=quality)
    choice, first = runs[0]
    sound = math.isfinite(quality((None, runs))[1])
    finals = [row["final"] for _, row in runs] if sound else []
    return {
        **choice,
        "learning_rate": first["learning_rate"],
        "mean": float(np.mean(finals)) if sound else None,
        "std": (float(np.std(finals, ddof=1)) if len(finals) > 1 else 0.0) if sound else None,
        "best": float(np.mean([row["best"] for _, row in runs])) if sound else None,
        "seeds": len(runs),
        "diverged": sum(row["status"] == "diverged" for row in mechanisms),
        "metric": first["metric"],
        "mode": mode,
    }


def rows(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of the phase in the work directory `folder`; none if it is not finished.

    Raises:
      WorkdirError: a file there is damaged.
    """
    if not (folder / "result.json").exists():
        return
    remedy = f"Delete it, and the same sweep trains {folder} from its latest checkpoint."
    result = read_json(folder / "result.json", remedy)
    config = read_config(folder)
    evaluations = [record for record in read_records(folder) if record.get("kind") == "eval"]
    if not evaluations:
        raise WorkdirError(
            f"{folder / 'metrics.jsonl'} is damaged: it lacks the evaluations that result.json "
            f"stands for. Put the file back, or delete {folder} to train it again."
        )
    for i, seed in enumerate(config["runs"]["seeds"]):
        for j, rate in enumerate(config["runs"]["learning_rates"]):
            status, steps = _end(result, i, j)
            diverged = status == "diverged"
            curve = [
                record[result["metric"]][i][j] for record in evaluations if record["step"] <= steps
            ]
            yield {
                **config["choices"],
                "phase": folder.name,
                "settings": config["settings"],
                "seed": seed,
                "learning_rate": rate,
                "status": status,
                "steps": steps,
                "metric": result["metric"],
                "mode": result["mode"],
                # A diverged run keeps the parameters from before, which are no result.
                "final": "" if diverged else result["final"][i][j],
                "best": result["best"][i][j],
                **{
                    f"{_FURTHER}{name}": "" if diverged else values[i][j]
                    for name, values in result["test"].items()
                },
                "seconds": round(training_seconds(folder), 3),
                "eval_every": config["training"]["eval_every"],
                "curve": " ".join("nan" if v is None else f"{v:.4g}" for v in curve),
            }


def _end(result, i, j) -> tuple[str, int]:
    """How a run ended, and after how many updates."""
    failed, stopped = result["failed_at"][i][j], result["stopped_at"][i][j]
    if failed >= 0:
        return "diverged", failed
    if stopped >= 0:
        return "stopped", stopped
    # Training may end before the last step because another rate has reached the goal.
    return ("finished" if result["status"] == "finished" else "cut"), result["steps"]


def _parsed(column: str, text: str) -> Any:
    if column == "curve":
        return tuple(map(float, text.split()))
    if column == "settings":
        return text  # a hash may look like a number
    if text in ("", "None"):
        return None
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
