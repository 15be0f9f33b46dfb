"""Degenerate, extreme and invalid inputs: finite and accurate, or NaN exactly where documented."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from tests.ops.cases import SHAPES, Shape, make_inputs
from tests.ops.harness import EVERY, FAST, errors, evaluate, exact

SHAPE = Shape(50, 16, value_dim=8, heads=2, key_heads=1)
every = pytest.mark.parametrize("implementation", EVERY, ids=str)
fast = pytest.mark.parametrize("implementation", FAST, ids=str)


def assert_finite(result):
    assert np.isfinite(result.out).all()
    assert np.isfinite(result.stats.residual).all()
    for name, gradient in result.gradients.items():
        assert np.isfinite(gradient).all(), name


def identical_keys(arrays):
    return {**arrays, "key": np.broadcast_to(arrays["key"][:, :1], arrays["key"].shape).copy()}


def zero_keys(arrays):
    return {**arrays, "key": np.zeros_like(arrays["key"])}


def zero_queries(arrays):
    return {**arrays, "query": np.zeros_like(arrays["query"])}


def key_offset(arrays):
    return {**arrays, "key": arrays["key"] + 100}


def query_is_key(arrays):
    return {**arrays, "query": np.repeat(arrays["key"], 2, axis=2)}


def logits_of_80(arrays):
    """Logits fill [-80, 80]: one key at each end, weights down to e^-160."""
    key, query = arrays["key"].copy(), arrays["query"].copy()
    for array in (key, query):
        array /= np.linalg.norm(array, axis=-1, keepdims=True)
    key[:, 3], key[:, 7] = query[:, 30, :1], -query[:, 30, :1]
    return {**arrays, "key": key, "query": query, "scale": np.full_like(arrays["scale"], 80.0)}


def duplicated_keys(arrays):
    key = arrays["key"].copy()
    key[:, 1::2] = key[:, ::2]
    return {**arrays, "key": key}


DEGENERATE = {
    f.__name__: f
    for f in (
        identical_keys, zero_keys, zero_queries, key_offset, query_is_key, logits_of_80,
        duplicated_keys,
    )
}  # fmt: skip
RIDGES = (1e-4, 1e-2, 1.0, 1e2, 1e4)


@fast
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_data_are_finite(case, ridge, implementation):
    assert_finite(evaluate(DEGENERATE[case](make_inputs(SHAPE, ridge=ridge)), implementation))


# Relative error of output and gradients at ridge 1, float32. Keys at 100 are known to 100 * 2^-24
# = 6e-6 only as inputs, but the reference has the same rounded inputs, so the bound is the usual.
@fast
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_data_are_accurate(case, implementation):
    inputs = DEGENERATE[case](make_inputs(SHAPE, ridge=1.0))
    want = exact(inputs)
    for name, error in errors(evaluate(inputs, implementation), want).items():
        # Where the exact gradient is zero (identical keys), what matters is its size beside that
        # of the values' gradient, which is of order one.
        gradient = want.gradients.get(name.removeprefix("d_"), want.out)
        if np.linalg.norm(gradient) < 1e-6 * np.linalg.norm(want.gradients["value"]):
            continue
        assert error < (2e-5 if name == "out" else 2e-4), (name, error)


@fast
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("shape", ["one_token", "length_37", "dim_64"])
def test_any_ridge_is_finite(shape, ridge, implementation):
    assert_finite(evaluate(make_inputs(SHAPES[shape], ridge=ridge), implementation))


@every
def test_single_token_is_its_value(implementation):
    inputs = make_inputs(SHAPES["one_token"], ridge=0.01)
    result = evaluate(inputs, implementation)
    np.testing.assert_allclose(result.out, inputs["value"], rtol=1e-6)
    assert not result.gradients["query"].any()
    assert not result.gradients["ridge"].any()


@every
def test_rows_without_keys_are_exactly_zero(implementation):
    """Whatever the values and cotangents there, and the other rows keep theirs."""
    inputs = make_inputs(SHAPE, ridge=0.1)
    options = {"key_value_seq_lengths": np.array([50], np.int32), "query_offset": -5}
    result, want = evaluate(inputs, implementation, **options), exact(inputs, **options)
    assert_finite(result)
    assert not result.out[:, :5].any()
    assert (result.stats.lse[:, :5] == -np.inf).all()
    for name in ("query", "ridge", "scale"):
        assert not result.gradients[name][:, :5].any(), name
    for name in ("key", "value"):
        assert not result.gradients[name][:, 45:].any(), name
    assert max(errors(result, want).values()) < 1e-3


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_concrete_bad_ridge_raises(ridge):
    arrays = make_inputs(SHAPE)
    query, key, value = (jnp.asarray(arrays[n], jnp.float32) for n in ("query", "key", "value"))
    with pytest.raises(ValueError, match="ridge must be positive"):
        lla.local_linear_attention(query, key, value, ridge=ridge)
    rows = np.ones(SHAPE.rows, np.float32)
    rows[0, 3, 1] = ridge
    with pytest.raises(ValueError, match=r"ridge must be positive.*\(1, 50, 2\)"):
        lla.local_linear_attention(query, key, value, ridge=rows)


@every
@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_traced_bad_ridge_is_nan_in_its_rows_alone(ridge, implementation):
    inputs = make_inputs(SHAPE)
    good = evaluate(inputs, implementation)
    rows = inputs["ridge"].copy()
    rows[0, 20, 1] = ridge
    bad = evaluate({**inputs, "ridge": rows}, implementation)
    assert np.isnan(bad.out[0, 20, 1]).all()
    others = np.ones(SHAPE.rows, bool)
    others[0, 20, 1] = False
    np.testing.assert_array_equal(bad.out[others], good.out[others])


def test_ridge_of_python_float_and_array_agree():
    """Bit for bit with one solver; `auto` may choose another where the ridge is known."""
    arrays = make_inputs(SHAPE)
    query, key, value = (jnp.asarray(arrays[n], jnp.float32) for n in ("query", "key", "value"))

    @jax.jit
    def both(ridge):
        attend = functools.partial(
            lla.local_linear_attention, query, key, value, solver=lla.Solver(method="cg")
        )
        return attend(ridge=0.5), attend(ridge=ridge)

    static, traced = both(jnp.full(SHAPE.rows, 0.5))
    np.testing.assert_array_equal(static, traced)
