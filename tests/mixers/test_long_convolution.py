"""The long convolution against its definition, the double sum, in NumPy with float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.mixers.long_convolution import long_convolution
from tests.measure import relative_error

BATCH, WIDTH = 2, 6
slow = partial(pytest.param, marks=pytest.mark.slow)
lengths = pytest.mark.parametrize("length", [1, 63, 100, slow(500)])
forms = pytest.mark.parametrize("form", ["parallel", "recurrent"])


def direct(inputs, filter, state=None):
    """y_t = sum_s filter_s u_{t-s}, term by term; `state` holds u_{-L+1}, ..., u_{-1}."""
    inputs, filter = np.asarray(inputs, np.float64), np.asarray(filter, np.float64)
    earlier = 0 if state is None else state.shape[1]
    if earlier:
        inputs = np.concatenate([np.asarray(state, np.float64), inputs], axis=1)
    out = np.zeros(inputs.shape)
    for t in range(inputs.shape[1]):
        for s in range(min(t + 1, len(filter))):
            out[:, t] += filter[s] * inputs[:, t - s]
    return out[:, earlier:]


def arrays(length, taps, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((BATCH, length, WIDTH))
    filter = rng.standard_normal((taps, WIDTH)) * np.exp(-np.arange(taps) / 40)[:, None]
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(filter, jnp.float32)


@partial(jax.jit, static_argnames="form")
def both(inputs, filter, state=None, *, form):
    return long_convolution(inputs, filter, state=state, form=form, return_state=True)


@partial(jax.jit, static_argnames="form")
def gradients(inputs, filter, state, weight, *, form):
    def loss(inputs, filter, state):
        out, final = both(inputs, filter, state, form=form)
        return jnp.sum(out * weight) + jnp.sum(final * final)

    return jax.grad(loss, argnums=(0, 1, 2))(inputs, filter, state)


@forms
@pytest.mark.parametrize("taps", ["one", "few", "all", "more"])
@lengths
def test_matches_the_definition(length, taps, form):
    inputs, filter = arrays(length, {"one": 1, "few": 7, "all": length, "more": 2 * length}[taps])
    out, _ = both(inputs, filter, form=form)
    assert relative_error(out, direct(inputs, filter)) < 1e-5


@lengths
def test_gradients_of_the_two_forms_agree(length):
    inputs, filter = arrays(length, max(length, 2), seed=1)
    rng = np.random.default_rng(2)
    weight = jnp.asarray(rng.standard_normal(inputs.shape), jnp.float32)
    state = jnp.asarray(rng.standard_normal((BATCH, len(filter) - 1, WIDTH)), jnp.float32)
    parallel = gradients(inputs, filter, state, weight, form="parallel")
    recurrent = gradients(inputs, filter, state, weight, form="recurrent")
    for one, other in zip(parallel, recurrent, strict=True):
        assert relative_error(one, other) < 1e-4


@forms
@pytest.mark.parametrize("taps", [5, 80], ids=["short", "long"])
def test_continuing_from_a_state(taps, form):
    inputs, filter = arrays(100, taps, seed=3)
    whole = direct(inputs, filter)
    out, state = both(inputs[:, :63], filter, form=form)
    assert state.shape == (BATCH, taps - 1, WIDTH)
    assert relative_error(out, whole[:, :63]) < 1e-5
    out, state = both(inputs[:, 63:], filter, state, form=form)
    assert relative_error(out, whole[:, 63:]) < 1e-5
    np.testing.assert_array_equal(state, inputs[:, 100 - (taps - 1) :])


@forms
def test_causality(form):
    inputs, filter = arrays(100, 100, seed=4)
    changed = inputs.at[:, 70:].add(1.0)
    out, _ = both(inputs, filter, form=form)
    other, _ = both(changed, filter, form=form)
    # Rounding of the transforms spreads; a tap that wrapped around would be of the order of 1.
    np.testing.assert_allclose(out[:, :70], other[:, :70], atol=1e-5)
    assert not np.allclose(out[:, 70:], other[:, 70:], atol=1e-2)
    gradient = gradients(
        inputs,
        filter,
        jnp.zeros((BATCH, 99, WIDTH)),
        jnp.zeros_like(inputs).at[:, 40].set(1.0),
        form=form,
    )[0]
    gradient = gradient - 2 * inputs.at[:, 0].set(0.0)  # of the state in the loss
    assert np.abs(gradient[:, 41:]).max() < 1e-5 < np.abs(gradient[:, :41]).max()


@forms
def test_low_precision_inputs_are_computed_in_float32(form):
    inputs, filter = arrays(100, 100, seed=5)
    inputs = inputs.astype(jnp.bfloat16)
    out, state = both(inputs, filter, form=form)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert relative_error(out, direct(inputs, filter)) < 2.0**-8


def test_errors_name_what_is_wrong():
    inputs, filter = arrays(4, 3)
    with pytest.raises(ValueError, match="inputs must"):
        long_convolution(inputs[0], filter)
    with pytest.raises(ValueError, match="filter must"):
        long_convolution(inputs, filter[:, :2])
    with pytest.raises(ValueError, match="state must"):
        long_convolution(inputs, filter, state=inputs)
    with pytest.raises(ValueError, match="form must"):
        long_convolution(inputs, filter, form="direct")
