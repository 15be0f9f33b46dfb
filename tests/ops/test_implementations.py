"""One suite, run against every implementation: shapes, masks, dtypes, members of the family.

An implementation states what it does not support; for that the suite asserts the refusal.
"""

import functools

import numpy as np
import pytest

from tests.ops.cases import MASKS, SHAPES, make_inputs
from tests.ops.harness import (
    REFERENCE,
    XLA_CG,
    XLA_DIRECT,
    Implementation,
    errors,
    evaluate,
    exact,
)

# Rounding of float32 and the default tolerance, at ridge 1 and standard normal data. Short
# sequences of low dimension are less averaged than the accuracy tests' data, hence the factor 2.
OUTPUT_BOUND, GRADIENT_BOUND = 2e-5, 2e-4


@functools.cache
def expected(shape: str, member: str = "lla", mask: str | None = None, rounded: str = "float32"):
    """Inputs, options and the float64 result of a named case."""
    options = MASKS[mask].options(SHAPES[shape]) if mask else {}
    inputs = make_inputs(SHAPES[shape])
    return inputs, options, exact(inputs, member=member, rounded=rounded, **options)


def check(implementation, shape, member="lla", mask=None):
    inputs, options, want = expected(shape, member, mask)
    got = evaluate(inputs, implementation, member=member, **options)
    assert got.out.shape == SHAPES[shape].output
    assert got.out.dtype == np.float32
    for name, error in errors(got, want).items():
        assert error <= (OUTPUT_BOUND if name == "out" else GRADIENT_BOUND), (name, error)
    return got, want


class Suite:
    """The tests of one implementation; subclasses say which."""

    implementation: Implementation
    unsupported: frozenset[str] = frozenset()  # members, "mask:<name>" or dtypes it refuses
    members: tuple[str, ...] = ("softmax", "parallax")
    # What runs without -m slow; None: everything.
    quick: frozenset[str] | None = None

    def run_or_refuse(self, feature: str, call):
        if feature in self.unsupported:
            with pytest.raises(NotImplementedError, match=self.implementation.name):
                call()
            pytest.skip(f"{self.implementation} refuses {feature}, as it says")
        return call()

    def test_shape(self, shape):
        self.run_or_refuse(f"shape:{shape}", lambda: check(self.implementation, shape))

    def test_mask(self, mask):
        got, want = self.run_or_refuse(
            f"mask:{mask}", lambda: check(self.implementation, MASKS[mask].shape, mask=mask)
        )
        # Rows that see nothing: exactly zero, and so are their gradients.
        empty = ~np.isfinite(want.stats.lse)
        if mask in ("dense", "empty_sequence", "negative_offset", "everything"):
            assert empty.any()
        assert not got.out[empty].any()
        for name in ("query", "ridge", "scale"):
            assert not got.gradients[name][empty].any()
        if mask == "empty_sequence":
            assert not got.gradients["key"][0].any()
            assert not got.gradients["value"][0].any()

    @pytest.mark.parametrize("mask", ["causal", "everything"])
    @pytest.mark.parametrize("member", ["softmax", "parallax"])
    def test_member(self, member, mask):
        if member not in self.members:
            pytest.skip("without a solve, the same code as under another name here")
        self.run_or_refuse(
            member, lambda: check(self.implementation, MASKS[mask].shape, member, mask)
        )

    @pytest.mark.parametrize("member", ["softmax", "parallax", "lla"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sixteen_bits(self, dtype, member):
        """At most twice the error of the exact result rounded once, gradients included."""
        if member != "lla" and member not in self.members:
            pytest.skip("without a solve, the same code as under another name here")
        inputs, _, want = expected("grouped_heads", member, None, dtype)
        got = self.run_or_refuse(
            dtype, lambda: evaluate(inputs, self.implementation, member=member, dtype=dtype)
        )
        assert got.out.dtype.name == dtype
        assert got.stats.lse.dtype == np.float32
        rounded = want._replace(
            out=want.out.astype(got.out.dtype),
            gradients={n: g.astype(got.gradients[n].dtype) for n, g in want.gradients.items()},
        )
        floor = errors(rounded, want)
        for name, error in errors(got, want).items():
            # The gradients of ridge and scale are float32, with only the solve's error.
            bound = 2 * max(floor[name], floor["out"])
            assert error <= bound, (name, error, floor[name])


def pytest_generate_tests(metafunc):
    """Parametrises shapes and masks, and marks as slow what a subclass does not call quick."""
    if metafunc.cls is None:
        return
    quick = metafunc.cls.quick
    for argument, names in (("shape", SHAPES), ("mask", MASKS)):
        if argument in metafunc.fixturenames and metafunc.function.__name__ == f"test_{argument}":
            chosen = [
                name
                if quick is None or name in quick
                else pytest.param(name, marks=pytest.mark.slow)
                for name in names
            ]
            metafunc.parametrize(argument, chosen)


class TestReference(Suite):
    """Its form is tested in test_reference.py; here, that it serves like the others."""

    implementation = REFERENCE
    quick = frozenset({"one_token", "length_37", "two_leading_axes", "everything"})


class TestXlaConjugateGradients(Suite):
    implementation = XLA_CG
    # Without dimensions and lengths between others, and masks that are a shape's default.
    quick = frozenset({*SHAPES, *MASKS}) - frozenset(
        {"dim_16", "dim_96", "length_100", "causal", "causal_more_keys", "causal_more_queries"}
        | {"full_more_keys", "offset"}
    )


class TestXlaDirect(Suite):
    implementation = XLA_DIRECT
    members = ()
    quick = frozenset(
        {"one_token", "length_129", "dim_48", "dim_128", "wide_value", "grouped_heads"}
        | {"empty_sequence", "everything"}
    )


@pytest.mark.parametrize("mask", ["causal", "everything"])
def test_float64_xla(mask):
    """In double precision both agree to its rounding: the blockwise form is algebraically exact."""
    inputs = make_inputs(SHAPES[MASKS[mask].shape])
    options = MASKS[mask].options(SHAPES[MASKS[mask].shape])
    want = exact(inputs, rounded="float64", **options)
    got = evaluate(inputs, XLA_CG, dtype="float64", **options)
    assert max(errors(got, want).values()) < 1e-9
