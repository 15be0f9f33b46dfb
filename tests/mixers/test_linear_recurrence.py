"""Decayed linear attention against its definition evaluated in NumPy with float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.mixers.linear_recurrence import linear_recurrence, linear_recurrence_step
from tests.measure import largest_array, relative_error

BATCH, HEADS, DIM, VALUE_DIM = 2, 2, 8, 6
slow = partial(pytest.param, marks=pytest.mark.slow)
# (length, gate)
cases = pytest.mark.parametrize(
    "length, gate",
    [
        (63, "none"),
        *((length, gate) for length in (1, 63, 100) for gate in ("head", "coordinate")),
        *(slow(500, gate) for gate in ("none", "head", "coordinate")),
    ],
)
gates = pytest.mark.parametrize("gate", ["head", "coordinate"])
forms = pytest.mark.parametrize("form", ["parallel", "recurrent"])


def direct(query, key, value, log_decay=None, state=None):
    """S = Diag(a) S + k v^T; o = S^T q, token by token."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    decay = np.ones(key.shape[:3]) if log_decay is None else np.exp(np.float64(log_decay))
    if decay.ndim == 3:
        decay = np.repeat(decay[..., None], key.shape[-1], -1)
    out = np.zeros(value.shape)
    final = np.zeros((*key.shape[:1], *key.shape[2:], value.shape[-1]))
    if state is not None:
        final[:] = np.asarray(state, np.float64)
    for b, t, n in np.ndindex(*key.shape[:3]):
        final[b, n] = np.diag(decay[b, t, n]) @ final[b, n] + np.outer(key[b, t, n], value[b, t, n])
        out[b, t, n] = final[b, n].T @ query[b, t, n]
    return out, final


def sequences(length, gate="coordinate", seed=0):
    """Normal queries, keys and values, gates from 1e-6 to nearly 1."""
    rng = np.random.default_rng(seed)
    query, key = rng.standard_normal((2, BATCH, length, HEADS, DIM))
    arrays = [query, key, rng.standard_normal((BATCH, length, HEADS, VALUE_DIM))]
    if gate != "none":
        shape = key.shape if gate == "coordinate" else key.shape[:3]
        arrays.append(-(rng.uniform(0, 1, shape) ** 4) * np.log(1e6))
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


@partial(jax.jit, static_argnames=("form", "chunk"))
def run(arrays, state, weight, *, form, chunk=32):
    """Output and final state, and the gradients with respect to arrays and state of a function."""

    def loss(arrays, state):
        out, final = linear_recurrence(
            *arrays, state=state, form=form, chunk=chunk, return_state=True
        )
        return jnp.sum(out * weight) + jnp.sum(final * final), (out, final)

    (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(arrays, state)
    return results, gradients


@partial(jax.jit, static_argnames=("form", "chunk"))
def forward(arrays, *, form, chunk=32):
    return linear_recurrence(*arrays, form=form, chunk=chunk, return_state=True)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def start_and_weight(arrays, seed=2):
    state = normal(BATCH, HEADS, DIM, VALUE_DIM, seed=seed)
    return state, normal(*arrays[2].shape, seed=seed + 1)


@cases
def test_both_forms_match_the_definition_and_each_other_in_gradients(length, gate):
    arrays = sequences(length, gate)
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


@gates
def test_gradients_of_the_recurrent_form_are_those_of_the_definition(gate):
    arrays = sequences(5, gate, seed=3)
    weight = normal(*arrays[2].shape, seed=4)
    state = jnp.zeros((BATCH, HEADS, DIM, VALUE_DIM), jnp.float32)
    _, (found, _) = run(arrays, state, weight, form="recurrent")
    rng = np.random.default_rng(5)
    direction = [rng.standard_normal(array.shape) for array in arrays]

    def loss(step):
        moved = [
            np.asarray(a, np.float64) + step * d for a, d in zip(arrays, direction, strict=True)
        ]
        out, final = direct(*moved)
        return np.sum(out * np.float64(weight)) + np.sum(final * final)

    along = sum(
        np.sum(np.asarray(g, np.float64) * d) for g, d in zip(found, direction, strict=True)
    )
    np.testing.assert_allclose(along, (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-4)


@forms
@gates
def test_strong_decay_is_finite_and_right(gate, form):
    """Gates of e^-1000 beside weak ones, which must keep their digits behind them."""
    arrays = sequences(100, gate, seed=6)
    log_decay = np.full(arrays[3].shape, -1e-3, np.float32)
    log_decay[:, :45] = -1000.0
    log_decay[:, 70, 0] = -1000.0
    if gate == "coordinate":
        log_decay[..., ::2] = -1e-3  # the other coordinates remember everything
    arrays = (*arrays[:3], jnp.asarray(log_decay))
    start, weight = start_and_weight(arrays)
    (out, state), gradients = run(arrays, start, weight, form=form)
    expected, expected_state = direct(*arrays, state=start)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(out[:, 45:70], expected[:, 45:70]) < 1e-5
    assert relative_error(state, expected_state) < 1e-5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "gate, chunk", [("head", 7), *(("coordinate", chunk) for chunk in (1, 7, 24, 1000))]
)
def test_any_chunk_gives_the_same(gate, chunk):
    arrays = sequences(63, gate, seed=11)
    results = forward(arrays, form="parallel", chunk=chunk)
    for actual, wanted in zip(results, direct(*arrays), strict=True):
        assert relative_error(actual, wanted) < 1e-5


@gates
def test_continuing_from_a_state_and_single_steps(gate):
    arrays = sequences(64, gate, seed=7)
    state, weight = start_and_weight(arrays)
    first, last = (tuple(a[:, part] for a in arrays) for part in (slice(0, 63), slice(63, 64)))
    out, final = direct(*arrays, state=state)
    stepped, step = state, jax.jit(linear_recurrence_step)
    for t in range(64):
        stepped, row = step(stepped, *(a[:, t] for a in arrays))
        assert relative_error(row, out[:, t]) < 1e-5
    assert relative_error(stepped, final) < 1e-5
    for form in ("parallel", "recurrent"):
        (_, middle), _ = run(first, state, weight[:, :63], form=form)
        (row, end), _ = run(last, middle, weight[:, 63:], form=form)
        assert relative_error(row[:, 0], out[:, 63]) < 1e-5
        assert relative_error(end, final) < 1e-5


@forms
@gates
def test_causality(gate, form):
    arrays, other = sequences(100, gate, seed=8), sequences(100, gate, seed=9)
    state, weight = start_and_weight(arrays)
    mixed = tuple(
        jnp.concatenate([a[:, :70], b[:, 70:]], 1) for a, b in zip(arrays, other, strict=True)
    )
    (out, _), _ = run(arrays, state, weight, form=form)
    (changed, _), _ = run(mixed, state, weight, form=form)
    np.testing.assert_array_equal(out[:, :70], changed[:, :70])
    assert not np.allclose(out[:, 70:], changed[:, 70:])


@pytest.mark.parametrize("gate", ["none", "head", "coordinate"])
@forms
def test_heads_share_queries_and_keys(gate, form):
    arrays = sequences(40, gate, seed=12)
    query, key = (array[:, :, :1] for array in arrays[:2])
    log_decay = arrays[3:]
    out, state = forward((query, key, *arrays[2:]), form=form)
    copies = (np.repeat(array, HEADS, 2) for array in (query, key))
    expected, expected_state = direct(*copies, arrays[2], *log_decay)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(state, expected_state) < 1e-5


@gates
def test_low_precision_inputs_keep_a_float32_state(gate):
    arrays = tuple(a.astype(jnp.bfloat16) for a in sequences(63, gate, seed=10))
    out, state = forward(arrays, form="parallel")
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected, expected_state = direct(*(np.asarray(a, np.float32) for a in arrays))
    assert relative_error(out, expected) < 2.0**-8
    assert relative_error(state, expected_state) < 1e-5


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_gates_of_pairs_never_exist_for_the_whole_sequence(order):
    """Gates per coordinate between the tokens of a block are 16 times the size of the keys."""
    arrays = sequences(512)

    def forward(arrays):
        return linear_recurrence(*arrays, chunk=32).sum()

    function = forward if order == "forward" else jax.grad(forward)
    assert largest_array(function, arrays) < 16 * arrays[1].size


def test_errors_name_what_is_wrong():
    query, key, value, log_decay = sequences(4)
    with pytest.raises(ValueError, match="query and key"):
        linear_recurrence(query[:, :3], key, value)
    with pytest.raises(ValueError, match="value must"):
        linear_recurrence(query, key, value[:, :3])
    with pytest.raises(ValueError, match="log_decay must"):
        linear_recurrence(query, key, value, log_decay[:, :3])
    with pytest.raises(ValueError, match="state must"):
        linear_recurrence(query, key, value, state=jnp.zeros((BATCH, HEADS, DIM, DIM)))
    with pytest.raises(ValueError, match="form must"):
        linear_recurrence(query, key, value, form="chunked")
    with pytest.raises(ValueError, match="chunk must"):
        linear_recurrence(query, key, value, chunk=0)
