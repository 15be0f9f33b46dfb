"""What the kernels of recurrences share: chunks of 64 tokens as 64 x 64 matrices of a warpgroup."""

from __future__ import annotations

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.tile import (
    LOG2E,
    ROW_BLOCK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    Arithmetic,
    Transposed,
    by_column,
    by_row,
    in_parts,
    narrow_transforms,
)

CHUNK = ROW_BLOCK
"""Tokens of a chunk, and coordinates of a block of keys or values."""

SQUARE = (CHUNK, CHUNK)

_DTYPE = jnp.bfloat16  # of every factor of a product
_MASKED = -1e4  # an exponent that stands for minus infinity


@dataclasses.dataclass(frozen=True)
class Square:
    """The arithmetic of a warpgroup with 64 x 64 matrices."""

    arithmetic: Arithmetic

    def multiply(self, *sums, start=None, shape=SQUARE):
        """The float32 sum of ``a @ b`` over the pairs of each of `sums`, plus those of `start`.

        The results have `shape`, or those of `start`.

        ``a`` is in registers, or in shared memory and maybe `Transposed`; ``b`` in shared memory.
        """
        if self.arithmetic.interpreted:
            found = []
            for i, pairs in enumerate(sums):
                total = 0.0 if start is None else start[i]
                for a, b in pairs:
                    total = total + self._plain(a, b)
                found.append(total)
            return tuple(found)

        def issue(*accumulators):
            for accumulator, pairs in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(accumulator, _operand(a), _operand(b))

        if start is not None:
            return pl.run_state(lambda refs: issue(*refs))(
                tuple(plgpu.ACC.init(total) for total in start)
            )

        def scoped(*accumulators):
            issue(*accumulators)
            return tuple(accumulator[...] for accumulator in accumulators)

        return pl.run_scoped(scoped, *[plgpu.ACC(shape, jnp.float32) for _ in sums])

    def _plain(self, a, b):
        def value(x):
            if isinstance(x, Transposed):
                return x.ref[...].T
            return x if isinstance(x, jax.Array) else x[...]

        out = lax.dot(value(a), value(b), preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # these reads have to end before the tile is overwritten
        return out

    def load(self, ref):
        """A tile of shared memory in float32."""
        return self.arithmetic.load(ref).astype(jnp.float32)

    def load_wide(self, ref):
        """A matrix of global memory, as it is."""
        if self.arithmetic.interpreted:
            return ref[...]
        return plgpu.load(ref, layout=WGMMA, optimized=False)

    def parts(self, matrix):
        """`matrix` as the sum of two 16-bit parts."""
        return in_parts(matrix, _DTYPE, True)

    def rows(self, ref):
        return self.arithmetic.load(ref, WGMMA_ROW)

    def columns(self, ref):
        return self.arithmetic.load(ref, WGMMA_COL)

    def sums(self, rows, columns, where):
        """The parts of the sums of logarithms of a chunk, each by row and by column."""
        return [
            (self.rows(row.at[where]), self.columns(column.at[where]))
            for row, column in zip(rows, columns, strict=True)
        ]

    def index(self, axis: int, shape=SQUARE):
        """The row or the column of every element.

        The barrier keeps the compiler from computing the masks of a chunk once for all chunks, for
        which there are no registers.
        """
        if axis == 1:
            return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
        row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=WGMMA_ROW)
        if not self.arithmetic.interpreted:
            row = lax.optimization_barrier(row)
        return by_row(row, shape)

    def pair(self, upper, lower, *, transposed: bool):
        """Decays from the token of a column to that of a row, 0 above the diagonal; or turned."""
        early, late = (0, 1) if transposed else (1, 0)
        along = (by_row, by_column)

        def between(part):
            return along[late](part[late], SQUARE) - along[early](part[early], SQUARE)

        visible = self.index(late) >= self.index(early)
        exponent = between(upper) + between(lower)
        return jnp.where(visible, jnp.exp2(jnp.where(visible, exponent, _MASKED) * LOG2E), 0.0)

    def inverse(self, matrix, tiles):
        """``(1 + matrix)^-1`` of a strictly lower triangular matrix; `tiles` are four of scratch.

        As `lla.mixers.chunks.unit_lower_inverse`: with X the inverse of the diagonal blocks of size
        s, the blocks of ``X matrix X`` below them complete those of size 2 s.
        """
        row, column = self.index(0), self.index(1)

        def below(size: int):  # the highest bit in which row and column differ is `size`
            different = row ^ column
            return (row > column) & (different >= size) & (different < 2 * size)

        inverse = jnp.where(row == column, 1.0, 0.0) - jnp.where(below(1), matrix, 0.0)
        matrix_tiles, inverse_tiles = tiles[:2], tiles[2:]
        store_parts(matrix, matrix_tiles)
        for size in (2, 4, 8, 16, 32):
            parts = store_parts(inverse, inverse_tiles)
            plgpu.commit_smem()
            (left,) = self.multiply(products_of_parts(parts, matrix_tiles))
            left = in_parts(left, _DTYPE, True)
            (both,) = self.multiply(products_of_parts(left, inverse_tiles))
            inverse = inverse - jnp.where(below(size), both, 0.0)
        return inverse


def _operand(x):
    return x.ref.transpose((1, 0)) if isinstance(x, Transposed) else x


def products_of_parts(parts, tiles):
    """The pairs of two numbers in two parts each, without the product of the small ones."""
    return [(parts[0], tiles[0]), (parts[0], tiles[1]), (parts[1], tiles[0])]


def store_parts(matrix, tiles):
    """Writes the two 16-bit parts of `matrix` to two tiles, and returns them."""
    parts = in_parts(matrix, _DTYPE, True)
    for part, tile in zip(parts, tiles, strict=True):
        tile[...] = part
    return parts


def narrow_tiles(*leading: int):
    """Scratch type of 16-bit matrices."""
    return plgpu.SMEM((*leading, *SQUARE), _DTYPE, transforms=narrow_transforms(CHUNK))


def program_index(heads: int):
    """Batch and head of a program instance."""
    program = lax.axis_index("program")
    return lax.div(program, jnp.int32(heads)), lax.rem(program, jnp.int32(heads))


class ProgramSlices:
    """Where the arrays of a program instance are; `group` heads share queries and keys.

    Keys, and the rows of the state, have `blocks` blocks of 64 coordinates.
    """

    def __init__(self, heads: int, group: int, blocks: int):
        self.b, self.h = program_index(heads)
        self.kv = lax.div(self.h, jnp.int32(group))
        self.columns = [pl.ds(i * CHUNK, CHUNK) for i in range(blocks)]

    def tokens(self, c):
        return pl.ds(c * CHUNK, CHUNK)

    def keys(self, array, c, shared: bool = True):
        """One place for each block of coordinates."""
        head = self.kv if shared else self.h
        return [array.at[self.b, self.tokens(c), head, columns] for columns in self.columns]

    def values(self, array, c):
        return array.at[self.b, self.tokens(c), self.h]

    def states(self, array, c):
        return [array.at[self.b, self.h, c, columns] for columns in self.columns]

    def state(self, array):
        return [array.at[self.b, self.h, columns] for columns in self.columns]

    def row(self, square: Square, array, c):
        rows = square.rows(array.at[self.b, self.h, self.tokens(c)])
        return by_row(rows, SQUARE)

    def sums(self, square: Square, given, c):
        gates = given["gates"]
        where = (self.b, self.h, self.tokens(c))
        return square.sums((gates.upper, gates.lower), given["columns"], where)
