"""Packed sequences in a model: its outputs and decoding are those of the segments by themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla.models import ModelConfig, SequenceModel

VOCAB, BATCH, ROOM = 11, 2, 9
IDS = np.array([[4] * 6 + [0] * 1 + [4] * 8, [1] * 9 + [2] * 6], np.int32)
ENDS = ((0, 6, 7, 15), (0, 9, 15))
SOFTMAX, DELTANET = dict(mixer="softmax"), dict(mixer="deltanet", mixer_options=dict(short_conv=3))
kinds = pytest.mark.parametrize(
    "kind",
    [pytest.param(SOFTMAX, marks=pytest.mark.slow), DELTANET],
    ids=["softmax", "deltanet"],
)


def build(**options):
    """Two blocks, learned positions unless told otherwise."""
    given = dict(
        width=16, depth=2, num_heads=2, mixer="softmax", mixer_options={}, vocab_size=VOCAB,
        input_dim=None, output_dim=5, max_length=ROOM, positions="learned", mlp_ratio=1.0,
    )  # fmt: skip
    return SequenceModel(ModelConfig(**(given | options)), rngs=nnx.Rngs(0))


def tokens(length=15):
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, length), np.int32)


def apart(model, inputs, ends=ENDS):
    out = np.zeros((*inputs.shape, 5), np.float32)
    for b, row in enumerate(ends):
        for first, last in itertools.pairwise(row):
            out[b, first:last] = model(inputs[b : b + 1, first:last])[0]
    return out


@kinds
def test_packed_equals_apart(kind):
    model, inputs = build(**kind), tokens()
    expected = apart(model, inputs)
    np.testing.assert_allclose(model(inputs, segment_ids=IDS), expected, atol=1e-4)
    at = jnp.array([[5, 14], [9, 0]], jnp.int32)
    some = nnx.jit(lambda model, at: model(inputs, at, segment_ids=IDS))(model, at)
    wanted = np.take_along_axis(expected, np.asarray(at)[..., None], axis=1)
    np.testing.assert_allclose(some, wanted, atol=1e-4)


@kinds
def test_decode_goes_on_with_the_last_segment(kind):
    model, inputs = build(**kind, max_length=24), tokens(17)
    expected = apart(model, inputs, ((0, 6, 7, 17), (0, 9, 17)))
    step = nnx.jit(lambda model, x, state, ids: model.decode(x, state, segment_ids=ids))
    state, outs = model.init_state(BATCH, 24), []
    for first, last in ((0, 7), (7, 9), (9, 15)):
        y, state = step(model, inputs[:, first:last], state, IDS[:, first:last])
        outs.append(y)
    for first in (15, 16):
        y, state = step(model, inputs[:, first : first + 1], state, None)
        outs.append(y)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=1e-4)
    assert state.lengths.tolist() == [10, 8] and state.segment.tolist() == [4, 2]


def test_padding_of_a_packed_piece_needs_no_positions():
    model, inputs = build(), tokens()
    state = model.init_state(BATCH, ROOM)
    counts = jnp.array([8, 3], jnp.int32)
    y, state = model.decode(inputs[:, :9], state, counts, segment_ids=IDS[:, :9])
    np.testing.assert_allclose(y[0, :8], apart(model, inputs)[0, :8], atol=1e-4)
    assert state.lengths.tolist() == [1, 3]
    # Another 9 tokens, of which 1 exists: the others are behind the last position.
    y, state = model.decode(
        inputs[:, :9], state, jnp.array([1, 0], jnp.int32), segment_ids=np.full((2, 9), 4, np.int32)
    )
    assert np.isfinite(y[0, 0]).all() and state.lengths.tolist() == [2, 3]


def test_segments_longer_than_the_learned_positions():
    model, inputs = build(), tokens()
    longer = np.array([[0] * 10 + [1] * 5, [1] * 15], np.int32)
    with pytest.raises(ValueError, match="a segment has 15 tokens or more, max_length is 9"):
        model(inputs, segment_ids=longer)
    out = nnx.jit(lambda model, ids: model(inputs, segment_ids=ids))(model, longer)
    assert np.isfinite(out[0, :9]).all() and np.isnan(out[0, 9]).all()
    assert np.isfinite(out[0, 10:]).all() and np.isnan(out[1, 9:]).all()
    # Without them there is no limit.
    assert np.isfinite(build(positions="none")(inputs, segment_ids=longer)).all()


def test_a_model_that_reads_the_last_token_refuses():
    with pytest.raises(NotImplementedError, match="it takes no segment_ids"):
        build(readout="last")(tokens(), segment_ids=IDS)


def test_gradients_of_parameters_are_sums_over_segments():
    model, inputs = build(mixer="gla", mixer_options={}), tokens()
    graph, params = nnx.split(model)
    weight = np.random.default_rng(1).standard_normal((BATCH, 15, 5)).astype(np.float32)

    def packed(params):
        return jnp.sum(nnx.merge(graph, params)(inputs, segment_ids=IDS) * weight)

    def separate(params):
        model, total = nnx.merge(graph, params), jnp.float32(0)
        for b, row in enumerate(ENDS):
            for first, last in itertools.pairwise(row):
                out = model(inputs[b : b + 1, first:last])
                total = total + jnp.sum(out * weight[b : b + 1, first:last])
        return total

    found, expected = (jax.jit(jax.grad(f))(params) for f in (packed, separate))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))
