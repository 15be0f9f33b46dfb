"""One suite for every back end: shapes, masks, dtypes, mechanisms of the family.

A subclass names an implementation and says what it does not support; for that the suite asserts
the refusal.
"""

from __future__ import annotations

import contextlib
import functools

import chex
import numpy as np
import pytest

from lla.ops import Backend
from tests.ops import harness
from tests.ops.cases import MASKS, SHAPES, make_inputs
from tests.ops.harness import Implementation, Result, errors, exact

MECHANISMS = ("lla", "softmax", "parallax")
# Rounding of float32 and the default tolerance, at ridge 1 and standard normal data. Short
# sequences of low dimension are less averaged than the accuracy tests' data, hence the factor 2.
OUTPUT_BOUND, GRADIENT_BOUND = 2e-5, 2e-4


def case(shape: str, mask: str | None):
    """Inputs and options of a named case."""
    options = MASKS[mask].options(SHAPES[shape]) if mask else {}
    return make_inputs(SHAPES[shape]), options


@functools.cache
def expected(shape: str, mechanism: str, mask: str | None, rounded: str) -> Result:
    """The float64 result of a named case."""
    inputs, options = case(shape, mask)
    return exact(inputs, mechanism=mechanism, rounded=rounded, **options)


def evaluate(
    implementation: Implementation, shape: str, mechanism: str, mask: str | None, dtype: str
) -> Result:
    """What an implementation returns for a named case."""
    inputs, options = case(shape, mask)
    return harness.evaluate(inputs, implementation, mechanism=mechanism, dtype=dtype, **options)


class Suite:
    """The tests of one implementation.

    Attributes:
      implementation: what runs.
      backend: a row of the table that is there for the tests alone, None where it is there anyway.
      unsupported: mechanisms, dtypes, ``"shape:<name>"`` and ``"mask:<name>"`` that it refuses.
      dtype: of the tests that do not choose one.
      mechanisms: those tested with every shape and mask.
      other_mechanisms: those tested with two masks and in 16 bits; where they share all code with
        another implementation, none.
      quick: names of shapes, masks, mechanisms and dtypes that run without ``-m slow``; None: all.
    """

    implementation: Implementation
    backend: Backend | None = None
    unsupported: frozenset[str] = frozenset()
    dtype = "float32"
    mechanisms: tuple[str, ...] = ("lla",)
    other_mechanisms: tuple[str, ...] = ("softmax", "parallax")
    quick: frozenset[str] | None = None

    def pytest_generate_tests(self, metafunc):
        """Parametrises the tests, and marks as slow what is not quick."""

        def slow_unless_quick(names):
            def marks(name):
                return [] if self.quick is None or name in self.quick else [pytest.mark.slow]

            return [pytest.param(name, marks=marks(name)) for name in names]

        name = metafunc.function.__name__
        if name in ("test_shape", "test_mask"):
            kind = name.removeprefix("test_")
            metafunc.parametrize(kind, slow_unless_quick({"shape": SHAPES, "mask": MASKS}[kind]))
            metafunc.parametrize("mechanism", self.mechanisms)
        elif name == "test_mechanism":
            metafunc.parametrize("mechanism", slow_unless_quick(self.other_mechanisms))
            metafunc.parametrize("mask", ["causal", "everything"])
        elif name == "test_sixteen_bits":
            metafunc.parametrize("mechanism", ("lla", *self.other_mechanisms))
            metafunc.parametrize("dtype", slow_unless_quick(["bfloat16", "float16"]))

    @pytest.fixture(autouse=True)
    def row(self):
        """Registers the back end for the time of a test."""
        with contextlib.ExitStack() as stack:
            if self.backend is not None:
                stack.enter_context(harness.registered(self.backend))
            yield

    def evaluate(self, shape: str, mechanism: str, mask: str | None, dtype: str) -> Result:
        """Runs a named case."""
        return evaluate(self.implementation, shape, mechanism, mask, dtype)

    def bound(self, name: str, floor: dict[str, float], dtype: str) -> float:
        """What the error of the output or of a gradient may be; `floor` is that of rounding."""
        if dtype == "float32":
            return OUTPUT_BOUND if name == "out" else GRADIENT_BOUND
        # The gradients of ridge and scale are float32, with only the solve's error.
        return 2 * max(floor[name], floor["out"])

    def check(
        self, shape: str, mechanism: str = "lla", mask: str | None = None, dtype: str | None = None
    ) -> tuple[Result, Result]:
        """Results of a case and the expected ones, compared; or asserts the refusal, and skips."""
        dtype = dtype or self.dtype
        features = {mechanism, dtype, f"shape:{shape}", f"mask:{mask}"}
        if refused := features & self.unsupported:
            with pytest.raises(NotImplementedError, match=self.implementation.name):
                evaluate(self.implementation, shape, mechanism, mask, dtype)
            pytest.skip(f"{self.implementation} refuses {', '.join(refused)}, as it says")
        want = expected(shape, mechanism, mask, dtype)
        got = self.evaluate(shape, mechanism, mask, dtype)
        chex.assert_shape(got.out, SHAPES[shape].output)
        chex.assert_shape(got.stats, SHAPES[shape].rows)
        assert got.out.dtype.name == dtype
        assert got.stats.lse.dtype == np.float32
        rounded = want._replace(
            out=want.out.astype(got.out.dtype),
            gradients={n: g.astype(got.gradients[n].dtype) for n, g in want.gradients.items()},
        )
        floor = errors(rounded, want)
        for name, error in errors(got, want).items():
            bound = self.bound(name, floor, dtype)
            assert error <= bound, (name, error, bound)
        return got, want

    def test_shape(self, shape, mechanism):
        self.check(shape, mechanism)

    def test_mask(self, mask, mechanism):
        got, want = self.check(MASKS[mask].shape, mechanism, mask)
        # Rows that see nothing: exactly zero, and so are their gradients.
        empty = ~np.isfinite(want.stats.lse)
        np.testing.assert_array_equal(np.isfinite(got.stats.lse), ~empty)
        if mask in ("dense", "empty_sequence", "negative_offset", "everything"):
            assert empty.any()
        assert not got.out[empty].any()
        for name in {"query", "ridge", "scale"} & got.gradients.keys():
            assert not got.gradients[name][empty].any()
        if mask == "empty_sequence":
            assert not got.gradients["key"][0].any()
            assert not got.gradients["value"][0].any()

    def test_mechanism(self, mechanism, mask):
        self.check(MASKS[mask].shape, mechanism, mask)

    def test_sixteen_bits(self, dtype, mechanism):
        """At most twice the error of the exact result rounded once, gradients included."""
        self.check("grouped_heads", mechanism, None, dtype)
