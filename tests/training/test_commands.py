"""The two mains, from the command line to files, and what they say to a mistake."""

import json
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from lla import tasks, training
from lla.runs.workdir import read_config, read_records
from lla.training import sweep

ROOT = pathlib.Path(__file__).parents[2]
TASKS = tasks.names()
CONFIGS = {task: task for task in TASKS} | {"text": "language_model"}  # names of files


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
    exec(compile((ROOT / "configs" / f"{CONFIGS[task]}.py").read_text(), task, "exec"), scope)
    return scope["get_config"](variant).to_dict()


@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("task", TASKS)
def test_configs_describe_a_run_and_a_sweep(task, variant):
    settings = training.resolve(config(task, variant))
    assert settings.task.name == task and settings.model.mixer.name == "lla"
    if variant:
        _, points = sweep.grid_points(config(task, variant))
        assert len(points) == 2
    with pytest.raises(ValueError, match="unknown variant 'smok'"):
        config(task, "smok")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_point_of_the_full_sweeps_is_possible(task):
    _, points = sweep.grid_points(config(task, ""))
    assert len(points) > 10 and len({point.name for point in points}) == len(points)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_smoke_variants_run(task, tmp_path):
    trained = run(
        "train", f"--config=configs/{CONFIGS[task]}.py:smoke", f"--workdir={tmp_path / 'run'}"
    )
    assert trained.returncode == 0, trained.stderr
    assert "finished at step 8" in trained.stdout
    swept = run(
        "sweep", f"--config=configs/{CONFIGS[task]}.py:smoke", f"--workdir={tmp_path / 'sweep'}"
    )
    assert swept.returncode == 0, swept.stderr
    assert len(sweep.read_results(tmp_path / "sweep" / "results.csv")) == 8


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The flag multi_host: two processes with a device each compute what one process does."""
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
    shared += [f"--coordinator=localhost:{port}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "experiments/train.py", *shared, f"--process_id={index}"],
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


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory):
    return tmp_path_factory.mktemp("nowhere")


@pytest.mark.parametrize(
    "command, message",
    [
        ("trian", "unknown command: 'trian'; did you mean 'train'?"),
        ("train", "--config is needed"),
        pytest.param("generate", "--workdir is needed", marks=pytest.mark.slow),
        ("train --config=mqra:smoke --describe", "there is no file 'mqra'. Did you mean mqar?"),
        pytest.param(
            "train --config=mqar:smok --describe",
            "'smok'; did you mean 'smoke'?",
            marks=pytest.mark.slow,
        ),
        ("train --config=bias_exponents --describe", "trains no model: use lla-study"),
        pytest.param("train --confg=mqar", "Did you mean: config", marks=pytest.mark.slow),
        pytest.param(
            "study --config=mqar --workdir=new",
            "use lla-train or lla-sweep",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sweep --config=mqar:smoke --config.sweep.seds=3 --dry_run",
            "did you mean config.sweep.",
            marks=pytest.mark.slow,
        ),
        pytest.param("generate --workdir=new", "new is no work directory", marks=pytest.mark.slow),
    ],
)
def test_a_mistyped_command_names_what_was_meant(nowhere, command, message):
    """From a folder without configs."""
    wrong = subprocess.run(
        [sys.executable, "-m", "lla", *command.split()],
        cwd=nowhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_line(wrong, message)
    assert not list(nowhere.iterdir())


@pytest.mark.parametrize(
    "command, expected",
    [
        ("--help", "\n  train     trains a model on a task\n"),
        ("train --help", "lla-train --config=mqar:short --workdir=runs/mqar  "),
        pytest.param("train --list", "\n  mqar  (lla-train, lla-sweep)\n", marks=pytest.mark.slow),
        ("study --config=bias_exponents:full --describe", "config.seeds = (0, 1, 2)\n    of the"),
        pytest.param(
            "sweep --config=mqar:smoke --dry_run",
            "2 points, 8 runs, at most 64 updates\n",
            marks=pytest.mark.slow,
        ),
        (
            "train --config mqar:smoke --config.training.steps=24 --describe",
            "config.training.steps = 24\n    updates.\n",
        ),
        (
            "train --config=mqar:smoke --config.model.mixer.name=linear --dry_run",
            "\nsteps        8 of 8 sequences",
        ),
    ],
)
def test_commands_tell_what_there_is_and_write_nothing(nowhere, command, expected):
    done = subprocess.run(
        [sys.executable, "-m", "lla", *command.split()],
        cwd=nowhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout, done.stdout
    assert not list(nowhere.iterdir())


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
            "--config.training.stop_at=(1,2)",
            "config.training.stop_at must be a finite number or None, got (1, 2)",
            marks=pytest.mark.slow,
        ),
        ("--config.mixers.gla.chunk=8", "config.mixers.gla.chunk has no effect"),
        pytest.param(
            "--config.sweep.seeds=(1,)", "is for experiments/sweep.py", marks=pytest.mark.slow
        ),
        pytest.param("--multi_host", "give --coordinator=HOST:PORT", marks=pytest.mark.slow),
        ("--process_id=1", "--process_id needs --multi_host"),
    ],
)
def test_a_mistake_is_a_line_that_names_it(tmp_path, override, message):
    workdir = tmp_path / "new"
    wrong = run("train", "--config=configs/mqar.py:smoke", f"--workdir={workdir}", override)
    assert_one_line(wrong, message)
    assert not workdir.exists()


def assert_one_line(wrong, message):
    assert wrong.returncode == 1
    told = wrong.stderr.strip()
    assert message in told and told.startswith("FATAL") and "\n" not in told, told
    assert not wrong.stdout


@pytest.mark.slow
@pytest.mark.parametrize("override", [(), ("--config.model.width=8",)])
@pytest.mark.parametrize(
    "config, message",
    [
        ("configs/mqra.py", "no file 'configs/mqra.py'. Did you mean configs/mqar.py?"),
        ("configs", "there is no file 'configs'"),
        ("", "there is no file ''"),
        ("configs/mqar.py:smok", "unknown variant 'smok'; did you mean 'smoke'?"),
        ("lla/version.py", "no attribute 'get_config'"),
        ("README.md", "invalid"),
    ],
)
def test_a_config_file_that_is_none_is_a_line(tmp_path, config, override, message):
    wrong = run("train", f"--config={config}", f"--workdir={tmp_path / 'new'}", *override)
    assert_one_line(wrong, message)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_work_directory_that_is_none_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    for script in ("train", "sweep"):
        for workdir, message in ((tmp_path / "file", "is a file"), ("", "must have a name")):
            wrong = run(script, "--config=configs/mqar.py:smoke", f"--workdir={workdir}")
            assert_one_line(wrong, message)
    assert not (ROOT / "config.json").exists()


@pytest.mark.slow
def test_a_finished_run_is_trained_further_on_request(tmp_path):
    flags = [
        "--config=configs/mqar.py:smoke",
        f"--workdir={tmp_path}",
        "--config.model.mixer.name=linear",
        "--config.optimizer.schedule=wsd",
        "--config.optimizer.warmup_fraction=0",
    ]
    assert "finished at step 8" in run("train", *flags).stdout
    more = [*flags, "--config.training.steps=16"]
    refused = run("train", *more)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == "To train that run further, add --extend."
    done = run("train", *more, "--extend")
    assert done.returncode == 0 and "finished at step 16" in done.stdout, done.stderr
    other = run("train", *more, "--config.training.seed=1", "--extend")
    assert_one_line(other, "the settings differ in training.seed")


@pytest.mark.slow
def test_options_are_reached_whatever_their_defaults_are(tmp_path):
    done = run(
        "train",
        "--config=configs/mqar.py:smoke",
        f"--workdir={tmp_path}",
        "--config.model.mixer.name=retnet",
        "--config.mixers.retnet.rope_theta=None",
        "--config.task.pairs=(1,2)",
        "--config.task.train_examples=None",
        "--config.training.stop_at=2",
    )
    assert done.returncode == 0, done.stderr
    record = read_config(tmp_path)
    assert record["task"]["pairs"] == [1, 2] and record["task"]["train_examples"] is None
    assert record["model"]["mixer"]["rope_theta"] is None and record["training"]["stop_at"] == 2.0


@pytest.mark.slow
def test_a_run_whose_only_update_diverges_ends_with_a_line(tmp_path):
    done = run(
        "train",
        "--config=configs/in_context_regression.py:smoke",
        f"--workdir={tmp_path}",
        "--config.model.mixer.name=linear",
        "--config.optimizer.learning_rate=1e38",
        "--config.optimizer.warmup_fraction=0",
        "--config.training.steps=1",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "finished at step 1" in done.stdout and "not finite, best" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_double_precision_trains_too(task, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    linear = "--config.model.mixer.name=linear"
    done = run(
        "train", f"--config=configs/{CONFIGS[task]}.py:smoke", linear, f"--workdir={tmp_path}"
    )
    assert done.returncode == 0 and "finished at step 8" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run that goes on until it is killed, beyond its first checkpoint."""
    path = tmp_path_factory.mktemp("long") / "run"
    flags = (
        "--config=configs/mqar.py:smoke",
        "--config.model.mixer.name=linear",
        "--config.training.steps=10000000",
        f"--workdir={path}",
    )
    command = [sys.executable, "experiments/train.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "step 20 " in line:
                break
        # Nobody reads what it writes from here on, which must not stop it.
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield path, process, flags
        process.kill()
        drain.join()


@pytest.mark.slow
def test_two_processes_do_not_share_a_work_directory(long_run):
    path, process, flags = long_run
    assert_one_line(run("train", *flags), f"is in use by process {process.pid} on")
    assert process.poll() is None
    steps = [record["step"] for record in read_records(path) if record["kind"] == "train"]
    assert len(set(steps)) == len(steps) > 5


@pytest.mark.slow
def test_generating_beside_a_run_leaves_it_alone(long_run):
    path, process, _ = long_run
    for _ in range(3):
        done = run("generate", f"--workdir={path}")
        assert done.returncode == 0, done.stderr
        assert "answers are right" in done.stdout
    assert process.poll() is None


@pytest.mark.slow
def test_generating_changes_no_file_and_tells_what_is_no_run(tmp_path):
    trained = run(
        "train",
        "--config=configs/mqar.py:smoke",
        "--config.model.mixer.name=linear",
        f"--workdir={tmp_path / 'run'}",
    )
    assert trained.returncode == 0, trained.stderr

    def files():
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}

    before = files()
    done = run("generate", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0 and files() == before, done.stderr
    (tmp_path / "sweep" / "cells" / "a").mkdir(parents=True)
    record = read_config(tmp_path / "run")
    (tmp_path / "sweep" / "cells" / "a" / "config.json").write_text(
        json.dumps(record | {"runs": {"seeds": [0], "learning_rates": [0.1]}})
    )
    for path, message in (
        ("sweep", "holds a sweep"),
        ("sweep/cells/a", "is a point of a sweep"),
        ("nothing", "has no config.json"),
    ):
        assert_one_line(run("generate", f"--workdir={tmp_path / path}"), message)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_a_sweep_tells_its_mistakes_too(tmp_path):
    for flag, message in (
        ("--config.training.seed=1", "set config.sweep.seeds"),
        ("--config.optimizer.learning_rate=1.0", "set config.sweep.learning_rates"),
        ("--config.mixers.gla.chunk=8", "the mixer trained here is 'softmax' or 'linear'"),
        ("--config.sweep.seeds=(-1,)", "sweep.seeds must be >= 0"),
        ("--part=3", "--part must be I/N"),
        ("--part=3/2", "--part must be I/N with I < N"),
        ("--config.sweep.seds=3", "did you mean config.sweep.seeds?"),
        ("--config.sharding.fsdp=2", "one device"),
    ):
        wrong = run("sweep", "--config=configs/mqar.py:smoke", f"--workdir={tmp_path}", flag)
        assert wrong.returncode == 1 and message in wrong.stderr + wrong.stdout, flag
        assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_a_hybrid_language_model_trains_and_continues_a_text(tmp_path):
    trained = run(
        "train",
        "--config=configs/language_model.py:smoke",
        "--config.model.mixer.name=gla",
        "--config.model.layers=('gla', 'linear')",
        "--config.mixers.linear.short_conv=2",
        f"--workdir={tmp_path}",
    )
    assert trained.returncode == 0 and "finished at step 8" in trained.stdout, trained.stderr
    assert read_config(tmp_path)["model"]["other_mixers"]["linear"]["short_conv"] == 2
    flags = (f"--workdir={tmp_path}", "--tokens=5", "--temperature=0")
    done = run("generate", *flags, "--prompt=The lamp")
    assert done.returncode == 0 and done.stdout.startswith("The lamp"), done.stderr
    assert len(done.stdout) > len("The lamp\n")
    unprompted = run("generate", *flags, "--split=validation")
    assert unprompted.stdout.startswith("The baker"), unprompted.stderr
    assert_one_line(run("generate", *flags, "--prompt="), "--prompt is empty")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "sweep"])
def test_text_that_is_not_there_is_told_in_a_line(script, tmp_path):
    flags = ("--config=configs/language_model.py:smoke", "--config.task.files=('nowhere',)")
    told = run(script, *flags, f"--workdir={tmp_path / 'run'}")
    assert told.returncode == 1 and "Traceback" not in told.stderr, told.stderr
    assert "there is no file or folder 'nowhere'" in told.stderr.splitlines()[-1]
