"""The sums of `lla.kernels.mosaic_gpu.decode` for wide heads, whose moments fill the registers.

One warpgroup weighs the keys of every tile and leaves them in shared memory; two multiply them,
each with half of the rows of the moments and with nothing else in its registers. Tiles come in
pairs: the first warpgroup has no other to hide its latencies, but two chains of its own.
"""

from __future__ import annotations

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.decode import (
    BLOCK,
    COLUMNS,
    SHRINK,
    SQUARE,
    Cache,
    Reader,
    Share,
    make_ring,
    reader_scratch,
    ring_scratch,
    row_names,
    stream,
)
from lla.kernels.mosaic_gpu.launch import Config
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

_PAIR = 2  # tiles that are weighed together, and weighted tiles in flight
# Registers of a thread of the warpgroups that weigh, multiply and stream: 512 in all.
_REGISTERS = {"weigh": 168, "multiply": 160, "stream": 24}


def plan(cache: Cache, member: str, precise: bool) -> tuple[Config, dict]:
    """How the kernel is launched, and its scratch types."""
    config = Config(warpgroups=READERS, block=BLOCK, stages=2 * _PAIR)
    weighted = plgpu.SMEM((_HALVES, *SQUARE), cache.dtype, transforms=narrow_transforms())
    return config, {
        "ring": ring_scratch(cache, config, READERS),
        **reader_scratch(cache, member, 1),
        "weighted": [[weighted] * (2 if precise else 1) for _ in range(_PAIR)],
        "seen": plgpu.Barrier(num_arrivals=_HALVES),
        # For each half of the moments.
        "ready": plgpu.Barrier(num_arrivals=1, num_barriers=_HALVES),
        "free": plgpu.Barrier(num_arrivals=1, num_barriers=_HALVES),
    }


def body(cache, member, precise, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    share = Share.mine(cache, given)
    ring = make_ring(config, scratch)
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
        stream(cache, given, share, ring, even=True)


@dataclasses.dataclass
class _PairReader(Reader):
    @property
    def pairs(self):
        count = self.share.end - self.share.begin
        return lax.div(count + 1, jnp.int32(_PAIR))


class _Weigher(_PairReader):
    def run(self) -> None:
        self.prepare()
        self.write_ones()
        start = {
            "largest": full((ROW_BLOCK,), LOWEST, ROWS),
            "total": full((ROW_BLOCK,), 0, ROWS),
            "value": tuple(full(SQUARE, 0, MATRIX) for _ in self.blocks),
        }
        sums = lax.fori_loop(0, self.pairs, self.add_pair, start)

        @pl.when(self.pairs > 0)
        def _():
            plgpu.barrier_wait(self.scratch["seen"])
            for c in self.blocks:
                plgpu.barrier_wait(self.scratch["free"].at[c])

        self.part("largest")[...] = sums["largest"]
        values = [matrix.sum(axis=0) for matrix in sums["value"]]
        self.store_rows({"total": sums["total"], "value": values})

    def add_pair(self, pair, sums):
        times = [_PAIR * pair + i for i in range(_PAIR)]
        slots = [self.ring.wait(t) for t in times]
        for t, slot in zip(times, slots, strict=True):
            self.clear_hidden(t, slot)
        tiles = [self.score(t, slot) for t, slot in zip(times, slots, strict=True)]
        largest, shrink_rows, weights = self.weigh(sums["largest"], *tiles)
        shrink, spread = by_row(shrink_rows, SQUARE), [by_row(w, SQUARE) for w in weights]

        @pl.when(pair > 0)
        def _():
            plgpu.barrier_wait(self.scratch["seen"])

        self.scratch["vectors"].at[0, SHRINK][...] = shrink_rows
        for c in self.blocks:

            @pl.when(pair > 0)
            def _(c=c):
                plgpu.barrier_wait(self.scratch["free"].at[c])

            for place, slot in enumerate(slots):
                weighted = self.keys(slot, c) * spread[place]
                parts = in_parts(weighted, self.cache.dtype, self.precise)
                for ref, part in zip(self.scratch["weighted"][place], parts, strict=True):
                    ref.at[c][...] = part
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.scratch["ready"].at[c])
        values = []
        for c, total in enumerate(sums["value"]):
            total = total * shrink
            for place, slot in enumerate(slots):
                total = total + self.values(slot, c) * spread[place]
            values.append(total)
        plgpu.commit_smem()
        for slot in slots:
            self.ring.release(slot)
        total = sums["total"] * shrink_rows + sum(weights)
        return {"largest": largest, "total": total, "value": tuple(values)}


class _Multiplier(_PairReader):
    """Rows ``[64 w, 64 w + 64)`` of the moments, and as many sums of weighted keys."""

    def run(self) -> None:
        width, mine = self.cache.head_dim, pl.ds(self.w * BLOCK, BLOCK)
        widths = [width] * len(self.ring.tiles) + [COLUMNS]
        plgpu.barrier_wait(self.scratch["ones_written"])
        start = tuple(full((BLOCK, n), 0, MATRIX) for n in widths)
        *moments, keys = lax.fori_loop(0, self.pairs, self.add_pair, start)
        for i, matrix in enumerate(moments):
            self.part("moments").at[mine, pl.ds(i * width, width)][...] = matrix
        row = row_names(self.member).index("key")
        self.part("rows").at[row, mine][...] = keys.sum(axis=1) / COLUMNS

    def add_pair(self, pair, moments):
        # An index that is known would become a constant of the products, which do not lower.
        half = lax.axis_index("warpgroup") - 1
        slots = [self.ring.wait(_PAIR * pair + i) for i in range(_PAIR)]
        plgpu.barrier_wait(self.scratch["ready"].at[half])
        shrink = self.arithmetic.load(self.scratch["vectors"].at[0, SHRINK], ROWS)
        moments = [matrix * by_row(shrink, matrix.shape) for matrix in moments]
        plgpu.barrier_arrive(self.scratch["seen"])
        factors = [[tile.at[slot] for slot in slots] for tile in self.ring.tiles]
        moments = self.arithmetic.accumulate_transposed(
            moments,
            *[
                [
                    (ref.at[half], factor)
                    for refs, factor in zip(self.scratch["weighted"], by_slot, strict=True)
                    for ref in refs
                ]
                for by_slot in (*factors, [self.ones] * _PAIR)
            ],
        )
        plgpu.barrier_arrive(self.scratch["free"].at[half])
        for slot in slots:
            self.ring.release(slot)
        return moments
