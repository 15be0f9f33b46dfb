"""Decoding with a bias of the logits, and with capped ones, as for the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from tests.ops.harness import FUNCTIONS, relative_error

BATCH, LENGTH, ROOM, HEADS, KV_HEADS, DIM = 2, 9, 12, 4, 2, 8
STEPS = {
    "lla": lla.decode_step,
    "parallax": lla.parallax_decode_step,
    "softmax": lla.softmax_decode_step,
}
# Float32 evaluations of the same numbers, in another order.
BOUND = 1e-5
SHAPES = {
    "full": (BATCH, HEADS, LENGTH, ROOM),
    "heads": (HEADS, LENGTH, ROOM),
    "places": (BATCH, 1, 1, ROOM),
}
mechanisms = pytest.mark.parametrize("mechanism", FUNCTIONS)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs(mechanism):
    """query, (probe,) key, value."""
    widths = [HEADS, HEADS, KV_HEADS, KV_HEADS]
    arrays = [normal((BATCH, LENGTH, n, DIM), seed) for seed, n in enumerate(widths)]
    return [a for i, a in enumerate(arrays) if i != 1 or mechanism == "parallax"]


def extra(mechanism):
    return {"ridge": 0.5} if mechanism == "lla" else {}


def empty():
    return lla.KVCache.create(BATCH, ROOM, KV_HEADS, DIM, dtype=jnp.float32)


def rows(bias, first, last):
    """The bias of the queries ``first ... last - 1``."""
    return bias if bias.shape[-2] == 1 else bias[..., first:last, :]


def decoded(mechanism, arrays, bias, pieces, **options):
    cache, parts, first = empty(), [], 0
    for size in pieces:
        piece = [a[:, first : first + size] for a in arrays]
        part, cache = STEPS[mechanism](
            *piece, cache, bias=rows(bias, first, first + size), **extra(mechanism), **options
        )
        parts.append(part)
        first += size
    return jnp.concatenate(parts, 1)


def whole(mechanism, arrays, bias, **options):
    bias = jnp.broadcast_to(bias, (*bias.shape[:-1], ROOM))[..., :LENGTH]
    return FUNCTIONS[mechanism](*arrays, bias=bias, **extra(mechanism), **options)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("mechanism", "shape", "window"),
    [
        ("lla", "full", None),
        ("lla", "places", 3),
        ("parallax", "heads", None),
        ("softmax", "full", 3),
    ],
)
def test_equals_the_whole_sequence(mechanism, shape, window):
    """A prompt and single tokens, with the gradient of the bias."""
    arrays, bias = inputs(mechanism), normal(SHAPES[shape], 7)
    cotangent = normal((BATCH, LENGTH, HEADS, DIM), 9)

    def gradient(function, *more):
        def value(bias):
            out = function(mechanism, arrays, bias, *more, local_window_size=window)
            return (out * cotangent).sum(), out

        return jax.jit(jax.grad(value, has_aux=True))(bias)

    want, out = gradient(whole)
    got, mine = gradient(decoded, (7, 1, 1))
    assert relative_error(mine, out) < BOUND
    assert relative_error(got, want) < 10 * BOUND


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@mechanisms
def test_what_is_not_seen_is_not_read(mechanism, implementation):
    """Of the bias behind a token, behind the cache's end and of tokens that only pad."""
    arrays = inputs(mechanism)
    lengths = jnp.array([LENGTH, 4])
    bias = normal(SHAPES["full"], 7)
    seen = np.tril(np.ones((LENGTH, ROOM), bool))[None] & (
        np.arange(LENGTH)[None, :, None] < np.asarray(lengths)[:, None, None]
    )
    spoiled = jnp.where(seen[:, None], bias, jnp.nan)

    @jax.jit
    def run(arrays, bias):
        def attend(arrays, bias):
            return STEPS[mechanism](
                *arrays, empty(), bias=bias, new_lengths=lengths, implementation=implementation,
                **extra(mechanism),
            )[0]  # fmt: skip

        out, pullback = jax.vjp(attend, arrays, bias)
        return out, pullback(jnp.ones_like(out))

    got, want = run(arrays, spoiled), run(arrays, bias)
    for mine, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, right)
    assert not got[0][1, 4:].any() and jnp.abs(got[0][1, :4]).min() > 0


def test_capped_logits():
    arrays = inputs("softmax")
    bias = normal(SHAPES["heads"], 7)
    run = functools.partial(decoded, "softmax", arrays, bias, (7, 2), logits_soft_cap=0.7)
    want = whole("softmax", arrays, bias, logits_soft_cap=0.7)
    assert relative_error(run(), want) < BOUND
    assert relative_error(whole("softmax", arrays, bias), want) > 0.05
    # Without a bias the cache is read in parts.
    out, cache = lla.softmax_decode_step(*arrays, empty(), logits_soft_cap=0.7)
    assert relative_error(out, lla.softmax_attention(*arrays, logits_soft_cap=0.7)) < BOUND


@mechanisms
def test_errors(mechanism):
    arrays = inputs(mechanism)
    with pytest.raises(ValueError, match=r"bias must be broadcastable to .* \(2, 4, 9, 12\)"):
        STEPS[mechanism](*arrays, empty(), bias=normal((LENGTH, LENGTH)), **extra(mechanism))
    for name in ("mosaic_gpu", "mosaic_tpu"):
        with pytest.raises(NotImplementedError, match=f"{name}: logit bias is not supported"):
            STEPS[mechanism](
                *arrays, empty(), bias=normal(ROOM), implementation=name, **extra(mechanism)
            )
    if mechanism == "softmax":
        with pytest.raises(NotImplementedError, match="mosaic_gpu: logits_soft_cap is not"):
            STEPS[mechanism](*arrays, empty(), logits_soft_cap=1.0, implementation="mosaic_gpu")


def test_explain():
    arrays = inputs("softmax")
    reasons = lla.explain(*arrays, cache=empty(), bias=normal(ROOM), new_lengths=jnp.array([9, 4]))
    assert reasons["xla"] is None and reasons["reference"] is None
    assert "no logit bias" in reasons["xla:decode"]
    assert "logit bias is not supported" in reasons["mosaic_gpu"]
    assert lla.explain(*arrays, cache=empty(), logits_soft_cap=1.0)["xla:decode"] is None
