"""The kernels for all NVIDIA GPUs in the GPU interpreter, against the exact reference.

The interpreter knows neither mma.sync nor cp.async. Products are plain ones in its place, and what
is copied before Hopper arrives at once: the way from shared memory to the operands of mma.sync, and
the waiting for cp.async, are not seen here.
"""

import jax
import pytest

from tests.kernels.test_interpreted import AMPLIFIED, check

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the kernels need JAX 0.11.2"
)

HOPPER, AMPERE = ("--capability", "9.0"), ("--capability", "8.0")


@pytest.mark.parametrize(
    ("case", "card"),
    [
        ("softmax_window", HOPPER),
        ("parallax_odd", AMPERE),
        ("lla_odd", HOPPER),
        ("lla_one_token", HOPPER),
        ("parallax_one_token", AMPERE),
    ],
)
def test_equals_reference(case, card):
    check(case, *card)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "softmax_causal", "softmax_float16", "softmax_causal_nan", "parallax_segments",
        "parallax_causal_nan", "lla_window", "lla_two_sided_window", "lla_lengths",
        "lla_segments", "lla_head_dim_128", "lla_head_dim_32", "lla_offset", "lla_faint",
        "lla_clustered", "lla_causal_nan", "softmax_head_dim_256",
        "lla_head_dim_256", "lla_ridge_10", "lla_ridge_0.1", "lla_ridge_0.01",
    ],
)  # fmt: skip
def test_every_case_equals_reference(case):
    check(
        case, *HOPPER,
        factor=2 if case in AMPLIFIED else 1,
        output=1.2 if case == "lla_offset" else None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ["softmax_causal", "parallax_segments", "lla_odd"])
def test_no_races(case):
    check(case, *HOPPER, "--races")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["softmax_causal", "lla_lengths", "lla_ridge_0.1"])
def test_before_hopper(case):
    check(case, *AMPERE)
