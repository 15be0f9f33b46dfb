"""The solves: `lla.kernels.mosaic_gpu.solve` with products by mma.sync.

Iterate and residual lie in global memory between iterations, where only the thread that wrote a
number reads it: shared memory is left to the tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lla.kernels.mosaic_gpu.launch import Masking, Shape, query_program_index, run_by_tile
from lla.kernels.mosaic_gpu.solve import Adjoint, Solution, TileOverride
from lla.kernels.mosaic_gpu.solve_rows import ROW_OUTPUTS, CGOptions, SolveRows
from lla.kernels.mosaic_gpu.tile import ROW_BLOCK, MaskSpec, by_row, row_dot
from lla.kernels.mosaic_gpu_mma.launch import (
    Config,
    Ring,
    RowTiles,
    barriers,
    environment,
    key_sources,
    launch,
    load_operands,
    operand_scratch,
    ring_scratch,
)
from lla.kernels.mosaic_gpu_mma.tile import store


@functools.partial(jax.jit, static_argnames=("shape", "mask", "config", "options", "interpret"))
def solve(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    options: CGOptions,
    query: jax.Array,
    key: jax.Array,
    scale: jax.Array,
    ridge: jax.Array | None,
    masking: Masking,
    adjoint: Adjoint | None = None,
    override: TileOverride | None = None,
    *,
    interpret: Any = None,
) -> Solution:
    """See `lla.kernels.mosaic_gpu.solve.solve`."""
    env = environment(shape, mask, config, interpret)
    forward = adjoint is None
    outputs = {
        "high": shape.queries(),
        "low": shape.queries(),
        "shift_high": shape.rows(),
        "shift": shape.rows(),
        "iterations": shape.rows(),
        "residual": shape.rows(),
    }
    if not forward:
        outputs["cotangent_mean"] = shape.rows()
    else:
        outputs["log_sum_exp"] = shape.rows()
    if forward or adjoint.key_mean is None:
        outputs["key_mean"] = shape.queries(jnp.float32)
    if options.max_iters:
        outputs |= dict.fromkeys(("kept_iterate", "kept_residual"), shape.queries(jnp.float32))
    operands = {
        "query": query,
        "key": key,
        "scale": scale,
        "ridge": ridge,
        "masking": masking.operands(),
        "adjoint": adjoint,
        "marked": None if override is None else override.marked,
        "preconditioner": None,
    }
    scratch = {
        "ring": ring_scratch(shape, config, 1 if forward else 2),
        "rows": plgpu.SMEM((1, len(ROW_OUTPUTS), ROW_BLOCK), jnp.float32),
        "flags": plgpu.SMEM((ROW_BLOCK,), jnp.int32),
        **operand_scratch(shape, config, 1 if forward else 2),
    }
    if not forward:
        scratch["again"] = barriers(config, 1)
    body = functools.partial(_body, env, options, None if override is None else override.options)
    results = launch(
        body, outputs, scratch, operands,
        programs=env.query_programs, config=config, interpret=interpret,
    )  # fmt: skip
    for name in ("kept_iterate", "kept_residual"):
        results.pop(name, None)
    return Solution(**results)


def _body(env, options: CGOptions, other: CGOptions | None, given, out, scratch):
    program = query_program_index(env.shape, ROW_BLOCK)
    tiles = env.key_tiles(given["masking"], program)
    streamed = [given["key"]]
    if given["adjoint"] is not None:
        streamed.append(given["adjoint"].value)
    sources = key_sources(env, program, tiles, streamed)
    ring = Ring(env.config, scratch["ring"]["tiles"], scratch["ring"].get("filled"), sources)

    def run(options):
        values = None if given["adjoint"] is None else _Values(ring.tiles[1:])
        WarpSolveRows(env, given, out, scratch, program, tiles, 0, options, ring, values).run()

    run_by_tile(given["marked"], program, 0, run, options, other)


@dataclasses.dataclass
class _Values:
    """The values of a ring that streams them beside the keys."""

    tiles: tuple

    def consumer_wait(self, t):
        del t

    consumer_release = consumer_wait


@dataclasses.dataclass
class WarpSolveRows(RowTiles, SolveRows):
    """The solve of 64 rows."""

    right_hand: Any = None  # first operand of the products with the values

    @property
    def cotangent(self):
        return self.right_hand

    def kept(self, name: str):
        return self.row_tile(self.out[f"kept_{name}"])

    def reload_mean(self):
        return self.env.arithmetic.load(self.row_tile(self.global_mean()))

    def store_mean(self, mean):
        store(self.row_tile(self.out["key_mean"]), mean)

    def run(self):
        given, arithmetic = self.given, self.env.arithmetic
        self.keys.start()
        sources = [self.row_tile(given["query"])]
        if not self.forward:
            sources.append(self.row_tile(given["adjoint"].cotangent))
        self.query, *rest = load_operands(self.env, self.scratch, sources)
        if self.forward:
            t, target, _ = self.statistics()
        else:
            (self.right_hand,) = rest
            t, target, _ = self.adjoint_target()
        if not self.options.max_iters:
            self.keys.finish(t)
            self.finish(-target, None, jnp.int32(0), self.zeros(rows=True))
            return
        if not self.forward:
            self.keys.finish(t)
            t = jnp.int32(0)
            sources = key_sources(self.env, self.program, self.tiles, (given["key"],))
            filled = self.scratch["again"].get("filled")
            self.keys = Ring(self.env.config, self.keys.tiles[:1], filled, sources)
            self.keys.start()
        self.store_row("residual", row_dot(target, target))
        store(self.kept("residual"), target)
        store(self.kept("iterate"), self.zeros())
        state = self.iterate(t, target)
        self.keys.finish(state.t)
        x = arithmetic.load(self.kept("iterate"))
        for part in state.direction:
            x = x + by_row(state.free_step, x.shape) * part.astype(jnp.float32)
        norm = self.load_row("residual")
        residual = jnp.sqrt(state.rz / jnp.where(norm > 0, norm, 1.0))
        self.finish(-x, self.reload_mean(), state.count, residual)

    def agree(self, count, more):
        del count
        flags = self.scratch["flags"]
        flags[...] = more  # with a barrier of the warpgroup before and after
        return flags[0]

    def finish(self, negated, mean, count, residual):
        dtype, f32 = self.env.shape.dtype, jnp.float32
        high = negated.astype(dtype)
        low = (negated - high.astype(f32)).astype(dtype)
        if mean is not None:
            shift_high = row_dot(mean, high.astype(f32))
            self.store_row("shift_high", shift_high)
            self.store_row("shift", shift_high + row_dot(mean, low.astype(f32)))
        self.store_row("iterations", self.zeros(rows=True) + count.astype(f32))
        self.store_row("residual", residual)
        store(self.row_tile(self.out["high"]), high)
        store(self.row_tile(self.out["low"]), low)
        for name in ROW_OUTPUTS:
            if name in self.out:
                store(self.row_slice(self.out[name]), self.load_row(name))
