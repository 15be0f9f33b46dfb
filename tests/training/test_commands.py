"""The two mains, from the command line to files, and what they say to a mistake."""

import pathlib
import socket
import subprocess
import sys

import pytest

from lla import training
from lla.experiment.workdir import read_records
from lla.training import sweep

ROOT = pathlib.Path(__file__).parents[2]
TASKS = ("in_context_regression", "mad", "mqar", "state_tracking")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, f"experiments/{script}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def config(task, variant):
    scope = {}
    exec(compile((ROOT / "configs" / f"{task}.py").read_text(), task, "exec"), scope)
    return scope["get_config"](variant).to_dict()


@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("task", TASKS)
def test_configs_describe_a_run_and_a_sweep(task, variant):
    settings = training.resolve(config(task, variant))
    assert settings.task.name == task and settings.model.mixer.name == "lla"
    if variant:
        _, points = sweep.cells(config(task, variant))
        assert len(points) == 2
    with pytest.raises(ValueError, match="unknown variant 'smok'"):
        config(task, "smok")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_point_of_the_full_sweeps_is_possible(task):
    _, points = sweep.cells(config(task, ""))
    assert len(points) > 10 and len({point.name for point in points}) == len(points)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_smoke_variants_run(task, tmp_path):
    trained = run("train", f"--config=configs/{task}.py:smoke", f"--workdir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    assert "finished at step 8" in trained.stdout
    swept = run("sweep", f"--config=configs/{task}.py:smoke", f"--workdir={tmp_path / 'sweep'}")
    assert swept.returncode == 0, swept.stderr
    assert len(sweep.read_results(tmp_path / "sweep" / "results.csv")) == 8


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The flag multi_host: two processes with a device each compute what one process does."""
    start = (
        "import sys, runpy, jax\n"
        "index, port = int(sys.argv.pop(1)), sys.argv.pop(1)\n"
        "begin = jax.distributed.initialize\n"
        "jax.distributed.initialize = lambda: begin('localhost:' + port, 2, index)\n"
        "sys.argv[0] = 'experiments/train.py'\n"
        "runpy.run_path('experiments/train.py', run_name='__main__')\n"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    arguments = [
        "--config=configs/mqar.py:smoke",
        "--config.model.mixer.name=linear",
        "--config.sharding.fsdp=2",
    ]
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PATH": ""}
    shared = [*arguments, "--multi_host", f"--workdir={tmp_path / 'two'}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start, str(index), str(port), *shared],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    arguments[-1] = "--config.sharding.data=1"
    alone = run("train", *arguments, f"--workdir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    two, one = read_records(tmp_path / "two"), read_records(tmp_path / "one")
    assert len(two) == len(one) > 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours.pop("kind") == theirs.pop("kind") and ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (value and pytest.approx(value, rel=1e-4, abs=1e-5)), name


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.optimizer.learning_rat=1", "did you mean config.optimizer.learning_rate?"),
        pytest.param(
            "--config.modle.width=1", "did you mean config.model?", marks=pytest.mark.slow
        ),
        ("--config.mixers.gla.zzz=1", "config.mixers.gla.zzz does not exist; did you mean"),
        ("--config.model.mixer.name=softmx", "did you mean 'softmax'?"),
        pytest.param(
            "--config.training.batch_size=0",
            "training.batch_size must be >= 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--config.training.steps=many", "invalid literal for int()", marks=pytest.mark.slow
        ),
    ],
)
def test_a_mistake_is_a_line_that_names_it(tmp_path, override, message):
    wrong = run("train", "--config=configs/mqar.py:smoke", f"--workdir={tmp_path}", override)
    assert wrong.returncode == 1
    assert message in wrong.stderr + wrong.stdout and "Traceback" not in wrong.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_tells_its_mistakes_too(tmp_path):
    for flag, message in (
        ("--part=3", "--part must be I/N"),
        ("--part=3/2", "--part must be I/N with I < N"),
        ("--config.sweep.seds=3", "did you mean config.sweep.seeds?"),
        ("--config.sharding.fsdp=2", "one device"),
    ):
        wrong = run("sweep", "--config=configs/mqar.py:smoke", f"--workdir={tmp_path}", flag)
        assert wrong.returncode == 1 and message in wrong.stderr + wrong.stdout, flag
        assert "Traceback" not in wrong.stderr
