"""Every mixer of the registry goes on from a state as it would on the whole sequence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from tests.measure import relative_error

WIDTH, HEADS, BATCH, LENGTH = 16, 2, 2, 11
every = pytest.mark.parametrize("name", mixers.names())
# The rest is slow: one with a cache, one of each kind of recurrence that has one, and all inputs.
QUICK = ("lla", "gla", "mamba", "gated_deltanet", "hyena")
some = pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in mixers.names() if n not in QUICK)],
)
# More options under which positions, caches, states and what is normalised matter.
VARIANTS = {
    "softmax": dict(num_kv_heads=1, value_dim=6, rope_theta=100.0, local_window_size=3),
    "parallax": dict(rope_theta=100.0),
    "lla": dict(num_kv_heads=1, ridge_type="per_token", ridge=0.5, rope_theta=100.0),
    "linear": dict(feature_map="elu", normalize=True, out_norm=False, qk_norm=True),
    "retnet": dict(chunk=4),
    "gla": dict(chunk=4),
    "mamba": dict(chunk=4),
    "mamba2": dict(chunk=4, state_size=8),
    "deltanet": dict(chunk=4, value_dim=6, allow_neg_eigval=True),
    "gated_deltanet": dict(chunk=4, output_gate=False),
    "mesanet": dict(chunk=4, output_gate=True),
    "hyena": dict(form="recurrent"),
}


def variant(name):
    return VARIANTS.get(name, {})


def taps(name, count=4):
    """The option for short convolutions, where the mixer has it."""
    return {"short_conv": count} if "short_conv" in mixers.options(name) else {}


def build(name, *, dtype=None, **options):
    """A mixer none of whose parts is idle."""
    mixer = mixers.create(name, WIDTH, HEADS, rngs=nnx.Rngs(0), dtype=dtype, **options)
    if name == "parallax":  # its probe starts at zero
        kernel = mixer.probe.kernel
        kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), kernel.shape)
    return mixer


def tokens(seed=1, length=LENGTH):
    return np.random.default_rng(seed).standard_normal((BATCH, length, WIDTH), np.float32)


@nnx.jit
def call(mixer, x):
    return mixer(x)


@nnx.jit
def decode(mixer, x, state, new_lengths=None):
    return mixer.decode(x, state, new_lengths)


def in_pieces(mixer, x, state, *sizes):
    """Outputs of pieces of these sizes, one behind the other, and the last state."""
    outs, first = [], 0
    for size in sizes:
        y, state = decode(mixer, x[:, first : first + size], state)
        outs.append(y)
        first += size
    return np.concatenate(outs, axis=1), state


def check(mixer, x):
    """Steps from the start, and a prompt in two chunks with steps behind it."""
    expected = call(mixer, x)
    for sizes in ([1] * LENGTH, [4, 4, 1, 1, 1]):
        out, state = in_pieces(mixer, x, mixer.init_state(BATCH, LENGTH), *sizes)
        assert relative_error(out, expected) < 1e-4
        assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(state))


@every
def test_pieces_equal_the_whole(name):
    check(build(name), tokens())


@every
@pytest.mark.slow
def test_pieces_equal_the_whole_with_other_options_and_short_convolutions(name):
    check(build(name, **variant(name)), tokens())
    check(build(name, **(variant(name) | taps(name))), tokens())
    check(build(name, **taps(name, 1)), tokens())


@some
def test_ragged_batches_with_short_convolutions(name):
    """What pads a sequence is not a number, and leaves no trace."""
    mixer, x = build(name, **taps(name, 4)), tokens()
    expected = np.asarray(call(mixer, x))
    out, done = np.full_like(expected, np.nan), np.zeros(BATCH, int)
    state = mixer.init_state(BATCH, LENGTH)
    for counts in ([3, 1], [0, 3], [1, 0], [3, 2], [2, 3], [2, 0]):
        new = np.full((BATCH, 3, WIDTH), np.nan, np.float32)
        for i, count in enumerate(counts):
            new[i, :count] = x[i, done[i] : done[i] + count]
        before = state
        y, state = decode(mixer, new, state, jnp.array(counts, jnp.int32))
        for i, count in enumerate(counts):
            out[i, done[i] : done[i] + count] = y[i, :count]
            if count == 0:
                for old, later in zip(*map(jax.tree.leaves, (before, state)), strict=True):
                    np.testing.assert_array_equal(old[i], later[i])
        done += counts
    assert done.tolist() == [11, 9]
    assert relative_error(out[0], expected[0]) < 1e-4
    assert relative_error(out[1, :9], expected[1, :9]) < 1e-4


@every
@pytest.mark.slow
def test_ragged_steps_of_one_token(name):
    mixer, x = build(name, **taps(name, 4)), tokens()
    expected = np.asarray(call(mixer, x))
    out, done = np.full_like(expected, np.nan), np.zeros(BATCH, int)
    state = mixer.init_state(BATCH, LENGTH)
    for step in range(2 * LENGTH):
        counts = [int(step % 2 == 0 and done[0] < LENGTH), int(step % 3 > 0 and done[1] < LENGTH)]
        new = np.full((BATCH, 1, WIDTH), np.nan, np.float32)
        for i, count in enumerate(counts):
            new[i, :count] = x[i, done[i] : done[i] + count]
        y, state = decode(mixer, new, state, jnp.array(counts, jnp.int32))
        for i, count in enumerate(counts):
            out[i, done[i] : done[i] + count] = y[i, :count]
        done += counts
    assert done.tolist() == [LENGTH] * 2
    assert relative_error(out, expected) < 1e-4


@every
def test_dtypes_of_states(name):
    mixer = build(name, dtype=jnp.bfloat16, **taps(name))
    x = jax.ShapeDtypeStruct((BATCH, 3, WIDTH), jnp.bfloat16)
    state = jax.eval_shape(functools.partial(mixer.init_state, BATCH, LENGTH))
    y, after = jax.eval_shape(lambda x, state: mixer.decode(x, state), x, state)
    assert y.dtype == jnp.bfloat16 and y.shape == x.shape
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    # Keys and values in a cache alone have 16 bits, by the dtype of the mixer or as asked.
    narrow = jax.eval_shape(lambda: build(name).init_state(BATCH, LENGTH, jnp.bfloat16))
    for kept in (state, narrow):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(kept)}
        assert (jnp.dtype(jnp.bfloat16) in dtypes) == hasattr(kept, "cache")
        assert dtypes <= {jnp.dtype(d) for d in (jnp.bfloat16, jnp.float32, jnp.int32)}


@pytest.mark.parametrize(
    "name",
    ["softmax", "hyena", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lla", "parallax"))],
)
def test_too_many_tokens(name):
    mixer, x = build(name), tokens()
    # Where lengths are known, an error.
    full = mixer.init_state(BATCH, 4)
    with pytest.raises(ValueError, match="max_length is 4"):
        mixer.decode(x[:, :5], full)
    # Compiled, what does not fit is not a number, for its own sequence alone.
    y, state = decode(mixer, x[:, :3], full)
    y, state = decode(mixer, x[:, 3:6], state, jnp.array([3, 1], jnp.int32))
    assert np.isnan(y[0]).all() and np.isfinite(y[1, :1]).all()
    expected = call(mixer, x)
    assert relative_error(y[1, :1], expected[1, 3:4]) < 1e-4
    y, _ = decode(mixer, x[:, 6:7], state)
    assert np.isnan(y).all()
