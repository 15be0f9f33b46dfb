"""Packed sequences in a recurrence, whose state is reset before every segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lla.mixers.chunks import log_of_zero
from lla.numerics import compute_dtype
from lla.ops import segments


def gates(
    log_decay: jax.Array | None, segment_ids: jax.Array | None, value: jax.Array
) -> jax.Array | None:
    """`log_decay`, with gates of zero before the first token of every segment.

    These gates, and all products with them (`lla.mixers.chunks.decays`), are exactly zero, while
    their logarithms are finite and small enough for running sums. The gradient of a replaced gate
    is zero.

    Args:
      log_decay: ``[B, T, N]`` or ``[B, T, N, H]``; None for no decay.
      segment_ids: int ``[B, T]``; None leaves `log_decay` as it is.
      value: ``[B, T, N, Hv]``, the values of the recurrence, for shape and dtype.

    Raises:
      ValueError: `segment_ids` is not an integer array ``[B, T]``.
    """
    if segment_ids is None:
        return log_decay
    dtype = compute_dtype(value.dtype)
    log_decay = jnp.zeros(value.shape[:3], dtype) if log_decay is None else log_decay.astype(dtype)
    starts = segments.starts(segment_ids, value.shape[:2])
    starts = starts.reshape(*starts.shape, *(1,) * (log_decay.ndim - 2))
    starts = jnp.broadcast_to(starts, log_decay.shape)
    return jnp.where(starts, jnp.full_like(log_decay, log_of_zero(dtype)), log_decay)
