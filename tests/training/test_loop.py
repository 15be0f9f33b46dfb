"""The host's side: what is recorded when, how a run ends, and that a kill changes nothing."""

import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from lla import training
from lla.runs import WorkdirError
from lla.runs.lock import exclusive
from lla.runs.workdir import read_config, read_records
from lla.training.checkpoint import Checkpoints
from tests.training.test_trainer import resolve

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def default_program():
    """Compiled once for all tests here."""
    return training.Trainer(resolve())


def train(path, settings=None, stream=None, **options):
    trainer = default_program() if settings is None else training.Trainer(settings)
    stream = io.StringIO() if stream is None else stream
    return training.train(trainer, path, stream=stream, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps, and its work directory."""
    path = tmp_path_factory.mktemp("finished")
    return train(path), path


def test_records_come_at_their_steps_and_evaluation_before_the_first(finished):
    result, path = finished
    records = read_records(path)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("eval", 0),
        ("train", 2),
        ("train", 4),
        ("eval", 4),
        ("train", 6),
        ("train", 8),
        ("eval", 8),
        ("test", 8),
    ]
    assert all(record["validation/loss"] > 0 for record in records if record["kind"] == "eval")
    accuracies = [record["validation/accuracy"] for record in records if record["kind"] == "eval"]
    assert result == {
        "status": "finished",
        "steps": 8,
        "metric": "validation/accuracy",
        "mode": "max",
        "final": accuracies[-1],
        "best": max(accuracies),
        "test": {"test/accuracy": records[-1]["test/accuracy"]},
        "failed_at": -1,
        "stopped_at": -1,
    }
    assert not any(name.startswith("test/") for record in records[:-1] for name in record)
    assert json.loads((path / "result.json").read_text()) == result
    assert read_config(path)["model"]["mixer"]["name"] == "linear"
    environment = json.loads((path / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    times = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in times] == [2, 4, 6, 8]


def test_a_record_averages_over_its_window(finished):
    _, path = finished
    window = [record for record in read_records(path) if record["kind"] == "train"][1]
    trainer = default_program()
    state, _ = trainer.advance(trainer.init(), np.int32(2))
    losses = []
    for _ in range(2):
        state, metrics = trainer.advance(state, np.int32(1))
        losses.append(float(metrics["sums"]["loss"][0]) / float(metrics["sums"]["loss"][1]))
    np.testing.assert_allclose(window["loss"], np.mean(losses), rtol=1e-6)


def test_a_window_takes_as_long_as_its_steps(tmp_path, monkeypatch):
    trainer = default_program()
    advance = trainer.advance

    def slowly(*given):  # as where the call returns when it is done
        time.sleep(0.2)
        return jax.block_until_ready(advance(*given))

    monkeypatch.setattr(trainer, "advance", slowly)
    train(tmp_path)
    lines = (tmp_path / "timing.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    calls = -(-2 // trainer.settings.training.steps_per_call)  # of a window of two steps
    assert len(seconds) == 4
    assert min(seconds) >= 0.2 * calls


def test_a_finished_run_is_not_run_again(finished):
    result, path = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    assert train(path) == result
    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def test_another_config_is_refused(finished):
    _, path = finished
    with pytest.raises(WorkdirError, match=r"training\.seed: 0 there, 1 now"):
        train(path, resolve(training={"seed": 1}))


def test_the_last_checkpoints_stay(finished):
    _, path = finished
    with Checkpoints(path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4, 8]


def test_training_ends_where_it_was_to_get(tmp_path):
    # Every accuracy reaches 0: the first evaluation ends the run.
    result = train(tmp_path / "zero", resolve(training={"stop_at": 0.0}))
    assert (result["status"], result["steps"]) == ("stopped", 0)
    # A loss-like goal that only training reaches, at the step of an evaluation.
    settings = resolve(
        "in_context_regression",
        training={"steps": 400, "stop_at": 1.05, "checkpoint_every": 200},
        optimizer={"learning_rate": 1e-2},
    )
    result = train(tmp_path / "error", settings)
    assert result["status"] == "stopped" and result["steps"] % 4 == 0
    assert 0 < result["steps"] < 400 and result["final"] <= 1.05
    with Checkpoints(tmp_path / "error" / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == result["steps"]


def test_a_non_finite_loss_ends_training_and_saves_the_step(tmp_path):
    settings = resolve(optimizer={"learning_rate": 1e38, "warmup_fraction": 0.0})
    for _ in range(2):  # the second time from what the first one left
        with pytest.raises(training.NonFiniteError, match="not finite at step"):
            train(tmp_path, settings)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "non_finite"
    step = result["failed_at"]
    assert read_records(tmp_path)[-1] == {"kind": "non_finite", "step": step}
    trainer = training.Trainer(settings)
    with Checkpoints(tmp_path / "non_finite") as checkpoints:
        assert checkpoints.steps() == [step]
        state = checkpoints.restore(trainer.abstract_state)
    batch = trainer.task.batch(0, step, 8)
    outputs = trainer.model(jax.device_get(state.params))(batch["inputs"])
    gradient_of = jax.grad(
        lambda params: trainer.task.loss(trainer.model(params)(batch["inputs"]), batch)
    )
    gradients = jax.tree.leaves(gradient_of(jax.device_get(state.params)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert not (
        np.isfinite(outputs).all() and all(np.isfinite(np.sum(leaf**2)) for leaf in gradients)
    )


# What a run finds in its directory.


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run's directory that lacks the result."""
    path = shutil.copytree(finished[1], tmp_path / "run")
    (path / "result.json").unlink()
    return path


def same(path, finished):
    """Whether the files that a run ends with are those of the undisturbed run."""
    names = ("metrics.jsonl", "result.json", "config.json")
    return all((path / n).read_bytes() == (finished[1] / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    "text, found", [("", "empty"), ('{"status": "fini', "not JSON"), ("3", "not a JSON object")]
)
def test_a_damaged_result_is_named_and_its_remedy_works(finished, unfinished, text, found):
    (unfinished / "result.json").write_text(text)
    with pytest.raises(WorkdirError, match=rf"result\.json is damaged: {found}.*Delete .* latest"):
        train(unfinished)
    (unfinished / "result.json").unlink()
    assert train(unfinished) == finished[0] and same(unfinished, finished)


def test_records_that_a_checkpoint_stands_on_must_be_there(finished, unfinished):
    file = unfinished / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for left in ([], lines[1:], lines[:-3]):
        file.write_text("".join(left))
        with pytest.raises(WorkdirError, match=r"lacks records up to step 8.*delete .*checkpoints"):
            train(unfinished)
        assert file.read_text() == "".join(left)
    file.unlink()
    with pytest.raises(WorkdirError, match="lacks records up to step 8"):
        train(unfinished)
    file.write_text("".join([*lines[:2], '{"kind": "train"}\n', *lines[3:]]))
    with pytest.raises(WorkdirError, match="line 3 is damaged: no record of training"):
        train(unfinished)
    shutil.rmtree(unfinished / "checkpoints")  # the other way out
    file.write_text("")
    assert train(unfinished) == finished[0] and same(unfinished, finished)


def test_a_damaged_checkpoint_is_computed_again_from_the_one_before(finished, unfinished):
    shutil.rmtree(unfinished / "checkpoints" / "8")
    (unfinished / "checkpoints" / "8").mkdir()
    stream = io.StringIO()
    with pytest.warns(RuntimeWarning, match="8 cannot be read .*using that of step 4"):
        assert train(unfinished, stream=stream) == finished[0]
    assert same(unfinished, finished)
    lines = stream.getvalue().splitlines()  # from step 4 of 8 on
    assert [line[:4] for line in lines] == [" 75%", "100%"] and "step 6" in lines[0]
    with Checkpoints(unfinished / "checkpoints") as checkpoints:
        assert int(checkpoints.restore(default_program().abstract_state).step) == 8


def test_a_directory_that_another_process_is_at_is_left_alone(finished, unfinished, tmp_path):
    with exclusive(unfinished):
        before = {file: file.stat().st_mtime_ns for file in unfinished.rglob("*")}
        with pytest.raises(WorkdirError, match=rf"in use by process {os.getpid()} on"):
            train(unfinished)
        assert before == {file: file.stat().st_mtime_ns for file in unfinished.rglob("*")}
    with exclusive(finished[1]):  # which is read alone
        assert train(finished[1]) == finished[0]


def test_what_the_model_refuses_at_its_call_leaves_no_directory(tmp_path):
    settings = resolve(mixer="lla", options={"scale": -1.0})
    for path, message in ((tmp_path / "new", "scale must be non-negative"), ("", "have a name")):
        with pytest.raises(ValueError, match=message):
            train(path, settings)
    assert not list(tmp_path.iterdir())


def test_progress_shows_speed_and_time_left(tmp_path):
    stream = io.StringIO()
    train(tmp_path, stream=stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "left" in lines[0] and "step 2" in lines[0] and "steps/s" in lines[0]
    assert lines[-1].startswith("100%")


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, tag, value, step):
            written.append((tag, step))

        def flush(self):
            pass

        def close(self):
            pass

    package = types.ModuleType("tensorboard")
    package.__spec__ = types.SimpleNamespace(name="tensorboard")
    summary = types.ModuleType("tensorboard.summary")
    summary.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", summary)
    train(tmp_path)
    assert ("train/loss", 2) in written and ("validation/accuracy", 0) in written


def test_a_profile_is_written(tmp_path):
    train(tmp_path, profile=1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


# A real kill.

# Long enough to be killed in the middle; checkpoints do not come at every record.
_FLAGS = (
    "--config=configs/mqar.py:smoke",
    "--config.model.mixer.name=linear",
    "--config.training.steps=400",
    "--config.training.log_every=2",
    "--config.training.eval_every=20",
    "--config.training.checkpoint_every=40",
    "--config.sharding.data=1",
)


def start(path):
    return subprocess.Popen(
        [sys.executable, "experiments/train.py", *_FLAGS, f"--workdir={path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def last_step(path):
    """Of the records that are on disk; -1 if none."""
    try:
        lines = (path / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, json.JSONDecodeError):
        return -1


def kill_after(path, step):
    process = start(path)
    deadline = time.monotonic() + 300
    while last_step(path) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (path / "result.json").exists()


def parameters(path):
    """Every array of the last checkpoint, as bytes."""
    manager = Checkpoints(path / "checkpoints")
    config = read_config(path)
    given = {
        "task": config["task"],
        "model": {**config["model"], "mixer": {"name": config["model"]["mixer"]["name"]}},
        **{name: config[name] for name in ("optimizer", "training", "sharding")},
    }
    state = manager.restore(training.Trainer(training.resolve(given)).abstract_state)
    manager.close()
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in leaves}


@pytest.mark.parametrize(
    "steps",
    [
        (2, 90),  # before the first checkpoint, and then between two
        pytest.param((46, 222, 396), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, steps):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended(start(whole))
    for step in steps:
        kill_after(killed, step)
    # What a kill in the middle of a checkpoint or of a line leaves behind.
    unfinished = killed / "checkpoints" / "399.orbax-checkpoint-tmp-1"
    unfinished.mkdir(parents=True)
    (unfinished / "data").write_text("half")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","st')
    assert "finished at step 400" in ended(start(killed))
    for name in ("metrics.jsonl", "result.json", "config.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert parameters(whole) == parameters(killed)


def test_a_paused_run_goes_on_with_the_same_text(tmp_path):
    trainer = training.Trainer(resolve("text"))
    train_text = functools.partial(training.train, trainer, stream=io.StringIO())
    train_text(tmp_path / "whole")
    record = trainer.settings.record()
    paused = training.fit(trainer, tmp_path / "paused", record, stream=io.StringIO(), pause_at=0.0)
    assert paused == {"status": "paused", "steps": 2}
    train_text(tmp_path / "paused")
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "paused"))
    assert whole.read_bytes() == resumed.read_bytes()
    (last,) = [entry for entry in read_records(tmp_path / "whole") if entry["kind"] == "test"]
    assert last["test/bits_per_byte"] > 0 and last["test/loss/position_4-7"] > 0
