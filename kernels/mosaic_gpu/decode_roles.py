"""The sums of `lla.kernels.mosaic_gpu.decode` for wide heads, whose moments fill the registers.

One warpgroup weighs the keys of every tile and leaves them in shared memory; two multiply them,
each with half of the rows of the moments and with nothing else in its registers.
"""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.decode import (
    BLOCK,
    SQUARE,
    Cache,
    Reader,
    Share,
    stream,
)
from lla.kernels.mosaic_gpu.launch import Ring
from lla.kernels.mosaic_gpu.tile import (
    LOWEST,
    MATRIX,
    ROW_BLOCK,
    ROWS,
    by_row,
    full,
    in_parts,
    narrow_transforms,
)

_HALVES = 2
READERS = 1 + _HALVES
"""Warpgroups that read tiles: the one that weighs, and one for each half of the moments."""

_SLOTS = 2  # weighted tiles in flight
# Registers of a thread of the warpgroups that weigh, multiply and stream: 512 in all.
_REGISTERS = {"weigh": 168, "multiply": 160, "stream": 24}


def scratch(cache: Cache, precise: bool) -> dict:
    """Scratch types of this body alone."""
    weighted = plgpu.SMEM((_SLOTS, *SQUARE), cache.dtype, transforms=narrow_transforms())
    return {
        "weighted": [[weighted] * (2 if precise else 1) for _ in range(_HALVES)],
        "shrink": plgpu.SMEM((_SLOTS, ROW_BLOCK), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=1, num_barriers=_SLOTS),
        "free": plgpu.Barrier(num_arrivals=_HALVES, num_barriers=_SLOTS),
    }


def body(cache, member, precise, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    share = Share.mine(cache, given)
    tiles, *barriers = scratch["ring"]
    ring = Ring(tuple(tiles), *barriers, config.stages, late=False)
    warpgroup = lax.axis_index("warpgroup")

    def registers(role: str, action: str):
        if not arithmetic.interpreted:
            plgpu.set_max_registers(_REGISTERS[role], action=action)

    def reader(kind, w):
        return kind(cache, member, precise, arithmetic, given, out, scratch, share, ring, w)

    @pl.when(warpgroup == 0)
    def _():
        registers("weigh", "increase")
        reader(_Weigher, 0).run()

    for half in range(_HALVES):

        @pl.when(warpgroup == 1 + half)
        def _(half=half):
            registers("multiply", "increase")
            reader(_Multiplier, half).run()

    @pl.when(warpgroup == READERS)
    def _():
        registers("stream", "decrease")
        stream(cache, given, share, ring)


def _slot(t):
    return lax.rem(t, jnp.int32(_SLOTS))


class _Weigher(Reader):
    def run(self) -> None:
        self.prepare()

        def matrices():
            return tuple(full(SQUARE, 0, MATRIX) for _ in self.blocks)

        start = {
            "largest": full((ROW_BLOCK,), LOWEST, ROWS),
            "total": full((ROW_BLOCK,), 0, ROWS),
            "value": matrices(),
            "key": matrices(),
        }
        count = self.share.end - self.share.begin
        sums = lax.fori_loop(0, count, self.add_tile, start)

        def wait(t, _):
            plgpu.barrier_wait(self.scratch["free"].at[_slot(t)])

        lax.fori_loop(jnp.maximum(count - _SLOTS, 0), count, wait, None)
        self.part("largest")[...] = sums["largest"]
        rows = {name: [matrix.sum(axis=0) for matrix in sums[name]] for name in ("value", "key")}
        self.store_rows(rows | {"total": sums["total"]})

    def add_tile(self, t, sums):
        slot, place = self.ring.wait(t), _slot(t)
        tile = self.weigh(t, slot, sums["largest"])
        shrink, spread = by_row(tile.shrink, SQUARE), by_row(tile.weights, SQUARE)

        @pl.when(t >= _SLOTS)
        def _():
            plgpu.barrier_wait(self.scratch["free"].at[place])

        keys = []
        for c in self.blocks:
            weighted = self.keys(slot, c) * spread
            keys.append(sums["key"][c] * shrink + weighted)
            parts = in_parts(weighted, self.cache.dtype, self.precise)
            for ref, part in zip(self.scratch["weighted"][c], parts, strict=True):
                ref.at[place][...] = part
        self.scratch["shrink"].at[place][...] = tile.shrink
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.scratch["ready"].at[place])
        values = [sums["value"][c] * shrink + self.values(slot, c) * spread for c in self.blocks]
        plgpu.commit_smem()
        self.ring.release(slot)
        total = sums["total"] * tile.shrink + tile.weights
        return {
            "largest": tile.largest, "total": total, "value": tuple(values), "key": tuple(keys),
        }  # fmt: skip


class _Multiplier(Reader):
    """Rows ``[64 w, 64 w + 64)`` of the moments."""

    def run(self) -> None:
        start = tuple(full(SQUARE, 0, MATRIX) for _ in self.ring.tiles)
        count = self.share.end - self.share.begin
        moments = lax.fori_loop(0, count, self.add_tile, start)
        for c, matrix in enumerate(moments):
            where = pl.ds(self.w * BLOCK, BLOCK), pl.ds(c * BLOCK, BLOCK)
            self.part("moments").at[where][...] = matrix

    def add_tile(self, t, moments):
        slot, place = self.ring.wait(t), _slot(t)
        plgpu.barrier_wait(self.scratch["ready"].at[place])
        shrink = by_row(self.arithmetic.load(self.scratch["shrink"].at[place], ROWS), SQUARE)
        refs = [ref.at[place] for ref in self.scratch["weighted"][self.w]]
        moments = self.arithmetic.accumulate_transposed(
            [matrix * shrink for matrix in moments],
            *[[(ref, tile.at[slot]) for ref in refs] for tile in self.ring.tiles],
        )
        plgpu.barrier_arrive(self.scratch["free"].at[place])
        self.ring.release(slot)
        return moments
