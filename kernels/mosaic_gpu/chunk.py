"""Building blocks of the recurrent kernels: a warpgroup, chunks of 64 tokens, 64 x 64 matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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
"""Tokens of a chunk, and coordinates of a block of a key or value."""

SQUARE = (CHUNK, CHUNK)

_DTYPE = jnp.bfloat16  # of the operands of products
_MASKED = -1e4  # exponent of a masked entry


@dataclasses.dataclass(frozen=True)
class ChunkMath:
    """Arithmetic on 64 x 64 matrices in the registers of a warpgroup."""

    arithmetic: Arithmetic

    def multiply(self, *sums, start=None, shape=SQUARE):
        """For each list of pairs in `sums`, the float32 sum of the products ``a @ b``.

        Args:
          sums: ``a`` is in registers or shared memory, ``b`` in shared memory; operands in shared
            memory may be `Transposed`.
          start: initial values of the sums; None for zeros.
          shape: of the results, without `start`.
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
        plgpu.commit_smem()  # the reads have to finish before the tile is overwritten
        return out

    def load(self, ref):
        """Loads a tile from shared memory, as float32."""
        return self.arithmetic.load(ref).astype(jnp.float32)

    def load_wide(self, ref):
        """Loads a matrix from global memory, in its own dtype."""
        if self.arithmetic.interpreted:
            return ref[...]
        return plgpu.load(ref, layout=WGMMA, optimized=False)

    def parts(self, matrix):
        """`matrix` split into a sum of two 16-bit parts."""
        return in_parts(matrix, _DTYPE, True)

    def rows(self, ref):
        return self.arithmetic.load(ref, WGMMA_ROW)

    def columns(self, ref):
        return self.arithmetic.load(ref, WGMMA_COL)

    def sums(self, rows, columns, where):
        """The running sums of log-decays of a chunk: each part as rows and as columns."""
        return [
            (self.rows(row.at[where]), self.columns(column.at[where]))
            for row, column in zip(rows, columns, strict=True)
        ]

    def index(self, axis: int, shape=SQUARE):
        """The row (axis 0) or column (axis 1) of every element.

        The barrier keeps the compiler from hoisting masks out of the loop over chunks, where they
        would occupy registers throughout.
        """
        if axis == 1:
            return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
        row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=WGMMA_ROW)
        if not self.arithmetic.interpreted:
            row = lax.optimization_barrier(row)
        return by_row(row, shape)

    def pair(self, upper, lower, *, transposed: bool):
        """Decays from the token of a column to that of a row, and 0 above the diagonal.

        Or the transpose of that.
        """
        early, late = (0, 1) if transposed else (1, 0)
        along = (by_row, by_column)

        def between(part):
            return along[late](part[late], SQUARE) - along[early](part[early], SQUARE)

        visible = self.index(late) >= self.index(early)
        exponent = between(upper) + between(lower)
        return jnp.where(visible, jnp.exp2(jnp.where(visible, exponent, _MASKED) * LOG2E), 0.0)

    def inverse(self, matrix, tiles):
        """``(1 + matrix)^-1`` of a strictly lower triangular matrix, with four scratch `tiles`.

        The algorithm of `lla.mixers.chunks.unit_lower_inverse`: let X be the inverse of the
        diagonal blocks of size s. Then the blocks of ``-X matrix X`` below them complete the
        inverses of the diagonal blocks of size 2 s.
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
    """Pairs whose products add up to that of two operands in two parts, without low times low."""
    return [(parts[0], tiles[0]), (parts[0], tiles[1]), (parts[1], tiles[0])]


def store_parts(matrix, tiles):
    """Writes `matrix` to two tiles as a sum of two 16-bit parts; returns the parts."""
    parts = in_parts(matrix, _DTYPE, True)
    for part, tile in zip(parts, tiles, strict=True):
        tile[...] = part
    return parts


def narrow_tiles(*leading: int):
    """Scratch type of 16-bit 64 x 64 matrices."""
    return plgpu.SMEM((*leading, *SQUARE), _DTYPE, transforms=narrow_transforms(CHUNK))


class DoubleBuffer(NamedTuple):
    """Inputs of the chunks, in two slots each: the next chunk is loaded during the current one."""

    sources: Callable[[Any], Any]  # a chunk's slices in global memory
    tiles: Any  # scratch, ``[2, ...]``
    loaded: Any  # two barriers with an arrival for each of `tiles`
    count: int  # chunks

    def start(self):
        """Loads the first chunk."""
        self._load(0, 0)

    def slot(self, c):
        """The slot of chunk c."""
        return lax.rem(c, jnp.int32(2))

    def wait(self, c, slot):
        """Waits for chunk c, which is in `slot`, and starts to load the next one."""
        plgpu.barrier_wait(self.loaded.at[slot])
        pl.when(c + 1 < self.count)(lambda: self._load(c + 1, 1 - slot))

    def _load(self, c, slot):
        tiles = [tile.at[slot] for tile in self.tiles]
        load_tiles(self.sources(c), tiles, self.loaded.at[slot])


def load_tiles(sources, tiles, loaded) -> None:
    """Starts to copy `sources` in global memory to `tiles`; each copy arrives at `loaded`."""
    for source, tile in zip(sources, tiles, strict=True):
        plgpu.copy_gmem_to_smem(source, tile, loaded)


def program_index(heads: int):
    """Batch and head of a program instance."""
    program = lax.axis_index("program")
    return lax.div(program, jnp.int32(heads)), lax.rem(program, jnp.int32(heads))


class ProgramSlices:
    """A program instance's slices of arrays in global memory.

    `group` heads share queries and keys. Keys, and the rows of the state, consist of `blocks`
    blocks of 64 coordinates.
    """

    def __init__(self, heads: int, group: int, blocks: int):
        self.b, self.h = program_index(heads)
        self.kv = lax.div(self.h, jnp.int32(group))
        self.columns = [pl.ds(i * CHUNK, CHUNK) for i in range(blocks)]

    def tokens(self, c):
        return pl.ds(c * CHUNK, CHUNK)

    def keys(self, array, c, shared: bool = True):
        """Chunk c of queries or keys, one slice per block of coordinates."""
        head = self.kv if shared else self.h
        return [array.at[self.b, self.tokens(c), head, columns] for columns in self.columns]

    def values(self, array, c):
        return array.at[self.b, self.tokens(c), self.h]

    def inputs(self, given, c):
        """Chunk c of queries, keys and values."""
        keys = [*self.keys(given["query"], c), *self.keys(given["key"], c)]
        return [*keys, self.values(given["value"], c)]

    def states(self, array, c):
        return [array.at[self.b, self.h, c, columns] for columns in self.columns]

    def state(self, array):
        return [array.at[self.b, self.h, columns] for columns in self.columns]

    def row(self, math: ChunkMath, array, c):
        rows = math.rows(array.at[self.b, self.h, self.tokens(c)])
        return by_row(rows, SQUARE)

    def sums(self, math: ChunkMath, given, c):
        gates = given["gates"]
        where = (self.b, self.h, self.tokens(c))
        return math.sums((gates.upper, gates.lower), given["columns"], where)

    def store_vectors(self, vectors, scratch, out, c):
        """Writes vectors of the tokens of chunk c to ``out [len(vectors), B, N, T]``."""
        for index, vector in enumerate(vectors):
            scratch.at[index][...] = vector
        plgpu.commit_smem()
        for index in range(len(vectors)):
            target = out.at[index, self.b, self.h, self.tokens(c)]
            plgpu.copy_smem_to_gmem(scratch.at[index], target)

    def walk(self, math: ChunkMath, count: int, advance, first, last):
        """Runs ``state = advance(i, state)`` `count` times.

        The state is a tuple of blocks, loaded from the array `first` and written to `last`.
        """
        state = tuple(math.load_wide(ref) for ref in self.state(first))
        state = lax.fori_loop(0, count, advance, state)
        for part, target in zip(state, self.state(last), strict=True):
            target[...] = part


def gated_operands(query, key, value, gates, **others) -> dict:
    """Operands of a kernel whose `gates` have the sums `upper` and `lower` of log-decays.

    These are passed a second time, to be loaded as columns: the compiler would merge loads of one
    operand with two layouts.
    """
    columns = (gates.upper, gates.lower)
    return {
        "query": query, "key": key, "value": value, "gates": gates, "columns": columns, **others
    }  # fmt: skip


DECAY_VECTORS = ("entering", "leaving", "inside", "through")
"""Contributions to the cotangents of the log-decays, sums over the coordinates of a token.

"entering" acts through the decay from the start of the chunk to the token, "leaving" through that
from the token to the end, and "inside" through those between tokens. The sum of "through" over a
chunk, times the decay over the whole chunk, acts through that decay.
"""
