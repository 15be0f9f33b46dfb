"""The decoding kernels for Hopper in the GPU interpreter against the exact reference."""

import jax
import pytest

from tests.kernels.interpret_decode import CASES
from tests.kernels.subprocesses import run_json

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU interpreter needs JAX 0.11"
)

TIME_LIMIT = 240  # seconds
ROUNDING = 2.0**-9  # of the result, which is rounded to bfloat16 once


def interpret(case: str, *arguments: str) -> dict:
    return run_json("interpret_decode", case, *arguments, timeout=TIME_LIMIT)


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
    # With one part the weighted keys are rounded as well.
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
    """Window, ragged lengths, padding rows, a scale, one ridge or one per head, invalid ridges."""
    report = interpret("step")
    assert set(report["served"]) == {"step"}  # no call falls back to whole sequences
    assert report["error"] <= 1.2 * ROUNDING and report["log_sum_exp"] <= 1e-5
    assert 0 < report["iterations"] < 64 and report["residual"] < 1e-2


@pytest.mark.slow
def test_gradient_is_that_of_whole_sequences():
    report = interpret("step_gradient")
    assert set(report["served"]) == {"step", "whole"}
    query, ridge = report["usual"]
    assert query < 1e-2 and ridge < 2e-2  # the bounds in the README
    query, ridge = report["tight"]
    assert query < 5e-3 and ridge < 2e-3
