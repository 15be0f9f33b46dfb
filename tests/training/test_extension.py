"""A finished run goes on to more steps, as if it had been trained to them from the beginning."""

import functools
import io
import json

import jax
import numpy as np
import pytest

from lla import training
from lla.runs import WorkdirError
from lla.runs.workdir import read_config, read_records
from lla.training import extension
from lla.training.checkpoint import Checkpoints
from tests.training.test_trainer import resolve

# Warm-up and decay take two updates each: 0 1 | 2 3 4 5 | 6 7.
WSD = {"schedule": "wsd", "warmup_fraction": 0.25, "decay_fraction": 0.25}


def settings(steps, training_options=None, **optimizer):
    options = {"steps": steps} | (training_options or {})
    return resolve(training=options, optimizer=optimizer)


@functools.cache
def compiled(steps, *optimizer):
    return training.Trainer(settings(steps, **dict(optimizer)))


def train(path, steps, extend=False, **optimizer):
    trainer = compiled(steps, *optimizer.items())
    stream = io.StringIO()
    result = training.train(trainer, path, stream=stream, extend=extend)
    return result, stream.getvalue()


def parameters(path, steps, **optimizer):
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(compiled(steps, *optimizer.items()).abstract_state)
    assert int(state.step) == steps
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]


LONGER = WSD | {"warmup_fraction": 0.125}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    path = tmp_path_factory.mktemp("straight")
    train(path, 16, **LONGER)
    return path


def test_an_extended_run_is_the_longer_run(tmp_path, straight):
    first, _ = train(tmp_path, 8, **WSD)
    assert [entry.name for entry in (tmp_path / extension.BEFORE_DECAY).iterdir()] == ["6"]
    result, progress = train(tmp_path, 16, extend=True, **LONGER)
    assert result["status"] == "finished" and result["steps"] == 16
    # Progress counts from where it went on.
    assert progress.splitlines()[0].startswith(" 50%") and "step 8 " in progress
    assert "step 6 " not in progress
    for name in ("metrics.jsonl", "result.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes(), name
    assert parameters(tmp_path, 16, **LONGER) == parameters(straight, 16, **LONGER)
    assert json.loads((tmp_path / "result_8.json").read_text()) == first
    # It is finished, and the same call says so again.
    assert train(tmp_path, 16, extend=True, **LONGER)[0] == result
    # And again: the checkpoint from before the decay is the newest.
    assert [entry.name for entry in (tmp_path / extension.BEFORE_DECAY).iterdir()] == ["12"]


def test_an_extension_that_was_killed_resumes(tmp_path, straight):
    train(tmp_path, 8, **WSD)
    plan = extension.plan(settings(16, **LONGER), tmp_path)
    assert plan.step == 6
    plan.apply()
    assert read_config(tmp_path)["training"]["steps"] == 16
    assert extension.plan(settings(16, **LONGER), tmp_path) is None
    train(tmp_path, 16, **LONGER)  # with or without `extend`
    assert (tmp_path / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_kill_before_the_config_changes_leaves_the_old_run(tmp_path, monkeypatch):
    before, _ = train(tmp_path, 8, **WSD)
    records = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extension, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            extension.plan(settings(16, **LONGER), tmp_path).apply()
    assert train(tmp_path, 8, **WSD)[0] == before
    assert (tmp_path / "metrics.jsonl").read_bytes() == records


@pytest.mark.slow
def test_a_constant_rate_goes_on_from_the_last_step(tmp_path):
    constant = {"schedule": "wsd", "warmup_fraction": 0.0, "decay_fraction": 0.0}
    train(tmp_path / "short", 6, **constant)
    assert not (tmp_path / "short" / extension.BEFORE_DECAY).exists()
    assert extension.plan(settings(12, **constant), tmp_path / "short").step == 6
    train(tmp_path / "short", 12, extend=True, **constant)
    train(tmp_path / "whole", 12, **constant)
    # The evaluation at step 6, the last of the short run, is none of the long one.
    short, whole = (read_records(tmp_path / name) for name in ("short", "whole"))
    assert short == whole
    assert parameters(tmp_path / "short", 12, **constant) == parameters(
        tmp_path / "whole", 12, **constant
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of 8 steps with a cosine and with a decay at the end."""
    path = tmp_path_factory.mktemp("runs")
    train(path / "cosine", 8)
    train(path / "wsd", 8, **WSD)
    return path


@pytest.mark.parametrize(
    "name, longer, message",
    [
        (
            "cosine",
            settings(16),
            r"cosine schedule depends on all steps, .* from step 0 on. Only runs with",
        ),
        ("wsd", settings(16), "cosine schedule depends on all steps"),
        (
            "wsd",
            settings(16, **WSD),
            r"warm-up would take 4 updates instead of 2. Give "
            r"--config.optimizer.warmup_fraction=0.125\.",
        ),
        ("wsd", settings(6, **WSD), "it has 8 steps, and training.steps is 6"),
        (
            "wsd",
            settings(16, {"batch_size": 16}, **LONGER),
            "differ in training.batch_size, and only the steps and the schedule may",
        ),
        ("nothing", settings(16), "no work directory"),
    ],
)
def test_why_a_run_cannot_be_extended(runs, name, longer, message):
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*")}
    with pytest.raises(WorkdirError, match=message):
        extension.plan(longer, runs / name)
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*")} == before


def test_without_a_checkpoint_from_before_the_decay_there_is_nothing_to_go_on_from(tmp_path):
    train(tmp_path, 8, **WSD)
    (tmp_path / extension.BEFORE_DECAY).rename(tmp_path / "moved")
    assert extension.plan(settings(16, **LONGER), tmp_path).step == 4
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "4")
    with pytest.raises(WorkdirError, match=r"same up to step 6 only, .* \(there are: 8\)"):
        extension.plan(settings(16, **LONGER), tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stopped_at": 8}, "it reached training.stop_at at step 8"),
        ({"failed_at": 5}, "its loss or gradient was not finite at step 5"),
    ],
)
def test_runs_that_ended_for_a_reason_are_not_extended(tmp_path, runs, change, message):
    for name in ("config.json", "result.json"):
        (tmp_path / name).write_text((runs / "wsd" / name).read_text())
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(result | change))
    with pytest.raises(WorkdirError, match=message):
        extension.plan(settings(16, **LONGER), tmp_path)


def test_a_longer_run_is_told_from_another_one(runs):
    assert extension.differs_by_length(settings(16, **LONGER), runs / "wsd")
    assert not extension.differs_by_length(settings(8, **WSD), runs / "wsd")
    assert not extension.differs_by_length(settings(16, {"seed": 1}, **LONGER), runs / "wsd")
    assert not extension.differs_by_length(settings(16), runs / "nothing")
