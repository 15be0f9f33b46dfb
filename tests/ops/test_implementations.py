"""The suite for the back ends of every platform; tests/kernels has that of the kernels."""

import pytest

from tests.ops.cases import MASKS, SHAPES, make_inputs
from tests.ops.harness import REFERENCE, XLA_CG, XLA_DIRECT, errors, evaluate, exact
from tests.ops.suite import Suite

SIXTEEN_BITS = {"bfloat16", "float16"}


class TestReference(Suite):
    """Its form is tested in test_reference.py; here, that it serves like the others."""

    implementation = REFERENCE
    quick = frozenset(
        {"one_token", "length_37", "two_leading_axes", "everything", "softmax", "parallax"}
        | SIXTEEN_BITS
    )


class TestXlaConjugateGradients(Suite):
    implementation = XLA_CG
    # Without dimensions and lengths between others, and masks that are a shape's default.
    quick = frozenset({*SHAPES, *MASKS, "softmax", "parallax"} | SIXTEEN_BITS) - frozenset(
        {"dim_16", "dim_96", "length_100", "causal", "causal_more_keys", "causal_more_queries"}
        | {"full_more_keys", "offset", "everything_but_dense"}
    )


class TestXlaDirect(Suite):
    implementation = XLA_DIRECT
    other_mechanisms = ()  # without a solve, the code that conjugate gradients have, too
    quick = frozenset(
        {"one_token", "length_129", "dim_48", "dim_128", "wide_value", "grouped_heads"}
        | {"empty_sequence", "everything"}
        | SIXTEEN_BITS
    )


@pytest.mark.parametrize("mask", ["causal", "everything"])
def test_float64_xla(mask):
    """In double precision both agree to its rounding: the blockwise form is algebraically exact."""
    inputs = make_inputs(SHAPES[MASKS[mask].shape])
    options = MASKS[mask].options(SHAPES[MASKS[mask].shape])
    want = exact(inputs, rounded="float64", **options)
    got = evaluate(inputs, XLA_CG, dtype="float64", **options)
    assert max(errors(got, want).values()) < 1e-9
