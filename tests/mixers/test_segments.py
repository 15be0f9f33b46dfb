"""Packed sequences: outputs, gradients and decoding are those of the segments by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from lla.mixers import hopper, scan_kernel
from lla.nn.new_tokens import apply_projection
from lla.ops import mosaic_gpu, segments
from tests.measure import relative_error
from tests.mixers.test_all import close, reference_options
from tests.mixers.test_decode import BATCH, WIDTH, build, some, taps, variant

# Two rows; ids are not sorted, one of them comes back, and one segment is a single token.
ROWS = (((7, 5), (-3, 1), (7, 12), (2**31 - 1, 4)), ((0, 12), (1, 3), (0, 7)))
LENGTH = 22
every = pytest.mark.parametrize("name", mixers.names())


def ids(rows=ROWS, dtype=np.int32):
    return np.stack([np.concatenate([np.full(n, i, dtype) for i, n in row]) for row in rows])


def spans(rows=ROWS):
    """(row, first token, token behind the last one) of every segment."""
    for b, row in enumerate(rows):
        ends = np.cumsum([n for _, n in row])
        yield from ((b, end - n, end) for (_, n), end in zip(row, ends, strict=True))


def tokens(length=LENGTH, seed=1):
    return np.random.default_rng(seed).standard_normal((BATCH, length, WIDTH), np.float32)


@nnx.jit
def gradients(mixer, x, weight, segment_ids):
    """Outputs, and gradients of sum(weight * output) for parameters and x."""
    graph, params = nnx.split(mixer)

    def loss(params, x):
        mixer = nnx.merge(graph, params)
        out = mixer(x) if segment_ids is None else mixer(x, segment_ids=segment_ids)
        return jnp.sum(out * weight), out

    (_, out), found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, found


def apart(mixer, x, weight, rows=ROWS):
    """The same of every segment in a call of its own.

    All of them are padded to one length, which changes nothing, since mixers are causal.
    """
    longest = max(end - first for _, first, end in spans(rows))
    out, d_x, d_params = np.zeros_like(x), np.zeros_like(x), []
    for b, first, end in spans(rows):
        inputs, weights = (np.zeros((1, longest, WIDTH), np.float32) for _ in range(2))
        inputs[0, : end - first], weights[0, : end - first] = (a[b, first:end] for a in (x, weight))
        y, (params, d_inputs) = gradients(mixer, inputs, weights, None)
        out[b, first:end], d_x[b, first:end] = y[0, : end - first], d_inputs[0, : end - first]
        d_params.append(params)
    return out, (jax.tree.map(lambda *leaves: np.sum(leaves, 0), *d_params), d_x)


def check(mixer, reference=None):
    x, weight = tokens(), tokens(seed=2)
    expected = apart(mixer if reference is None else reference, x, weight)
    found = gradients(mixer, x, weight, ids())
    close(found, expected)
    assert relative_error(gradients(mixer, x, weight, None)[0], expected[0]) > 0.01


@every
def test_packed_equals_apart(name):
    """With chunks of 4, so that segments end inside of chunks, at their ends, and span several."""
    check(build(name, **({"chunk": 4} if "chunk" in mixers.options(name) else {})))


@every
@pytest.mark.slow
def test_packed_equals_apart_with_other_options_and_short_convolutions(name):
    check(build(name, **(variant(name) | taps(name))))


@every
@pytest.mark.slow
def test_packed_reference_equals_apart(name):
    check(build(name, **reference_options(name)))
    check(build(name, **(variant(name) | reference_options(name))))


@nnx.jit
def decode(mixer, x, state, new_lengths=None, segment_ids=None):
    return mixer.decode(x, state, new_lengths, segment_ids=segment_ids)


def continued(mixer, prefill, behind, x, more):
    """Outputs of `x` packed, in pieces of these sizes, and of `more`, which go on without ids."""
    state, outs, first = mixer.init_state(BATCH, LENGTH + more.shape[1]), [], 0
    for size in prefill:
        piece = slice(first, first + size)
        y, state = decode(mixer, x[:, piece], state, None, ids()[:, piece])
        outs.append(y)
        first += size
    first = 0
    for size in behind:
        y, state = decode(mixer, more[:, first : first + size], state)
        outs.append(y)
        first += size
    return np.concatenate(outs, axis=1), state


def with_more(x, more):
    """The outputs of the segments, the last of which goes on with `more`."""
    rows = tuple((*row[:-1], (row[-1][0], row[-1][1] + more.shape[1])) for row in ROWS)
    return rows, np.concatenate([x, more], axis=1)


@some
@pytest.mark.parametrize(
    "options", [{}, pytest.param(None, marks=pytest.mark.slow)], ids=["default", "variant"]
)
def test_decode_goes_on_with_the_last_segment(name, options):
    mixer = build(name, **((variant(name) | taps(name)) if options is None else options))
    x, more = tokens(), tokens(4, seed=3)
    rows, whole = with_more(x, more)
    expected = apart(mixer, whole, whole, rows)[0]
    # At once; in pieces, of which one starts with a segment and one is a single token.
    for prefill, behind in (((LENGTH,), (3, 1)), ((6, 1, 8, 7), (1, 1, 2))):
        out, state = continued(mixer, prefill, behind, x, more)
        assert relative_error(out, expected) < 1e-4
        np.testing.assert_array_equal(state.segment, [ROWS[0][-1][0], ROWS[1][-1][0]])


@some
def test_ragged_packed_pieces_leave_no_trace_of_padding(name):
    mixer, x, known = build(name, **taps(name, 3)), tokens(), ids()
    expected = apart(mixer, x, x)[0]
    out, done = np.full_like(x, np.nan), np.zeros(BATCH, int)
    state = mixer.init_state(BATCH, LENGTH + 9)
    for counts in ([5, 9], [0, 4], [2, 0], [9, 6], [6, 3]):
        new = np.full((BATCH, 9, WIDTH), np.nan, np.float32)
        packed = np.arange(BATCH * 9, dtype=np.int32).reshape(BATCH, 9)  # of padding: anything
        for i, count in enumerate(counts):
            new[i, :count] = x[i, done[i] : done[i] + count]
            packed[i, :count] = known[i, done[i] : done[i] + count]
        before = state
        y, state = decode(mixer, new, state, jnp.array(counts, jnp.int32), packed)
        for i, count in enumerate(counts):
            out[i, done[i] : done[i] + count] = y[i, :count]
            if count == 0:
                for old, later in zip(*map(jax.tree.leaves, (before, state)), strict=True):
                    np.testing.assert_array_equal(old[i], later[i])
        done += counts
    assert done.tolist() == [LENGTH] * 2
    assert relative_error(out, expected) < 1e-4


@every
@pytest.mark.slow
def test_long_segments_and_many_short_ones(name):
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(BATCH):
        sizes = [130, 1, 1, 64, 17]
        sizes += [300 - sum(sizes)]
        rows.append(tuple(enumerate(int(n) for n in rng.permutation(sizes))))
    x, weight = tokens(300), tokens(300, seed=2)
    mixer = build(name)
    close(gradients(mixer, x, weight, ids(rows)), apart(mixer, x, weight, rows))


@every
def test_wrong_ids(name):
    mixer, x = build(name), tokens()
    state = mixer.init_state(BATCH, LENGTH)
    for wrong in (ids()[:1], ids()[:, :-1], ids().astype(np.float32), ids() > 0):
        with pytest.raises(ValueError, match="segment_ids must be an integer array"):
            mixer(x, segment_ids=wrong)
        with pytest.raises(ValueError, match="segment_ids must be an integer array"):
            mixer.decode(x, state, segment_ids=wrong)
    with pytest.raises(ValueError, match="segment_ids must fit into int32"):
        mixer.decode(x, state, segment_ids=ids(dtype=np.int64) + 2)


def test_starts_of_wide_ids():
    wide = np.array([[0, 2**32, 2**32, 0, -1, 2**32 - 1]])
    found = segments.starts(wide, wide.shape)
    np.testing.assert_array_equal(found, [[False, True, False, True, True, True]])


def test_positions_and_runs():
    starts = jnp.array([[False, False, True, True, False], [True, False, False, False, True]])
    np.testing.assert_array_equal(segments.positions(starts), [[0, 1, 0, 0, 1], [0, 1, 2, 3, 0]])
    lengths = jnp.array([5, 6], jnp.int32)
    found = segments.positions(starts, lengths)
    np.testing.assert_array_equal(found, [[5, 6, 0, 0, 1], [0, 1, 2, 3, 0]])
    np.testing.assert_array_equal(segments.runs(starts), [[0, 0, 1, 2, 2], [1, 1, 1, 1, 2]])


def test_a_projection_without_a_convolution_takes_no_ids():
    layer = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))
    out = apply_projection(layer, jnp.asarray(tokens()), ids())
    np.testing.assert_array_equal(out, layer(jnp.asarray(tokens())))


def test_packed_scans_do_not_run_in_kernels_that_know_no_segments(monkeypatch):
    """As on a machine that has the kernels, which a CPU could not run."""
    monkeypatch.setattr(mosaic_gpu, "refuse_machine", lambda *_: None)
    rng = np.random.default_rng(0)
    x, delta = (jnp.asarray(a, jnp.bfloat16) for a in rng.uniform(0, 1, (2, 1, 32, 64)))
    b, c = (jnp.asarray(a, jnp.bfloat16) for a in rng.standard_normal((2, 1, 32, 16)))
    a = -jnp.ones((64, 16), jnp.bfloat16)
    packed = np.repeat(np.arange(2, dtype=np.int32), 16)[None]
    with hopper.unmeasured_kernels():
        assert scan_kernel.serves(x, a)
        out = mixers.selective_scan(x, delta, a, b, c, segment_ids=packed, form="parallel")
    arrays = (x[:, 16:], delta[:, 16:], a, b[:, 16:], c[:, 16:])
    expected = mixers.selective_scan(*arrays, form="recurrent")
    assert relative_error(out[:, 16:], expected) < 1e-2
