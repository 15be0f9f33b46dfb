"""Trains what the figures of trained models still need, on all cards.

    python experiments/run_figures.py --plan                      # print what is left
    python experiments/run_figures.py --workdir=runs/figures      # train it

A process for each card trains one point after the other, the longest first, and compiles the next
one meanwhile. If compiling takes longer than training, as for points that are solved early, use
several processes for each card: --processes_per_card=3. What is in the committed results or in the
work directory is not trained again. The same command resumes a run that was killed from its last
checkpoint.

Each sweep writes a CSV file after every phase of a point: WORKDIR/SWEEP/results.csv and, if
--results is given, RESULTS/SWEEP.csv with RESULTS/provenance.json. Put a finished file into
experiments/FIGURE/results under a name of its own, where --plan finds it.
"""

import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # of configs

import importlib

from absl import app, flags

from lla.runs import WorkdirError, command, environment, tables
from lla.runs.workdir import directory, write_whole
from lla.training import RefusedError, sweep
from lla.training.queue import Queue
from lla.training.results import is_choice
from lla.training.trainer import Runs

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")
_SWEEPS = flags.DEFINE_list(
    "sweeps",
    ["mqar:full", "state_tracking:full", "in_context_regression:full", "mad:full"],
    "Configs with their variants, in the order in which they are worked off.",
)
_ONLY = flags.DEFINE_string("only", "", "Regular expression: points whose name it is found in.")
_LIMIT = flags.DEFINE_float("limit", math.inf, "Seconds after which training pauses.")
_RESULTS = flags.DEFINE_string("results", None, "Directory that gets a copy of all results.")
_CARDS = flags.DEFINE_list("cards", None, "CUDA devices, such as 0,1; all if it is not given.")
_PER_CARD = flags.DEFINE_integer("processes_per_card", 1, "They share its memory.", lower_bound=1)
_COMMIT = flags.DEFINE_string("commit", None, "For the provenance, of a copy of the files.")
_PLAN = flags.DEFINE_bool("plan", False, "Print what is finished and what is left, train nothing.")
_KNOWN = flags.DEFINE_bool("known", True, "Leave out what the committed results have.")
_BEGIN_ALL = flags.DEFINE_bool(
    "begin_all", False, "Begin phases that would not be over at the limit if no run stopped early."
)
_LONGEST = flags.DEFINE_bool("longest_first", True, "Sort the points of all sweeps by their cost.")

# Where there is no result to go by: nanoseconds that a token of a run costs an update, by mechanism
# (one H200, bfloat16, two layers, width 64; with width 128 twice as much), and milliseconds that no
# update goes below.
_NANOSECONDS = {
    "softmax": 12.5, "parallax": 18.0, "lla": 27.0, "deltanet": 16.0, "gated_deltanet": 17.0,
    "gla": 16.5, "mamba2": 24.0, "mamba": 26.0, "mesanet": 38.0, "hyena": 30.0,
}  # fmt: skip
_OTHERS = 60.0
_FLOOR = 3.0

Row = Mapping[str, Any]


def name_of(spec: str) -> tuple[str, str]:
    """The config and the variant in `spec`, such as "mqar:full"."""
    name, _, variant = spec.partition(":")
    return name, variant


def known_results(name: str) -> list[Row]:
    """The committed rows of a figure that have a phase."""
    folder = pathlib.Path(__file__).resolve().parent / name / "results"
    rows = [row for file in sorted(folder.glob("*.csv")) for row in sweep.read_results(file)]
    return [row for row in rows if "phase" in row]


def grids(
    specs: Sequence[str],
    only: str,
    workdir: pathlib.Path,
    results: pathlib.Path | None = None,
    known: bool = True,
) -> list[sweep.Grid]:
    """The sweeps, with the points whose name matches `only`.

    Raises:
      ValueError: a config that does not exist.
    """
    found = []
    for spec in specs:
        name, variant = name_of(spec)
        try:
            config = importlib.import_module(f"configs.{name}").get_config(variant)
        except ModuleNotFoundError as error:
            raise ValueError(f"--sweeps: there is no config {name!r}.") from error
        described, points = sweep.grid_points(config.to_dict())
        points = [cell for cell in points if re.search(only, f"{spec}/{cell.name}")]
        folder = f"{name}_{variant}" if variant else name
        copies = () if results is None else (results / f"{folder}.csv",)
        rows = known_results(name) if known else ()
        found.append(sweep.Grid(described, points, workdir / folder, rows, copies))
    return found


class Costs:
    """Seconds that a phase takes if no run stops early, estimated from results if there are any."""

    def __init__(self, rows: Sequence[Row]):
        self._measured: dict[tuple, list[float]] = {}
        phases: dict[tuple, list[Row]] = {}
        for row in rows:
            if row.get("seconds"):
                key = (*_choices(row).items(), row["settings"], row["phase"])
                phases.setdefault(key, []).append(row)
        for members in phases.values():
            steps = max(row["steps"] for row in members)
            choices = _choices(members[0])
            if steps:
                per_run = members[0]["seconds"] / steps / len(members)
                for key in (_key(choices), _key(choices, 1)):
                    self._measured.setdefault(key, []).append(per_run)

    def __call__(self, cell: sweep.GridPoint, runs: Runs) -> float:
        """Seconds of all updates of these runs together."""
        count = len(runs.seeds) * len(runs.learning_rates)
        steps = cell.settings.training.steps
        for key in (_key(cell.choices), _key(cell.choices, 1)):
            if key in self._measured:
                return steps * max(count * statistics.median(self._measured[key]), _FLOOR / 1e3)
        name, task = cell.settings.model.mixer.name, cell.settings.create_task()
        tokens = count * cell.settings.training.batch_size * task.max_length
        size = cell.settings.model.width / 64
        nanoseconds = _NANOSECONDS.get(name, _OTHERS) * size * tokens
        return steps * max(nanoseconds / 1e9, _FLOOR / 1e3)


def _choices(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.items() if is_choice(k) and v is not None}


def _key(choices: Row, level: int = 0) -> tuple:
    """What points of similar cost share: not options and, on level 1, not the size of the task."""
    leaves_out = ("mixers.",) if level == 0 else ("mixers.", "task.num_items", "task.segment")
    return tuple(sorted((k, v) for k, v in choices.items() if not k.startswith(leaves_out)))


def plan(found: Sequence[tuple[str, sweep.Grid]], costs: Costs) -> str:
    """A Markdown table of finished and open points, by sweep and mechanism."""
    lines, totals = [], [0, 0, 0.0, 0.0]
    for spec, grid in found:
        by_name: dict[str, list[sweep.GridPoint]] = {}
        for cell in grid.points:
            by_name.setdefault(cell.settings.model.mixer.name, []).append(cell)
        for name, cells in by_name.items():
            still = [(cell, grid.open_phases(cell)) for cell in cells]
            left = sum(
                costs(cell, grid.phases()[phase]) for cell, phases in still for phase in phases
            )
            done = sum(not phases for _, phases in still)
            spent = _spent(grid, name)
            lines.append([spec, name, f"{done} of {len(cells)}", _minutes(spent), _minutes(left)])
            for i, value in enumerate((done, len(cells), spent, left)):
                totals[i] += value
    done, count, spent, left = totals
    lines.append(["all", "", f"{done} of {count}", _minutes(spent), _minutes(left)])
    return tables.markdown(
        ["sweep", "mechanism", "points finished", "card minutes", "at most left"], lines
    )


def _spent(grid, name):
    phases = {
        (row["settings"], row["phase"]): row["seconds"]
        for row in grid.known
        if row["model.mixer.name"] == name
        and row["settings"] in {cell.digest for cell in grid.points}
    }
    return sum(phases.values())


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _cards() -> list[str]:
    if _CARDS.value is not None:
        return _CARDS.value
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [card for card in visible.split(",") if card]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.split()


def _on_every_card(cards: Sequence[str], each: int) -> int:
    """Runs this command `each` times for each card; the exit status is that of the worst."""
    start = [sys.executable, *sys.argv, "--processes_per_card=1"]
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / each:.2f}"}
    processes = []
    for card in [card for card in cards for _ in range(each)]:
        chosen = os.environ | share | {"CUDA_VISIBLE_DEVICES": card}
        processes.append(subprocess.Popen([*start, f"--cards={card}"], env=chosen))
    return max(process.wait() for process in processes)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    start = time.monotonic()
    if not _PLAN.value and _WORKDIR.value is None:
        raise app.UsageError("--workdir must be given, unless --plan is.")
    try:
        workdir = directory("runs/figures" if _WORKDIR.value is None else _WORKDIR.value)
        results = None if _RESULTS.value is None else directory(_RESULTS.value)
    except WorkdirError as error:
        raise app.UsageError(str(error)) from error
    cards = _cards()
    if len(cards) * _PER_CARD.value > 1 and not _PLAN.value:
        sys.exit(_on_every_card(cards, _PER_CARD.value))
    try:
        found = grids(_SWEEPS.value, _ONLY.value, workdir, results, _KNOWN.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    costs = Costs([row for grid in found for row in grid.known])
    if _PLAN.value:
        print(plan(list(zip(_SWEEPS.value, found, strict=True)), costs))
        return
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        described = environment.describe()
        if _COMMIT.value is not None:
            described |= {"commit": _COMMIT.value, "uncommitted_changes": None}
        described["cards"] = len(cards) or 1
        write_whole(results / "provenance.json", json.dumps(described, indent=2) + "\n")

    def longest(grid, cell):
        return -sum(costs(cell, runs) for runs in grid.phases().values())

    work = Queue(
        found,
        order=longest if _LONGEST.value else None,
        end_before=_LIMIT.value - (time.monotonic() - start),
        estimate=None if _BEGIN_ALL.value else costs,
        report=lambda line: print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True),
    )
    try:
        work.run()
    except (WorkdirError, RefusedError) as error:
        raise app.UsageError(str(error)) from error


if __name__ == "__main__":
    command.run(main)
