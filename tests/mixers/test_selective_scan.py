"""The selective scan against its definition evaluated in NumPy with float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.mixers.selective_scan import selective_scan, selective_scan_step
from tests.measure import largest_array, relative_error

BATCH, CHANNELS, STATE = 2, 5, 4
forms = pytest.mark.parametrize("form", ["parallel", "recurrent"])


def direct(x, delta, a, b, c, state=None):
    """h = exp(Delta A) h + Delta B x; y = C . h, channel by channel and token by token."""
    x, delta, a, b, c = (np.asarray(array, np.float64) for array in (x, delta, a, b, c))
    y = np.zeros(x.shape)
    final = np.zeros((x.shape[0], *a.shape))
    if state is not None:
        final[:] = np.asarray(state, np.float64)
    for i, t, d in np.ndindex(*x.shape):
        step = delta[i, t, d]
        final[i, d] = np.exp(step * a[d]) * final[i, d] + step * b[i, t] * x[i, t, d]
        y[i, t, d] = c[i, t] @ final[i, d]
    return y, final


def sequences(length, seed=0):
    """Normal inputs; exponents of decays from 1e-3 to 20."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH, length, CHANNELS))
    delta = 10 ** rng.uniform(-3, 0.7, x.shape)
    a = -np.tile(np.arange(1.0, STATE + 1), (CHANNELS, 1))
    b, c = rng.standard_normal((2, BATCH, length, STATE))
    return tuple(jnp.asarray(array, jnp.float32) for array in (x, delta, a, b, c))


def at(arrays, where):
    """The arrays with an axis of time cut down to `where`; `a` has none."""
    return tuple(array if i == 2 else array[:, where] for i, array in enumerate(arrays))


@partial(jax.jit, static_argnames="form")
def run(arrays, state, weight, *, form):
    """Output and final state, and the gradients with respect to arrays and state of a function."""

    def loss(arrays, state):
        y, final = selective_scan(*arrays, state=state, form=form, chunk=16, return_state=True)
        return jnp.sum(y * weight) + jnp.sum(final * final), (y, final)

    (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(arrays, state)
    return results, gradients


@partial(jax.jit, static_argnames="chunk")
def forward(arrays, *, chunk):
    return selective_scan(*arrays, chunk=chunk, return_state=True)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def start_and_weight(arrays, seed=2):
    return normal(BATCH, CHANNELS, STATE, seed=seed), normal(*arrays[0].shape, seed=seed + 1)


@pytest.mark.parametrize("length", [1, 63, 100, pytest.param(500, marks=pytest.mark.slow)])
def test_both_forms_match_the_definition_and_each_other_in_gradients(length):
    arrays = sequences(length)
    state, weight = start_and_weight(arrays)
    expected = direct(*arrays, state=state)
    gradients = {}
    for form in ("parallel", "recurrent"):
        results, gradients[form] = run(arrays, state, weight, form=form)
        for actual, wanted in zip(results, expected, strict=True):
            assert relative_error(actual, wanted) < 1e-5
    leaves = (jax.tree.leaves(gradients[form]) for form in ("parallel", "recurrent"))
    for one, other in zip(*leaves, strict=True):
        assert relative_error(one, other) < 1e-4


def test_gradients_of_the_recurrent_form_are_those_of_the_definition():
    arrays = sequences(5, seed=3)
    weight = normal(*arrays[0].shape, seed=4)
    state = jnp.zeros((BATCH, CHANNELS, STATE), jnp.float32)
    _, (found, _) = run(arrays, state, weight, form="recurrent")
    rng = np.random.default_rng(5)
    direction = [rng.standard_normal(array.shape) for array in arrays]

    def loss(step):
        moved = [
            np.asarray(a, np.float64) + step * d for a, d in zip(arrays, direction, strict=True)
        ]
        y, final = direct(*moved)
        return np.sum(y * np.float64(weight)) + np.sum(final * final)

    along = sum(
        np.sum(np.asarray(g, np.float64) * d) for g, d in zip(found, direction, strict=True)
    )
    np.testing.assert_allclose(along, (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-4)


@forms
def test_strong_decay_is_finite_and_right(form):
    """Steps of 1000, after which nothing is left, among steps of 1e-3."""
    x, _, a, b, c = sequences(100, seed=6)
    delta = np.full(x.shape, 1e-3, np.float32)
    delta[:, :45] = 1000.0
    delta[:, 70, ::2] = 1000.0
    arrays = (x, jnp.asarray(delta), a, b, c)
    state, weight = start_and_weight(arrays)
    results, gradients = run(arrays, state, weight, form=form)
    for actual, wanted in zip(results, direct(*arrays, state=state), strict=True):
        assert relative_error(actual, wanted) < 1e-5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_any_chunk_gives_the_same(chunk):
    arrays = sequences(63, seed=11)
    for actual, wanted in zip(forward(arrays, chunk=chunk), direct(*arrays), strict=True):
        assert relative_error(actual, wanted) < 1e-5


def test_continuing_from_a_state_and_single_steps():
    arrays = sequences(64, seed=7)
    state, weight = start_and_weight(arrays)
    y, final = direct(*arrays, state=state)
    stepped, step = state, jax.jit(selective_scan_step)
    for t in range(64):
        x, delta, a, b, c = at(arrays, t)
        stepped, row = step(stepped, a, x, delta, b, c)
        assert relative_error(row, y[:, t]) < 1e-5
    assert relative_error(stepped, final) < 1e-5
    for form in ("parallel", "recurrent"):
        (_, middle), _ = run(at(arrays, slice(0, 63)), state, weight[:, :63], form=form)
        (row, end), _ = run(at(arrays, slice(63, 64)), middle, weight[:, 63:], form=form)
        assert relative_error(row[:, 0], y[:, 63]) < 1e-5
        assert relative_error(end, final) < 1e-5


@forms
def test_causality(form):
    arrays, other = sequences(100, seed=8), sequences(100, seed=9)
    state, weight = start_and_weight(arrays)
    mixed = tuple(
        a if i == 2 else jnp.concatenate([a[:, :70], b[:, 70:]], 1)
        for i, (a, b) in enumerate(zip(arrays, other, strict=True))
    )
    (y, _), _ = run(arrays, state, weight, form=form)
    (changed, _), _ = run(mixed, state, weight, form=form)
    np.testing.assert_array_equal(y[:, :70], changed[:, :70])
    assert not np.allclose(y[:, 70:], changed[:, 70:])


def test_low_precision_inputs_keep_a_float32_state():
    arrays = tuple(a.astype(jnp.bfloat16) for a in sequences(63, seed=10))
    y, state = forward(arrays, chunk=16)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected, expected_state = direct(*(np.asarray(a, np.float32) for a in arrays))
    assert relative_error(y, expected) < 2.0**-8
    assert relative_error(state, expected_state) < 1e-5


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_states_of_all_tokens_never_exist_at_once(order, form):
    arrays = sequences(512)

    def forward(arrays):
        return selective_scan(*arrays, form=form, chunk=16).sum()

    function = forward if order == "forward" else jax.grad(forward)
    states = arrays[0].size * STATE
    assert largest_array(function, arrays) < states


def test_errors_name_what_is_wrong():
    x, delta, a, b, c = sequences(4)
    with pytest.raises(ValueError, match="x and delta"):
        selective_scan(x, delta[:, :3], a, b, c)
    with pytest.raises(ValueError, match="a must"):
        selective_scan(x, delta, a[:3], b, c)
    with pytest.raises(ValueError, match="b must"):
        selective_scan(x, delta, a, b[:, :3], c)
    with pytest.raises(ValueError, match="c must"):
        selective_scan(x, delta, a, b, c[..., :3])
    with pytest.raises(ValueError, match="state must"):
        selective_scan(x, delta, a, b, c, state=jnp.zeros((BATCH, STATE, CHANNELS)))
    with pytest.raises(ValueError, match="form must"):
        selective_scan(x, delta, a, b, c, form="chunked")
    with pytest.raises(ValueError, match="chunk must"):
        selective_scan(x, delta, a, b, c, chunk=0)
