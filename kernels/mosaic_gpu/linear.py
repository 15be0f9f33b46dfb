"""Linear attention with a decay for every coordinate of the key, on Hopper.

One warpgroup walks over the chunks of 64 tokens of one head. The transposed state stays in its
registers, in float32. See `lla.mixers.linear_recurrence` for the formulas.

The decay between two tokens j < i of a chunk must not be split into factors above 1. The highest
bit in which i and j differ defines a block of tokens whose first half contains j and whose second
half contains i. The decay is then split at the border: from j to the end of the first half, and
from the start of the second half to i. There are six levels, with halves of 1, 2, ..., 32 tokens. A
level scales every token once, as a query in a second half and as a key in a first half, and
multiplies the result by its own transpose; the off-diagonal blocks of that level are kept.

Exponents are sums of log-decays, never differences. They are computed as products of a 0-1 matrix
with the log-decays in two 16-bit parts.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.chunk import (
    CHUNK,
    SQUARE,
    ChunkMath,
    DoubleBuffer,
    Transposed,
    load_tiles,
    program_index,
    store_parts,
)
from lla.kernels.mosaic_gpu.launch import Config, launch
from lla.kernels.mosaic_gpu.tile import LOG2E, Arithmetic, narrow_transforms

_DTYPE = jnp.bfloat16
_LEVELS = 6  # halves of 1, 2, ..., 32 tokens


def _tile(*sizes: int):
    """Scratch type of a 16-bit matrix, given its sizes and the fewest columns of any matrix."""
    *shape, narrowest = sizes
    return plgpu.SMEM(tuple(shape), _DTYPE, transforms=narrow_transforms(narrowest))


class _Chunk:
    """The gates of a chunk: decays ``[64, H]`` from the log-decays in `tiles`."""

    def __init__(self, math: ChunkMath, dim: int, tiles):
        self.math, self.shape, self.tiles = math, (CHUNK, dim), tiles
        self.column = math.index(1)

    @property
    def row(self):
        """Computed for every mask again, or the common parts of masks would occupy registers."""
        return self.math.index(0)

    def on_diagonal(self, matrix):
        return jnp.where(self.row == self.column, matrix, 0.0)

    def read(self, ref):
        store_parts(self.math.load_wide(ref), self.tiles)
        plgpu.commit_smem()

    def decay(self, which):
        """The decay of every row: over the tokens (columns) for which `which` is True."""
        which = jnp.where(which, 1.0, 0.0).astype(_DTYPE)
        (sums,) = self.math.multiply([(which, tile) for tile in self.tiles], shape=self.shape)
        return jnp.exp2(sums * LOG2E)

    def start(self):
        return self.decay(self.column <= self.row)

    def end(self):
        return self.decay(self.column > self.row)

    def total(self):
        return self.decay(self.column >= 0)

    def later(self, size, shape):
        """Whether a row is in the second half of its block, with halves of `size`."""
        return (self.math.index(0, shape) & size) != 0

    def level(self, size):
        """The decays of queries from the start of their half, of keys to the end of theirs."""
        row, column = self.row, self.column
        passed = jnp.where((row & size) != 0, row - column, column - row - 1)
        return self.decay(((row ^ column) < size) & (passed >= 0))

    def below(self, size):
        row, column = self.row, self.column
        different = row ^ column
        return (row > column) & (different >= size) & (different < 2 * size)

    def above(self, size):
        row, column = self.row, self.column
        different = row ^ column
        return (row < column) & (different >= size) & (different < 2 * size)


def _operands(query, key, value, log_decay, **others):
    return {"query": query, "key": key, "value": value, "log_decay": log_decay, **others}


@functools.partial(jax.jit, static_argnames=("save", "interpret"))
def forward(query, key, value, log_decay, state, *, save: bool, interpret: Any = None):
    """Outputs ``[B, T, N, 64]``, the last state, and with `save` the states before every chunk.

    Args:
      query, key: bfloat16 ``[B, T, N, H]``, T a multiple of 64, H 32 or 64.
      value: bfloat16 ``[B, T, N, 64]``.
      log_decay: float32 ``[B, T, N, H]``.
      state: transposed, float32 ``[B, N, 64, H]``; so is the last state.
    """
    b, t, n, dim = key.shape
    count = t // CHUNK
    outputs = {
        "out": jax.ShapeDtypeStruct(value.shape, _DTYPE),
        "state": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if save:
        outputs["states"] = jax.ShapeDtypeStruct((b, n, count, CHUNK, dim), _DTYPE)
    scratch = {
        "inputs": [_tile(2, CHUNK, dim, dim), _tile(2, CHUNK, dim, dim), _tile(2, *SQUARE, dim)],
        "logs": [_tile(CHUNK, dim, dim) for _ in range(2)],
        "work": _tile(2, CHUNK, dim, dim),
        "state": _tile(CHUNK, dim, dim),
        "out": _tile(*SQUARE, dim),
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=2),
    }
    math = ChunkMath(Arithmetic(interpret is not None))
    found = launch(
        functools.partial(_forward_body, math, n, count, dim, save), outputs, scratch,
        _operands(query, key, value, log_decay, state=state), programs=b * n, config=Config(),
        interpret=interpret, threads=1,
    )  # fmt: skip
    return found["out"], found["state"], found.get("states")


def _forward_body(math: ChunkMath, heads: int, count: int, dim: int, save, given, out, scratch):
    b, h = program_index(heads)
    shape = (CHUNK, dim)

    def sources(c):
        where = (b, pl.ds(c * CHUNK, CHUNK), h)
        return [given[name].at[where] for name in ("query", "key", "value")]

    inputs = DoubleBuffer(sources, scratch["inputs"], scratch["loaded"], count)

    def advance(c, state):
        slot = inputs.slot(c)
        tokens = pl.ds(c * CHUNK, CHUNK)
        scratch["state"][...] = state.astype(_DTYPE)
        gates = _Chunk(math, dim, scratch["logs"])
        gates.read(given["log_decay"].at[b, tokens, h])
        if save:
            plgpu.copy_smem_to_gmem(scratch["state"], out["states"].at[b, h, c])
        inputs.wait(c, slot)
        query, key, value = (target.at[slot] for target in scratch["inputs"])

        (weights,) = math.multiply([(query, Transposed(key))])
        weights = gates.on_diagonal(weights)

        def add_level(i, weights):
            size, work = lax.shift_left(jnp.int32(1), i), lax.rem(i, jnp.int32(2))
            later = gates.later(size, shape)
            scaled = jnp.where(later, math.load(query), math.load(key)) * gates.level(size)
            scaled = scaled.astype(_DTYPE)
            tile = scratch["work"].at[work]
            tile[...] = scaled
            plgpu.commit_smem()
            (products,) = math.multiply([(scaled, Transposed(tile))])
            return weights + jnp.where(gates.below(size), products, 0.0)

        weights = lax.fori_loop(0, _LEVELS, add_level, weights)
        incoming = (math.load(query) * gates.start()).astype(_DTYPE)
        (result,) = math.multiply(
            [(incoming, Transposed(scratch["state"])), (weights.astype(_DTYPE), value)]
        )
        scratch["out"][...] = result.astype(_DTYPE)
        tile = scratch["work"].at[c * 0]  # products with a constant index do not lower
        tile[...] = (math.load(key) * gates.end()).astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch["out"], out["out"].at[b, tokens, h])
        (state,) = math.multiply([(Transposed(value), tile)], start=(gates.total() * state,))
        plgpu.wait_smem_to_gmem(0)
        return state

    inputs.start()
    state = math.load_wide(given["state"].at[b, h])
    state = lax.fori_loop(0, count, advance, state)
    out["state"].at[b, h][...] = state


@functools.partial(jax.jit, static_argnames=("interpret",))
def backward(query, key, value, log_decay, states, d_out, d_state, *, interpret: Any = None):
    """Cotangents by name: "query", "key", "value", "log_decay" and "state"."""
    b, t, n, dim = key.shape
    outputs = {
        "query": jax.ShapeDtypeStruct(key.shape, _DTYPE),
        "key": jax.ShapeDtypeStruct(key.shape, _DTYPE),
        "value": jax.ShapeDtypeStruct(value.shape, _DTYPE),
        "log_decay": jax.ShapeDtypeStruct(key.shape, jnp.float32),
        "state": jax.ShapeDtypeStruct(d_state.shape, jnp.float32),
    }
    rows, whole = (CHUNK, dim, dim), (*SQUARE, dim)
    scratch = {
        "inputs": [_tile(*size) for size in (rows, rows, whole, whole, rows)],
        "logs": [_tile(*rows) for _ in range(2)],
        "work": _tile(2, *rows),
        "results": [_tile(*rows) for _ in range(2)],
        "d_state": _tile(*rows),
        "d_value": _tile(*whole),
        "loaded": plgpu.Barrier(num_arrivals=5),
    }
    math = ChunkMath(Arithmetic(interpret is not None))
    return launch(
        functools.partial(_backward_body, math, n, t // CHUNK, dim), outputs, scratch,
        _operands(query, key, value, log_decay, states=states, d_out=d_out, d_state=d_state),
        programs=b * n, config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip


def _backward_body(math: ChunkMath, heads: int, count: int, dim: int, given, out, scratch):
    b, h = program_index(heads)
    shape = (CHUNK, dim)
    query, key, value, d_out, state = scratch["inputs"]

    def fetch(c):
        tokens = (b, pl.ds(c * CHUNK, CHUNK), h)
        sources = [given[name].at[tokens] for name in ("query", "key", "value", "d_out")]
        sources.append(given["states"].at[b, h, c])
        load_tiles(sources, scratch["inputs"], scratch["loaded"])

    def advance(i, d_state):
        c = count - 1 - i
        tokens = pl.ds(c * CHUNK, CHUNK)
        scratch["d_state"][...] = d_state.astype(_DTYPE)
        gates = _Chunk(math, dim, scratch["logs"])
        gates.read(given["log_decay"].at[b, tokens, h])
        plgpu.barrier_wait(scratch["loaded"])
        column = gates.column

        weights_t, d_weights, d_weights_t = math.multiply(
            [(key, Transposed(query))], [(d_out, Transposed(value))], [(value, Transposed(d_out))]
        )
        weights_t = gates.on_diagonal(weights_t)
        on_diagonal = gates.on_diagonal(d_weights).sum(axis=1)

        def add_level(i, carry):
            weights_t, d_query, d_key = carry
            size, work = lax.shift_left(jnp.int32(1), i), lax.rem(i, jnp.int32(2))
            later = gates.later(size, shape)
            decay = gates.level(size)
            scaled = jnp.where(later, math.load(query), math.load(key)) * decay
            scaled = scaled.astype(_DTYPE)
            tile = scratch["work"].at[work]
            tile[...] = scaled
            plgpu.commit_smem()
            (products,) = math.multiply([(scaled, Transposed(tile))])
            weights_t = weights_t + jnp.where(gates.above(size), products, 0.0)
            below, above = gates.below(size), gates.above(size)
            both = jnp.where(below, d_weights, jnp.where(above, d_weights_t, 0.0))
            (d_rows,) = math.multiply([(both.astype(_DTYPE), tile)], shape=shape)
            d_rows = d_rows * decay
            d_query = d_query + jnp.where(later, d_rows, 0.0)
            return weights_t, d_query, d_key + jnp.where(later, 0.0, d_rows)

        zero = math.load(key) * 0.0
        weights_t, d_query, d_key = lax.fori_loop(0, _LEVELS, add_level, (weights_t, zero, zero))
        # Through the log-decays up to a token, minus through those after it.
        onward = d_query * math.load(query) - d_key * math.load(key)
        on_diagonal = lax.broadcast_in_dim(on_diagonal, shape, [0])
        d_query = d_query + on_diagonal * math.load(key)
        d_key = d_key + on_diagonal * math.load(query)

        start = gates.start()
        (incoming,) = math.multiply([(d_out, state)], shape=shape)
        incoming = incoming * start
        d_query = d_query + incoming
        scratch["results"][0][...] = d_query.astype(_DTYPE)
        onward = onward + incoming * math.load(query)
        scratch["work"].at[c * 0][...] = (math.load(query) * start).astype(_DTYPE)

        end = gates.end()
        (outgoing,) = math.multiply([(value, scratch["d_state"])], shape=shape)
        outgoing = outgoing * end
        d_key = d_key + outgoing
        scratch["results"][1][...] = d_key.astype(_DTYPE)
        leaving = outgoing * math.load(key)
        outgoing = (math.load(key) * end).astype(_DTYPE)
        plgpu.commit_smem()
        (d_value,) = math.multiply(
            [(weights_t.astype(_DTYPE), d_out), (outgoing, Transposed(scratch["d_state"]))]
        )
        scratch["d_value"][...] = d_value.astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch["results"][0], out["query"].at[b, tokens, h])
        plgpu.copy_smem_to_gmem(scratch["results"][1], out["key"].at[b, tokens, h])
        plgpu.copy_smem_to_gmem(scratch["d_value"], out["value"].at[b, tokens, h])

        total = gates.total()
        through = total * d_state * math.load(state)
        (new,) = math.multiply(
            [(Transposed(d_out), scratch["work"].at[c * 0])], start=(total * d_state,)
        )

        # Sums of `onward` from a token on, of `leaving` before it, and of `through` over all rows.
        def sums(which, matrix, so_far):
            store_parts(matrix, scratch["logs"])
            plgpu.commit_smem()
            which = jnp.where(which, 1.0, 0.0).astype(_DTYPE)
            pairs = [(which, tile) for tile in scratch["logs"]]
            return math.multiply(pairs, start=(so_far,))[0]

        d_log = sums(column >= gates.row, onward, onward * 0.0)
        d_log = sums(column < gates.row, leaving, d_log)
        d_log = sums(column >= 0, through, d_log)
        out["log_decay"].at[b, tokens, h][...] = d_log
        plgpu.commit_smem()
        pl.when(c > 0)(lambda: fetch(c - 1))  # all inputs of this chunk have been read
        plgpu.wait_smem_to_gmem(0)
        return new

    fetch(count - 1)
    d_state = math.load_wide(given["d_state"].at[b, h])
    d_state = lax.fori_loop(0, count, advance, d_state)
    out["state"].at[b, h][...] = d_state
