"""What every mixer of the registry has to do; a new name is tested without a change here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from tests.measure import relative_error

WIDTH, HEADS, BATCH, LONGEST = 16, 2, 2, 100
SEEDS = (0, 1)
every = pytest.mark.parametrize("name", mixers.names())


def forms(name):
    """The option that selects the reference, and its two values: reference and default."""
    if "form" in mixers.options(name):
        return "form", "recurrent", "parallel"
    return "implementation", "reference", None


def reference_options(name):
    """The reference of MesaNet solves exactly; its default iterates."""
    option, reference, _ = forms(name)
    exact = {"solver": "exact"} if name == "mesanet" else {}
    return {option: reference, **exact}


def build(name, key, **options):
    """A mixer none of whose parts is idle."""
    mixer = mixers.create(name, WIDTH, HEADS, rngs=nnx.Rngs(key), **options)
    if name == "parallax":  # its probe starts at zero
        kernel = mixer.probe.kernel
        kernel[...] = 0.3 * jax.random.normal(key, kernel.shape)
    return mixer


@functools.cache
def stacked_parameters(name):
    """Those of `SEEDS`, along a leading axis."""
    keys = jax.vmap(jax.random.key)(jnp.array(SEEDS))
    return jax.jit(jax.vmap(lambda key: nnx.split(build(name, key))[1]))(keys)


@functools.cache
def parameters(name):
    """Those of the first seed."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], stacked_parameters(name))


def runner(name, *, dtype=None, reference=False, stacked=False):
    """Compiled (params, x, weight) -> output and gradients of sum(weight * output)."""
    return _runner(name, dtype, reference, stacked)


@functools.cache  # which tells f(x) from f(x, option=default), hence the function above
def _runner(name, dtype, reference, stacked):
    options = reference_options(name) if reference else {}
    key = jax.random.key(0)
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(name, key, dtype=dtype, **options)))

    def loss(params, x, weight):
        out = nnx.merge(graph, params)(x)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    def run(params, x, weight):
        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params, x, weight
        )
        return out, gradients

    return jax.jit(jax.vmap(run, in_axes=(0, None, None)) if stacked else run)


def tokens(length=LONGEST, seed=1):
    return np.random.default_rng(seed).standard_normal((BATCH, length, WIDTH), np.float32)


def close(actual, expected):
    """Outputs, and every gradient, to 1e-4.

    Some gradients all but vanish, because what remains of larger terms is their rounding: those of
    a query that sees one key, or in front of a norm. Hence the second term, a tenth of the first
    for the gradients together.
    """
    (out, gradients), (expected_out, expected_gradients) = actual, expected
    assert relative_error(out, expected_out) < 1e-4
    expected_leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(expected_gradients)]
    size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in expected_leaves))
    for leaf, wanted in zip(jax.tree.leaves(gradients), expected_leaves, strict=True):
        assert np.isfinite(leaf).all()
        assert np.linalg.norm(leaf - wanted) < 1e-4 * np.linalg.norm(wanted) + 1e-5 * size


@functools.cache
def reference_of_prefix(name, length):
    """The reference on the first `length` of `LONGEST` tokens.

    It is causal (see below), so tokens behind a prefix do not change it if they have no weight in
    the loss; one compilation serves every length.
    """
    weight = tokens(seed=2)
    weight[:, length:] = 0.0
    out, (params, inputs) = runner(name, reference=True)(parameters(name), tokens(), weight)
    np.testing.assert_array_equal(inputs[:, length:], 0.0)
    return np.asarray(out)[:, :length], (params, np.asarray(inputs)[:, :length])


@every
@pytest.mark.parametrize("length", [1, 63])
def test_parallel_form_equals_the_reference(name, length):
    found = runner(name)(parameters(name), tokens()[:, :length], tokens(seed=2)[:, :length])
    assert found[0].shape == (BATCH, length, WIDTH) and found[0].dtype == jnp.float32
    close(found, reference_of_prefix(name, length))


@every
def test_parallel_form_equals_the_reference_vmapped_over_parameters_at_length_100(name):
    params, x, weight = stacked_parameters(name), tokens(), tokens(seed=2)
    out, gradients = runner(name, stacked=True)(params, x, weight)
    for i in range(len(SEEDS)):
        one, found = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], (params, gradients))
        close((out[i], found), runner(name, reference=True)(one, x, weight))
    assert relative_error(out[0], out[1]) > 0.1  # the seeds differ
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@every
@pytest.mark.slow
def test_parallel_form_equals_the_reference_at_length_500(name):
    arguments = parameters(name), tokens(500), tokens(500, seed=2)
    close(runner(name)(*arguments), runner(name, reference=True)(*arguments))


@every
@pytest.mark.parametrize("reference", [False, True], ids=["parallel", "reference"])
def test_causality(name, reference):
    """Up to rounding: a Fourier transform mixes all tokens, at the size of the largest output."""
    length = LONGEST if reference else 63  # as compiled already
    run, weight = runner(name, reference=reference), tokens(length, seed=2)
    out = np.asarray(run(parameters(name), tokens(length), weight)[0])
    for position in (1, 40, length - 1):
        x = tokens(length)
        x[:, position:] += 1.0
        changed = np.asarray(run(parameters(name), x, weight)[0])
        difference = np.abs(changed - out).max(axis=(0, 2))
        assert difference[:position].max() <= 1e-6 * np.abs(changed).max()
        assert difference[position:].min() > 1e-4


@every
def test_uses_positions_says_whether_the_order_of_earlier_tokens_matters(name):
    x, weight = tokens(63), tokens(63, seed=2)
    reversed_ = np.concatenate([x[:, 61::-1], x[:, 62:]], 1)
    out, other = (runner(name)(parameters(name), inputs, weight)[0] for inputs in (x, reversed_))
    change = relative_error(other[:, -1], out[:, -1])
    assert change < 1e-5 if mixers.uses_positions(name) else change > 1e-2


@every
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_finite_in_bfloat16(name, size):
    params, x = parameters(name), jnp.asarray(size * tokens(63), jnp.bfloat16)
    out, gradients = runner(name, dtype=jnp.bfloat16)(params, x, tokens(63, seed=2))
    assert out.dtype == jnp.bfloat16 and out.shape == x.shape
    for leaf in jax.tree.leaves((out, gradients)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(gradients[0])}
    assert dtypes == {jnp.dtype(jnp.float32)} and gradients[1].dtype == jnp.bfloat16
