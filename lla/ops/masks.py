"""Which keys a query may see, in symbolic form: a tile evaluates only its own part."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("offset", "lengths", "query_segments", "key_segments", "dense", "bias"),
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
      dense: bool ``[B | 1, N | 1, T | 1, S]``, True where attention is allowed.
      bias: ``[B | 1, N | 1, T | 1, S | 1]``, a logit bias for what it hides; see `hides`.
    """

    is_causal: bool
    window: tuple[int, int] | None
    offset: jax.Array | None
    lengths: jax.Array | None
    query_segments: jax.Array | None
    key_segments: jax.Array | None
    dense: jax.Array | None
    bias: jax.Array | None = None

    def arrays(self) -> list[jax.Array]:
        return jax.tree.leaves(self)

    def numbers(self, batch: int, num_keys: int) -> jax.Array:
        """The offset and the number of keys of every sequence, int32 ``[B, 2]``."""
        offset = jnp.zeros(batch, jnp.int32) if self.offset is None else self.offset
        length = jnp.full(batch, num_keys, jnp.int32)
        if self.lengths is not None:
            length = jnp.clip(self.lengths, 0, num_keys)
        return jnp.stack([offset, length], axis=1)


HIDING_BIAS = -1e36
"""A logit bias below hides an entry like a mask: -inf, and the lowest numbers of wide dtypes."""


def hides(bias: jax.Array) -> jax.Array:
    """Bool of the same shape: where a logit bias hides the entry. NaN hides nothing."""
    return bias.astype(jnp.float32) < HIDING_BIAS


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
    """The whole mask as bool ``[B, N | 1, T, S]``."""
    return rows_mask(mask, batch, 0, num_queries, num_keys)


def rows_mask(mask: Mask, batch: int, first, rows: int, num_keys: int) -> jax.Array:
    """The mask of the queries ``[first, first + rows)`` as bool ``[B, N | 1, rows, S]``."""
    offset = jnp.zeros(batch, jnp.int32) if mask.offset is None else mask.offset
    at = first + jnp.arange(rows, dtype=jnp.int32)
    at = offset[:, None, None] + at[None, :, None]
    cols = jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
    lengths = None if mask.lengths is None else mask.lengths[:, None, None]
    shape = (batch, rows, num_keys)
    at, cols = jnp.broadcast_to(at, shape), jnp.broadcast_to(cols, shape)
    if lengths is not None:
        lengths = jnp.broadcast_to(lengths, shape)
    valid = positional_mask(mask, at, cols, lengths)
    if mask.query_segments is not None:
        ids = jax.lax.dynamic_slice_in_dim(mask.query_segments, first, rows, axis=1)
        valid &= ids[:, :, None] == mask.key_segments[:, None, :]
    valid = valid[:, None]
    if mask.dense is not None:
        valid &= slice_rows(mask.dense, first, rows)
    if mask.bias is not None:
        valid &= ~hides(slice_rows(mask.bias, first, rows))
    return valid


def slice_rows(array: jax.Array, first, rows: int) -> jax.Array:
    """The queries ``[first, first + rows)`` of ``[B | 1, N | 1, T | 1, S | 1]``."""
    if array.shape[2] == 1:
        return array
    return jax.lax.dynamic_slice_in_dim(array, first, rows, axis=2)
