"""One decoding step from the sums over the cache: softmax, Parallax and local linear attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lla.kernels.mosaic_gpu.decode import Cache, Sums, sum_over_cache
from lla.kernels.mosaic_gpu.decode_solve import fit
from lla.kernels.mosaic_gpu.tile import LN2


class Decoded(NamedTuple):
    """out ``[B, N, D]`` in the cache's dtype; the others ``[B, N]`` float32.

    `log_sum_exp` is natural, ``-inf`` for a query without keys, whose output is zero.
    """

    out: jax.Array
    log_sum_exp: jax.Array
    iterations: jax.Array
    residual: jax.Array


def attend_cache(
    cache: Cache,
    member: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    scale: jax.Array,
    ridge: jax.Array | None = None,
    probe: jax.Array | None = None,
    *,
    tol: float | None = 1e-4,
    max_iters: int = 256,
    precise: bool = True,
    interpret: Any = None,
) -> Decoded:
    """Attention of one query per sequence and head to the visible keys of a cache.

    Args:
      cache: sizes.
      member: "softmax", "parallax" or "lla".
      query, probe: ``[B, N, D]``.
      key, value: ``[B, S, K, D]`` in 16 bits.
      visible: int32 ``[B, 2]``, the first visible key and the one after the last.
      scale, ridge: float32 ``[B, N]``.
      tol, max_iters: see `lla.kernels.mosaic_gpu.decode_solve.fit`.
      precise, interpret: see `lla.kernels.mosaic_gpu.decode.sum_over_cache`.
    """
    wide = query.astype(jnp.float32)
    scaled = wide * scale[..., None]
    wide_probe = None if probe is None else probe.astype(jnp.float32)
    sums = sum_over_cache(
        cache, member, scaled, key, value, visible, wide_probe, precise=precise, interpret=interpret
    )
    joined, highest = _join(sums)
    some = joined.total > 0
    inverse = jnp.where(some, 1 / jnp.where(some, joined.total, 1.0), 0.0)
    origin = _origin(cache, key, visible)
    log_sum_exp = (highest + jnp.log2(jnp.where(some, joined.total, 1.0))) * LN2
    log_sum_exp = log_sum_exp + (scaled * origin).sum(-1)
    log_sum_exp = jnp.where(some, log_sum_exp, -jnp.inf)

    mean = joined.value * inverse[..., None]
    iterations = residual = jnp.zeros_like(highest)
    if member == "softmax":
        out = mean
    elif member == "parallax":
        along = joined.along * inverse
        out = mean * (1 + along)[..., None] - joined.along_value * inverse[..., None]
    else:
        key_mean = joined.key * inverse[..., None]  # relative to the origin
        moments = joined.moments * inverse[..., None, None]
        other = jnp.concatenate([key_mean + origin, mean], axis=-1)
        moments = moments - key_mean[..., :, None] * other[..., None, :]
        covariance, cross = jnp.split(moments, 2, axis=-1)
        fitted = fit(
            covariance, cross, key_mean + origin - wide, mean, ridge, cache.dtype,
            tol=tol, max_iters=max_iters, interpret=interpret,
        )  # fmt: skip
        out, iterations, residual = fitted
        out = jnp.where(some[..., None], out, jnp.zeros_like(out))
    return Decoded(out.astype(cache.dtype), log_sum_exp, iterations, residual)


def _join(sums: Sums) -> tuple[Sums, jax.Array]:
    """The sums of all parts, without the axis P, relative to the largest logit; and that logit."""
    largest = sums.largest[..., 0]
    highest = largest.max(-1)
    factor = jnp.exp2(largest - highest[..., None])

    def join(array):
        weights = factor.reshape(*factor.shape, *(1,) * (array.ndim - factor.ndim))
        return (array * weights).sum(2)

    joined = {
        name: None if array is None else join(array) for name, array in sums._asdict().items()
    }
    for name in ("total", "along"):
        if joined[name] is not None:
            joined[name] = joined[name].sum(-1)
    return Sums(**joined), highest


def _origin(cache: Cache, key: jax.Array, visible: jax.Array) -> jax.Array:
    """The first visible key, float32 ``[B, N, D]``."""
    first = jnp.minimum(visible[:, 0], cache.num_keys - 1)
    first = jnp.take_along_axis(key, first[:, None, None, None], axis=1)[:, 0]
    return jnp.repeat(first.astype(jnp.float32), cache.group, axis=1)
