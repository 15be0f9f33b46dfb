"""Packed sequences: several of them, one behind the other, in every row of a batch.

Segment ids tell them apart, integers ``[*B, T]``. A segment is a run of equal ids: it starts where
the id changes, and an id that comes back later stands for another segment.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checked(segment_ids: Any, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
    """`segment_ids` as an array; ValueError unless these are integers of `shape`."""
    ids = segment_ids if isinstance(segment_ids, jax.Array) else np.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape != tuple(shape):
        raise ValueError(
            f"segment_ids must be an integer array of shape {tuple(shape)}, got {ids.dtype} "
            f"{ids.shape}."
        )
    return ids


def starts(segment_ids: Any, shape: tuple[int, ...], before: jax.Array | None = None) -> jax.Array:
    """Bool ``[*B, T]``: which tokens are the first of a segment, and follow another one.

    Args:
      segment_ids: integers ``[*B, T]``.
      shape: what that has to be.
      before: int32 ``[*B]``, ids of the preceding tokens. None: the first token continues the
        preceding segment, if there is one.

    Raises:
      ValueError: `segment_ids` is not an integer array of that shape, or, with `before`, is known
        to hold values outside int32.
    """
    ids = checked(segment_ids, shape)
    changes = jnp.asarray(ids[..., 1:] != ids[..., :-1])
    first = jnp.zeros((*shape[:-1], 1), bool)
    if before is not None and shape[-1]:
        first = narrowed(ids)[..., :1] != before[..., None]
    return jnp.concatenate([first, changes], axis=-1)


def narrowed(ids: jax.Array | np.ndarray) -> jax.Array:
    """`ids` as int32; ValueError if they are known not to fit."""
    if not isinstance(ids, jax.core.Tracer) and ids.size:
        limits, known = jnp.iinfo(jnp.int32), np.asarray(ids)
        if known.min() < limits.min or known.max() > limits.max:
            raise ValueError(
                "segment_ids must fit into int32 in decoding, which keeps the last of them, got "
                f"{known.min()} ... {known.max()}."
            )
    return jnp.asarray(ids).astype(jnp.int32)


def runs(starts: jax.Array) -> jax.Array:
    """Int32 ``[*B, T]``: the number of starts up to every token, an id that never comes back."""
    return jnp.cumsum(starts.astype(jnp.int32), axis=-1, dtype=jnp.int32)


def positions(starts: jax.Array, lengths: jax.Array | int = 0) -> jax.Array:
    """Int32 ``[*B, T]``: how many tokens of its segment precede every token.

    Args:
      starts: bool ``[*B, T]``.
      lengths: int32 ``[*B]``, or one number: tokens in front of these that are of the segment of
        the first one.
    """
    index = jnp.broadcast_to(jnp.arange(starts.shape[-1], dtype=jnp.int32), starts.shape)
    lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32)[..., None], starts.shape)
    first = jnp.where(starts, index, jnp.full_like(index, -1))
    first = jax.lax.cummax(first, axis=starts.ndim - 1)
    return index + jnp.where(first < 0, lengths, -first)


def cleared(tree: Any, where: jax.Array) -> Any:
    """`tree` of arrays ``[*B, ...]`` with zeros for the sequences that `where`, ``[*B]``, names."""

    def clear(array):
        mask = where.reshape(*where.shape, *(1,) * (array.ndim - where.ndim))
        return jnp.where(jnp.broadcast_to(mask, array.shape), jnp.zeros_like(array), array)

    return jax.tree.map(clear, tree)


def moved_to_front(buffer: jax.Array, first: jax.Array, counts: jax.Array) -> jax.Array:
    """The tokens of `buffer` ``[*B, L, ...]`` from `first` on, `counts` of them, and zeros behind.

    `first` and `counts` are int32 ``[*B]``.
    """
    axis, room = first.ndim, buffer.shape[first.ndim]
    slots = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32), (*first.shape, room))
    at = jnp.clip(slots + jnp.broadcast_to(first[..., None], slots.shape), 0, room - 1)
    inside = slots < jnp.broadcast_to(counts[..., None], slots.shape)
    rest = (1,) * (buffer.ndim - axis - 1)
    moved = jnp.take_along_axis(buffer, at.reshape(*at.shape, *rest), axis=axis)
    inside = jnp.broadcast_to(inside.reshape(*inside.shape, *rest), buffer.shape)
    return jnp.where(inside, moved, jnp.zeros_like(moved))


def slots(runs: jax.Array, lengths: jax.Array, room: int) -> jax.Array:
    """Segments of the slots of a buffer whose first `lengths` tokens are followed by new ones.

    Args:
      runs: int32 ``[*B, T]``, segments of the new tokens; the first one continues the segment in
        the buffer.
      lengths: int32 ``[*B]``.
      room: slots of the buffer.

    Returns:
      Int32 ``[*B, room]``; slots behind the new tokens are taken for the last one's.
    """
    index = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32), (*lengths.shape, room))
    index = index - jnp.broadcast_to(lengths[..., None], index.shape)
    return jnp.take_along_axis(runs, jnp.clip(index, 0, runs.shape[-1] - 1), axis=-1)
