"""The gated delta rule on Hopper: one warpgroup walks over the chunks of one head.

Chunks of 64 tokens, heads of 64 coordinates: every matrix is 64 x 64, the tile of one warpgroup,
and the state stays in its registers in float32. See `lla.mixers.delta_rule` for the formulas; here
a chunk reads the state S before it, so that its corrections come from one right-hand side,

    u = T beta (v - start k S),  T = (1 + A)^-1;  o = start q S + L u;  S' = total S + k^T end u

which never takes the difference of two rounded products. A and its inverse, the right-hand side and
the state that k reads have two 16-bit parts; q, k and v are exact, and what else is multiplied is
rounded once. The forward pass leaves S, u and T of every chunk, and the backward pass takes the
chunks in reverse:

    du = L^T do + end k dS';  p = T^T du;  r = -p S^T;  dA = -p u^T
    dS = total dS' + q^T (start do) - k^T (start beta p)
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

from lla.kernels.mosaic_gpu.launch import Config, launch
from lla.kernels.mosaic_gpu.tile import (
    COLS,
    LOG2E,
    MATRIX,
    ROW_BLOCK,
    ROWS,
    Arithmetic,
    by_column,
    by_row,
    in_parts,
    narrow_transforms,
)

CHUNK = ROW_BLOCK
"""Tokens of a chunk, and coordinates of keys and values."""

_DTYPE = jnp.bfloat16  # of every factor of a product
SQUARE = (CHUNK, CHUNK)
# Above the square root of the largest number no power of two is taken: masked exponents.
_MASKED = -1e4
_INPUTS = ("query", "key", "value")


class Gates(NamedTuple):
    """What a chunk reads of its gates, float32 ``[B, N, T]``; `total` is ``[B, N, M]``.

    `upper` and `lower` are the parts of `lla.mixers.chunks.Sums`.
    """

    beta: jax.Array
    upper: jax.Array
    lower: jax.Array
    start: jax.Array
    end: jax.Array
    total: jax.Array


class Saved(NamedTuple):
    """What the backward pass reads: `states` and `solvers` ``[B, N, M, 64, 64]``, `updates` like v.

    All have 16 bits.
    """

    states: jax.Array
    solvers: jax.Array
    updates: jax.Array


class Transposed(NamedTuple):
    """A factor that lies in shared memory as its transpose."""

    ref: Any


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
                    plgpu.wgmma(accumulator, _turned(a), _turned(b))

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
        return plgpu.load(ref, layout=MATRIX, optimized=False)

    def parts(self, matrix):
        """`matrix` as the sum of two 16-bit parts."""
        return in_parts(matrix, _DTYPE, True)

    def rows(self, ref):
        return self.arithmetic.load(ref, ROWS)

    def columns(self, ref):
        return self.arithmetic.load(ref, COLS)

    def sums(self, rows, columns, where):
        """The parts of the sums of logarithms of a chunk, each by row and by column."""
        return [
            (self.rows(row.at[where]), self.columns(column.at[where]))
            for row, column in zip(rows, columns, strict=True)
        ]

    def index(self, axis: int):
        return plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=MATRIX)

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


def _turned(x):
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


def program_place(heads: int):
    """Batch and head of a program instance."""
    program = lax.axis_index("program")
    return lax.div(program, jnp.int32(heads)), lax.rem(program, jnp.int32(heads))


def _columns(gates: Gates):
    """What is also read by column: loads of one operand in two layouts would become one load."""
    return gates.upper, gates.lower


@functools.partial(jax.jit, static_argnames=("save", "interpret"))
def forward(query, key, value, gates: Gates, state, *, save: bool, interpret: Any = None):
    """Outputs ``[B, T, N, 64]``, the last state, and with `save` what `backward` reads.

    Args:
      query, key, value: bfloat16 ``[B, T, N, 64]``, T a multiple of 64.
      gates: of the tokens.
      state: float32 ``[B, N, 64, 64]``.
    """
    b, t, n, _ = key.shape
    count = t // CHUNK
    squares = jax.ShapeDtypeStruct((b, n, count, *SQUARE), _DTYPE)
    outputs = {
        "out": jax.ShapeDtypeStruct(value.shape, _DTYPE),
        "state": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if save:
        outputs |= {"states": squares, "solvers": squares}
        outputs["updates"] = jax.ShapeDtypeStruct(value.shape, _DTYPE)
    scratch = {
        "inputs": [narrow_tiles(2) for _ in _INPUTS],
        "tiles": [narrow_tiles() for _ in range(7)],
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=2),
    }
    operands = {
        "query": query, "key": key, "value": value, "gates": gates, "state": state,
        "columns": _columns(gates),
    }  # fmt: skip
    found = launch(
        functools.partial(_forward_body, Square(Arithmetic(interpret is not None)), n, count, save),
        outputs, scratch, operands, programs=b * n, config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    saved = Saved(found["states"], found["solvers"], found["updates"]) if save else None
    return found["out"], found["state"], saved


def _forward_body(tile: Square, heads: int, count: int, save: bool, given, out, scratch):
    b, h = program_place(heads)
    high, low, update, *work = scratch["tiles"]
    gates = given["gates"]

    def fetch(c, slot):
        where = (b, pl.ds(c * CHUNK, CHUNK), h)
        for name, target in zip(_INPUTS, scratch["inputs"], strict=True):
            barrier = scratch["loaded"].at[slot]
            plgpu.copy_gmem_to_smem(given[name].at[where], target.at[slot], barrier)

    def advance(c, state):
        slot = lax.rem(c, jnp.int32(2))
        plgpu.barrier_wait(scratch["loaded"].at[slot])
        pl.when(c + 1 < count)(lambda: fetch(c + 1, 1 - slot))
        query, key, value = (target.at[slot] for target in scratch["inputs"])
        tokens = pl.ds(c * CHUNK, CHUNK)
        beta, start, end = (
            by_row(tile.rows(ref.at[b, h, tokens]), SQUARE)
            for ref in (gates.beta, gates.start, gates.end)
        )
        sums = tile.sums((gates.upper, gates.lower), given["columns"], (b, h, tokens))
        store_parts(state, (high, low))
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(high, out["states"].at[b, h, c])

        pair = tile.pair(*sums, transposed=False)
        (overlap,) = tile.multiply([(key, Transposed(key))])
        strict = tile.index(0) > tile.index(1)
        solver = tile.inverse(jnp.where(strict, beta * overlap * pair, 0.0), work)
        solver = in_parts(solver, _DTYPE, True)

        (known,) = tile.multiply([(key, high), (key, low)])
        right = beta * (tile.load(value) - start * known)
        store_parts(right, work[:2])
        work[2][...] = solver[0]
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(work[2], out["solvers"].at[b, h, c])
        (updates,) = tile.multiply(products_of_parts(solver, work[:2]))
        update[...] = updates.astype(_DTYPE)
        work[1][...] = (end * updates).astype(_DTYPE)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(update, out["updates"].at[b, tokens, h])

        scores, incoming = tile.multiply([(query, Transposed(key))], [(query, high)])
        weights = (scores * pair).astype(_DTYPE)
        (result,) = tile.multiply([(weights, update)], start=(start * incoming,))
        work[0][...] = result.astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(work[0], out["out"].at[b, tokens, h])
        total = gates.total[b, h, c]
        (state,) = tile.multiply([(Transposed(key), work[1])], start=(total * state,))
        plgpu.wait_smem_to_gmem(0)
        return state

    fetch(0, 0)
    state = lax.fori_loop(0, count, advance, tile.load_wide(given["state"].at[b, h]))
    out["state"].at[b, h][...] = state


VECTORS = ("beta", "entering", "leaving", "inside", "through")
"""Sums over the coordinates of a token, float32 ``[B, N, T]``, that `backward` returns."""


@functools.partial(jax.jit, static_argnames=("interpret",))
def backward(
    query, key, value, gates: Gates, saved: Saved, d_out, d_state, *, interpret: Any = None
):
    """Cotangents by name: "query", "key", "value" and "state", and the `VECTORS`.

    Of the logarithms of the gates these are parts: what `entering` has acts through the decay from
    the start of the chunk to the token, `leaving` through that from the token to the end, `inside`
    through those between tokens, and the sum of `through` over the chunk, times the decay over all
    of it, through that one.
    """
    b, t, n, _ = key.shape
    count = t // CHUNK
    tokens = jax.ShapeDtypeStruct(key.shape, _DTYPE)
    outputs = dict.fromkeys(_INPUTS, tokens)
    outputs["state"] = jax.ShapeDtypeStruct(d_state.shape, jnp.float32)
    outputs["vectors"] = jax.ShapeDtypeStruct((len(VECTORS), b, n, t), jnp.float32)
    scratch = {
        "inputs": [narrow_tiles() for _ in range(7)],
        "tiles": [narrow_tiles() for _ in range(5)],
        "vectors": plgpu.SMEM((len(VECTORS), CHUNK), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=7),
    }
    operands = {
        "query": query, "key": key, "value": value, "gates": gates, "saved": saved,
        "d_out": d_out, "d_state": d_state, "columns": _columns(gates),
    }  # fmt: skip
    found = launch(
        functools.partial(_backward_body, Square(Arithmetic(interpret is not None)), n, count),
        outputs, scratch, operands, programs=b * n, config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    vectors = found.pop("vectors")
    return found | dict(zip(VECTORS, vectors, strict=True))


def _backward_body(tile: Square, heads: int, count: int, given, out, scratch):
    b, h = program_place(heads)
    gates, saved = given["gates"], given["saved"]
    query, key, value, d_out, state, update, solver = scratch["inputs"]
    d_state_tile, first, second, third, fourth = scratch["tiles"]
    vectors = dict(zip(VECTORS, range(len(VECTORS)), strict=True))

    def fetch(c):
        tokens = (b, pl.ds(c * CHUNK, CHUNK), h)
        sources = [given[name].at[tokens] for name in (*_INPUTS, "d_out")]
        sources += [saved.states.at[b, h, c], saved.updates.at[tokens], saved.solvers.at[b, h, c]]
        for source, target in zip(sources, scratch["inputs"], strict=True):
            plgpu.copy_gmem_to_smem(source, target, scratch["loaded"])

    def advance(i, d_state):
        c = count - 1 - i
        tokens = pl.ds(c * CHUNK, CHUNK)
        d_state_tile[...] = d_state.astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.barrier_wait(scratch["loaded"])

        def row(ref):
            return by_row(tile.rows(ref.at[b, h, tokens]), SQUARE)

        def note(name, matrix):
            scratch["vectors"].at[vectors[name]][...] = matrix.sum(axis=1)

        sums = tile.sums((gates.upper, gates.lower), given["columns"], (b, h, tokens))
        note("through", d_state * tile.load(state))

        # du, and p of the right-hand side.
        turned, outgoing = tile.multiply([(key, Transposed(query))], [(key, d_state_tile)])
        weights = (turned * tile.pair(*sums, transposed=True)).astype(_DTYPE)
        (d_update,) = tile.multiply([(weights, d_out)], start=(row(gates.end) * outgoing,))
        first[...] = d_update.astype(_DTYPE)
        plgpu.commit_smem()
        (right,) = tile.multiply([(Transposed(solver), first)])
        d_beta = (right * tile.load(value)).sum(axis=1)
        beta = row(gates.beta)
        d_value = beta * right
        second[...] = d_value.astype(_DTYPE)
        start = row(gates.start)
        third[...] = (-start * d_value).astype(_DTYPE)
        fourth[...] = (start * tile.load(d_out)).astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(second, out["value"].at[b, tokens, h])
        total = gates.total[b, h, c]
        (new,) = tile.multiply(
            [(Transposed(query), fourth), (Transposed(key), third)], start=(total * d_state,)
        )
        right = -right.astype(_DTYPE)

        # Scores of the queries, and the coupling between keys.
        pair = tile.pair(*sums, transposed=False)
        d_scores, d_coupling = tile.multiply(
            [(d_out, Transposed(update))], [(right, Transposed(update))]
        )
        d_scores = (d_scores * pair).astype(_DTYPE)
        first[...] = d_scores
        strict = tile.index(0) > tile.index(1)
        d_coupling = jnp.where(strict, d_coupling * pair, 0.0)
        (overlap,) = tile.multiply([(key, Transposed(key))])
        d_beta = d_beta + (d_coupling * overlap).sum(axis=1)
        d_coupling = (beta * d_coupling).astype(_DTYPE)
        third[...] = d_coupling
        plgpu.commit_smem()

        d_query, incoming = tile.multiply([(d_scores, key)], [(d_out, Transposed(state))])
        incoming = start * incoming
        inside = (d_query * tile.load(query)).sum(axis=1)
        entering = (incoming * tile.load(query)).sum(axis=1)
        fourth[...] = (d_query + incoming).astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(fourth, out["query"].at[b, tokens, h])

        d_key, column = tile.multiply(
            [(d_coupling, key)], [(Transposed(first), query), (Transposed(third), key)]
        )
        inside = inside + ((d_key - column) * tile.load(key)).sum(axis=1)
        scratch["vectors"].at[vectors["inside"]][...] = inside
        d_key = d_key + column
        incoming, leaving = tile.multiply(
            [(right, Transposed(state))], [(update, Transposed(d_state_tile))]
        )
        leaving = row(gates.end) * leaving
        note("leaving", leaving * tile.load(key))
        incoming = start * incoming
        d_beta = d_beta + (incoming * tile.load(key)).sum(axis=1)
        scratch["vectors"].at[vectors["beta"]][...] = d_beta
        incoming = beta * incoming
        entering = entering + (incoming * tile.load(key)).sum(axis=1)
        scratch["vectors"].at[vectors["entering"]][...] = entering
        d_key = d_key + leaving + incoming
        plgpu.commit_smem()
        pl.when(c > 0)(lambda: fetch(c - 1))  # everything of this chunk has been read
        first[...] = d_key.astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(first, out["key"].at[b, tokens, h])
        for index in vectors.values():
            place = out["vectors"].at[index, b, h, tokens]
            plgpu.copy_smem_to_gmem(scratch["vectors"].at[index], place)
        plgpu.wait_smem_to_gmem(0)
        return new

    fetch(count - 1)
    d_state = tile.load_wide(given["d_state"].at[b, h])
    d_state = lax.fori_loop(0, count, advance, d_state)
    out["state"].at[b, h][...] = d_state
