"""Which decoding steps the Hopper kernels for one token serve, and how they share the keys."""

import jax
import jax.numpy as jnp
import pytest

import lla
from lla.ops import BACKENDS, Backend, Decoder
from lla.ops.mosaic_gpu import decode as decode_gpu
from lla.ops.problem import make_problem


@pytest.mark.parametrize("queries", [1, 8, 40, 132, 256, 1000])
@pytest.mark.parametrize("num_keys", [1, 64, 1000, 4096, 131_072])
def test_shares(queries, num_keys):
    tiles = -(-num_keys // 64)
    splits = decode_gpu.choose_splits(queries, num_keys)
    assert 1 <= splits <= max(1, tiles // 4)

    def time(splits):
        return -(-queries * splits // 132) * (-(-tiles // splits) + 4)

    assert time(splits) <= min(time(1), time(max(1, min(tiles // 4, 132 // queries))))


def test_one_sequence_fills_the_card_and_many_are_not_split():
    assert 100 <= 8 * decode_gpu.choose_splits(8, 4096) <= 132
    assert decode_gpu.choose_splits(256, 16384) == 1


@pytest.mark.parametrize(
    ("mechanism", "group", "heads"),
    [
        ("softmax", 1, 1),
        ("softmax", 4, 4),
        ("parallax", 16, 8),
        ("softmax", 11, 1),
        ("parallax", 14, 7),
        ("lla", 4, 1),
    ],
)
def test_heads_that_share_an_instance(mechanism, group, heads):
    from lla.kernels.mosaic_gpu.decode import heads_per_program

    assert heads_per_program(mechanism, group) == heads


def problem(tokens=1, head_dim=64, value_dim=64, room=64):
    def zeros(length, heads, width):
        return jnp.zeros((2, length, heads, width), jnp.bfloat16)

    return make_problem(
        "lla", zeros(tokens, 2, head_dim), zeros(room, 1, head_dim), zeros(room, 1, value_dim),
        ridge=1.0, query_offset=jnp.asarray([3, 5]), key_value_seq_lengths=jnp.asarray([4, 6]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "served"),
    [
        ({}, True),
        ({"head_dim": 128, "value_dim": 128, "room": 65}, True),
        ({"tokens": 2}, False),
        ({"head_dim": 32, "value_dim": 32}, False),
        ({"value_dim": 128}, False),
        ({"room": 63}, False),
    ],
)
def test_served(given, served):
    assert (decode_gpu.unsupported(problem(**given)) is None) == served


def test_steps_go_to_them(monkeypatch):
    """With the kernels taken for available, one token gets them and two tokens do not."""
    called = []

    def kernels(name, values):
        def run(problem, *_):
            called.append(name)
            shape = problem.query.shape
            stats = lla.Stats(*(jnp.zeros(shape[:-1], d) for d in ("float32", "int32", "float32")))
            return jnp.full(shape, values, problem.query.dtype), stats

        return run

    backend = Backend(
        "mosaic_gpu",
        lambda problem: None,
        kernels("whole", 2),
        decode=Decoder(decode_gpu.unsupported, kernels("step", 1)),
    )
    monkeypatch.setitem(BACKENDS, "mosaic_gpu", backend)
    cache = lla.KVCache.create(2, 64, num_kv_heads=1, head_dim=64)
    for tokens in (1, 2):
        query = jnp.zeros((2, tokens, 2, 64), jnp.bfloat16)
        key = query[:, :, :1]
        out, cache = lla.softmax_decode_step(
            query, key, key, cache, implementation=("mosaic_gpu", "xla")
        )
        assert jax.device_get(out).min() == tokens and out.shape == query.shape
    assert called == ["step", "whole"]
    assert cache.lengths.tolist() == [3, 3]
