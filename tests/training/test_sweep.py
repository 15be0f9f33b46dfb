"""Many runs in one program are the single runs, and a sweep does each point once."""

import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from lla import training
from lla.runs import WorkdirError
from lla.runs.workdir import read_config, read_records
from lla.training import sweep
from tests.training.test_trainer import SMALL, resolve

TOO_LARGE = 1e38
RUNS = training.Runs(seeds=(0, 3), learning_rates=(1e-3, 1e-2, TOO_LARGE))
CHANGES = {"optimizer": {"warmup_fraction": 0.0}, "sharding": {"data": 1}}


@pytest.fixture(scope="module")
def cell():
    """State, sums and evaluation of all runs at once after 4 steps."""
    trainer = training.Trainer(resolve(**CHANGES), runs=RUNS)
    state, metrics = trainer.advance(trainer.init(), np.int32(4))
    return jax.device_get((state, metrics["sums"], trainer.evaluate(state.params)))


@pytest.mark.parametrize("i, j", [(0, 0), (1, 1)])
def test_a_run_of_a_cell_is_the_single_run(cell, i, j):
    state, sums, evaluation = cell
    seed, rate = RUNS.seeds[i], RUNS.learning_rates[j]
    optimizer = {**CHANGES["optimizer"], "learning_rate": rate}
    trainer = training.Trainer(
        resolve(training={"seed": seed}, optimizer=optimizer, sharding={"data": 1})
    )
    alone, metrics = trainer.advance(trainer.init(), np.int32(4))
    for path, leaf in alone.params.items():
        np.testing.assert_allclose(state.params[path][i, j], leaf, atol=1e-5, err_msg=path)
    for name, (total, weight) in metrics["sums"].items():
        np.testing.assert_allclose(sums[name][0][i, j], total, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(sums[name][1][i, j], weight, rtol=1e-6)
    for name, (total, _) in trainer.evaluate(alone.params).items():
        np.testing.assert_allclose(
            evaluation[name][0][i, j], total, rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_a_run_that_diverges_does_not_stop_the_others(cell):
    state, _, evaluation = cell
    assert (state.failed_at[:, :2] == -1).all() and (state.failed_at[:, 2] > 0).all()
    assert np.isfinite(evaluation["validation/loss"][0][:, :2]).all()


def config(**changes):
    given = training.defaults("mqar")
    given["task"].update(SMALL["mqar"])
    given["model"].update(width=16, num_heads=2, depth=1)
    given["training"].update(
        steps=4, batch_size=8, log_every=2, eval_every=2, eval_batches=2, checkpoint_every=2
    )
    given["optimizer"]["warmup_fraction"] = 0.0
    given["sweep"].update(
        seeds=RUNS.seeds,
        learning_rates=RUNS.learning_rates,
        grid={"model": {"mixer": {"name": ("linear", "retnet")}}},
    )
    given["sweep"].update(changes)
    return given


def run(path, given=None, **options):
    lines = []
    given = config() if given is None else given
    file = sweep.run(given, path, stream=io.StringIO(), report=lines.append, **options)
    return sweep.read_results(file), lines


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Rows and lines of a sweep over two points, done in two parts, and its directory."""
    path = tmp_path_factory.mktemp("sweep")
    rows, _ = run(path, part=(1, 2))
    assert {row["model.mixer.name"] for row in rows} == {"retnet"}
    rows, lines = run(path)
    return rows, lines, path


def test_results_have_a_row_for_every_run(swept):
    rows, _, path = swept
    found = [(row["model.mixer.name"], row["seed"], row["learning_rate"]) for row in rows]
    assert found == [
        (name, seed, rate)
        for name in ("linear", "retnet")
        for seed in RUNS.seeds
        for rate in RUNS.learning_rates
    ]
    for row in rows:
        diverged = row["learning_rate"] == TOO_LARGE
        assert row["status"] == ("diverged" if diverged else "finished")
        assert (row["final"] is None) == diverged
        assert row["metric"] == "validation/accuracy" and row["mode"] == "max"
        assert row["phase"] == "final" and row["seconds"] > 0 and row["eval_every"] == 2
    *records, test = read_records(path / "cells" / "model.mixer.name=linear" / "final")
    history = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in history] == [0, 2, 4]
    last = np.asarray(history[-1]["validation/accuracy"], float)
    assert last.shape == (2, 3)
    assert [row["final"] for row in rows[:2]] == list(last[0, :2])
    values = [record["validation/accuracy"][0][0] for record in history]
    assert rows[0]["best"] == max(values)
    np.testing.assert_allclose(rows[0]["curve"], values, rtol=1e-3)
    assert rows[1]["final:test/accuracy"] == test["test/accuracy"][0][1]


def test_finished_points_are_skipped_and_new_ones_added(swept):
    _, lines, path = swept
    assert [line.split()[-1] for line in lines] == ["training", "finished", "4"]
    before = (path / "results.csv").read_bytes()
    (path / "results.csv").unlink()
    _, lines = run(path)
    assert [line.split()[-1] for line in lines] == ["finished", "finished"]
    assert (path / "results.csv").read_bytes() == before


def test_a_point_with_other_settings_is_refused(swept):
    _, _, path = swept
    given = config()
    given["training"]["batch_size"] = 16
    with pytest.raises(WorkdirError, match=r"training\.batch_size: 8 there, 16 now"):
        run(path, given)
    assert json.loads((path / "cells/model.mixer.name=linear/final/result.json").read_text())


def test_damaged_files_of_a_point_are_named_with_what_to_do(swept, tmp_path):
    rows, _, path = swept
    path = shutil.copytree(path, tmp_path / "sweep")
    folder = path / "cells/model.mixer.name=linear/final"
    result = (folder / "result.json").read_text()
    for text, found in (("", "empty"), (result[:50], "not JSON")):
        (folder / "result.json").write_text(text)
        for read in (lambda: sweep.write_results(path), lambda: run(path)):
            with pytest.raises(WorkdirError, match=rf"result\.json is damaged: {found}.*Delete it"):
                read()
    (folder / "result.json").unlink()
    seconds = {"seconds": None}  # of another computer's day
    again, _ = run(path)
    assert [row | seconds for row in again] == [row | seconds for row in rows]
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl is damaged: it lacks the evaluations"):
        run(path)


def test_what_a_model_refuses_is_no_point_that_has_begun(tmp_path):
    given = config(grid={"model": {"mixer": {"name": ("softmax",)}}})
    given["mixers"]["softmax"]["scale"] = -1.0
    with pytest.raises(training.RefusedError, match="mixer 'softmax': scale must be non-negative"):
        run(tmp_path, given)
    assert not list(tmp_path.rglob("config.json"))


def test_processes_share_a_sweep(tmp_path):
    held = tmp_path / "locks" / "model.mixer.name=retnet"
    held.parent.mkdir()
    other = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{other}; print(); sys.stdin.read()", str(held)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        rows, lines = run(tmp_path)
        process.communicate()
    assert {row["model.mixer.name"] for row in rows} == {"linear"}
    assert sum("another process" in line for line in lines) == 1
    # What has died holds nothing, and a limit begins nothing.
    rows, lines = run(tmp_path, limit=-1.0)
    assert len(rows) == 6 and "already finished" in lines[0] and "not begun" in lines[1]
    assert {row["model.mixer.name"] for row in run(tmp_path)[0]} == {"linear", "retnet"}


SELECTION = dict(selection_seeds=(5, 6), learning_rates=(1e-3, 1e-2), seeds=(0, 1, 2))


def two_phases(**training_changes):
    given = config(**SELECTION, grid={"model": {"mixer": {"name": ("linear",)}}})
    given["training"].update(training_changes)
    return given


def test_selection_has_seeds_of_its_own(tmp_path):
    rows, lines = run(tmp_path, two_phases())
    chosen = [row for row in rows if row["phase"] == "select"]
    final = [row for row in rows if row["phase"] == "final"]
    assert [(row["seed"], row["learning_rate"]) for row in chosen] == [
        (seed, rate) for seed in (5, 6) for rate in (1e-3, 1e-2)
    ]
    (best,) = sweep.select(chosen, ())
    assert {row["learning_rate"] for row in final} == {best["learning_rate"]}
    assert [row["seed"] for row in final] == [0, 1, 2]
    folder = tmp_path / "cells" / "model.mixer.name=linear" / "final"
    assert read_config(folder)["runs"]["learning_rates"] == [best["learning_rate"]]
    # What is reported is that of single runs with this seed and rate.
    settings = resolve(
        model={"mixer": {"name": "linear"}},
        training={**two_phases()["training"], "seed": 1},
        optimizer={"warmup_fraction": 0.0, "learning_rate": best["learning_rate"]},
    )
    alone = training.train(training.Trainer(settings), tmp_path / "alone", stream=io.StringIO())
    assert final[1]["final:test/accuracy"] == pytest.approx(alone["test"]["test/accuracy"])
    assert len(sweep.summary(rows)) == 1 and "3 seeds" in sweep.summary(rows)[0]
    with pytest.raises(ValueError, match="selection_seeds must be others"):
        run(tmp_path / "both", config(selection_seeds=(0,), seeds=(0, 1)))


def test_selection_ends_when_one_rate_is_at_the_goal(tmp_path, monkeypatch):
    """Both seeds of the lower rate are at the goal after two steps: the other rate is cut short."""
    later = {2: [[0.9, 0.5], [0.9, 0.5]], 3: [[0.6], [0.95], [0.6]]}  # by the number of seeds

    def evaluate(self, params):
        values = np.asarray(later[self.shape[0]])
        first = not hasattr(self, "evaluated")
        self.evaluated = True
        return {"validation/accuracy": (0.0 * values if first else values, np.ones_like(values))}

    monkeypatch.setattr(training.Trainer, "evaluate", evaluate)
    rows, _ = run(tmp_path, two_phases(stop_at=0.8, steps=6))
    ends = {
        (row["phase"], row["seed"], row["learning_rate"]): (row["status"], row["steps"])
        for row in rows
    }
    assert ends == {
        ("select", 5, 1e-3): ("stopped", 2),
        ("select", 5, 1e-2): ("cut", 2),
        ("select", 6, 1e-3): ("stopped", 2),
        ("select", 6, 1e-2): ("cut", 2),
        ("final", 0, 1e-3): ("finished", 6),
        ("final", 1, 1e-3): ("stopped", 2),
        ("final", 2, 1e-3): ("finished", 6),
    }
    assert [row["curve"] for row in rows if row["seed"] == 1] == [(0.0, 0.95)]


@pytest.mark.parametrize("end", [2, 10])
def test_a_seed_that_goes_on_alone_has_a_program_of_its_own(tmp_path, monkeypatch, end):
    """Three of four seeds reach the goal at step `end`, too late to pay at step 10 of 12."""
    given = config(seeds=(0, 1, 2, 3), learning_rates=(1e-2,))
    given["sweep"]["grid"] = {"model": {"mixer": {"name": ("linear",)}}}
    given["training"].update(steps=12, stop_at=0.8)
    evaluate, advance, called = training.Trainer.evaluate, training.Trainer.advance, []

    def evaluated(self, params):
        found = dict(evaluate(self, params))
        self.evaluations = getattr(self, "evaluations", 0) + 1
        value = np.full((4, 1), 0.0)
        value[[0, 1, 3]] = 0.0 if self.evaluations <= end / 2 else 0.9
        return found | {"validation/accuracy": (value, np.ones_like(value))}

    def recorded(self, state, count, places=None):
        called.append(None if places is None else places.tolist())
        return advance(self, state, count, places)

    monkeypatch.setattr(training.Trainer, "evaluate", evaluated)
    monkeypatch.setattr(training.Trainer, "advance", recorded)
    rows, _ = run(tmp_path / "first", given)
    assert [row["steps"] for row in rows] == [end, end, 12, end]
    assert called == ([None] + 5 * [[2]] if end == 2 else 6 * [None])
    given["training"]["stop_at"] = None
    whole, _ = run(tmp_path / "second", given)
    assert rows[2]["final:test/accuracy"] == pytest.approx(whole[2]["final:test/accuracy"])
    losses = [
        [record["loss"][2] for record in read_records(folder) if record["kind"] == "train"]
        for folder in sorted(tmp_path.glob("*/cells/*/final"))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_seed_that_goes_on_alone_resumes_with_the_same_program(tmp_path, monkeypatch):
    runs = training.Runs(seeds=(0, 1, 2), learning_rates=(1e-2,))
    settings = resolve(training={"steps": 12, "eval_every": 2, "stop_at": 0.8})
    trainer = training.Trainer(settings, runs=runs)
    evaluate = trainer.evaluate

    def evaluated(params):
        value = np.asarray([[0.9], [0.0], [0.9]])
        return evaluate(params) | {"validation/accuracy": (value, np.ones_like(value))}

    monkeypatch.setattr(trainer, "evaluate", evaluated)
    for name, pause_at in (("whole", np.inf), ("paused", 0.0)):
        results = []
        while not results or results[-1]["status"] == "paused":
            results.append(
                training.fit(trainer, tmp_path / name, {}, stream=io.StringIO(), pause_at=pause_at)
            )
        assert len(results) == (1 if name == "whole" else 6)
        assert results[-1]["stopped_at"] == [[0], [-1], [0]]
    whole, paused = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "paused")
    )
    assert whole == paused


def test_known_results_are_not_made_again(tmp_path):
    first, _ = run(tmp_path / "first", two_phases())
    grid, points = sweep.grid_points(two_phases())
    known = sweep.Grid(grid, points, tmp_path / "second", known=first)
    assert known.open_phases(points[0]) == []
    chosen = [row for row in first if row["phase"] == "select"]
    half = sweep.Grid(grid, points, tmp_path / "second", known=chosen)
    assert half.open_phases(points[0]) == ["final"]
    assert half.runs(points[0], "final").learning_rates == (
        sweep.select(chosen, ())[0]["learning_rate"],
    )
    _, others = sweep.grid_points(two_phases(steps=6))
    assert known.open_phases(others[0]) == ["select", "final"]
    # How often something is recorded changes no result.
    _, others = sweep.grid_points(two_phases(log_every=1))
    assert known.open_phases(others[0]) == []


def test_many_known_results_need_one_digest(tmp_path, monkeypatch):
    grid, points = sweep.grid_points(two_phases())
    row = {**points[0].choices, "settings": points[0].digest, "phase": "final"}
    hashed = []
    monkeypatch.setattr(sweep, "_changed", lambda *given: hashed.append(given) or {})
    _, (point,) = sweep.grid_points(two_phases())
    known = sweep.Grid(grid, [point], tmp_path, known=[row] * 100)
    known.open_phases(point)
    assert len(hashed) == 1


def test_a_pause_goes_on_where_it_was(tmp_path):
    from lla.training.queue import Queue

    whole, _ = run(tmp_path / "whole", two_phases())
    grid, points = sweep.grid_points(two_phases())
    lines, paused = [], sweep.Grid(grid, points, tmp_path / "paused")

    def work(**options):
        Queue([paused], stream=io.StringIO(), report=lines.append, **options).run()

    work(end_before=0.0, estimate=lambda cell, runs: -1e9)
    assert "paused at step 2" in lines[1] and "not begun" in lines[2]
    assert not list((tmp_path / "paused").rglob("result.json"))
    work()
    rows = sweep.read_results(paused.write())
    timeless = [{**row, "seconds": None} for row in rows]
    assert timeless == [{**row, "seconds": None} for row in whole]


def test_what_takes_too_long_is_not_begun(tmp_path):
    from lla.training.queue import Queue

    grid, points = sweep.grid_points(config())
    lines, order = [], []

    def estimate(cell, runs):
        order.append(cell.name)
        return 1e9 if "retnet" in cell.name else 0.0

    Queue(
        [sweep.Grid(grid, points, tmp_path)],
        order=lambda grid, cell: -points.index(cell),
        end_before=1e6,
        estimate=estimate,
        stream=io.StringIO(),
        report=lines.append,
    ).run()
    assert "retnet" in order[0] and "not begun" in lines[0]
    rows = sweep.read_results(tmp_path / "results.csv")
    assert {row["model.mixer.name"] for row in rows} == {"linear"}


def test_parts_outside_are_errors(tmp_path):
    with pytest.raises(ValueError, match="part must be"):
        run(tmp_path, part=(2, 2))


def row(mixer, seed, rate, final, status="finished", mode="min", **choices):
    return {
        "model.mixer.name": mixer,
        **choices,
        "seed": seed,
        "learning_rate": rate,
        "status": status,
        "metric": "test/mse",
        "mode": mode,
        "final": final,
        "best": final,
    }


def test_selection_takes_the_best_mean_over_seeds():
    rows = [
        row("a", 0, 0.1, 1.0),
        row("a", 1, 0.1, 3.0),  # mean 2
        row("a", 0, 0.2, 0.5),
        row("a", 1, 0.2, None, "diverged"),  # best single run, but it diverges
        row("a", 0, 0.3, 2.4),
        row("a", 1, 0.3, 2.6),
        row("b", 0, 0.1, None, "diverged"),
    ]
    a, b = sweep.select(rows, ["model.mixer.name"])
    assert (a["learning_rate"], a["mean"], a["seeds"], a["diverged"]) == (0.1, 2.0, 2, 1)
    assert a["std"] == pytest.approx(2**0.5)
    assert b["mean"] is None and b["diverged"] == 1
    larger = [{**entry, "mode": "max"} for entry in rows[:2] + rows[4:6]]
    assert sweep.select(larger, ["model.mixer.name"])[0]["learning_rate"] == 0.3
    with pytest.raises(ValueError, match="one primary metric"):
        sweep.select([rows[0], {**rows[1], "mode": "max"}], ["model.mixer.name"])


def test_selection_takes_options_that_are_no_group_like_the_learning_rate():
    rows = [
        row("lla", 0, 0.1, 2.0, **{"mixers.lla.ridge": 1.0}),
        row("lla", 0, 0.1, 1.0, **{"mixers.lla.ridge": 0.1}),
        row("softmax", 0, 0.1, 3.0, **{"mixers.lla.ridge": None}),
    ]
    lla, softmax = sweep.select(rows, ["model.mixer.name"])
    assert lla["mixers.lla.ridge"] == 0.1 and lla["mean"] == 1.0 and lla["seeds"] == 1
    assert softmax["mean"] == 3.0
    assert len(sweep.summary(rows)) == 2 and "0.1" in sweep.summary(rows)[0]


def test_other_splits_are_further_columns_and_no_choice(tmp_path):
    given = training.defaults("state_tracking")
    given["task"].update(num_items=2, min_swaps=1, max_swaps=2)
    given["model"].update(width=16, num_heads=2, depth=1)
    given["training"].update(
        steps=2, batch_size=4, log_every=2, eval_every=2, eval_batches=2, checkpoint_every=2
    )
    grid = {"model": {"mixer": {"name": ("linear",)}}}
    given["sweep"].update(seeds=(0, 1), learning_rates=(1e-3, 1e-2), grid=grid)
    rows, _ = run(tmp_path, given)
    last = read_records(tmp_path / "cells" / "model.mixer.name=linear" / "final")[-1]
    assert last["kind"] == "test"
    assert len(rows) == 4
    for row in rows:
        i, j = row["seed"], (1e-3, 1e-2).index(row["learning_rate"])
        for name in ("test/accuracy", "test_long/accuracy"):
            assert row[f"final:{name}"] == last[name][i][j]
    (found,) = sweep.select(rows, ["model.mixer.name"])
    assert found["seeds"] == 2
