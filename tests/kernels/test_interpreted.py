"""The attention kernels for Hopper in the GPU interpreter against the exact reference."""

import pickle

import jax
import pytest

from lla.ops import Backend
from lla.ops.mosaic_gpu import hopper
from tests.kernels.interpret import CASES
from tests.kernels.subprocesses import run_json
from tests.ops.harness import Implementation, Result
from tests.ops.suite import Suite

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU interpreter needs JAX 0.11"
)

TIME_LIMIT = 600  # seconds; a case takes 10 to 40 on a machine with nothing else to do
DIRECT_LIMIT = 1800  # every access is compiled separately: 100 to 500, 800 with the race detector
QUICK = ("softmax_window", "parallax_odd", "lla_odd")

# Bounds, in multiples of bfloat16's rounding error. Weights, probe, adjoint solution and result are
# rounded once each, and the solve has its tolerance. The gradients of keys and values sum terms in
# which the rounding error of the probe is multiplied by the weights.
ROUNDING = 2.0**-9
AMPLIFIED = ("lla_ridge_0.01", "lla_offset", "lla_direct_offset", "lla_faint")
OUTPUT, ROWS, KEYS = 3, 4, 8


def check(case: str, *arguments: str, factor: float = 1.0, output: float | None = None):
    limit = DIRECT_LIMIT if "direct" in case else TIME_LIMIT
    report = run_json("interpret", case, *arguments, timeout=limit)
    assert report["finite"]
    assert report["kernels"] > 0 and report["races"] == 0
    bounds = {"output": OUTPUT, "key": KEYS, "value": KEYS}
    bounds = {name: factor * bounds.get(name, ROWS) for name in report["errors"]}
    bounds["output"] = bounds["output"] if output is None else output
    for name, error in report["errors"].items():
        assert error <= bounds[name] * ROUNDING, (name, error)


@pytest.mark.compat
@pytest.mark.parametrize("case", QUICK)
def test_equals_reference(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name not in QUICK])
def test_every_case_equals_reference(case):
    # A small ridge amplifies rounding errors by the condition of its systems. Where few rows have a
    # cotangent, their errors do not average out. With a shared offset, the output would be off by 8
    # roundings if the mean key had one part, and by 6 without the correction for weights that do
    # not sum to 1.
    check(
        case,
        factor=2 if case in AMPLIFIED else 1,
        output=1.2 if case == "lla_offset" else None,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "softmax_causal", "parallax_segments", "lla_causal", "lla_three_warpgroups",
        "lla_sum_products", "lla_pingpong_three_warpgroups", "lla_direct",
    ],
)  # fmt: skip
def test_no_races(case):
    check(case, "--races")


class TestSuite(Suite):
    """The suite of all back ends; every case that is served is a process of its own."""

    implementation = Implementation("mosaic_gpu_interpreted")
    backend = Backend(implementation.name, hopper.unsupported_shape, hopper.attend)
    unsupported = frozenset(
        {"float32", "shape:dim_256", "mask:dense", "mask:dense_broadcast", "mask:everything"}
    )
    dtype = "bfloat16"
    quick = frozenset({"dim_256", "dense", "dense_broadcast", "everything"})

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path):
        self.file = tmp_path / "result.pickle"

    def evaluate(self, shape, mechanism, mask, dtype):
        case = (shape, mechanism, mask or "none", dtype)
        run_json("interpret_suite", *case, str(self.file), timeout=TIME_LIMIT)
        return Result(*pickle.loads(self.file.read_bytes()))

    def bound(self, name, floor, dtype):
        kinds = {"out": OUTPUT, "d_key": KEYS, "d_value": KEYS}
        return kinds.get(name, ROWS) * ROUNDING

    def test_float32(self):
        self.check("one_token", dtype="float32")
