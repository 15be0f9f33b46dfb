"""The identities that define the family, for every implementation."""

import functools

import numpy as np
import pytest

from tests.measure import relative_error
from tests.ops import oracles
from tests.ops.cases import Shape, make_inputs
from tests.ops.harness import EVERY, FAST, REFERENCE, evaluate, exact

SHAPE = Shape(60, 12, value_dim=12, heads=4, key_heads=2, batch=(2,))
implementations = pytest.mark.parametrize("implementation", EVERY, ids=str)


@functools.cache
def base(ridge=1.0):
    return make_inputs(SHAPE, ridge=ridge)


def value_is_key(inputs):
    return {**inputs, "value": inputs["key"]}


@implementations
def test_effective_weights_sum_to_one(implementation):
    inputs = {**base(), "value": np.ones(SHAPE.value)}
    # Weights of either sign: rounding is that of sums of up to 60 terms of size |s| < 10.
    np.testing.assert_allclose(evaluate(inputs, implementation).out, 1, atol=1e-5)


def test_weighted_keys_are_the_query_and_the_probe():
    """``sum_j s_ij k_j = q_i + ridge x_i``, x solved here by NumPy; float64."""
    inputs = value_is_key(base(0.3))
    out = exact(inputs, rounded="float64").out
    valid = oracles.visible(SHAPE)
    for b, i, n in [(0, 0, 0), (0, 5, 3), (1, 40, 1), (1, 59, 2)]:
        q, k = inputs["query"][b, i, n], inputs["key"][b, valid[b, n, i], n // 2]
        w = np.exp(inputs["scale"][b, i, n] * (k @ q))
        p = w / w.sum()
        centred = k - p @ k
        x = np.linalg.solve((p[:, None] * centred).T @ centred + 0.3 * np.eye(12), p @ k - q)
        np.testing.assert_allclose(out[b, i, n], q + 0.3 * x, rtol=1e-11, atol=1e-12)


@implementations
def test_affine_values_are_reproduced(implementation):
    """Values affine in the keys are predicted at the query as the ridge goes to 0."""
    inputs = value_is_key(base(1e-4))
    rng = np.random.default_rng(3)
    slope, intercept = rng.normal(size=(12, 12)) / 4, rng.normal(size=12)
    inputs["value"] = inputs["key"] @ slope + intercept
    want = inputs["query"] @ slope + intercept
    out = evaluate(inputs, implementation).out
    # Rows with at least twice as many keys as dimensions, so that the covariance has full rank.
    # What remains is the bias of the ridge, checked to be that: a tenth of it at a tenth of it.
    bias = relative_error(out[:, 30:], want[:, 30:])
    assert bias < 3e-3
    finer = exact({**inputs, "ridge": inputs["ridge"] / 10}, rounded="float64").out
    assert relative_error(finer[:, 30:], want[:, 30:]) < 0.2 * bias


@implementations
def test_large_ridge_is_softmax_attention(implementation):
    inputs = base(1e6)
    softmax = exact(inputs, mechanism="softmax").out
    # The correction is of relative size |C| / ridge, about 1e-6, times |k - q| of about 5.
    assert relative_error(evaluate(inputs, implementation).out, softmax) < 2e-5


@implementations
def test_parallax_at_the_solution_is_local_linear_attention(implementation):
    if implementation not in (EVERY[0], EVERY[1]):
        pytest.skip("parallax has no solver")
    inputs, valid = base(0.5), oracles.visible(SHAPE)
    probe = np.zeros(SHAPE.query)
    for b, i, n in np.ndindex(SHAPE.batch[0], SHAPE.num_queries, SHAPE.heads):
        q, k = inputs["query"][b, i, n], inputs["key"][b, valid[b, n, i], n // 2]
        w = np.exp(inputs["scale"][b, i, n] * (k @ q))
        p = w / w.sum()
        centred = k - p @ k
        probe[b, i, n] = np.linalg.solve(
            (p[:, None] * centred).T @ centred + 0.5 * np.eye(12), p @ k - q
        )
    out = evaluate({**inputs, "probe": probe}, implementation, mechanism="parallax").out
    assert relative_error(out, exact(inputs).out) < 1e-5


@implementations
def test_first_row(implementation):
    """One key: the output is its value, and nothing reaches the query or the key."""
    inputs = base()
    inputs = {**inputs, "cotangent": inputs["cotangent"] * (np.arange(60) == 0)[:, None, None]}
    result = evaluate(inputs, implementation)
    np.testing.assert_allclose(
        result.out[:, 0], np.repeat(inputs["value"][:, 0], 2, axis=1), rtol=1e-6
    )
    for name in ("query", "key", "ridge", "scale"):
        # The reference differentiates sums that cancel; the blockwise form never forms them.
        largest = np.abs(result.gradients[name]).max()
        assert largest <= (1e-5 if implementation == REFERENCE else 0), (name, largest)
    want = inputs["cotangent"][:, 0].reshape(2, 2, 2, 12).sum(2)
    np.testing.assert_allclose(result.gradients["value"][:, 0], want, rtol=1e-6, atol=1e-6)


@implementations
def test_scale_zero_is_invariant_under_translation(implementation):
    """The regression sees only differences of keys and queries.

    With a positive scale a common shift c changes the logits by ``scale * c.k_j`` and so the
    weights; that is the next test's subject.
    """
    inputs = base()
    inputs = {**inputs, "scale": np.zeros_like(inputs["scale"])}
    shifted = {**inputs, "query": inputs["query"] + 3, "key": inputs["key"] + 3}
    want = exact(inputs, rounded="float64")
    np.testing.assert_allclose(exact(shifted, rounded="float64").out, want.out, rtol=1e-9)
    assert relative_error(evaluate(shifted, implementation).out, want.out) < 1e-5


def test_common_shift_acts_through_the_logits_alone():
    """A shift of keys and queries equals a change of weights; float64.

    ``scale (q + c).(k_j + c) = scale q.k_j + scale c.k_j + const``: not invariant, but equal to the
    unshifted regression with the extra logits, here written as least squares.
    """
    inputs = base()
    shift = 0.3
    shifted = {**inputs, "query": inputs["query"] + shift, "key": inputs["key"] + shift}
    out = exact(shifted, rounded="float64").out
    assert relative_error(out, exact(inputs, rounded="float64").out) > 0.01
    want = oracles.weighted_least_squares(shifted, oracles.visible(SHAPE))
    np.testing.assert_allclose(out, want, rtol=1e-9, atol=1e-10)


@implementations
def test_key_shift_changes_only_the_distance_to_the_query(implementation):
    """A shift c of the keys alone leaves the weights; the query moves by -c relative to them."""
    inputs = base()
    rows = np.zeros_like(inputs["scale"])
    shifted = {**inputs, "key": inputs["key"] + 2.0, "query": inputs["query"] + 2.0, "scale": rows}
    moved = {**inputs, "scale": rows}
    out, want = evaluate(shifted, implementation), exact(moved)
    for name in ("query", "key", "value", "ridge"):
        # 2 against keys of size 1 costs one or two bits of the differences.
        assert relative_error(out.gradients[name], want.gradients[name]) < 1e-4, name


@pytest.mark.parametrize("implementation", FAST, ids=str)
def test_value_is_linear(implementation):
    """The output is linear in the values, exactly for a power of two."""
    inputs = base()
    once = evaluate(inputs, implementation).out
    twice = evaluate({**inputs, "value": 2 * inputs["value"]}, implementation).out
    np.testing.assert_array_equal(twice, 2 * once)
