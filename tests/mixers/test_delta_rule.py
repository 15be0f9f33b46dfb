"""The delta rule, plain and gated, against its definition evaluated in NumPy with float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from lla.mixers import chunks
from lla.mixers.delta_rule import delta_rule, delta_rule_step
from tests.measure import relative_error

BATCH, HEADS, DIM, VALUE_DIM = 2, 2, 16, 12
slow = partial(pytest.param, marks=pytest.mark.slow)
lengths = pytest.mark.parametrize("length", [1, 63, 100, slow(500)])
gated = pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])


def direct(query, key, value, beta, log_decay=None, state=None):
    """S = a S; S += beta k (v - S^T k)^T; o = S^T q, token by token."""
    query, key, value, beta = (np.asarray(x, np.float64) for x in (query, key, value, beta))
    batch, length, heads, dim = key.shape
    decay = np.ones(beta.shape) if log_decay is None else np.exp(np.asarray(log_decay, np.float64))
    out = np.zeros(value.shape)
    final = np.zeros((batch, heads, dim, value.shape[-1]))
    if state is not None:
        final[:] = np.asarray(state, np.float64)
    for b in range(batch):
        for n in range(heads):
            s = final[b, n]
            for t in range(length):
                s = decay[b, t, n] * s
                k = key[b, t, n]
                s = s + beta[b, t, n] * np.outer(k, value[b, t, n] - s.T @ k)
                out[b, t, n] = s.T @ query[b, t, n]
            final[b, n] = s
    return out, final


def sequences(length, gated=True, seed=0, heads=HEADS):
    """Unit keys and queries, normal values, beta in (0, 2), gates from strong to none."""
    rng = np.random.default_rng(seed)
    query, key = rng.standard_normal((2, BATCH, length, heads, DIM))
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = rng.standard_normal((BATCH, length, heads, VALUE_DIM))
    beta = rng.uniform(0, 2, (BATCH, length, heads))
    arrays = [query, key, value, beta]
    if gated:
        arrays.append(-(rng.uniform(0, 1, beta.shape) ** 4) * np.log(1e6))
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


@partial(jax.jit, static_argnames=("form", "chunk"))
def both(arrays, state=None, *, form, chunk=32):
    return delta_rule(*arrays, state=state, form=form, chunk=chunk, return_state=True)


@partial(jax.jit, static_argnames="form")
def gradients(arrays, state, weight, *, form):
    def loss(arrays, state):
        out, final = delta_rule(*arrays, state=state, form=form, chunk=32, return_state=True)
        return jnp.sum(out * weight) + jnp.sum(final * final)

    return jax.grad(loss, argnums=(0, 1))(arrays, state)


@partial(jax.jit, static_argnames="form")
def gradients_of_output(arrays, state, weight, *, form):
    def loss(arrays, state):
        out = delta_rule(*arrays, state=state, form=form, chunk=64)
        return jnp.sum(out.astype(jnp.float32) * weight)

    return jax.grad(loss, argnums=(0, 1))(arrays, state)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@gated
@lengths
def test_matches_the_definition(length, gated, form):
    arrays = sequences(length, gated)
    out, state = both(arrays, form=form)
    expected, expected_state = direct(*arrays)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(state, expected_state) < 1e-5


@gated
@lengths
def test_gradients_of_the_two_forms_agree(length, gated):
    arrays = sequences(length, gated, seed=1)
    rng = np.random.default_rng(2)
    weight = jnp.asarray(rng.standard_normal(arrays[2].shape), jnp.float32)
    state = jnp.asarray(rng.standard_normal((BATCH, HEADS, DIM, VALUE_DIM)), jnp.float32)
    parallel = gradients(arrays, state, weight, form="parallel")
    recurrent = gradients(arrays, state, weight, form="recurrent")
    for one, other in zip(jax.tree.leaves(parallel), jax.tree.leaves(recurrent), strict=True):
        assert relative_error(one, other) < 1e-4


def test_gradients_of_the_recurrent_form_are_those_of_the_definition():
    arrays = sequences(5, seed=3)
    weight = np.random.default_rng(4).standard_normal(arrays[2].shape)
    state = jnp.zeros((BATCH, HEADS, DIM, VALUE_DIM), jnp.float32)
    found, _ = gradients(arrays, state, jnp.asarray(weight, jnp.float32), form="recurrent")
    rng = np.random.default_rng(5)
    direction = [rng.standard_normal(array.shape) for array in arrays]

    def loss(step):
        moved = [
            np.asarray(a, np.float64) + step * d for a, d in zip(arrays, direction, strict=True)
        ]
        out, final = direct(*moved)
        return np.sum(out * weight) + np.sum(final * final)

    along = sum(
        np.sum(np.asarray(g, np.float64) * d) for g, d in zip(found, direction, strict=True)
    )
    np.testing.assert_allclose(along, (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_strong_decay_is_finite_and_right(form):
    """Gates of 1e-6 and of nearly 1 next to each other: the weak ones must keep their digits."""
    arrays = sequences(100, seed=6)
    strong = np.zeros(arrays[3].shape, np.float32)
    strong[:, :50] = np.log(1e-6)
    strong[:, 50:] = -1e-3
    strong[:, 70, 0] = np.log(1e-6)
    arrays = (*arrays[:4], jnp.asarray(strong))
    out, state = both(arrays, form=form, chunk=64)
    expected, expected_state = direct(*arrays)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(state, expected_state) < 1e-5
    weight = jnp.ones_like(arrays[2])
    found = gradients(arrays, jnp.zeros_like(state), weight, form=form)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_weak_decays_behind_strong_ones_keep_their_digits():
    log_decay = np.full((1, 64), np.log(1e-6), np.float32)
    log_decay[:, 40:] = -1e-3
    pair = np.asarray(chunks.decays(jnp.asarray(log_decay)).pair)[0]
    sums = np.cumsum(log_decay.astype(np.float64), axis=-1)[0]
    np.testing.assert_allclose(pair[63, 40:], np.exp(sums[63] - sums[40:]), rtol=1e-6)
    assert not np.triu(pair, 1).any()


def test_continuing_from_a_state_and_single_steps():
    arrays = sequences(100, seed=7)
    whole, final = both(arrays, form="parallel")
    _, middle = both(tuple(a[:, :63] for a in arrays), form="parallel")
    rest = tuple(a[:, 63:] for a in arrays)
    for form in ("parallel", "recurrent"):
        out, state = both(rest, middle, form=form)
        assert relative_error(out, whole[:, 63:]) < 1e-5
        assert relative_error(state, final) < 1e-5
    state, out = delta_rule_step(middle, *(a[:, 0] for a in rest))
    assert relative_error(out, whole[:, 63]) < 1e-5


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_causality(form):
    arrays = sequences(100, seed=8)
    other = sequences(100, seed=9)
    mixed = tuple(
        jnp.concatenate([a[:, :70], b[:, 70:]], 1) for a, b in zip(arrays, other, strict=True)
    )
    out, _ = both(arrays, form=form)
    changed, _ = both(mixed, form=form)
    np.testing.assert_array_equal(out[:, :70], changed[:, :70])
    assert not np.allclose(out[:, 70:], changed[:, 70:])


def test_low_precision_inputs_keep_a_float32_state():
    arrays = tuple(a.astype(jnp.bfloat16) for a in sequences(100, seed=10))
    out, state = both(arrays, form="parallel")
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected, expected_state = direct(*arrays)
    assert relative_error(out, expected) < 2.0**-8
    # Of 16-bit factors: the solver, its right-hand sides and results, the state that is read and
    # the keys that write it. Each may be rounded by 1.7e-3 in the mean; they are independent.
    assert relative_error(state, expected_state) < 5e-3


@gated
@pytest.mark.parametrize("shared, bound", [(0.0, 5e-3), (1.0, 1.5e-2)], ids=["random", "similar"])
def test_bfloat16_stays_within_its_bounds(gated, shared, bound):
    """Output 5e-3, gradients 2e-2, as the kernels of attention have, with a long memory.

    Keys with a common direction (a mean cosine of 1/2) and no decay are the hard case: terms of the
    state and of the chunk's own corrections are up to four times as large as the output that they
    leave, and each is rounded by 1.7e-3 in the mean, twice.
    """
    query, key, value, *gates = sequences(200, gated, seed=11)
    centre = shared * np.random.default_rng(12).standard_normal((1, 1, HEADS, DIM)) / DIM**0.5
    query, key = (x + jnp.asarray(centre, jnp.float32) for x in (query, key))
    query, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    gates = [gates[0] / 2, *(gate / 20 for gate in gates[1:])]
    narrow = tuple(a.astype(jnp.bfloat16) for a in (query, key, value))
    arrays = (*narrow, *gates)
    exact = (*(a.astype(jnp.float32) for a in narrow), *gates)
    state = jnp.zeros((BATCH, HEADS, DIM, VALUE_DIM), jnp.float32)
    rng = np.random.default_rng(13)
    weight = jnp.asarray(rng.standard_normal(value.shape), jnp.float32)
    out, _ = both(arrays, form="parallel")
    expected, _ = direct(*exact)
    assert relative_error(out, expected) < bound
    found, wanted = (
        gradients_of_output(given, state, weight, form=form)
        for given, form in ((arrays, "parallel"), (exact, "recurrent"))
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative_error(one, other) < 2e-2


def test_errors_name_what_is_wrong():
    query, key, value, beta, log_decay = sequences(4)
    with pytest.raises(ValueError, match="query and key"):
        delta_rule(query[:, :3], key, value, beta)
    with pytest.raises(ValueError, match="value must"):
        delta_rule(query, key, value[:, :3], beta)
    with pytest.raises(ValueError, match="beta must"):
        delta_rule(query, key, value, beta[..., None])
    with pytest.raises(ValueError, match="log_decay must"):
        delta_rule(query, key, value, beta, log_decay[:, :3])
    with pytest.raises(ValueError, match="state must"):
        delta_rule(query, key, value, beta, state=jnp.zeros((BATCH, HEADS, DIM, DIM)))
    with pytest.raises(ValueError, match="form must"):
        delta_rule(query, key, value, beta, form="chunked")
    with pytest.raises(ValueError, match="chunk must"):
        delta_rule(query, key, value, beta, chunk=0)


def module_sequences(module, x):
    """What the published layers feed to the rule, from the module's own parameters."""
    x = np.asarray(x, np.float64)

    def kernel(part):
        return np.asarray(part.kernel[...], np.float64)

    def silu(y):
        return y / (1 + np.exp(-y))

    query, key, value = (
        silu(np.einsum("btw,wnh->btnh", x, kernel(part)))
        for part in (module.query, module.key, module.value)
    )
    query = query / np.linalg.norm(query, axis=-1, keepdims=True)
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    return x, kernel, silu, (query, key, value, 1 / (1 + np.exp(-(x @ kernel(module.beta)))))


def rms_norm(out):
    return out / np.sqrt(np.square(out).mean(-1, keepdims=True) + 1e-6)


def test_deltanet_is_the_published_layer():
    module = mixers.create(
        "deltanet", 32, 2, value_dim=12, chunk=16, allow_neg_eigval=True, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 40, 32))
    _, kernel, _, (query, key, value, beta) = module_sequences(module, x)
    out, _ = direct(query, key, value, 2 * beta)
    expected = np.einsum("btnv,nvw->btw", rms_norm(out), kernel(module.out))
    assert relative_error(nnx.jit(module)(x), expected) < 1e-4


@pytest.mark.parametrize("output_gate", [True, False])
def test_gated_deltanet_is_the_published_layer(output_gate):
    module = mixers.create(
        "gated_deltanet", 32, 2, chunk=16, output_gate=output_gate, rngs=nnx.Rngs(1)
    )
    x = jax.random.normal(jax.random.key(1), (2, 40, 32))
    doubles, kernel, silu, arrays = module_sequences(module, x)
    rate = np.exp(np.asarray(module.A_log[...], np.float64))
    bias = np.asarray(module.dt_bias[...], np.float64)
    assert (rate > 1).all() and (rate < 16).all()
    assert (np.log1p(np.exp(bias)) > 9e-4).all() and (np.log1p(np.exp(bias)) < 0.11).all()
    log_decay = -rate * np.log1p(np.exp(doubles @ kernel(module.decay) + bias))
    out = rms_norm(direct(*arrays, log_decay)[0])
    if output_gate:
        out = out * silu(np.einsum("btw,wnv->btnv", doubles, kernel(module.gate)))
    expected = np.einsum("btnv,nvw->btw", out, kernel(module.out))
    assert relative_error(nnx.jit(module)(x), expected) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 13, 64])
def test_inverse_of_a_unit_triangle(size):
    """Also for one key repeated: the powers of that matrix would reach 1e18 at size 64."""
    rng = np.random.default_rng(size)
    matrices = np.stack([np.ones((size, size)), rng.uniform(-0.5, 0.5, (size, size))])
    expected = np.linalg.inv(np.tril(matrices, -1) + np.eye(size))
    inverse = jax.jit(chunks.unit_lower_inverse)
    found = inverse(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    weight, direction = rng.standard_normal((2, *matrices.shape))
    gradient = jax.grad(lambda x: jnp.sum(inverse(x) * weight.astype(np.float32)))(
        jnp.asarray(matrices, jnp.float32)
    )
    moved = -expected @ np.tril(direction, -1) @ expected
    assert not np.triu(gradient).any()
    np.testing.assert_allclose(
        np.sum(np.asarray(gradient, np.float64) * direction),
        np.sum(weight * moved),
        atol=1e-4 * np.linalg.norm(weight) * np.linalg.norm(moved),
    )
