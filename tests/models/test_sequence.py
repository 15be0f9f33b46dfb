"""The model around the mixers."""

import dataclasses
import math

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


def test_remat_changes_memory_and_no_number():
    def gradients(remat):
        model = build(dataclasses.replace(TOKENS, remat=remat, mlp_ratio=2.0))
        loss, found = nnx.value_and_grad(lambda m: jnp.sum(jnp.square(m(tokens()))))(model)
        jaxpr = jax.make_jaxpr(lambda state: nnx.merge(nnx.graphdef(model), state)(tokens()))(
            nnx.state(model)
        )
        return loss, nnx.to_pure_dict(found), str(jaxpr).count("remat")

    (loss, plain, none), (again, remat, some) = gradients(False), gradients(True)
    assert none == 0 and some == 2
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)


HYBRID = dataclasses.replace(
    TOKENS,
    depth=6,
    layers=("linear", "retnet", "softmax"),
    other_mixers={"softmax": {"num_kv_heads": 1}},
)


def test_a_hybrid_has_the_mixers_of_its_layers():
    model = build(HYBRID)
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert kinds == ["LinearAttention", "RetNet", "Softmax"] * 2
    assert model.blocks[2].mixer.key.kernel.shape[1] == 1
    # RetNet sees the order of tokens.
    assert not HYBRID.learned_positions
    assert dataclasses.replace(HYBRID, layers=("linear", "softmax")).learned_positions
    outputs = model(tokens())
    state = model.init_state(2, 8)
    for at in range(8):
        step, state = model.decode(tokens()[:, at : at + 1], state)
        np.testing.assert_allclose(step[:, 0], outputs[:, at], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": ("softmax", "retnet")}, "must contain the mixer, 'linear'"),
        ({"depth": 5}, "must divide depth, 5"),
        ({"other_mixers": {"gla": {}}}, "has 'gla', which is no other mixer"),
        ({"other_mixers": {"linear": {}}}, "has 'linear', which is no other mixer"),
    ],
)
def test_impossible_hybrids(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **changes)


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


def test_swiglu_is_gated_and_its_width_is_rounded_up():
    config = dataclasses.replace(
        TOKENS, width=128, mlp_ratio=8 / 3, mlp_type="swiglu", mlp_multiple_of=16, depth=1
    )
    assert config.mlp_width == 352 and TOKENS.mlp_width == 0
    assert dataclasses.replace(TOKENS, mlp_ratio=2.0).mlp_width == 32
    mlp = build(config).blocks[0].mlp
    x = np.random.default_rng(0).normal(size=(2, 3, 128))
    gate, up, down = (
        np.asarray(layer.kernel[...], float) for layer in (mlp.gate, mlp.up, mlp.down)
    )
    assert gate.shape == up.shape == (128, 352)
    gated = x @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)
    assert {mlp.gate.bias, mlp.up.bias, mlp.down.bias} == {None}


def test_plain_embeddings_enter_the_stream_as_they_are():
    config = dataclasses.replace(
        TOKENS, width=64, vocab_size=512, output_dim=512, positions="learned", embedding_std=0.02
    )
    model = build(config)
    for table in (model.embed, model.positions):
        assert 0.018 < float(jnp.std(table.embedding[...])) < 0.022
    np.testing.assert_array_equal(model._embed(tokens()), model.embed(tokens()))


def test_the_head_has_a_bias_if_it_is_told_to():
    assert build(TOKENS).head.bias is None
    model = build(dataclasses.replace(TOKENS, head_bias=True))
    before = model(tokens())
    np.testing.assert_array_equal(model.head.bias[...], np.zeros(11))
    model.head.bias[...] = jnp.arange(11.0)
    expected = np.asarray(before) + np.arange(11.0)
    np.testing.assert_allclose(model(tokens()), expected, rtol=1e-4, atol=1e-5)


LAST = dataclasses.replace(TOKENS, readout="last", width=17, num_heads=1, head_bias=True)


def normed(x, norm):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])


def test_all_outputs_are_read_from_the_last_token():
    model = build(LAST)
    stream = model.embed(tokens()) * 17**0.5 + (model.positions(jnp.arange(8)) * 17**0.5)[None]
    for block in model.blocks:
        stream = block(stream)
    # Positions as sines and cosines, with angular frequencies from 1 to 1 / 10000.
    x = np.asarray(stream, float)[:, -1:] + np.stack(
        [
            [np.sin(t * 1e4 ** (-i / 7)) for i in range(8)]
            + [np.cos(t * 1e4 ** (-i / 7)) for i in range(8)]
            + [0.0]
            for t in range(8)
        ]
    )
    for norm, linear in zip(model.decoder.norms, model.decoder.maps, strict=True):
        x = normed(x, norm) @ np.asarray(linear.kernel[...], float) + np.asarray(linear.bias[...])
        x = x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2
    expected = normed(x, model.norm) @ np.asarray(model.head.kernel[...], float)
    outputs = model(tokens())
    assert outputs.shape == (2, 8, 11)
    np.testing.assert_allclose(outputs, expected, rtol=2e-3, atol=2e-4)

    at = jnp.array([[0, 5], [7, 2]])
    np.testing.assert_allclose(
        model(tokens(), at), jnp.take_along_axis(outputs, at[:, :, None], axis=1), rtol=1e-5
    )
    # Every output depends on every token, through the last one alone.
    changed = model(tokens().at[:, 0].add(1) % 11)
    assert np.all(np.abs(changed - outputs).max(-1) > 1e-6)


def test_a_model_that_reads_the_last_token_cannot_decode():
    with pytest.raises(NotImplementedError, match="readout 'last' cannot decode"):
        build(LAST).init_state(2, 8)


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
        ({"mlp_type": "relu"}, "mlp_type must be 'gelu' or 'swiglu', got 'relu'"),
        ({"mlp_multiple_of": 0}, "mlp_multiple_of must be at least 1"),
        ({"readout": "first"}, "readout must be 'each' or 'last'"),
        ({"embedding_std": 0.0}, "embedding_std must be > 0"),
        ({"embedding_std": float("inf")}, "embedding_std must be > 0 and finite"),
        ({"tie_embeddings": True, "output_dim": 3}, "tie_embeddings needs"),
        ({"tie_embeddings": True, "head_bias": True}, "head_bias needs a head of its own"),
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
