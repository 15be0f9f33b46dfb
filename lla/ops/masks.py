"""Which keys a query may see, kept symbolic so that a tile evaluates only its own part."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("offset", "lengths", "query_segments", "key_segments", "dense"),
    meta_fields=("is_causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Conjunction of all masks of one call; absent parts are None.

    Attributes:
      is_causal: key ``j`` is visible from query ``i`` only if ``j <= i + offset``.
      window: ``(left, right)``: only ``i + offset - left <= j <= i + offset + right``.
      offset: int32 ``[B]``, position of query 0 among the keys.
      lengths: int32 ``[B]``, number of existing keys.
      query_segments: int32 ``[B, T]``.
      key_segments: int32 ``[B, S]``.
      dense: bool ``[B | 1, K | 1, G | 1, T | 1, S]``, True where attention is allowed.
    """

    is_causal: bool
    window: tuple[int, int] | None
    offset: jax.Array | None
    lengths: jax.Array | None
    query_segments: jax.Array | None
    key_segments: jax.Array | None
    dense: jax.Array | None

    def arrays(self) -> list[jax.Array]:
        return jax.tree.leaves(self)


def positional_mask(mask: Mask, query_positions, key_positions, lengths):
    """Bool, broadcast of the position arrays: the causal, window and length parts of `mask`.

    `query_positions` include the offset; all arguments are int32 and broadcast together.
    """
    distance = key_positions - query_positions
    valid = jnp.ones(distance.shape, bool)
    if mask.is_causal:
        valid &= distance <= 0
    if mask.window is not None:
        left, right = mask.window
        valid &= (distance >= -left) & (distance <= right)
    if lengths is not None:
        valid &= key_positions < lengths
    return valid


def dense_mask(mask: Mask, batch: int, num_queries: int, num_keys: int) -> jax.Array:
    """The whole mask as bool ``[B, K | 1, G | 1, T, S]``."""
    offset = jnp.zeros(batch, jnp.int32) if mask.offset is None else mask.offset
    rows = offset[:, None, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :, None]
    cols = jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
    lengths = None if mask.lengths is None else mask.lengths[:, None, None]
    shape = (batch, num_queries, num_keys)
    rows, cols = jnp.broadcast_to(rows, shape), jnp.broadcast_to(cols, shape)
    if lengths is not None:
        lengths = jnp.broadcast_to(lengths, shape)
    valid = positional_mask(mask, rows, cols, lengths)
    if mask.query_segments is not None:
        valid &= mask.query_segments[:, :, None] == mask.key_segments[:, None, :]
    valid = valid[:, None, None]
    if mask.dense is not None:
        full = jnp.broadcast_shapes(valid.shape, mask.dense.shape)
        valid = jnp.broadcast_to(valid, full) & jnp.broadcast_to(mask.dense, full)
    return valid
