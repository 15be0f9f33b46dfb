"""The piecewise-linear distribution of the regression tasks, for one sequence.

A sequence consists of segments of `segment_length` pairs; the last one is shorter if the length is
not a multiple. Each segment has a centre, around which its keys lie, and a linear map.
"""

import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lla import estimators


def draw_normal(key: jax.Array, shapes: Mapping[str, tuple[int, ...]], dtype) -> dict:
    """Standard normal arrays of the given shapes.

    They come from one draw: on a CPU the generator takes most of the compile time, and every call
    would compile it again.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    ends = list(itertools.accumulate(sizes))
    flat = jax.random.normal(key, (ends[-1],), dtype)
    parts = (flat[end - size : end] for end, size in zip(ends, sizes, strict=True))
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def rms_norm(x: jax.Array) -> jax.Array:
    """[..., H] scaled to a mean square of 1 over the last axis."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))


def linear_by_segment(maps: jax.Array, x: jax.Array, segment_length: int) -> jax.Array:
    """Applies the map of its segment, divided by sqrt(H), to each x.

    Args:
      maps: [segments, V, H], standard normal.
      x: [T, H], T <= segments * segment_length.
      segment_length: positions per segment.

    Returns:
      [T, V]
    """
    # One product per segment rather than one gathered map per position.
    segments, _, dim = maps.shape
    length = x.shape[0]
    pad = segments * segment_length - length
    x = jnp.pad(x, ((0, pad), (0, 0))).reshape(segments, segment_length, dim)
    out = jnp.einsum("sij,stj->sti", maps / math.sqrt(dim), x, precision="highest")
    return out.reshape(segments * segment_length, -1)[:length]


def ridge_by_segment(
    queries: jax.Array, keys: jax.Array, values: jax.Array, segment_length: int, noise: float
) -> jax.Array:
    """Predictions [B, T, V] of the Bayes estimator that knows where segments begin.

    Ridge regression on the pairs of the segment at positions <= t. With a ridge of noise^2 * H it
    is the posterior mean for maps with entries of variance 1/H.

    Args:
      queries, keys: [B, T, H].
      values: [B, T, V].
      segment_length: positions per segment.
      noise: standard deviation of the values around the map.
    """
    batch, length = keys.shape[:2]
    segments = -(-length // segment_length)
    pad = segments * segment_length - length

    def split(array):
        array = jnp.pad(array, ((0, 0), (0, pad), (0, 0)))
        return array.reshape(batch * segments, segment_length, array.shape[-1])

    # Without noise least squares is exact; the floor only keeps the factorisation positive.
    ridge = max(noise**2, 1e-5)
    fit = estimators.create("mesanet", relative_ridge=ridge, form="recurrent")
    out = fit(split(queries), split(keys), split(values))
    return out.reshape(batch, segments * segment_length, -1)[:, :length]
