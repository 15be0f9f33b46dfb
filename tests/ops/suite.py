"""One suite for every back end: shapes, masks, dtypes, members of the family.

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

MEMBERS = ("lla", "softmax", "parallax")
# Rounding of float32 and the default tolerance, at ridge 1 and standard normal data. Short
# sequences of low dimension are less averaged than the accuracy tests' data, hence the factor 2.
OUTPUT_BOUND, GRADIENT_BOUND = 2e-5, 2e-4


def case(shape: str, mask: str | None):
    """Inputs and options of a named case."""
    options = MASKS[mask].options(SHAPES[shape]) if mask else {}
    return make_inputs(SHAPES[shape]), options


@functools.cache
def expected(shape: str, member: str, mask: str | None, rounded: str) -> Result:
    """The float64 result of a named case."""
    inputs, options = case(shape, mask)
    return exact(inputs, member=member, rounded=rounded, **options)


def evaluate(
    implementation: Implementation, shape: str, member: str, mask: str | None, dtype: str
) -> Result:
    """What an implementation returns for a named case."""
    inputs, options = case(shape, mask)
    return harness.evaluate(inputs, implementation, member=member, dtype=dtype, **options)


class Suite:
    """The tests of one implementation.

    Attributes:
      implementation: what runs.
      backend: a row of the table that is there for the tests alone, None where it is there anyway.
      unsupported: members, dtypes, ``"shape:<name>"`` and ``"mask:<name>"`` that it refuses.
      dtype: of the tests that do not choose one.
      members: those tested with every shape and mask.
      other_members: those tested with two masks and in 16 bits; where they share all code with
        another implementation, none.
      quick: names of shapes, masks, members and dtypes that run without ``-m slow``; None: all.
    """

    implementation: Implementation
    backend: Backend | None = None
    unsupported: frozenset[str] = frozenset()
    dtype = "float32"
    members: tuple[str, ...] = ("lla",)
    other_members: tuple[str, ...] = ("softmax", "parallax")
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
            metafunc.parametrize("member", self.members)
        elif name == "test_member":
            metafunc.parametrize("member", slow_unless_quick(self.other_members))
            metafunc.parametrize("mask", ["causal", "everything"])
        elif name == "test_sixteen_bits":
            metafunc.parametrize("member", ("lla", *self.other_members))
            metafunc.parametrize("dtype", slow_unless_quick(["bfloat16", "float16"]))

    @pytest.fixture(autouse=True)
    def row(self):
        """Registers the back end for the time of a test."""
        with contextlib.ExitStack() as stack:
            if self.backend is not None:
                stack.enter_context(harness.registered(self.backend))
            yield

    def evaluate(self, shape: str, member: str, mask: str | None, dtype: str) -> Result:
        """Runs a named case."""
        return evaluate(self.implementation, shape, member, mask, dtype)

    def bound(self, name: str, floor: dict[str, float], dtype: str) -> float:
        """What the error of the output or of a gradient may be; `floor` is that of rounding."""
        if dtype == "float32":
            return OUTPUT_BOUND if name == "out" else GRADIENT_BOUND
        # The gradients of ridge and scale are float32, with only the solve's error.
        return 2 * max(floor[name], floor["out"])

    def check(
        self, shape: str, member: str = "lla", mask: str | None = None, dtype: str | None = None
    ) -> tuple[Result, Result]:
        """Results of a case and the expected ones, compared; or asserts the refusal, and skips."""
        dtype = dtype or self.dtype
        features = {member, dtype, f"shape:{shape}", f"mask:{mask}"}
        if refused := features & self.unsupported:
            with pytest.raises(NotImplementedError, match=self.implementation.name):
                evaluate(self.implementation, shape, member, mask, dtype)
            pytest.skip(f"{self.implementation} refuses {', '.join(refused)}, as it says")
        want = expected(shape, member, mask, dtype)
        got = self.evaluate(shape, member, mask, dtype)
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

    def test_shape(self, shape, member):
        self.check(shape, member)

    def test_mask(self, mask, member):
        got, want = self.check(MASKS[mask].shape, member, mask)
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

    def test_member(self, member, mask):
        self.check(MASKS[mask].shape, member, mask)

    def test_sixteen_bits(self, dtype, member):
        """At most twice the error of the exact result rounded once, gradients included."""
        self.check("grouped_heads", member, None, dtype)
