"""The decoding kernels in the GPU interpreter against the exact reference."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.kernels.interpret_decode import CASES

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU interpreter needs JAX 0.11"
)

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 240  # seconds
ROUNDING = 2.0**-9  # of bfloat16, which the result is rounded to once


def interpret(case: str, *arguments: str) -> dict:
    command = [sys.executable, "-m", "tests.kernels.interpret_decode", case, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(case: str, *arguments: str, factor: float = 1.2):
    report = interpret(case, *arguments)
    assert report["races"] == 0
    assert report["error"] <= factor * ROUNDING
    assert report["log_sum_exp"] <= 1e-5


@pytest.mark.compat
def test_equals_reference():
    check("lla")


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "lla"])
def test_every_case_equals_reference(case):
    # One part rounds the weighted keys once, too.
    check(case, factor=3 if case.endswith("one_part") else 1.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "softmax",
        "parallax",
        "lla",
        "lla_head_dim_128",
        "parallax_group_2",
        "parallax_long_group",
    ],
)
def test_no_races(case):
    check(case, "--races")


@pytest.mark.slow
def test_step_of_the_operator():
    """Window, ragged lengths, rows that pad, a scale, a ridge for each head or all, bad ridges."""
    report = interpret("step")
    assert report["served"] == ["step"] * 3
    assert report["error"] <= 1.2 * ROUNDING and report["log_sum_exp"] <= 1e-5
    assert 0 < report["iterations"] < 64 and report["residual"] < 1e-2


@pytest.mark.slow
def test_gradient_is_that_of_whole_sequences():
    report = interpret("step_gradient")
    assert report["served"] == ["step", "whole"] * 2
    query, ridge = report["usual"]
    assert query < 1e-2 and ridge < 2e-2  # what the README allows
    query, ridge = report["tight"]
    assert query < 5e-3 and ridge < 2e-3
