"""The selective scan on Hopper: one warpgroup per 64 channels of a sequence.

The states of the channels, 64 x 16 numbers, stay in registers. Tokens are processed in chunks of
16, which are prefetched into shared memory. The state before every chunk is saved for the backward
pass, which recomputes the states within a chunk, stores them in shared memory rounded to 16 bits,
and walks back through them. Sums over channels, for the gradients of B and C, are products with a
matrix of ones. See `lla.mixers.selective_scan` for the recurrence.
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
    ChunkMath,
    DoubleBuffer,
    Transposed,
    load_tiles,
    program_index,
)
from lla.kernels.mosaic_gpu.launch import Config, launch
from lla.kernels.mosaic_gpu.tile import (
    LN2,
    LOG2E,
    ROW_BLOCK,
    WGMMA,
    Arithmetic,
    by_column,
    by_row,
    full,
    narrow_transforms,
)

TOKENS = 16
"""Tokens of a chunk."""

CHANNELS = ROW_BLOCK
"""Channels of a program instance."""

STATES = 16
"""Size of the state of a channel."""

_SHAPE = (CHANNELS, STATES)
_DTYPE = jnp.bfloat16
_PAIR = 2 * STATES  # columns to sum over the channels for one token: gradients of B and C


def _tokens(copies: int, columns: int = CHANNELS, dtype=jnp.float32):
    return plgpu.SMEM((copies, TOKENS, columns), dtype)


class _Scan:
    """Access to tokens, for both passes; `tiles` are x, delta, B and C, ``[copies, 16, ...]``."""

    def __init__(self, math: ChunkMath, given, tiles, place):
        self.math, self.tiles = math, tiles
        self.b, block = place
        self.channels = pl.ds(block * CHANNELS, CHANNELS)
        # In base 2: decays are computed by exp2.
        self.rates = math.load_wide(given["rates"].at[self.channels]) * LOG2E

    def token(self, slot, t):
        """delta, x, B and C of a token, each broadcast to ``[64, 16]``."""
        rows = (by_row(self.row(i, slot, t), _SHAPE) for i in (1, 0))
        columns = (
            by_column(self.math.columns(tile.at[slot, t]), _SHAPE) for tile in self.tiles[2:4]
        )
        return (*rows, *columns)

    def row(self, i, slot, t):
        return self.math.rows(self.tiles[i].at[slot, t]).astype(jnp.float32)

    def decay(self, delta):
        return jnp.exp2(delta * self.rates)

    def sources(self, given, names, c):
        """The slices of chunk c in global memory."""
        tokens = pl.ds(c * TOKENS, TOKENS)
        for name in names:
            array = given[name]
            place = (self.b, tokens) if name in "bc" else (self.b, tokens, self.channels)
            yield array.at[place]


def _in_groups(size: int, step, carry):
    """Runs ``carry = step(t, carry)`` over the tokens in order, unrolled by `size`."""

    def group(i, carry):
        for t in range(size):
            carry = step(i * size + t, carry)
        return carry

    return lax.fori_loop(0, TOKENS // size, group, carry)


@functools.partial(jax.jit, static_argnames=("save", "interpret"))
def forward(x, delta, rates, b, c, state, *, save: bool, interpret: Any = None):
    """y ``[B, T, D]``, the last state, and with `save` the states before every chunk.

    All arrays but x and y are float32; D is a multiple of 64, T of 16.

    Args:
      x: ``[B, T, D]``, bfloat16; so is y.
      delta: ``[B, T, D]``.
      rates: ``[D, 16]``.
      b, c: ``[B, T, 16]``.
      state: ``[B, D, 16]``.
    """
    batch, t, d = x.shape
    count = t // TOKENS
    outputs = {
        "y": jax.ShapeDtypeStruct(x.shape, _DTYPE),
        "state": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if save:
        outputs["states"] = jax.ShapeDtypeStruct((batch, count, d, STATES), jnp.float32)
    scratch = {
        "tiles": [_tokens(2, dtype=_DTYPE), _tokens(2), _tokens(2, STATES), _tokens(2, STATES)],
        "y": plgpu.SMEM((TOKENS, CHANNELS), _DTYPE),
        "loaded": plgpu.Barrier(num_arrivals=4, num_barriers=2),
    }
    operands = {"x": x, "delta": delta, "rates": rates, "b": b, "c": c, "state": state}
    math = ChunkMath(Arithmetic(interpret is not None))
    found = launch(
        functools.partial(_forward_body, math, d // CHANNELS, count, save), outputs, scratch,
        operands, programs=batch * d // CHANNELS, config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    return found["y"], found["state"], found.get("states")


def _forward_body(math: ChunkMath, blocks: int, count: int, save: bool, given, out, scratch):
    scan = _Scan(math, given, scratch["tiles"], program_index(blocks))
    inputs = DoubleBuffer(
        lambda c: scan.sources(given, ("x", "delta", "b", "c"), c), scratch["tiles"],
        scratch["loaded"], count,
    )  # fmt: skip

    def advance(c, state):
        slot = inputs.slot(c)
        inputs.wait(c, slot)
        if save:
            out["states"].at[scan.b, c, scan.channels][...] = state

        def step(t, state):
            delta, x, b, c_row = scan.token(slot, t)
            state = scan.decay(delta) * state + (delta * x) * b
            scratch["y"].at[t][...] = (state * c_row).sum(axis=1).astype(_DTYPE)
            return state

        state = _in_groups(4, step, state)
        plgpu.commit_smem()
        tokens = pl.ds(c * TOKENS, TOKENS)
        plgpu.copy_smem_to_gmem(scratch["y"], out["y"].at[scan.b, tokens, scan.channels])
        plgpu.wait_smem_to_gmem(0)
        return state

    inputs.start()
    state = math.load_wide(given["state"].at[scan.b, scan.channels])
    state = lax.fori_loop(0, count, advance, state)
    out["state"].at[scan.b, scan.channels][...] = state


@functools.partial(jax.jit, static_argnames=("interpret",))
def backward(x, delta, rates, b, c, states, d_y, d_state, *, interpret: Any = None):
    """Cotangents by name: "x", "delta", "rates", "b", "c" and "state"."""
    batch, t, d = x.shape
    count, blocks = t // TOKENS, d // CHANNELS
    outputs = {
        "x": jax.ShapeDtypeStruct(x.shape, _DTYPE),
        "delta": jax.ShapeDtypeStruct(x.shape, jnp.float32),
        "rates": jax.ShapeDtypeStruct((batch, d, STATES), jnp.float32),
        "sums": jax.ShapeDtypeStruct((batch, blocks, t // 2, 2 * _PAIR), jnp.float32),
        "state": jax.ShapeDtypeStruct(d_state.shape, jnp.float32),
    }
    transforms = narrow_transforms(STATES)
    scratch = {
        "tiles": [
            _tokens(1, dtype=_DTYPE),
            _tokens(1),
            _tokens(1, STATES),
            _tokens(1, STATES),
            _tokens(1, dtype=_DTYPE),
        ],
        "states": plgpu.SMEM((TOKENS, *_SHAPE), _DTYPE, transforms=transforms),
        "summed": plgpu.SMEM((CHANNELS, 2 * _PAIR), _DTYPE, transforms=transforms),
        "ones": plgpu.SMEM(_SHAPE, _DTYPE, transforms=transforms),
        "results": [plgpu.SMEM((TOKENS, CHANNELS), d) for d in (_DTYPE, jnp.float32)],
        "sums": plgpu.SMEM((TOKENS // 2, 2 * _PAIR), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=5),
    }
    operands = {
        "x": x, "delta": delta, "rates": rates, "b": b, "c": c, "states": states, "d_y": d_y,
        "d_state": d_state,
    }  # fmt: skip
    math = ChunkMath(Arithmetic(interpret is not None))
    found = launch(
        functools.partial(_backward_body, math, blocks, count), outputs, scratch, operands,
        programs=batch * blocks, config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    sums = found.pop("sums").sum(1).reshape(batch, t, 2, STATES)
    rates = found["rates"].sum(0)
    return found | {"rates": rates, "b": sums[:, :, 0], "c": sums[:, :, 1]}


def _backward_body(math: ChunkMath, blocks: int, count: int, given, out, scratch):
    tiles = scratch["tiles"]
    scan = _Scan(math, given, tiles, program_index(blocks))
    block = lax.rem(lax.axis_index("program"), jnp.int32(blocks))
    summed, ones = scratch["summed"], scratch["ones"]
    ones[...] = full(_SHAPE, 1, WGMMA, _DTYPE)

    def fetch(c):
        sources = scan.sources(given, ("x", "delta", "b", "c", "d_y"), c)
        load_tiles(sources, [tile.at[0] for tile in tiles], scratch["loaded"])

    def advance(i, carry):
        d_state, d_rates = carry
        c = count - 1 - i
        state = math.load_wide(given["states"].at[scan.b, c, scan.channels])
        plgpu.barrier_wait(scratch["loaded"])

        def forth(t, state):
            scratch["states"].at[t][...] = state.astype(_DTYPE)
            delta, x, b, _ = scan.token(0, t)
            return scan.decay(delta) * state + (delta * x) * b

        _in_groups(4, forth, state)

        def back(t, which, carry):
            """Token t, the first of a pair if `which` is 0, else the second."""
            d_state, d_rates = carry
            delta, x, b, c_row = scan.token(0, t)
            d_y = by_row(scan.row(4, 0, t), _SHAPE)
            decay = scan.decay(delta)
            kept = decay * math.load(scratch["states"].at[t])
            d_state = d_state + d_y * c_row
            inflow = delta * x
            sums = (d_state * inflow, (kept + inflow * b) * d_y)
            for i, matrix in enumerate(sums):
                columns = pl.ds(_PAIR * which + STATES * i, STATES)
                summed.at[:, columns][...] = matrix.astype(_DTYPE)
            through = d_state * kept
            d_rates = d_rates + delta * through
            d_inflow = (d_state * b).sum(axis=1)
            delta_row, x_row = (scan.row(i, 0, t) for i in (1, 0))
            scratch["results"][0].at[t][...] = (delta_row * d_inflow).astype(_DTYPE)
            d_delta = (scan.rates * through).sum(axis=1) * LN2
            scratch["results"][1].at[t][...] = x_row * d_inflow + d_delta
            return decay * d_state, d_rates

        def two_back(i, carry):
            pair = TOKENS // 2 - 1 - i
            carry = back(2 * pair, 0, back(2 * pair + 1, 1, carry))
            plgpu.commit_smem()
            (sums,) = math.multiply([(Transposed(summed), ones)], shape=_SHAPE)
            scratch["sums"].at[pair][...] = sums.sum(axis=1) * (1 / STATES)
            return carry

        d_state, d_rates = lax.fori_loop(0, TOKENS // 2, two_back, (d_state, d_rates))
        plgpu.commit_smem()
        pl.when(c > 0)(lambda: fetch(c - 1))
        tokens = pl.ds(c * TOKENS, TOKENS)
        for name, tile in zip(("x", "delta"), scratch["results"], strict=True):
            plgpu.copy_smem_to_gmem(tile, out[name].at[scan.b, tokens, scan.channels])
        pairs = pl.ds(c * (TOKENS // 2), TOKENS // 2)
        plgpu.copy_smem_to_gmem(scratch["sums"], out["sums"].at[scan.b, block, pairs])
        plgpu.wait_smem_to_gmem(0)
        return d_state, d_rates

    fetch(count - 1)
    d_state = math.load_wide(given["d_state"].at[scan.b, scan.channels])
    d_state, d_rates = lax.fori_loop(0, count, advance, (d_state, d_state * 0.0))
    out["state"].at[scan.b, scan.channels][...] = d_state
    out["rates"].at[scan.b, scan.channels][...] = d_rates
