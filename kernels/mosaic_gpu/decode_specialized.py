"""The sums of `lla.kernels.mosaic_gpu.decode` for wide heads, by specialised warpgroups.

The moments of wide heads fill the registers of two warpgroups. A third one computes the weights of
every tile and writes the weighted keys to shared memory; those two multiply them, each for half of
the rows of the moments. Tiles are processed in pairs, which gives the scoring warpgroup two
independent chains of instructions to hide latencies.
"""

from __future__ import annotations

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.decode import (
    BLOCK,
    MIN_COLUMNS,
    SHRINK,
    SQUARE,
    CacheShape,
    Consumer,
    Split,
    consumer_scratch,
    make_ring,
    ring_scratch,
    row_names,
    stream,
)
from lla.kernels.mosaic_gpu.launch import Config
from lla.kernels.mosaic_gpu.tile import (
    LOWEST,
    ROW_BLOCK,
    WGMMA,
    WGMMA_ROW,
    by_row,
    full,
    in_parts,
    narrow_transforms,
)

_HALVES = 2
CONSUMERS = 1 + _HALVES
"""Consumer warpgroups: one computes the weights, two multiply half of the moments each."""

_PAIR = 2  # tiles that are weighted together, and weighted tiles in flight
# Registers per thread by role of the warpgroup; one score, two multiply and one load take 512.
_REGISTERS = {"score": 168, "multiply": 160, "load": 24}


def plan(cache: CacheShape, mechanism: str, bf16x2: bool) -> tuple[Config, dict]:
    """How the kernel is launched, and its scratch types."""
    config = Config(warpgroups=CONSUMERS, block=BLOCK, stages=2 * _PAIR)
    weighted = plgpu.SMEM((_HALVES, *SQUARE), cache.dtype, transforms=narrow_transforms())
    return config, {
        "ring": ring_scratch(cache, config, CONSUMERS),
        **consumer_scratch(cache, mechanism, 1),
        "weighted": [[weighted] * (2 if bf16x2 else 1) for _ in range(_PAIR)],
        "seen": plgpu.Barrier(num_arrivals=_HALVES),
        # One barrier for each half of the moments.
        "ready": plgpu.Barrier(num_arrivals=1, num_barriers=_HALVES),
        "free": plgpu.Barrier(num_arrivals=1, num_barriers=_HALVES),
    }


def body(cache, mechanism, bf16x2, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    split = Split.of_program(cache, given)
    ring = make_ring(config, scratch)
    warpgroup = lax.axis_index("warpgroup")

    def registers(role: str, action: str):
        if not arithmetic.interpreted:
            plgpu.set_max_registers(_REGISTERS[role], action=action)

    def reader(kind, w):
        return kind(cache, mechanism, bf16x2, arithmetic, given, out, scratch, split, ring, w)

    @pl.when(warpgroup == 0)
    def _():
        registers("score", "increase")
        reader(_ScoreWarpgroup, 0).run()

    for half in range(_HALVES):

        @pl.when(warpgroup == 1 + half)
        def _(half=half):
            registers("multiply", "increase")
            reader(_MomentWarpgroup, half).run()

    @pl.when(warpgroup == CONSUMERS)
    def _():
        registers("load", "decrease")
        stream(cache, given, split, ring, even=True)


@dataclasses.dataclass
class _PairConsumer(Consumer):
    @property
    def pairs(self):
        count = self.split.end - self.split.begin
        return lax.div(count + 1, jnp.int32(_PAIR))


class _ScoreWarpgroup(_PairConsumer):
    """Computes the weights, the sums of values, and the weighted keys for the other warpgroups."""

    def run(self) -> None:
        self.prepare()
        self.write_ones()
        start = {
            "largest": full((ROW_BLOCK,), LOWEST, WGMMA_ROW),
            "total": full((ROW_BLOCK,), 0, WGMMA_ROW),
            "value": tuple(full(SQUARE, 0, WGMMA) for _ in self.blocks),
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
        slots = [self.ring.consumer_wait(t) for t in times]
        for t, slot in zip(times, slots, strict=True):
            self.zero_hidden(t, slot)
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
                parts = in_parts(weighted, self.cache.dtype, self.bf16x2)
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
            self.ring.consumer_release(slot)
        total = sums["total"] * shrink_rows + sum(weights)
        return {"largest": largest, "total": total, "value": tuple(values)}


class _MomentWarpgroup(_PairConsumer):
    """Rows ``[64 w, 64 w + 64)`` of the moments, and of the sum of the weighted keys."""

    def run(self) -> None:
        width, mine = self.cache.head_dim, pl.ds(self.w * BLOCK, BLOCK)
        widths = [width] * len(self.ring.tiles) + [MIN_COLUMNS]
        plgpu.barrier_wait(self.scratch["ones_written"])
        start = tuple(full((BLOCK, n), 0, WGMMA) for n in widths)
        *moments, keys = lax.fori_loop(0, self.pairs, self.add_pair, start)
        for i, matrix in enumerate(moments):
            self.part("moments").at[mine, pl.ds(i * width, width)][...] = matrix
        row = row_names(self.mechanism).index("key")
        self.part("rows").at[row, mine][...] = keys.sum(axis=1) / MIN_COLUMNS

    def add_pair(self, pair, moments):
        # Not `self.w`: products with a constant index do not lower.
        half = lax.axis_index("warpgroup") - 1
        slots = [self.ring.consumer_wait(_PAIR * pair + i) for i in range(_PAIR)]
        plgpu.barrier_wait(self.scratch["ready"].at[half])
        shrink = self.arithmetic.load(self.scratch["vectors"].at[0, SHRINK], WGMMA_ROW)
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
            self.ring.consumer_release(slot)
        return moments
