"""The sums of `lla.kernels.mosaic_gpu.decode` with moments, for query heads that share keys.

Each query head of an instance has a warpgroup, and every warpgroup takes every tile.
"""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.decode import (
    BLOCK,
    COLUMNS,
    SQUARE,
    Cache,
    Reader,
    Share,
    fill,
    heads_together,
    reader_scratch,
    ring_scratch,
)
from lla.kernels.mosaic_gpu.launch import Config, Ring
from lla.kernels.mosaic_gpu.tile import (
    LOWEST,
    MATRIX,
    ROW_BLOCK,
    ROWS,
    Turned,
    by_column,
    by_row,
    full,
    in_parts,
    narrow_transforms,
)

_STAGES = 5
_AHEAD = 3
"""Tiles that are on their way: fewer than a ring holds, so that no warpgroup waits for another."""


def plan(cache: Cache, member: str, precise: bool) -> tuple[Config, dict]:
    """How the kernel is launched, and its scratch types."""
    heads = heads_together(member, cache.group, cache.head_dim)
    config = Config(warpgroups=heads, block=BLOCK, stages=_STAGES, streaming=False)
    tile = plgpu.SMEM((heads, *SQUARE), cache.dtype, transforms=narrow_transforms())
    return config, {
        "ring": ring_scratch(cache, config, heads),
        **reader_scratch(cache, member, heads),
        "weights": tile,
        "weighted": [tile] * (2 if precise else 1),
    }


def body(cache, member, precise, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    heads = config.warpgroups
    share = Share.mine(cache, given, heads)
    tiles, *barriers = scratch["ring"]
    ring = Ring(tuple(tiles), *barriers, config.stages, late=False)
    # One body for all warpgroups, as the caches of instructions do not hold four.
    w = lax.axis_index("warpgroup")
    share = share._replace(head=share.head + w)
    _Head(cache, member, precise, arithmetic, given, out, scratch, share, ring, w).run()


class _Head(Reader):
    """All sums of one query head."""

    def run(self) -> None:
        count = self.share.end - self.share.begin

        @pl.when(self.w == 0)
        def _():
            lax.fori_loop(0, jnp.minimum(count, _AHEAD), lambda t, _: self.fill(t), None)
            self.write_ones()

        self.prepare()
        plgpu.barrier_wait(self.scratch["ones_written"])
        narrow = full((BLOCK, COLUMNS), 0, MATRIX)
        start = {
            "largest": full((ROW_BLOCK,), LOWEST, ROWS),
            "total": full((ROW_BLOCK,), 0, ROWS),
            # Of the keys times keys and values, of the keys, of the values.
            "moments": (*(full(SQUARE, 0, MATRIX) for _ in range(2)), narrow, narrow),
        }
        sums = lax.fori_loop(0, count, self.add_tile, start)

        @pl.when(self.w == 0)
        def _():
            self.ring.drain(count)

        *moments, keys, values = sums["moments"]
        self.part("largest")[...] = sums["largest"]
        self.store_rows(
            {
                "total": sums["total"],
                "value": values.sum(axis=1) / (COLUMNS // 2),
                "key": keys.sum(axis=1) / COLUMNS,
            }
        )
        for c, matrix in enumerate(moments):
            self.part("moments").at[pl.ds(0, BLOCK), pl.ds(c * BLOCK, BLOCK)][...] = matrix

    def fill(self, t) -> None:
        fill(self.cache, self.given, self.share, self.ring, t)

    def add_tile(self, t, sums):
        @pl.when((self.w == 0) & (t + _AHEAD < self.share.end - self.share.begin))
        def _():
            self.fill(t + _AHEAD)

        slot = self.ring.wait(t)
        tile = self.score(t, slot)
        largest, shrink, (weights,) = self.weigh(sums["largest"], tile)
        total = sums["total"] * shrink + weights
        self.write_weights(weights)
        weighted = self.keys(slot, 0) * by_row(weights, SQUARE)
        parts = in_parts(weighted, self.cache.dtype, self.precise)
        refs = [ref.at[self.w] for ref in self.scratch["weighted"]]
        for ref, part in zip(refs, parts, strict=True):
            ref[...] = part
        plgpu.commit_smem()
        keys, values = (tile.at[slot] for tile in self.ring.tiles)
        weights = Turned(self.scratch["weights"].at[self.w, pl.ds(0, COLUMNS)])
        moments = self.arithmetic.accumulate_transposed(
            [matrix * by_row(shrink, matrix.shape) for matrix in sums["moments"]],
            *[[(ref, factor) for ref in refs] for factor in (keys, values, self.ones)],
            [(values, weights)],
        )
        self.ring.release(slot)
        return {"largest": largest, "total": total, "moments": moments}

    def write_weights(self, weights) -> None:
        """The weights in two parts, in turn the rows of a matrix that values are multiplied by."""
        columns = self.turned(weights)
        # The barriers keep the conversions packed, as in `in_parts`.
        high = lax.optimization_barrier(columns.astype(self.cache.dtype))
        low = (columns - high.astype(jnp.float32)).astype(self.cache.dtype)
        low = lax.optimization_barrier(low)
        row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=MATRIX)
        even = lax.rem(row, jnp.int32(2)) == 0
        rows = jnp.where(even, by_column(high, SQUARE), by_column(low, SQUARE))
        self.scratch["weights"].at[self.w][...] = rows
