"""Cutting a problem into tiles of queries and ranges of keys, as a `Plan` says.

Arrays come with groups first: ``M`` groups (pairs of sequence and key head), ``M'`` of which one
tile spans; ``G`` query heads share a key head. The rows of a tile are ``[M', R, ...]`` with
``R = G * block_q``. The axis of a single group is left out of what the tile mathematics works on:
compilers are better at matrices than at batches of one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lla.compat import full_varying
from lla.ops.masks import Mask, positional_mask
from lla.ops.xla.plan import Plan


def drop_single(array):
    """``[M', ...]`` without the axis of a single group."""
    return array[0] if array.shape[0] == 1 else array


def with_groups(groups: int, results):
    """Restores the axis of a single group in the results of a tile."""
    return jax.tree.map(lambda a: a[None], results) if groups == 1 else results


def for_groups(plan: Plan, function, *trees):
    """Maps `function` over chunks of groups: every array ``[M, ...]`` arrives as ``[M', ...]``."""
    return scan_groups(plan, lambda _, *args: (None, function(*args)), None, *trees)[1]


def scan_groups(plan: Plan, function, carry, *trees):
    """`for_groups` of ``function(carry, *trees) -> (carry, results)``, chunk after chunk."""
    m, chunk = jax.tree.leaves(trees)[0].shape[0], plan.groups
    if chunk == m:
        return function(carry, *trees)
    split = jax.tree.map(lambda a: a.reshape(m // chunk, chunk, *a.shape[1:]), trees)
    carry, out = lax.scan(lambda carry, args: function(carry, *args), carry, split)
    return carry, jax.tree.map(lambda a: a.reshape(m, *a.shape[2:]), out)


def scan_tiles(plan: Plan, tile, carry):
    """`lax.scan` of ``tile(buckets, carry, index) -> (carry, results)`` over a group's tiles."""
    parts = []
    for begin, end, buckets in plan.segments:
        indices = jnp.arange(begin, end, dtype=jnp.int32)
        carry, results = lax.scan(functools.partial(tile, buckets), carry, indices)
        parts.append(results)
    return carry, jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def pad_rows(plan: Plan, array, axis: int, fill=0):
    """Pads the query axis to whole tiles."""
    missing = plan.num_tiles * plan.block_q - array.shape[axis]
    if missing == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=fill)


def tile_rows(plan: Plan, array, first, dtype):
    """``[M', G, T, ...] -> [M', R, ...]``, the rows of the tile that starts at query `first`."""
    rows = lax.dynamic_slice_in_dim(array, first, plan.block_q, axis=2).astype(dtype)
    return drop_single(rows.reshape(rows.shape[0], -1, *rows.shape[3:]))


def join_tiles(plan: Plan, array, num_heads: int, num_queries: int):
    """``[tiles, M', R, ...] -> [M', G, T, ...]``, the inverse of `tile_rows` over all tiles."""
    count, m, _, *rest = array.shape
    array = array.reshape(count, m, num_heads, plan.block_q, *rest)
    array = jnp.moveaxis(array, 0, 2).reshape(m, num_heads, -1, *rest)
    return array[:, :, :num_queries]


def _key_range(plan: Plan, mask: Mask, first, num_keys: int, groups: int):
    """Keys ``[low, high)`` that the tile starting at query `first` can see, int32 ``[M']`` each."""
    low = jnp.zeros(groups, jnp.int32)
    high = jnp.full(groups, num_keys, jnp.int32)
    begin = first + (low if mask.offset is None else mask.offset)
    end = begin + plan.block_q  # position after the last query
    if mask.lengths is not None:
        high = jnp.minimum(high, mask.lengths)
    if mask.is_causal:
        high = jnp.minimum(high, end)
    if mask.window is not None:
        left, right = mask.window
        low = jnp.maximum(low, begin - left)
        high = jnp.minimum(high, end + right)
    return low, high


def with_key_range(plan: Plan, mask: Mask, first, num_keys: int, groups: int, buckets, branch):
    """Calls ``branch(length, start)`` with the smallest of `buckets` that holds the tile's keys."""
    low, high = _key_range(plan, mask, first, num_keys, groups)
    longest = (high - low).max()
    index = sum((longest > size).astype(jnp.int32) for size in buckets[:-1])
    branches = [
        lambda size=size: branch(size, jnp.clip(low, 0, num_keys - size)) for size in buckets
    ]
    return branches[0]() if len(branches) == 1 else lax.switch(index, branches)


def slice_keys(array, start, length: int, axis: int = 1):
    """Takes `length` keys along `axis` of ``[M', ..., S, ...]``, from a start per group."""
    if array.shape[axis] == length:
        return array
    if array.shape[0] == 1:
        return lax.dynamic_slice_in_dim(array, start[0], length, axis=axis)
    return jax.vmap(lambda a, i: lax.dynamic_slice_in_dim(a, i, length, axis=axis - 1))(
        array, start
    )


def add_keys(total, update, start):
    """Adds ``[M', length, ...]`` to the keys of `total` that `slice_keys` takes."""
    length = update.shape[1]
    if total.shape[1] == length:
        return total + update
    if total.shape[0] == 1:
        update = update + lax.dynamic_slice_in_dim(total, start[0], length, axis=1)
        return lax.dynamic_update_slice_in_dim(total, update, start[0], axis=1)

    def add(a, u, i):
        u = u + lax.dynamic_slice_in_dim(a, i, length, axis=0)
        return lax.dynamic_update_slice_in_dim(a, u, i, axis=0)

    return jax.vmap(add)(total, update, start)


class Bias(NamedTuple):
    """A logit bias, never repeated for what it is the same for.

    Attributes:
      array: ``[P, G | 1, T | 1, S | 1]``, T padded to whole tiles.
      places: int32 ``[M']``, for every group its place on the first axis.
    """

    array: jax.Array
    places: jax.Array


def tile_bias(plan: Plan, bias: Bias, first, start, length: int, heads: int, dtype):
    """The part of a tile, ``[M', R, length]``."""
    at, sizes = _bias_part(plan, bias.array, first, length)

    def take(place, begin):
        return lax.dynamic_slice(bias.array, at(place, begin), sizes)[0].astype(dtype)

    groups = start.shape[0]
    if groups == 1:
        part = take(bias.places[0], start[0])[None]
    else:
        part = jax.vmap(take)(bias.places, start)
    part = jnp.broadcast_to(part, (groups, heads, plan.block_q, length))
    return part.reshape(groups, -1, length)


def bias_rows(plan: Plan, shape, update, start, heads: int):
    """``[M', R, length]``, summed like `shape`, that of a `Bias`, with zeros for all other keys."""
    groups, _, length = update.shape
    update = update.reshape(groups, heads, plan.block_q, length)
    shared = tuple(axis for axis in (1, 2, 3) if shape[axis] == 1)
    update = update.sum(shared, keepdims=True)
    if update.shape[3] == shape[3]:
        return update
    total = full_varying((*update.shape[:3], shape[3]), 0, update.dtype, like=update)
    return jax.vmap(lambda a, u, i: lax.dynamic_update_slice_in_dim(a, u, i, axis=2))(
        total, update, start
    )


def add_bias(total, update, places, first):
    """Adds what `bias_rows` returns to `total`, like the array of a `Bias`."""

    def add(total, place, part):
        at = (place, *(jnp.zeros_like(place),) * 3)
        if total.shape[2] != 1:
            at = (at[0], at[1], first, at[3])
        part = part[None] + lax.dynamic_slice(total, at, (1, *part.shape))
        return lax.dynamic_update_slice(total, part, at)

    if update.shape[0] == 1:
        return add(total, places[0], update[0])
    # One after the other: groups may share a place, and the order of a sum must not vary.
    return lax.scan(lambda total, group: (add(total, *group), None), total, (places, update))[0]


def _bias_part(plan: Plan, array, first, length: int):
    """Where a tile begins in the array of a `Bias`, by place and first key; and its sizes."""
    _, heads, rows, cols = array.shape
    sizes = (1, heads, min(rows, plan.block_q), min(cols, length))

    def at(place, begin):
        zero = jnp.zeros_like(place)
        return place, zero, zero if rows == 1 else first, zero if cols == 1 else begin

    return at, sizes


def tile_mask(plan: Plan, mask: Mask, first, start, length: int, heads: int, num_queries: int):
    """Bool ``[M', R, length]``; False for the rows that only pad the last tile."""
    rows = first + jnp.arange(plan.block_q, dtype=jnp.int32)[None, :, None]
    cols = start[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None]
    positions = rows if mask.offset is None else rows + mask.offset[:, None, None]
    lengths = None if mask.lengths is None else mask.lengths[:, None, None]
    valid = positional_mask(mask, positions, cols, lengths) & (rows < num_queries)
    if mask.query_segments is not None:
        query_ids = lax.dynamic_slice_in_dim(mask.query_segments, first, plan.block_q, axis=1)
        key_ids = slice_keys(mask.key_segments, start, length)
        valid &= query_ids[:, :, None] == key_ids[:, None, :]
    valid = valid[:, None]
    if mask.dense is not None:
        dense = mask.dense
        if dense.shape[2] != 1:
            dense = lax.dynamic_slice_in_dim(dense, first, plan.block_q, axis=2)
        valid = valid & slice_keys(dense, start, length, axis=3)
    shape = (start.shape[0], heads, plan.block_q, length)
    return jnp.broadcast_to(valid, shape).reshape(shape[0], -1, length)
