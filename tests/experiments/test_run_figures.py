"""The runner of the figures: what is left, what it costs, and that known results are left out."""

import csv
import json
import pathlib

import pytest

from lla.experiments import run_figures
from lla.training import sweep
from lla.training.trainer import Runs


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Results that are "committed", and the grid of a config's smoke variant."""
    rows = []
    monkeypatch.setattr(run_figures, "known_results", lambda name: rows)
    return rows, lambda **options: run_figures.grids(["mqar:smoke"], "", tmp_path, **options)[0]


def rows_of(cell, phase="final", seconds=40.0, steps=10):
    return [
        {
            **cell.choices,
            "phase": phase,
            "settings": cell.digest,
            "seed": seed,
            "learning_rate": rate,
            "steps": steps,
            "seconds": seconds,
        }
        for seed in (0, 1)
        for rate in (1e-3, 3e-3)
    ]


def test_known_results_are_left_out(found):
    rows, grid = found
    softmax, linear = grid().points
    assert "softmax" in softmax.name and "linear" in linear.name
    rows += rows_of(softmax)
    rows += rows_of(linear)[:3]  # one run is missing
    assert [grid().open_phases(cell) for cell in grid().points] == [[], ["final"]]
    assert grid(known=False).open_phases(softmax) == ["final"]
    rows[0]["settings"] = "other"
    assert grid().open_phases(softmax) == ["final"]


def test_the_plan_counts_points_and_minutes(found):
    rows, grid = found
    rows += rows_of(grid().points[0], seconds=120.0)
    costs = run_figures.Costs(rows)
    lines = run_figures.plan([("mqar:smoke", grid())], costs).splitlines()
    softmax, linear, total = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]
    )
    assert softmax == ["mqar:smoke", "softmax", "1 of 1", "2.0", "0.0"]
    assert linear[:4] == ["mqar:smoke", "linear", "0 of 1", "0.0"]
    assert total[2:4] == ["1 of 2", "2.0"]


def test_costs_come_from_results_where_there_are_any(found):
    _, grid = found
    softmax, linear = grid().points
    runs = Runs((0, 1), (1e-3, 3e-3))
    measured = run_figures.Costs(rows_of(softmax, seconds=40.0, steps=10))
    steps = softmax.settings.training.steps
    assert measured(softmax, runs) == pytest.approx(steps * 4.0)  # 40 s for 10 updates of 4 runs
    assert measured(softmax, Runs((0,), (1e-3,))) == pytest.approx(steps * 1.0)
    assert measured(linear, runs) == run_figures.Costs([])(linear, runs) == steps * 3e-3


def test_points_are_chosen_by_name(tmp_path):
    (grid,) = run_figures.grids(["mqar:full"], "length_256.*=lla,.*width=64", tmp_path)
    (cell,) = grid.points
    assert cell.settings.task.options["length"] == 256 and cell.settings.model.mixer.name == "lla"
    phases = grid.phases()
    assert list(phases) == ["select", "final"]
    assert phases["select"].one_rate and not phases["final"].one_rate
    assert not set(phases["select"].seeds) & set(phases["final"].seeds)
    with pytest.raises(ValueError, match="no config 'mqra'"):
        run_figures.grids(["mqra:full"], "", tmp_path)


@pytest.mark.parametrize("name", ["mqar", "mad"])
def test_committed_results_are_found_by_the_digest_of_their_settings(name, tmp_path):
    (grid,) = run_figures.grids([f"{name}:full"], "", tmp_path)
    committed = {row["settings"] for row in grid.known}
    assert committed and committed <= {cell.digest for cell in grid.points}


@pytest.mark.slow
def test_the_command_trains_and_tells_where_from(tmp_path):
    import subprocess
    import sys

    root = pathlib.Path(__file__).parents[2]
    command = [
        sys.executable, "experiments/run_figures.py", "--sweeps=mqar:smoke", "--only=linear",
        f"--workdir={tmp_path / 'work'}", f"--results={tmp_path / 'results'}", "--commit=abc",
    ]  # fmt: skip
    for _ in range(2):  # the second time nothing is left
        subprocess.run(command, cwd=root, check=True)
    rows = sweep.read_results(tmp_path / "results" / "mqar_smoke.csv")
    assert len(rows) == 4 and {row["phase"] for row in rows} == {"final"}
    provenance = json.loads((tmp_path / "results" / "provenance.json").read_text())
    assert provenance["commit"] == "abc" and provenance["versions"]["jax"]
    with (tmp_path / "work" / "mqar_smoke" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
