"""The model around the mixers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from lla.models import ModelConfig, SequenceModel

TOKENS = ModelConfig(
    width=16,
    depth=2,
    num_heads=2,
    mixer="linear",
    mixer_options=mixers.options("linear"),
    vocab_size=11,
    input_dim=None,
    output_dim=11,
    max_length=8,
)
NUMBERS = dataclasses.replace(TOKENS, vocab_size=None, input_dim=5, output_dim=3)


def build(config, seed=0):
    return SequenceModel(config, rngs=nnx.Rngs(seed))


def tokens(seed=0, length=8):
    return jax.random.randint(jax.random.key(seed), (2, length), 0, 11)


@pytest.mark.compat
def test_shapes_of_tokens_and_numbers():
    assert build(TOKENS)(tokens()).shape == (2, 8, 11)
    assert build(NUMBERS)(jnp.ones((2, 6, 5))).shape == (2, 6, 3)


def test_outputs_at_some_positions_are_those_of_all():
    model, at = build(TOKENS), jnp.array([[0, 5], [7, 2]])
    everywhere = model(tokens())
    np.testing.assert_allclose(
        model(tokens(), at), jnp.take_along_axis(everywhere, at[:, :, None], axis=1), rtol=1e-5
    )


def test_the_future_is_not_read():
    model, changed = build(TOKENS), tokens().at[:, 5].add(1) % 11
    before, after = model(tokens()), model(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


def test_positions_follow_the_mixer_unless_told():
    def learned(**changes):
        return hasattr(build(dataclasses.replace(TOKENS, **changes)), "positions")

    retnet = {"mixer": "retnet", "mixer_options": mixers.options("retnet")}
    assert learned() and not learned(**retnet)
    assert not learned(positions="none") and learned(**retnet, positions="learned")
    # A repeated token gives equal outputs without positions, and others with them.
    same = jnp.full((1, 8), 3)
    options = {**mixers.options("softmax"), "qk_norm": True}
    softmax = dataclasses.replace(TOKENS, mixer="softmax", mixer_options=options)
    blind = build(dataclasses.replace(softmax, positions="none"))(same)
    np.testing.assert_allclose(blind, jnp.broadcast_to(blind[:, :1], blind.shape), rtol=1e-4)
    seeing = build(softmax)(same)
    assert not np.allclose(seeing, jnp.broadcast_to(seeing[:, :1], seeing.shape), rtol=1e-2)


def test_an_option_that_is_a_length_follows_the_longest_sequence_unless_told():
    def filter_length(**options):
        options = {**mixers.options("hyena"), **options}
        config = dataclasses.replace(TOKENS, mixer="hyena", mixer_options=options, max_length=24)
        return build(config).blocks[0].mixer.filter.length

    assert filter_length() == 24
    assert filter_length(filter_length=40) == 40
    assert mixers.create("hyena", 16, 2, rngs=nnx.Rngs(0)).filter.length == 1024
    assert mixers.length_option("hyena") == "filter_length"
    assert mixers.length_option("softmax") is None


def test_tied_embeddings_are_one_table_and_start_at_unit_variance():
    wide = dataclasses.replace(
        TOKENS, width=64, vocab_size=512, output_dim=512, tie_embeddings=True, depth=1
    )
    model = build(wide)
    assert not hasattr(model, "head")
    logits = model(tokens())
    assert 0.8 < float(jnp.std(logits)) < 1.25
    stream = model.embed(tokens()) * wide.width**0.5
    assert 0.8 < float(jnp.std(stream)) < 1.25


def test_mlp_adds_a_branch():
    model = build(dataclasses.replace(TOKENS, mlp_ratio=2.0))
    assert model.blocks[0].mlp.up.kernel.shape == (16, 32)
    plain = build(TOKENS)
    assert not hasattr(plain.blocks[0], "mlp")
    before = model(tokens())
    model.blocks[1].mlp.down.kernel[...] = 0 * model.blocks[1].mlp.down.kernel[...]
    assert not np.allclose(before, model(tokens()))


@pytest.mark.compat
@pytest.mark.parametrize("config", [TOKENS, NUMBERS], ids=["tokens", "numbers"])
def test_bfloat16_computes_near_float32(config):
    inputs = tokens() if config is TOKENS else jax.random.normal(jax.random.key(1), (2, 8, 5))
    low = build(dataclasses.replace(config, dtype="bfloat16", mlp_ratio=2.0))
    out, exact = low(inputs), build(dataclasses.replace(config, mlp_ratio=2.0))(inputs)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low))} == {jnp.dtype("float32")}
    error = jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0 < float(error) < 0.05  # a few roundings of 2^-9 per layer


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 0}, "width must be at least 1"),
        ({"input_dim": 3}, "exactly one of vocab_size and input_dim"),
        ({"vocab_size": None}, "exactly one of vocab_size and input_dim"),
        ({"positions": "rotary"}, "positions must be"),
        ({"mlp_ratio": -1.0}, "mlp_ratio must be"),
        ({"tie_embeddings": True, "output_dim": 3}, "tie_embeddings needs"),
        ({"dtype": "int32"}, "dtype must be one of float32, bfloat16, float16, float64, got"),
        ({"param_dtype": "float31"}, "param_dtype must be one of .*, got 'float31'"),
    ],
)
def test_impossible_configs_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOKENS, **changes)


def test_wrong_inputs_are_errors():
    with pytest.raises(ValueError, match=r"integers of shape \[B, T\]"):
        build(TOKENS)(jnp.ones((2, 8)))
    with pytest.raises(ValueError, match=r"shape \[B, T, 5\]"):
        build(NUMBERS)(jnp.ones((2, 8, 4)))
    with pytest.raises(ValueError, match="longer than max_length 8"):
        build(TOKENS)(tokens(length=9))
