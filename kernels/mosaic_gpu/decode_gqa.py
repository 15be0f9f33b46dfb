"""The sums of `lla.kernels.mosaic_gpu.decode` for grouped query heads, without moments.

The query heads of an instance are the first rows of an operand with 64 rows, so that products read
a tile of keys and values once for all heads. Two consumers alternate between tiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.decode import (
    BLOCK,
    MAX_HEADS,
    SQUARE,
    CacheShape,
    Split,
    Sums,
    heads_per_program,
    make_ring,
    per_head_scalar,
    ring_scratch,
    row_names,
    stream,
    valid_keys,
    zero_hidden,
)
from lla.kernels.mosaic_gpu.launch import Config, Ring, set_registers
from lla.kernels.mosaic_gpu.tile import (
    LOG2E,
    LOWEST,
    ROW_BLOCK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    Arithmetic,
    by_column,
    by_row,
    full,
    in_parts,
    narrow_transforms,
    row_dot,
    wide_transforms,
)

CONSUMERS = 2
"""Consumer warpgroups, each of which takes every other tile."""


def _names(mechanism: str) -> dict[str, int]:
    """Index of each sum in the output: `row_names`, then the largest logit."""
    return {name: i for i, name in enumerate((*row_names(mechanism), "largest"))}


def outputs(cache: CacheShape, mechanism: str) -> dict:
    """Arrays ``[B, N / H, P, R + 1, 8, D]`` for instances with H query heads."""
    heads = heads_per_program(mechanism, cache.group)
    lead = (cache.batch, cache.heads // heads, cache.splits, len(_names(mechanism)))
    return {"rows": jax.ShapeDtypeStruct((*lead, MAX_HEADS, cache.head_dim), jnp.float32)}


def sums(cache: CacheShape, mechanism: str, results: dict) -> Sums:
    """Rearranges the sums from program instances to query heads."""
    rows = results["rows"][:, :, :, :, : heads_per_program(mechanism, cache.group)]
    rows = jnp.moveaxis(rows, 4, 2)  # [B, N / H, H, P, R + 1, D]
    rows = rows.reshape(cache.batch, cache.heads, *rows.shape[3:])
    return Sums(rows[..., -1, :ROW_BLOCK], rows[..., :-1, :])


def plan(cache: CacheShape, mechanism: str, bf16x2: bool) -> tuple[Config, dict]:
    """How the kernel is launched, and its scratch types."""
    del bf16x2  # the weights always have two parts
    # Even: see `lla.kernels.mosaic_gpu.decode_pingpong.plan`.
    config = Config(warpgroups=CONSUMERS, block=BLOCK, stages=4 if cache.blocks == 2 else 6)
    shape = (ROW_BLOCK, cache.head_dim)
    rows = plgpu.SMEM(shape, cache.dtype, transforms=narrow_transforms())
    return config, {
        "ring": ring_scratch(cache, config, 1),
        # Row h is the query of head h; in the second array, its probe.
        "heads": [rows] * (2 if mechanism == "parallax" else 1),
        "heads_written": plgpu.Barrier(num_arrivals=1),
        # Results of the second consumer, for the first.
        "numbers": plgpu.SMEM((3, ROW_BLOCK), jnp.float32),
        "matrix": plgpu.SMEM(shape, jnp.float32, transforms=wide_transforms()),
        "handed": plgpu.Barrier(num_arrivals=1),
        "taken": plgpu.Barrier(num_arrivals=1),
    }


def body(cache, mechanism, bf16x2, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    del bf16x2
    heads = heads_per_program(mechanism, cache.group)
    split = Split.of_program(cache, given, heads)
    ring = make_ring(config, scratch)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _():
        set_registers(config, arithmetic, compute=True)
        w = warpgroup
        _Rows(cache, mechanism, heads, arithmetic, given, out, scratch, split, ring, w).run()

    @pl.when(warpgroup == CONSUMERS)
    def _():
        set_registers(config, arithmetic, compute=False)
        stream(cache, given, split, ring)


def _by_row(vector, shape):
    """`by_row` with an explicit layout, which saves layout inference a long search."""
    return plgpu.layout_cast(by_row(vector, shape), WGMMA)


def _by_column(vector, shape):
    return plgpu.layout_cast(by_column(vector, shape), WGMMA)


@dataclasses.dataclass
class _Rows:
    """Consumer `w`, which sums over every other tile: ``[64, D]`` with a row per head."""

    cache: CacheShape
    mechanism: str
    heads: int
    arithmetic: Arithmetic
    given: Any
    out: Any
    scratch: Any
    split: Split
    ring: Ring
    w: jax.Array
    scale: jax.Array | None = None  # [64], of logits in base 2
    origin_along: jax.Array | None = None  # [64], the first visible key times the probes

    def run(self) -> None:
        pl.when(self.w == 0)(self.write_heads)
        plgpu.barrier_wait(self.scratch["heads_written"])
        self.prepare()
        zero = full((ROW_BLOCK,), 0, WGMMA_ROW)
        wide = full((ROW_BLOCK, self.cache.head_dim), 0, WGMMA)
        # Above the logits of hidden keys, so that these have no weight even in a tile without
        # others.
        largest = full((ROW_BLOCK,), LOWEST / 2, WGMMA_ROW)
        start = {"largest": largest, "total": zero, "value": wide}
        if self.mechanism == "parallax":
            start |= {"along": zero, "along_value": wide}
        count = self.split.end - self.split.begin
        count_mine = lax.div(count + (CONSUMERS - 1 - self.w), jnp.int32(CONSUMERS))
        sums = lax.fori_loop(0, count_mine, self.add_tile, start)
        pl.when(self.w != 0)(lambda: self.hand_over(sums))
        pl.when(self.w == 0)(lambda: self.finish(sums))

    @property
    def columns(self) -> list:
        """The columns of each block of the head dimension."""
        return [pl.ds(c * BLOCK, BLOCK) for c in range(self.cache.blocks)]

    def vector(self, source, columns):
        """A block of a vector in global memory."""
        return self.arithmetic.load(source.at[columns], WGMMA_COL).astype(jnp.float32)

    def write_heads(self) -> None:
        split = self.split
        row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
        for name, tile in zip(("query", "probe"), self.scratch["heads"], strict=False):
            for columns in self.columns:
                rows = full(SQUARE, 0, WGMMA)
                for h in range(self.heads):
                    vector = self.vector(self.given[name].at[split.b, split.head + h], columns)
                    rows = jnp.where(row == h, _by_column(vector, SQUARE), rows)
                tile.at[:, columns][...] = rows.astype(self.cache.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.scratch["heads_written"])

    def prepare(self) -> None:
        split, given = self.split, self.given
        row = plgpu.broadcasted_iota(jnp.int32, (ROW_BLOCK,), 0, layout=WGMMA_ROW)
        scale = full((ROW_BLOCK,), 0, WGMMA_ROW)
        for h in range(self.heads):
            own = per_head_scalar(given["scale"], split.b, split.head + h)
            scale = jnp.where(row == h, own * LOG2E, scale)
        self.scale = scale
        if self.mechanism != "parallax":
            return
        some_key = jnp.minimum(split.low, self.cache.num_keys - 1)
        origin = given["key"].at[split.b, some_key, split.kv_head]
        origin_along = full((ROW_BLOCK,), 0, WGMMA_ROW)
        for columns in self.columns:
            probes = self.arithmetic.load(self.scratch["heads"][1].at[:, columns])
            key = _by_column(self.vector(origin, columns), SQUARE)
            origin_along = origin_along + row_dot(probes.astype(jnp.float32), key)
        self.origin_along = origin_along

    def add_tile(self, i, sums):
        t = CONSUMERS * i + self.w
        slot = self.ring.consumer_wait(t)
        zero_hidden(self.cache, self.split, self.arithmetic, self.ring, t, slot)
        keys, values = (tile.at[slot] for tile in self.ring.tiles)
        logits, *along = self.arithmetic.products(
            BLOCK, *[[(tile, keys)] for tile in self.scratch["heads"]]
        )
        valid = valid_keys(self.cache, self.split, t, SQUARE, 1, WGMMA)
        logits = jnp.where(valid, logits * _by_row(self.scale, SQUARE), LOWEST)
        largest = jnp.maximum(sums["largest"], logits.max(axis=1))
        shrink = jnp.exp2(sums["largest"] - largest)
        weights = jnp.exp2(logits - _by_row(largest, SQUARE))
        new = {"largest": largest, "total": sums["total"] * shrink + weights.sum(axis=1)}
        factors = {"value": weights}
        if self.mechanism == "parallax":
            weighted = weights * (along[0] - _by_row(self.origin_along, SQUARE))
            new["along"] = sums["along"] * shrink + weighted.sum(axis=1)
            factors["along_value"] = weighted
        for name, factor in factors.items():
            # One at a time, since there are no registers for both.
            total = sums[name] * _by_row(shrink, sums[name].shape)
            parts = in_parts(factor, self.cache.dtype, True)
            pairs = [(part, values) for part in parts]
            (new[name],) = self.arithmetic.accumulate([total], pairs)
        self.ring.consumer_release(slot)
        return new

    def numbers(self, sums) -> dict:
        return {name: sums[name] for name in ("largest", "total", "along") if name in sums}

    def matrices(self, sums) -> dict:
        return {name: sums[name] for name in ("value", "along_value") if name in sums}

    def hand_over(self, sums) -> None:
        for i, vector in enumerate(self.numbers(sums).values()):
            self.scratch["numbers"].at[i][...] = vector
        for i, matrix in enumerate(self.matrices(sums).values()):
            if i:
                plgpu.barrier_wait(self.scratch["taken"])
            self.scratch["matrix"][...] = matrix
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.scratch["handed"])

    def finish(self, sums) -> None:
        """Adds the sums of both consumers and writes them."""
        numbers, matrices = self.numbers(sums), self.matrices(sums)
        for i, (name, matrix) in enumerate(matrices.items()):
            plgpu.barrier_wait(self.scratch["handed"])
            if i == 0:
                others = {
                    name: self.arithmetic.load(self.scratch["numbers"].at[n], WGMMA_ROW)
                    for n, name in enumerate(numbers)
                }
                largest = jnp.maximum(numbers["largest"], others["largest"])
                own, other = (jnp.exp2(n["largest"] - largest) for n in (numbers, others))
            handed, shape = self.arithmetic.load(self.scratch["matrix"]), matrix.shape
            self.write(name, matrix * _by_row(own, shape) + handed * _by_row(other, shape))
            if i + 1 < len(matrices):
                plgpu.barrier_arrive(self.scratch["taken"])
        self.write("largest", _by_row(largest, shape))
        for name in numbers:
            if name != "largest":  # spread over the columns, which add up to the sum
                total = (numbers[name] * own + others[name] * other) / self.cache.head_dim
                self.write(name, _by_row(total, shape))

    def write(self, name: str, matrix) -> None:
        """Writes the first rows of a matrix to sum `name` of the output."""
        split, heads = self.split, self.heads
        place = self.out["rows"].at[
            split.b,
            lax.div(split.head, jnp.int32(heads)),
            split.number,
            _names(self.mechanism)[name],
        ]
        self.scratch["matrix"][...] = matrix
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.scratch["matrix"].at[pl.ds(0, MAX_HEADS)], place)
        plgpu.wait_smem_to_gmem(0)
