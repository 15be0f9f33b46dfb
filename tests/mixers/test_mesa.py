"""The mesa layer against its definition evaluated in NumPy with float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from lla.mixers.mesa import MesaState, make_solver, mesa, mesa_step
from tests.measure import relative_error

BATCH, HEADS, DIM, VALUE_DIM = 2, 2, 16, 12
slow = partial(pytest.param, marks=pytest.mark.slow)
lengths = pytest.mark.parametrize("length", [1, 63, 100, slow(500)])
REFERENCE = ("recurrent", "exact")
ways = pytest.mark.parametrize(
    "way", [("parallel", "cg"), ("parallel", "exact"), ("recurrent", "cg"), REFERENCE], ids="-".join
)


def direct(query, key, value, beta, log_decay, ridge, state=None):
    """H = g H + beta k k^T; G = g G + beta k v^T; o = G^T (H + Lambda)^-1 q, token by token."""
    arrays = (query, key, value, beta, log_decay, ridge)
    query, key, value, beta, log_decay, ridge = (np.asarray(x, np.float64) for x in arrays)
    batch, length, heads, dim = key.shape
    out = np.zeros(value.shape)
    moments = np.zeros((batch, heads, dim, dim))
    targets = np.zeros((batch, heads, dim, value.shape[-1]))
    if state is not None:
        moments[:], targets[:] = (np.asarray(x, np.float64) for x in state)
    for b in range(batch):
        for n in range(heads):
            h, g = moments[b, n], targets[b, n]
            for t in range(length):
                decay, k = np.exp(log_decay[b, t, n]), key[b, t, n]
                h = decay * h + beta[b, t, n] * np.outer(k, k)
                g = decay * g + beta[b, t, n] * np.outer(k, value[b, t, n])
                out[b, t, n] = g.T @ np.linalg.solve(h + np.diag(ridge[n]), query[b, t, n])
            moments[b, n], targets[b, n] = h, g
    return out, MesaState(moments, targets)


def sequences(length, seed=0, *, shared=0.0, dim=DIM, strongest=1e-6):
    """Unit queries and keys (around a `shared` direction), gates from 1 to `strongest`, Lambda."""
    rng = np.random.default_rng(seed)
    query, key = rng.standard_normal((2, BATCH, length, HEADS, dim))
    centre = shared * rng.standard_normal((1, 1, HEADS, dim))
    query, key = query + centre, key + centre
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = rng.standard_normal((BATCH, length, HEADS, VALUE_DIM))
    beta = rng.uniform(0, 1, (BATCH, length, HEADS))
    log_decay = rng.uniform(0, 1, beta.shape) ** 6 * np.log(strongest)
    ridge = rng.uniform(0.5, 1.5, (HEADS, dim))
    arrays = (query, key, value, beta, log_decay, ridge)
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


@partial(jax.jit, static_argnames=("way", "chunk", "max_iters"))
def both(arrays, state=None, *, way, chunk=32, max_iters=30):
    form, solver = way
    return mesa(
        *arrays[:5],
        ridge=arrays[5],
        state=state,
        form=form,
        solver=solver,
        chunk=chunk,
        max_iters=max_iters,
        return_state=True,
    )


@partial(jax.jit, static_argnames="way")
def gradients(arrays, state, weight, *, way):
    def loss(arrays, state):
        out, final = both(arrays, state, way=way)
        return jnp.sum(out * weight) + jnp.sum(final.moment**2) + jnp.sum(final.target**2)

    return jax.grad(loss, argnums=(0, 1))(arrays, state)


def some_state(seed=0):
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((BATCH, HEADS, DIM, DIM)) / np.sqrt(DIM)
    target = rng.standard_normal((BATCH, HEADS, DIM, VALUE_DIM))
    moment = np.einsum("bnij,bnkj->bnik", half, half)
    return MesaState(jnp.asarray(moment, jnp.float32), jnp.asarray(target, jnp.float32))


@ways
@lengths
def test_matches_the_definition(length, way):
    arrays, state = sequences(length), some_state()
    out, final = both(arrays, state, way=way)
    expected, expected_final = direct(*arrays, state)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(final.moment, expected_final.moment) < 1e-5
    assert relative_error(final.target, expected_final.target) < 1e-5


@pytest.mark.parametrize("way", [("parallel", "cg"), ("parallel", "exact"), ("recurrent", "cg")])
@lengths
def test_gradients_agree_with_those_of_the_reference(length, way):
    arrays, state = sequences(length, seed=1), some_state(2)
    weight = jnp.asarray(np.random.default_rng(3).standard_normal(arrays[2].shape), jnp.float32)
    found = gradients(arrays, state, weight, way=way)
    reference = gradients(arrays, state, weight, way=REFERENCE)
    # H multiplies from the left in one form, from the right in another. It is symmetric wherever it
    # comes from, so only the symmetric part of its gradient means anything.
    found, reference = (_symmetric(tree) for tree in (found, reference))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        assert relative_error(one, other) < 1e-4


def _symmetric(found):
    arrays, state = found
    return arrays, MesaState((state.moment + jnp.swapaxes(state.moment, -1, -2)) / 2, state.target)


def test_gradients_are_those_of_the_definition():
    arrays, state = sequences(40, seed=4, strongest=0.1), some_state(5)
    weight = np.random.default_rng(6).standard_normal(arrays[2].shape)
    rng = np.random.default_rng(7)
    direction = [rng.standard_normal(array.shape) for array in arrays]

    def loss(step):
        moved = [
            np.asarray(a, np.float64) + step * d for a, d in zip(arrays, direction, strict=True)
        ]
        out, final = direct(*moved, state)
        return np.sum(out * weight) + np.sum(final.moment**2) + np.sum(final.target**2)

    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    for way in (("parallel", "cg"), ("parallel", "exact"), REFERENCE):
        found, _ = gradients(arrays, state, jnp.asarray(weight, jnp.float32), way=way)
        along = sum(
            np.sum(np.asarray(g, np.float64) * d) for g, d in zip(found, direction, strict=True)
        )
        np.testing.assert_allclose(along, expected, rtol=1e-4)


@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_thirty_iterations_agree_with_the_factorisation(shared):
    """At the default Lambda, without decay: the largest H, and keys in all or in one direction."""
    query, key, value, beta, log_decay, ridge = sequences(512, seed=8, shared=shared, dim=64)
    arrays = (query, key, value, beta, jnp.zeros_like(log_decay), jnp.ones_like(ridge))
    out, _ = both(arrays, way=("parallel", "cg"), chunk=64)
    exact, _ = both(arrays, way=("parallel", "exact"), chunk=64)
    assert relative_error(out, exact) < 1e-4
    few, _ = both(arrays, way=("parallel", "cg"), chunk=64, max_iters=3)
    assert relative_error(few, exact) > 1e-3  # or the test could not tell a solver from none


@ways
def test_strong_decay_is_finite_and_right(way):
    """Gates of 1e-6 and of nearly 1 next to each other."""
    *arrays, log_decay, ridge = sequences(100, seed=9)
    strong = np.full(log_decay.shape, np.log(1e-6), np.float32)
    strong[:, 50:] = -1e-3
    strong[:, 70, 0] = np.log(1e-6)
    arrays = (*arrays, jnp.asarray(strong), ridge)
    out, final = both(arrays, way=way, chunk=64)
    expected, expected_final = direct(*arrays)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(final.moment, expected_final.moment) < 1e-5
    found = gradients(arrays, some_state(), jnp.ones_like(arrays[2]), way=way)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_zero_queries_and_keys():
    arrays = sequences(63, seed=10)
    blank = tuple(jnp.zeros_like(a) for a in arrays[:2]) + arrays[2:]
    found, _ = gradients(blank, some_state(), jnp.ones_like(arrays[2]), way=("parallel", "cg"))
    assert all(np.isfinite(leaf).all() for leaf in found)
    out, _ = both(blank, way=("parallel", "cg"))
    assert not np.asarray(out).any()


def test_continuing_from_a_state_and_single_steps():
    arrays = sequences(100, seed=11)
    ridge = arrays[5]
    whole, final = both(arrays, way=("parallel", "cg"))
    _, middle = both((*(a[:, :63] for a in arrays[:5]), ridge), way=("parallel", "cg"))
    rest = (*(a[:, 63:] for a in arrays[:5]), ridge)
    for way in (("parallel", "cg"), REFERENCE):
        out, state = both(rest, middle, way=way)
        assert relative_error(out, whole[:, 63:]) < 1e-5
        assert relative_error(state.moment, final.moment) < 1e-5
        assert relative_error(state.target, final.target) < 1e-5
    for solver in ("cg", "exact"):
        token = (a[:, 0] for a in rest[:5])
        _, out = mesa_step(middle, *token, ridge=ridge, solve=make_solver(solver))
        assert relative_error(out, whole[:, 63]) < 1e-5


@ways
def test_causality(way):
    arrays, other = sequences(100, seed=12), sequences(100, seed=13)
    mixed = [jnp.concatenate([a[:, :70], b[:, 70:]], 1) for a, b in zip(arrays, other, strict=True)]
    mixed = (*mixed[:5], arrays[5])
    out, _ = both(arrays, way=way)
    changed, _ = both(mixed, way=way)
    np.testing.assert_array_equal(out[:, :70], changed[:, :70])
    assert not np.allclose(out[:, 70:], changed[:, 70:])


def test_no_decay_is_a_gate_of_one():
    *arrays, log_decay, ridge = sequences(63, seed=14)
    expected, _ = direct(*arrays, np.zeros(log_decay.shape), ridge)
    for way in (("parallel", "cg"), REFERENCE):
        out, _ = both((*arrays, None, ridge), way=way)
        assert relative_error(out, expected) < 1e-5


def test_low_precision_inputs_keep_a_float32_state():
    arrays = tuple(a.astype(jnp.bfloat16) for a in sequences(63, seed=15))
    out, state = both(arrays, way=("parallel", "cg"))
    assert out.dtype == jnp.bfloat16
    assert state.moment.dtype == state.target.dtype == jnp.float32
    expected, expected_state = direct(*arrays)
    assert relative_error(out, expected) < 2.0**-8
    assert relative_error(state.moment, expected_state.moment) < 1e-5


def test_errors_name_what_is_wrong():
    query, key, value, beta, log_decay, ridge = sequences(4)
    call = partial(mesa, query, key, value, beta, log_decay, ridge=ridge)
    with pytest.raises(ValueError, match="ridge must"):
        mesa(query, key, value, beta, log_decay, ridge=ridge[0])
    with pytest.raises(ValueError, match="state must"):
        call(state=MesaState(jnp.zeros((1, 2)), jnp.zeros((1, 2))))
    with pytest.raises(ValueError, match="solver must"):
        call(solver="cholesky")
    with pytest.raises(ValueError, match="max_iters must"):
        call(max_iters=0)
    with pytest.raises(ValueError, match="tol must"):
        call(tol=1.0)
    with pytest.raises(ValueError, match="form must"):
        call(form="chunked")


@pytest.mark.parametrize("output_gate", [False, True])
def test_mesanet_is_the_published_layer(output_gate):
    module = mixers.create(
        "mesanet", 32, 2, value_dim=12, chunk=16, output_gate=output_gate, rngs=nnx.Rngs(0)
    )
    ridge = np.asarray(module.channel_ridge(), np.float64)
    np.testing.assert_allclose(ridge, 1.0, rtol=1e-6)
    # Away from the start: a ridge for each channel, and biases of the gates.
    module.ridge[...] = jax.random.normal(jax.random.key(1), module.ridge.shape)
    module.decay.bias[...] = jnp.array([2.0, 5.0])
    module.beta.bias[...] = jnp.array([1.0, -1.0])
    x = jax.random.normal(jax.random.key(2), (2, 40, 32))
    doubles = np.asarray(x, np.float64)

    def kernel(part):
        return np.asarray(part.kernel[...], np.float64)

    def silu(y):
        return y / (1 + np.exp(-y))

    def gate(part):
        return 1 / (1 + np.exp(-(doubles @ kernel(part) + np.asarray(part.bias[...], np.float64))))

    query, key = (
        silu(np.einsum("btw,wnh->btnh", doubles, kernel(part)))
        for part in (module.query, module.key)
    )
    query = query / np.linalg.norm(query, axis=-1, keepdims=True)
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    value = np.einsum("btw,wnv->btnv", doubles, kernel(module.value))
    ridge = np.log1p(np.exp(np.asarray(module.ridge[...], np.float64))) + 0.25
    log_decay = np.log(gate(module.decay))
    out, _ = direct(query, key, value, gate(module.beta), log_decay, ridge)
    out = out / np.sqrt(np.square(out).mean(-1, keepdims=True) + 1e-6)
    if output_gate:
        out = out * silu(np.einsum("btw,wnv->btnv", doubles, kernel(module.gate)))
    expected = np.einsum("btnv,nvw->btw", out, kernel(module.out))
    assert relative_error(nnx.jit(module)(x), expected) < 1e-4
