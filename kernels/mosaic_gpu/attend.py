"""The output: softmax attention, with or without a probe.

Keys and values are streamed once. Without a solve the softmax is computed online. After a solve its
log-sum-exp is known, and the probe has one or two 16-bit parts.
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

from lla.kernels import lowered
from lla.kernels.mosaic_gpu.launch import (
    Config,
    Environment,
    Masking,
    Ring,
    Shape,
    launch,
    ones_scratch,
    query_program_index,
    ring_scratch,
    row_tile,
    run_by_tile,
    run_or_skip,
    skip_tiles,
    stream_keys_and_values,
)
from lla.kernels.mosaic_gpu.query_rows import QueryRows
from lla.kernels.mosaic_gpu.tile import (
    LOWEST,
    ROW_BLOCK,
    WGMMA_COL,
    WGMMA_ROW,
    Arithmetic,
    MaskSpec,
    by_column,
    by_row,
    full,
    in_parts,
    rounded_parts,
    row_dot,
)

LARGEST_ORIGIN = 1e4
"""Scores are taken relative to an origin of at most this size: its rounding errors reach 1e-3."""


class Attended(NamedTuple):
    """Output ``[B, T, N, D]``, and float32 ``[B, N, T]`` that are None where the solve gave them.

    `log_sum_exp` is in base 2, ``inf`` for rows without keys; `shift` is the mean key times the
    probe.
    """

    out: jax.Array
    log_sum_exp: jax.Array | None = None
    shift: jax.Array | None = None


class Solved(NamedTuple):
    """What the solve found along with the probe: see `lla.kernels.mosaic_gpu.solve.Solution`."""

    log_sum_exp: jax.Array
    shift: jax.Array  # of the parts of the probe that are used
    low: jax.Array | None  # None: only the high part is used
    marked: jax.Array | None = None  # int32 [B, N, T/64], the tiles with bf16x2; None: all


@lowered.jit("shape", "mask", "config", "bf16x2", "interpret")
def attend(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    masking: Masking,
    probe: jax.Array | None = None,
    solved: Solved | None = None,
    *,
    bf16x2: bool = False,
    interpret: Any = None,
) -> Attended:
    """``sum_j p_ij (1 + (k_j - k_mean_i) . probe_i) v_j``.

    Args:
      probe: ``[B, T, N, D]`` in 16 bits, *negated* with respect to the operator; None for softmax
        attention.
      solved: results of the solve, if the probe comes from one.
      bf16x2: whether the weights of a solved probe have two 16-bit parts, in the tiles that
        ``solved.marked`` marks. Where the probe is large these weights nearly cancel.
      interpret: parameters of the interpreter, or None to compile.
    """
    env = Environment(shape, mask, config, Arithmetic(interpret is not None, config.hold_sums))
    count = config.warpgroups
    outputs = {"out": shape.queries()}
    if solved is None:
        outputs["log_sum_exp"] = shape.rows()
        if probe is not None:
            outputs["shift"] = shape.rows()
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "scale": scale,
        "masking": masking.operands(),
        "probe": probe,
        "solved": solved,
    }
    inputs = [name for name in ("query", "probe") if operands[name] is not None]
    if solved is not None and solved.low is not None:
        inputs.append("low")
    scratch = {
        "inputs": row_tile(shape, config, max(2, len(inputs))),
        "ring": ring_scratch(shape, config, 2),
        **ones_scratch(shape, config),
        "rows": plgpu.SMEM((count, 2, ROW_BLOCK), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=len(inputs), num_barriers=count),
    }
    body = functools.partial(_body, env, inputs, bf16x2)
    results = launch(
        body, outputs, scratch, operands,
        programs=env.query_programs, config=config, interpret=interpret,
    )  # fmt: skip
    return Attended(**results)


def _body(env: Environment, inputs: list[str], bf16x2: bool, given, out, scratch):
    count = env.config.warpgroups
    program = query_program_index(env.shape, count * ROW_BLOCK)
    tiles = env.key_tiles(given["masking"], program)
    key_tile, value_tile, *barriers = scratch["ring"]
    ring = Ring((key_tile, value_tile), *barriers, env.config.stages, env.config.hold_sums)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < count)
    def _():
        env.set_registers(compute=True)

        def run(bf16x2):
            AttendRows(env, given, out, scratch, program, tiles, warpgroup, ring, bf16x2).run(
                inputs
            )

        def run_tile():
            marked = given["solved"].marked if bf16x2 else None
            run_by_tile(marked, program, warpgroup, run, bf16x2 and marked is None, True)

        run_or_skip(env, program, warpgroup, run_tile, lambda: skip_tiles(tiles, (ring,)))

    @pl.when(warpgroup == count)
    def _():
        env.set_registers(compute=False)
        stream_keys_and_values(env, given, program, tiles, ring)


@dataclasses.dataclass
class AttendRows(QueryRows):
    """The output of one consumer warpgroup."""

    ring: Ring
    bf16x2: bool
    parts: Any = ()

    def run(self, inputs: list[str]):
        loaded = self.scratch["loaded"].at[self.w]
        tiles = [self.scratch["inputs"].at[self.w, i] for i in range(len(inputs))]
        for name, tile in zip(inputs, tiles, strict=True):
            array = self.given["solved"].low if name == "low" else self.given[name]
            plgpu.copy_gmem_to_smem(self.row_tile(array), tile, loaded)
        plgpu.barrier_wait(loaded)
        query, *self.parts = tiles
        self.write_ones()
        if self.given["solved"] is not None:
            out = self.solved(query)
        elif self.parts:
            out = self.probed(query)
        else:
            out = self.softmax(query)
        query[...] = out.astype(self.env.shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query, self.row_tile(self.out["out"]))
        for index, name in enumerate(("log_sum_exp", "shift")):
            if name in self.out:
                row = self.scratch["rows"].at[self.w, index]
                plgpu.copy_smem_to_gmem(row, self.row_slice(self.out[name]))
        plgpu.wait_smem_to_gmem(0)

    def solved(self, query):
        """With a known log-sum-exp: no running maximum, no rescaling."""
        scale, ids = self.scale_and_ids()
        dtype = self.env.shape.dtype
        solved = self.given["solved"]
        log_sum_exp = self.row_vector(solved.log_sum_exp)
        constant = 1 - self.row_vector(solved.shift)

        def scores_along(slot):
            return ([(part, self.ring.tiles[0].at[slot]) for part in self.parts],)

        def weigh(j, masked, total, scores, along):
            weights = self.weights(scores(), j, masked, scale, ids, log_sum_exp)
            along = along()
            weighted = weights * (along + by_row(constant, along.shape))
            summed = not self.env.config.sum_products
            parts, parts_sum = rounded_parts(weighted, dtype, self.bf16x2, summed)
            softmax = [in_parts(weights, dtype, False)] if self.bf16x2 else []
            return total + parts_sum if summed else total, parts, *softmax

        _, total, out, *plain = self.sum_over_tiles(
            self.ring, jnp.int32(0), query, scores_along, weigh, 1, self.zeros(rows=True),
            1 + self.bf16x2,
        )  # fmt: skip
        # The weights of a row sum to 1 for any probe. A deviation comes from an error of the scores
        # along a large probe, equal for all keys of the row, so that softmax weights correct it.
        total = jnp.where(log_sum_exp < jnp.inf, total, 1.0)
        if plain:
            return out - by_row(total - 1, out.shape) * plain[0]
        return out * by_row(1 / total, out.shape)

    def softmax(self, query):
        def round_weights(weights, summed):
            total = weights.sum(axis=1) if summed else None
            return (weights.astype(self.env.shape.dtype),), total

        _, largest, total, out = self.online_softmax(self.ring, query, 1, round_weights)
        inverse = self.store_log_sum_exp(largest, total)
        return out * by_row(inverse, out.shape)

    def probed(self, query):
        """Softmax attention and its correction in one pass, with two sums of values.

        Scores along the probe are taken relative to that of one key, so that an offset which all
        keys share costs no accuracy.
        """
        arithmetic, block, dtype = self.env.arithmetic, self.env.config.block, self.env.shape.dtype
        scale, ids = self.scale_and_ids()
        (probe,) = self.parts
        some_key = self.first_key().astype(jnp.float32)
        origin = row_dot(
            arithmetic.load(probe).astype(jnp.float32), by_column(some_key, self.matrix)
        )
        if self.env.mask.window is not None or self.env.mask.segments:
            # Some rows may not see that key, and a large origin would cost them accuracy.
            origin = jnp.where(jnp.abs(origin) < LARGEST_ORIGIN, origin, 0.0)

        def step(j, carry, masked):
            t, largest, total, along_total, sums = carry
            slot = self.ring.consumer_wait(t)
            keys, values = (tile.at[slot] for tile in self.ring.tiles)
            scores, along = arithmetic.products(block, [(query, keys)], [(probe, keys)])
            new, weights = self.online_weights(scores, j, masked, scale, ids, largest)
            along = weights * (along - by_row(origin, along.shape))
            shrink = jnp.exp2(largest - new)
            total = total * shrink + weights.sum(axis=1)
            along_total = along_total * shrink + along.sum(axis=1)
            sums = tuple(a * by_row(shrink, self.matrix) for a in sums)
            sums = arithmetic.accumulate(
                sums, [(weights.astype(dtype), values)], [(along.astype(dtype), values)]
            )
            self.ring.consumer_release(slot)
            return t + 1, new, total, along_total, sums

        lowest, zero = full((ROW_BLOCK,), LOWEST, WGMMA_ROW), self.zeros(rows=True)
        start = (jnp.int32(0), lowest, zero, zero, (self.zeros(), self.zeros()))
        _, largest, total, along_total, (plain, along) = self.over_tiles(step, start)
        inverse = self.store_log_sum_exp(largest, total)
        mean = along_total * inverse
        self.scratch["rows"].at[self.w, 1][...] = origin + mean
        return (plain * by_row(1 - mean, self.matrix) + along) * by_row(inverse, self.matrix)

    def first_key(self):
        """The first key of the first tile, ``[D]`` along the columns."""
        first = self.tiles.low * self.env.config.block
        where = (self.program.b, first, self.program.kv_head)
        return self.env.arithmetic.load(self.given["key"].at[where], WGMMA_COL)

    def store_log_sum_exp(self, largest, total):
        """Writes the log-sum-exp; returns 1 / total, and 1 for rows without keys."""
        some = total > 0
        total = jnp.where(some, total, 1.0)
        log_sum_exp = jnp.where(some, largest + jnp.log2(total), jnp.inf)
        self.scratch["rows"].at[self.w, 0][...] = log_sum_exp
        return 1 / total
