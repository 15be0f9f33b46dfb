"""A run that is killed goes on bit for bit: a real process, a real SIGKILL."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVERY = 400, 40
COMMAND = (
    sys.executable,
    "experiments/train.py",
    "--config=configs/mqar.py:smoke",
    f"--config.training.steps={STEPS}",
    f"--config.training.checkpoint_every={EVERY}",
    f"--config.training.eval_every={EVERY}",
)


def train(path):
    command = [*COMMAND, f"--workdir={path}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def last_state(path):
    """The step and the arrays of the latest checkpoint."""
    manager = orbax.checkpoint.CheckpointManager(path / "checkpoints")
    step = manager.latest_step()
    restored = manager.restore(step, args=orbax.checkpoint.args.StandardRestore())
    manager.close()
    return step, jax.tree.map(np.asarray, restored)


def test_killed_run_resumes_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole)
    process = subprocess.Popen(
        [*COMMAND, f"--workdir={killed}"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 150
    while not metrics.exists() or f'"step":{EVERY + 2},' not in metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()

    train(killed)
    assert metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    steps, states = zip(*(last_state(path) for path in (whole, killed)), strict=True)
    assert steps == (STEPS, STEPS)
    jax.tree.map(np.testing.assert_array_equal, *states)
