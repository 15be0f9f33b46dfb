"""Positions, lengths and segment ids beyond 32 bits: saturated, told apart, or refused."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops import integers
from tests.measure import relative_error
from tests.ops.cases import Shape, make_inputs
from tests.ops.harness import XLA_CG, evaluate

SHAPE = Shape(48, 8, heads=2, key_heads=1, batch=(2,))
LARGE = 2**31 - 1
LENGTHS = {"key_value_seq_lengths": np.array([40, 9])}


def outputs(implementation, **options):
    inputs = make_inputs(SHAPE)
    arrays = {n: jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value")}
    return lla.local_linear_attention(
        **arrays, ridge=1.0, implementation=implementation, **options
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("options", "same"),
    [
        (lambda w: {"local_window_size": w}, {}),
        (lambda w: {"local_window_size": (w, w), "is_causal": False}, {"is_causal": False}),
        (
            lambda w: {"local_window_size": (w, 0), "query_offset": -3, "is_causal": False},
            {"query_offset": -3},
        ),
        (
            lambda w: {"local_window_size": (3, w), "is_causal": False, **LENGTHS},
            {"local_window_size": (3, 48), "is_causal": False, **LENGTHS},
        ),
        (
            lambda w: {"local_window_size": (3, w), "is_causal": False, "query_offset": 5},
            {"local_window_size": (3, 48), "is_causal": False, "query_offset": 5},
        ),
        (lambda w: {"query_offset": w}, {"is_causal": False}),
        (lambda w: {"key_value_seq_lengths": np.array([w, 5])}, {
            "key_value_seq_lengths": np.array([48, 5])}),
        (lambda w: {"key_value_seq_lengths": np.array([-w, 5])}, {
            "key_value_seq_lengths": np.array([0, 5])}),
    ],
)  # fmt: skip
def test_large_numbers_saturate(options, same, implementation):
    want = outputs(implementation, **same)
    for large in (LARGE, 2**32, sys.maxsize, 2**70):
        assert relative_error(outputs(implementation, **options(large)), want) < 1e-5


def test_an_offset_before_everything_sees_nothing():
    assert not np.asarray(outputs("xla", query_offset=-LARGE)).any()


def test_an_offset_that_a_window_cannot_follow_is_an_error():
    with pytest.raises(ValueError, match=r"query_offset.*536870912.*2147483647"):
        outputs("xla", query_offset=LARGE, local_window_size=5)


@pytest.mark.parametrize("far", [2**32, 2**40, -(2**35)])
def test_segment_ids_beyond_32_bits_are_told_apart(far):
    ids = np.zeros((2, 48), np.int64)
    ids[:, 20:] = far
    small = (ids != 0).astype(np.int32)
    got = outputs("xla", segment_ids=(ids, ids))
    assert relative_error(got, outputs("xla", segment_ids=(small, small))) < 1e-6


def test_wide_traced_integers(float64):
    """With 64-bit integers enabled, inside a compiled function."""
    ids = np.zeros((2, 48), np.int64)
    ids[:, 20:] = 2**32
    small = (ids != 0).astype(np.int32)
    want = np.asarray(outputs("xla", segment_ids=(small, small)))
    with float64():

        @jax.jit
        def attend(ids, lengths):
            return outputs("xla", segment_ids=(ids, ids), key_value_seq_lengths=lengths)

        got = np.asarray(attend(jnp.asarray(ids), jnp.full(2, 2**32, jnp.int64)))
    assert relative_error(got, want) < 1e-5


def test_narrow_and_unsigned_integers():
    ids = np.repeat([0, 200], 24)[None].repeat(2, 0)
    want = outputs("xla", segment_ids=(ids, ids), query_offset=np.int8(3))
    unsigned = ids.astype(np.uint32) + np.uint32(2**32 - 300)
    for given in (ids.astype(np.uint8), unsigned, jnp.asarray(unsigned)):
        got = outputs("xla", segment_ids=(given, given), query_offset=jnp.asarray(3, jnp.uint8))
        assert relative_error(got, want) < 1e-6


def test_mixed_signs_in_jax_arrays_are_an_error():
    with pytest.raises(ValueError, match="both as int32"):
        integers.labels([jnp.zeros(3, jnp.uint32), jnp.zeros(3, jnp.int32)], ["query", "key"])


@pytest.mark.parametrize("bad", [1.0, np.ones(2), np.array(["a"]), True])
def test_what_is_no_integer_is_an_error(bad):
    with pytest.raises(ValueError, match="query_offset must be an integer"):
        outputs("xla", query_offset=bad)


def test_gradients_with_a_large_window():
    inputs = make_inputs(SHAPE)
    want = evaluate(inputs, XLA_CG)
    got = evaluate(inputs, XLA_CG, local_window_size=LARGE)
    for name, gradient in want.gradients.items():
        assert relative_error(got.gradients[name], gradient) < 1e-5
