"""A decoding step of softmax attention, Parallax or local linear attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lla.kernels.mosaic_gpu.decode import CacheShape, Sums, row_names, sum_over_cache
from lla.kernels.mosaic_gpu.decode_solve import fit
from lla.kernels.mosaic_gpu.tile import LN2


class Decoded(NamedTuple):
    """`out` is ``[B, N, D]`` in the cache's dtype, the others ``[B, N]`` float32.

    `log_sum_exp` is natural. A query without visible keys has ``-inf`` there, and output zero.
    """

    out: jax.Array
    log_sum_exp: jax.Array
    iterations: jax.Array
    residual: jax.Array


def attend_cache(
    cache: CacheShape,
    mechanism: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: tuple[jax.Array, jax.Array],
    scale: jax.Array,
    ridge: jax.Array | None = None,
    probe: jax.Array | None = None,
    *,
    tol: float | None = 1e-4,
    max_iters: int = 256,
    bf16x2: bool = True,
    interpret: Any = None,
) -> Decoded:
    """Attention of one query per sequence and head to the visible keys of the cache.

    Args:
      cache: sizes.
      mechanism: "softmax", "parallax" or "lla".
      query, probe: ``[B, N, D]`` in 16 bits.
      key, value: ``[B, S, K, D]`` in 16 bits.
      visible: two int32 ``[B]``, the first visible key and the one after the last.
      scale, ridge: float32 ``[B, N]``, or ``[1, 1]`` if all are equal.
      tol, max_iters: see `lla.kernels.mosaic_gpu.decode_solve.fit`.
      bf16x2, interpret: see `lla.kernels.mosaic_gpu.decode.sum_over_cache`.
    """
    sums = sum_over_cache(
        cache, mechanism, query, key, value, visible, scale, probe, bf16x2=bf16x2,
        interpret=interpret,
    )  # fmt: skip
    rows, moments, highest = _join(sums)
    named = dict(zip(row_names(mechanism), jnp.moveaxis(rows, 2, 0), strict=True))
    total = named["total"].sum(-1)
    some = total > 0
    inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
    iterations = residual = jnp.zeros_like(highest)
    if mechanism == "lla":
        out, iterations, residual = fit(
            cache, rows, moments, query, key, visible[0], ridge,
            tol=tol, max_iters=max_iters, interpret=interpret,
        )  # fmt: skip
    else:
        out = named["value"] * inverse[..., None]
        if mechanism == "parallax":
            along = named["along"].sum(-1) * inverse
            out = out * (1 + along)[..., None] - named["along_value"] * inverse[..., None]
        out = out.astype(cache.dtype)
    log_sum_exp = (highest + jnp.log2(jnp.where(some, total, 1.0))) * LN2
    log_sum_exp = jnp.where(some, log_sum_exp, -jnp.inf)
    return Decoded(out, log_sum_exp, iterations, residual)


def _join(sums: Sums) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Adds up the splits: rows and moments relative to the largest logit, and that logit."""
    largest = sums.largest[..., 0]
    if largest.shape[-1] == 1:
        rows, moments = sums.rows[:, :, 0], sums.moments
        return rows, None if moments is None else moments[:, :, 0], largest[..., 0]
    highest = largest.max(-1)
    factor = jnp.exp2(largest - highest[..., None])

    def join(array):
        if array is None:
            return None
        return (array * factor.reshape(*factor.shape, *(1,) * (array.ndim - factor.ndim))).sum(2)

    return join(sums.rows), join(sums.moments), highest
