"""The accuracy contract: float32 and bfloat16 against the float64 reference."""

import functools

import numpy as np
import pytest

from tests.ops import harness
from tests.ops.cases import REGIMES, Shape, make_inputs
from tests.ops.harness import FAST, XLA_CG, errors, exact

CONTRACT = {10.0: 1e-5, 1.0: 1e-5, 0.1: 1e-4, 0.01: 1e-3}
"""Ridge to the bound on the output's relative error; gradients may have ten times that."""

evaluate = functools.partial(harness.evaluate, optimised=True)

NORMAL = Shape(256, 64)
OTHER = Shape(160, 32)


@functools.cache
def case(regime: str, ridge: float, shape: Shape, rounded: str):
    inputs = make_inputs(shape, regime, ridge)
    return inputs, exact(inputs, rounded=rounded)


@pytest.mark.parametrize("implementation", FAST, ids=str)
@pytest.mark.parametrize("ridge", CONTRACT)
@pytest.mark.parametrize("shape", [NORMAL, OTHER], ids=["n256_d64", "n160_d32"])
def test_float32_on_normal_data(shape, ridge, implementation):
    inputs, want = case("normal", ridge, shape, "float32")
    for name, error in errors(evaluate(inputs, implementation), want).items():
        assert error <= CONTRACT[ridge] * (1 if name == "out" else 10), (name, error)


@pytest.mark.parametrize("implementation", FAST, ids=str)
@pytest.mark.parametrize("ridge", CONTRACT)
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "normal"])
def test_float32_on_harder_data(regime, ridge, implementation):
    """The same bounds: they leave room for condition numbers ten times those of normal data."""
    inputs, want = case(regime, ridge, OTHER, "float32")
    for name, error in errors(evaluate(inputs, implementation), want).items():
        assert error <= CONTRACT[ridge] * (1 if name == "out" else 10), (name, error)


@pytest.mark.parametrize("implementation", FAST, ids=str)
@pytest.mark.parametrize("ridge", [10.0, 1.0, 0.1])
@pytest.mark.parametrize("regime", ["normal", "qk_norm", "clustered"])
def test_bfloat16(regime, ridge, implementation):
    """At most twice the error of the exact formula on the same inputs, rounded once.

    The gradients of ridge and scale leave in float32: they are held to the rounding of the rest.
    """
    inputs, want = case(regime, ridge, OTHER, "bfloat16")
    got = evaluate(inputs, implementation, dtype="bfloat16")
    rounded = want._replace(
        out=want.out.astype(got.out.dtype),
        gradients={n: g.astype(got.out.dtype) for n, g in want.gradients.items()},
    )
    floor = errors(rounded, want)
    for name, error in errors(got, want).items():
        assert error <= 2 * floor[name], (name, error, floor[name])


def test_tighter_tolerance_is_more_accurate():
    """`tol` does what it says: the error falls with it, and stays below it up to a small factor."""
    inputs, want = case("normal", 0.1, OTHER, "float32")
    found = []
    for tol in (1e-2, 1e-3, 1e-5):
        got = evaluate(inputs, XLA_CG, solver=XLA_CG.solver(tol=tol))
        found.append(errors(got, want)["out"])
        # The bound is on the weights' error; values of unit variance turn it into the output's.
        assert found[-1] <= 2 * tol, (tol, found[-1])
    assert np.all(np.diff(found) < 0), found
