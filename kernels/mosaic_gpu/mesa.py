"""The solves of the mesa layer on Hopper: one warpgroup per chunk of 64 tokens.

See `lla.mixers.mesa` for the formulas. The products of the tokens' matrices with their directions x
are

    start (x H0) + ((x k^T) pair beta) k + Lambda x,

which takes six products of 64 x 64 matrices. Keys are exact in 16 bits. Directions, the moment H0
and the weights of the keys have two 16-bit parts, so that the iterates agree with those of float32
to about 2^-16. Everything stays in registers and shared memory, and each chunk stops by itself,
once all of its tokens have converged.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.chunk import (
    CHUNK,
    SQUARE,
    ChunkMath,
    Transposed,
    narrow_tiles,
    products_of_parts,
    store_parts,
)
from lla.kernels.mosaic_gpu.launch import Config, launch
from lla.kernels.mosaic_gpu.tile import ROW_BLOCK, WGMMA_ROW, Arithmetic, by_column, by_row, full

_DTYPE = jnp.bfloat16


@functools.partial(jax.jit, static_argnames=("max_iters", "tol", "interpret"))
def solve(
    moment: jax.Array,
    key: jax.Array,
    beta: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    start: jax.Array,
    ridge: jax.Array,
    inverse: jax.Array,
    right: jax.Array,
    *,
    max_iters: int,
    tol: float,
    interpret: Any = None,
) -> jax.Array:
    """x of ``(H + Lambda) x = right`` for all tokens of G chunks, float32 ``[G, 64, 64]``.

    Args:
      moment: H before the chunk, float32 ``[G, 64, 64]``.
      key: bfloat16 ``[G, 64, 64]``.
      beta, start: of each token, float32 ``[G, 64]``.
      sums: the two parts of `lla.mixers.chunks.Sums`, likewise.
      ridge: of each of N heads, ``[N, 64]``; chunk g belongs to head ``g % N``.
      inverse, right: the diagonal preconditioner and the right-hand sides, like `moment`.
      max_iters, tol: as for `lla.mixers.mesa.mesa`.
    """
    scratch = {
        "key": narrow_tiles(),
        "tiles": [narrow_tiles() for _ in range(2)],
        "residual": plgpu.SMEM((CHUNK,), jnp.float32),
        "flag": plgpu.SMEM((CHUNK,), jnp.int32),
        "loaded": plgpu.Barrier(),
    }
    operands = {
        "moment": moment, "key": key, "beta": beta, "sums": sums, "columns": (beta, *sums),
        "start": start, "ridge": ridge, "inverse": inverse, "right": right,
    }  # fmt: skip
    body = functools.partial(
        _body, ChunkMath(Arithmetic(interpret is not None)), ridge.shape[0], max_iters, tol
    )
    found = launch(
        body, {"x": jax.ShapeDtypeStruct(right.shape, jnp.float32)}, scratch, operands,
        programs=right.shape[0], config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    return found["x"]


def _body(math: ChunkMath, heads: int, max_iters: int, tol: float, given, out, scratch):
    g = lax.axis_index("program")
    key, moment = scratch["key"], scratch["tiles"]
    plgpu.copy_gmem_to_smem(given["key"].at[g], key, scratch["loaded"])
    store_parts(math.load_wide(given["moment"].at[g]), moment)
    plgpu.commit_smem()
    plgpu.barrier_wait(scratch["loaded"])

    sums = math.sums(given["sums"], given["columns"][1:], (g,))
    pair = math.pair(*sums, transposed=False)
    pair = pair * by_column(math.columns(given["columns"][0].at[g]), SQUARE)
    start = math.rows(given["start"].at[g])
    ridge = by_column(math.columns(given["ridge"].at[lax.rem(g, jnp.int32(heads))]), SQUARE)
    inverse = math.load_wide(given["inverse"].at[g])
    right = math.load_wide(given["right"].at[g])

    def product(x, parts):
        incoming, scores = math.multiply(
            products_of_parts(parts, moment), [(part, Transposed(key)) for part in parts]
        )
        weights = math.parts(scores * pair)
        begin = by_row(start, SQUARE) * incoming + ridge * x
        return math.multiply([(part, key) for part in weights], start=(begin,))[0]

    def dot(x, y):
        return (x * y).sum(axis=1)

    def unfinished(square):
        """Whether any token is, as a scalar that all threads agree on."""
        scratch["residual"][...] = square - bound
        plgpu.commit_smem()
        excess = by_column(math.columns(scratch["residual"]), SQUARE).max(axis=1)
        scratch["flag"][...] = jnp.where(excess > 0, 1, 0).astype(jnp.int32)
        plgpu.commit_smem()
        return scratch["flag"][0]

    def advance(carry):
        count, _, x, residual, direction, square = carry
        parts = math.parts(direction)
        direction = parts[0].astype(jnp.float32) + parts[1].astype(jnp.float32)
        image = product(direction, parts)
        curvature = dot(direction, image)
        # Rows that have converged, or whose curvature has underflowed, are frozen.
        active = (square > bound) & (curvature > 0)
        one = full((ROW_BLOCK,), 1, WGMMA_ROW)
        step = jnp.where(active, square / jnp.where(active, curvature, one), 0.0)
        x = x + by_row(step, SQUARE) * direction
        residual = residual - by_row(step, SQUARE) * image
        scaled = inverse * residual
        new = dot(residual, scaled)
        ratio = jnp.where(active, new / jnp.where(active, square, one), 0.0)
        new = jnp.where(active, new, 0.0)
        go = unfinished(new) * (count + 1 < max_iters).astype(jnp.int32)
        return count + 1, go, x, residual, scaled + by_row(ratio, SQUARE) * direction, new

    scaled = inverse * right
    square = dot(right, scaled)
    bound = square * tol**2
    begin = (jnp.int32(0), unfinished(square), right * 0.0, right, scaled, square)
    _, _, x, *_ = lax.while_loop(lambda carry: carry[1] > 0, advance, begin)
    out["x"].at[g][...] = x
