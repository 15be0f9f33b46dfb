"""Building blocks of the Hopper kernels: layouts, products, masks, and ranges of tiles.

A program instance (CTA) has two or more consumer warpgroups, which compute 64 rows each, and one
producer warpgroup, which streams tiles from global memory. In a consumer a float32 array
``[64, C]`` has the register layout of a wgmma accumulator (`WGMMA`). A vector with one entry per
row, or per column, has the layout of a reduction of such an array (`WGMMA_ROW`, `WGMMA_COL`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.tiles import MaskSpec, SequenceMask

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = WGMMA.reduce(1)
WGMMA_COL = WGMMA.reduce(0)
WGMMA_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
"""For matrices whose transpose lies in memory."""

ROW_BLOCK = 64
"""Rows of a consumer warpgroup: the M of a wgmma instruction."""

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Initial value of a running maximum. Finite, so that a fully masked tile gives weights of zero.
LOWEST = -1e30


def narrow_transforms(*sizes: int) -> tuple:
    """Shared-memory layout of 16-bit tiles with 32 columns or a multiple of 64.

    The operands of a product share one layout. Its swizzle is limited by all of `sizes`: the number
    of columns, and the smallest number of rows that a product sums over.
    """
    columns = min((64, *sizes))
    return (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))


def wide_transforms() -> tuple:
    """Shared-memory layout of float32 tiles with a multiple of 32 columns."""
    return (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


ONES = 16
"""Columns of a tile of ones: the fewest that its shared-memory layout allows."""


def ones_transforms() -> tuple:
    """Shared-memory layout of a 16-bit tile of ones ``[n, ONES]``."""
    return (plgpu.TilingTransform((8, ONES)), plgpu.SwizzleTransform(2 * ONES))


class Transposed(NamedTuple):
    """An operand of a product whose transpose is stored in shared memory."""

    ref: Any


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Products and loads: Hopper instructions, or plain JAX for the interpreter.

    The GPU interpreter of JAX 0.11 supports neither accumulators that outlive a scope nor wgmma
    operands in registers.

    Attributes:
      interpreted: whether to use plain JAX.
      hold_sums: whether `summing` keeps its sums in accumulators throughout the loop. Otherwise it
        waits for them after every tile, which takes fewer registers.
      issued: number of products issued so far, in program order, while a kernel is traced.
    """

    interpreted: bool = False
    hold_sums: bool = True
    issued: list[int] = dataclasses.field(default_factory=lambda: [0], compare=False)

    def load(self, ref, layout=WGMMA):
        if self.interpreted:
            return ref[...]
        # The loads of a vector's elements cannot be coalesced into wider ones.
        return plgpu.load(ref, layout=layout, optimized=layout is WGMMA)

    def load_row(self, ref):
        """A vector ``[128]`` with one element per thread."""
        if self.interpreted:
            return ref[...]
        layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
        return plgpu.load(ref, layout=layout, optimized=False)

    def load_transposed(self, ref):
        """The transpose of a matrix in global memory, with layout `WGMMA_TRANSPOSED`."""
        if self.interpreted:
            return ref[...].T
        return plgpu.load(ref.transpose((1, 0)), layout=WGMMA_TRANSPOSED, optimized=False)

    def store_transposed(self, ref, matrix):
        """Writes the transpose of a matrix with layout `WGMMA` to global memory."""
        if self.interpreted:
            ref[...] = matrix.T
        else:
            ref.transpose((1, 0))[...] = plgpu.layout_cast(matrix, WGMMA_TRANSPOSED)

    def with_products(self, columns: int, use, *sums):
        """Issues products, and returns ``use(*reads)``, which runs while they are in flight.

        Each of `sums` is a list of pairs ``(a, b)`` with ``a [64, d]`` in shared memory or
        registers and ``b [columns, d]`` in shared memory. The matching function in `reads` waits
        for the float32 sum of the ``a @ b^T`` and returns it. Products complete in the order of
        issue: once a read returns, all earlier products are done.
        """
        if self.interpreted:
            results = [sum(self._dot(a, b, True) for a, b in pairs) for pairs in sums]
            return use(*(lambda result=result: result for result in results))

        def issue(*accumulators):
            reads = []
            for accumulator, pairs in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    self._issue(accumulator, a, b.transpose((1, 0)))
                reads.append(functools.partial(self._read, accumulator, self.issued[0]))
            return use(*reads)

        scratch = [plgpu.ACC((ROW_BLOCK, columns), jnp.float32) for _ in sums]
        return pl.run_scoped(issue, *scratch)

    def _issue(self, accumulator, a, b):
        plgpu.wgmma(accumulator, a, b.ref.transpose((1, 0)) if isinstance(b, Transposed) else b)
        self.issued[0] += 1

    def _read(self, accumulator, number: int):
        """The accumulator, once the first `number` products are done."""
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=self.issued[0] - number)

    def products(self, columns: int, *sums):
        """The sums of `with_products`, after waiting for all of them."""
        return self.with_products(columns, lambda *reads: tuple(read() for read in reads), *sums)

    def accumulate(self, totals, *sums):
        """Adds the products ``a @ b`` of each list of pairs to its total, and waits for them.

        ``a [64, n]`` is in registers, ``b [n, c]`` in shared memory or `Transposed`.
        """
        if self.interpreted:
            return tuple(
                total + sum(self._product(a, b) for a, b in pairs)
                for total, pairs in zip(totals, sums, strict=True)
            )

        def issue(accumulators):
            for accumulator, pairs in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    self._issue(accumulator, a, b)

        return pl.run_state(issue)(tuple(plgpu.ACC.init(total) for total in totals))

    def accumulate_transposed(self, totals, *sums):
        """Adds the products ``a^T @ b`` of each list of pairs to its total, and waits for them.

        ``a [n, 64]`` and ``b [n, c]`` are in shared memory; b may be `Transposed`.
        """
        if self.interpreted:
            return tuple(
                total + sum(self._product(a[...].T, b) for a, b in pairs)
                for total, pairs in zip(totals, sums, strict=True)
            )

        def issue(accumulators):
            for accumulator, pairs in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    self._issue(accumulator, a.transpose((1, 0)), b)

        return pl.run_state(issue)(tuple(plgpu.ACC.init(total) for total in totals))

    def summing(self, columns: tuple[int, ...], loop, body, carry):
        """Runs `body` over the tiles of `loop`, with accumulators ``[64, c]`` for c in `columns`.

        Args:
          columns: widths of the accumulators.
          loop: ``loop(body, carry)`` runs ``carry = body(j, carry, masked)`` over the tiles.
          body: ``body(j, carry, masked, add)`` calls ``add(*sums)``, which is like `accumulate` but
            does not wait: its operands must stay in place until the next `products` have returned.
          carry: the first carry.

        Returns:
          the last carry and the tuple of sums.
        """
        if self.interpreted or not self.hold_sums:

            def step(j, carried, masked):
                carry, totals = carried
                box = [totals]

                def add(*sums):
                    box[0] = self.accumulate(box[0], *sums)

                return body(j, carry, masked, add), box[0]

            zeros = tuple(full((ROW_BLOCK, c), 0, WGMMA) for c in columns)
            return loop(step, (carry, zeros))

        def scoped(*accumulators):
            def add(*sums):
                for accumulator, pairs in zip(accumulators, sums, strict=True):
                    for a, b in pairs:
                        self._issue(accumulator, a, b)

            last = loop(lambda j, carry, masked: body(j, carry, masked, add), carry)
            return last, tuple(accumulator[...] for accumulator in accumulators)

        scratch = [plgpu.ACC((ROW_BLOCK, c), jnp.float32) for c in columns]
        return pl.run_scoped(scoped, *scratch)

    def _product(self, a, b):
        return self._dot(a, b.ref, True) if isinstance(b, Transposed) else self._dot(a, b, False)

    def _dot(self, a, b, transposed: bool):
        a = a if isinstance(a, jax.Array) else a[...]
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        out = lax.dot_general(a, b[...], dims, preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the reads have to finish before the tile is overwritten
        return out


def full(shape, value, layout, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def by_row(vector, shape):
    """``[R] -> [R, C]``."""
    return lax.broadcast_in_dim(vector, shape, [0])


def by_column(vector, shape):
    """``[C] -> [R, C]``."""
    return lax.broadcast_in_dim(vector, shape, [1])


def rounded(array, dtype):
    """`array` in 16 bits, and its row sums after rounding.

    The barrier keeps the conversion packed, two numbers per instruction. Without it the compiler
    converts one number at a time, since both forms are used, at an eighth of the rate.
    """
    array = lax.optimization_barrier(array.astype(dtype))
    return array, array.astype(jnp.float32).sum(axis=1)


def in_parts(array, dtype, bf16x2: bool) -> tuple[jax.Array, ...]:
    """`array` rounded to 16 bits, or split into a sum of two 16-bit parts if `bf16x2`."""
    high = array.astype(dtype)
    if not bf16x2:
        return (high,)
    high = lax.optimization_barrier(high)
    return high, (array - high.astype(jnp.float32)).astype(dtype)


def rounded_parts(array, dtype, bf16x2: bool, summed: bool = True):
    """`in_parts`, and the row sums of what the parts represent (None unless `summed`)."""
    if not summed:
        return in_parts(array, dtype, bf16x2), None
    if bf16x2:
        return in_parts(array, dtype, True), array.sum(axis=1)
    array, total = rounded(array, dtype)
    return (array,), total


def row_dot(a, b):
    return (a * b).sum(axis=1)


# ---------------------------------------------------------------------------------------------
# Masks


class TileRange(NamedTuple):
    """Tiles ``[low, high)``; those in ``[full_low, full_high)`` are visible throughout."""

    low: jax.Array
    high: jax.Array
    full_low: jax.Array
    full_high: jax.Array


def _floor_tiles(position, size: int):
    return lax.div(jnp.maximum(position, 0), jnp.int32(size))


def _ceil_tiles(position, size: int):
    return lax.div(jnp.maximum(position, 0) + (size - 1), jnp.int32(size))


def key_tiles(spec: MaskSpec, mask: SequenceMask, first, rows: int, size: int) -> TileRange:
    """Key tiles of `size` that the query rows ``[first, first + rows)`` see."""
    begin = first + mask.offset  # position of the first row; end: after the last one
    end = begin + rows
    high, full_high = mask.length, mask.length
    low = full_low = jnp.int32(0)
    if spec.is_causal:
        high, full_high = jnp.minimum(high, end), jnp.minimum(full_high, begin + 1)
    if spec.window is not None:
        left, right = spec.window
        high, full_high = jnp.minimum(high, end + right), jnp.minimum(full_high, begin + 1 + right)
        low, full_low = begin - left, end - 1 - left
    return _tile_range(spec, low, high, full_low, full_high, size)


def query_tiles(
    spec: MaskSpec, mask: SequenceMask, first, keys: int, size: int, num_queries: int
) -> TileRange:
    """Query tiles of `size` that see any of the keys ``[first, first + keys)``."""
    begin = first - mask.offset  # the query at the position of the first key
    end = begin + keys
    low = full_low = jnp.int32(0)
    high = full_high = jnp.int32(num_queries)
    if spec.is_causal:
        low, full_low = begin, end - 1
    if spec.window is not None:
        left, right = spec.window
        low, full_low = jnp.maximum(low, begin - right), jnp.maximum(full_low, end - 1 - right)
        high, full_high = jnp.minimum(high, end + left), jnp.minimum(full_high, begin + 1 + left)
    high = jnp.where(first < mask.length, high, 0)
    full_high = jnp.where(first + keys <= mask.length, full_high, 0)
    return _tile_range(spec, low, high, full_low, full_high, size)


def _tile_range(spec: MaskSpec, low, high, full_low, full_high, size: int) -> TileRange:
    high = _ceil_tiles(high, size)
    low = jnp.minimum(_floor_tiles(low, size), high)
    if spec.segments:
        return TileRange(low, high, low, low)
    full_low = jnp.clip(_ceil_tiles(full_low, size), low, high)
    full_high = jnp.clip(_floor_tiles(full_high, size), full_low, high)
    return TileRange(low, high, full_low, full_high)


def over_tiles(spec: MaskSpec, tiles: TileRange, body, carry, *, low_edge: bool):
    """Runs ``carry = body(tile, carry, masked)`` over the tiles in order.

    `low_edge` says whether partly masked tiles can precede the full ones. If not, the loop over
    them is omitted.
    """

    def loop(low, high, masked, carry):
        return lax.fori_loop(low, high, lambda j, c: body(j, c, masked), carry)

    if not spec.segments:
        if low_edge:
            carry = loop(tiles.low, tiles.full_low, True, carry)
        carry = loop(tiles.full_low, tiles.full_high, False, carry)
    return loop(tiles.full_high, tiles.high, True, carry)


def visible(
    spec: MaskSpec, mask: SequenceMask, shape, first_query, first_key, *, transposed: bool,
    query_segments=None, key_segments=None,
):  # fmt: skip
    """The mask of a tile, bool: queries by keys, or keys by queries if `transposed`.

    Segment ids are vectors along the axis of their queries or keys.
    """
    query_axis = 1 if transposed else 0

    def positions(axis):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)

    keys = positions(1 - query_axis) + first_key
    valid = keys < mask.length
    if spec.is_causal or spec.window is not None:
        distance = keys - (positions(query_axis) + (first_query + mask.offset))
        if spec.is_causal:
            valid = valid & (distance <= 0)
        if spec.window is not None:
            left, right = spec.window
            valid = valid & (distance >= -left) & (distance <= right)
    if spec.segments:
        along = (by_column, by_row) if transposed else (by_row, by_column)
        valid = valid & (along[0](query_segments, shape) == along[1](key_segments, shape))
    return valid
