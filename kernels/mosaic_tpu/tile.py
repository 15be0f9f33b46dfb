"""Arithmetic, masks and layouts of one tile, as pure functions.

A tile has queries along its rows and keys along its columns; in the kernel of the key gradients it
is the other way round. Scalars of the rows form a column ``[R, 1]``, scalars of the columns a row
``[1, L]``. In memory both are stored as rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from lla.kernels.tiles import MaskSpec, SequenceMask

# Below every logit. Finite, so that the difference of two of them is not NaN.
LOWEST = -1e30
# The contracted dimension of each operand of a product.
INNER, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How products are computed.

    All operands of products have `dtype`. Computed float32 numbers are rounded to it, or split into
    two parts if `bf16x2`; with float32 nothing is rounded. Sums are accumulated in float32.
    """

    dtype: Any
    bf16x2: bool

    @property
    def coarse(self) -> bool:
        """Whether weights are rounded to a single bfloat16 part."""
        return self.dtype != jnp.float32 and not self.bf16x2

    def parts(self, array) -> tuple:
        """The float32 `array` as operands of products."""
        if self.dtype == jnp.float32:
            return (array,)
        high = round_to_bfloat16(array)
        if self.coarse:
            return (high.astype(self.dtype),)
        low = round_to_bfloat16(array - high)
        return high.astype(self.dtype), low.astype(self.dtype)

    def rounded(self, array):
        """The float32 numbers that `parts` represents."""
        if self.dtype == jnp.float32:
            return array
        high = round_to_bfloat16(array)
        return high + round_to_bfloat16(array - high) if self.bf16x2 else high

    def weighted_sum(self, weights, vectors):
        """``weights @ vectors`` with rounded weights, and the row sums of these weights."""
        total = self.rounded(weights).sum(-1, keepdims=True)
        return product(self.parts(weights), (vectors,)), total


def round_to_bfloat16(array):
    """Rounds float32 to bfloat16 precision.

    Works on the bits, since compilers may drop a pair of conversions.
    """
    bits = lax.bitcast_convert_type(array, jnp.int32)
    bits = (bits + 0x8000) & jnp.int32(-0x10000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def product(a: tuple, b: tuple, contracted=INNER):
    """The float32 product of two sums of parts, without the product of the low parts."""
    precision = lax.Precision.HIGHEST if a[0].dtype == jnp.float32 else None
    total = None
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            if i + j < max(len(a), len(b)):
                term = lax.dot_general(
                    x, y, (contracted, ((), ())), precision=precision,
                    preferred_element_type=jnp.float32,
                )  # fmt: skip
                total = term if total is None else total + term
    return total


def to_column(row):
    """``[1, n] -> [n, 1]`` exactly, by selecting the diagonal."""
    return _diagonal(row, axis=1)


def to_row(column):
    """``[n, 1] -> [1, n]`` exactly."""
    return _diagonal(column, axis=0)


def _diagonal(vector, axis: int):
    size = vector.size
    shape = (size, size)
    on = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)
    spread = jnp.where(on, jnp.broadcast_to(vector, shape), jnp.zeros(shape, vector.dtype))
    return spread.sum(axis, keepdims=True)


def ids_to_column(row):
    """`to_column` for int32, in halves that float32 holds: hardware may lack integer sums."""
    high, low = row >> 16, row & 0xFFFF
    high, low = (to_column(half.astype(jnp.float32)).astype(jnp.int32) for half in (high, low))
    return (high << 16) | low


# ---------------------------------------------------------------------------------------------
# Masks


def visible(spec: MaskSpec, length, positions, keys, query_ids=None, key_ids=None):
    """The mask of a tile, bool; of `positions` and `keys` one is a row and one a column."""
    valid = keys < length
    if spec.is_causal or spec.window is not None:
        distance = keys - positions
        if spec.is_causal:
            valid = valid & (distance <= 0)
        if spec.window is not None:
            left, right = spec.window
            valid = valid & (distance >= -left) & (distance <= right)
    if spec.segments:
        valid = valid & (query_ids == key_ids)
    return valid


def key_tiles(spec: MaskSpec, sequence: SequenceMask, first, last, size: int):
    """Tiles ``[low, high)`` of `size` keys that any of the queries ``first`` to ``last`` sees."""
    low, high = jnp.int32(0), sequence.length
    begin, end = first + sequence.offset, last + sequence.offset + 1
    if spec.is_causal:
        high = jnp.minimum(high, end)
    if spec.window is not None:
        left, right = spec.window
        low, high = jnp.maximum(low, begin - left), jnp.minimum(high, end + right)
    return _tiles(low, high, size)


def row_tiles(
    spec: MaskSpec, sequence: SequenceMask, first, keys: int, queries: int, group: int, size: int
):
    """Tiles ``[low, high)`` of `size` rows that see any of the keys ``[first, first + keys)``.

    A query has `group` rows.
    """
    low, high = jnp.int32(0), jnp.int32(queries)
    begin = first - sequence.offset  # the query at the position of the first key
    end = jnp.minimum(first + keys, sequence.length) - sequence.offset
    if spec.is_causal:
        low = jnp.maximum(low, begin)
    if spec.window is not None:
        left, right = spec.window
        low, high = jnp.maximum(low, begin - right), jnp.minimum(high, end + left)
    high = jnp.where(first < sequence.length, high, 0)
    # Positions far outside would overflow when multiplied by `group`.
    low, high = (jnp.clip(n, 0, queries) for n in (low, high))
    return _tiles(low * group, high * group, size)


def _tiles(low, high, size: int):
    high = lax.div(jnp.maximum(high, 0) + (size - 1), jnp.int32(size))
    return jnp.minimum(lax.div(low, jnp.int32(size)), high), high
