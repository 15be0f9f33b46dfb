"""The sums of `lla.kernels.mosaic_gpu.decode`, by two consumers that alternate between tiles."""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.decode import (
    BLOCK,
    MIN_COLUMNS,
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
from lla.kernels.mosaic_gpu.launch import Config, set_registers
from lla.kernels.mosaic_gpu.tile import (
    LOWEST,
    ROW_BLOCK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    by_row,
    full,
    in_parts,
    narrow_transforms,
)

CONSUMERS = 2
"""Consumer warpgroups, each of which takes every other tile."""


def plan(cache: CacheShape, mechanism: str, bf16x2: bool) -> tuple[Config, dict]:
    """How the kernel is launched, and its scratch types."""
    # An even number of stages gives each consumer its own slots. Otherwise it would miss every
    # other phase of their barriers, and wait forever.
    config = Config(warpgroups=CONSUMERS, block=BLOCK, stages=4 if cache.blocks == 2 else 6)
    types = {
        "ring": ring_scratch(cache, config, 1),
        **consumer_scratch(cache, mechanism, CONSUMERS),
        "handed": plgpu.Barrier(num_arrivals=1),
        "numbers": plgpu.SMEM((3, ROW_BLOCK), jnp.float32),
        "rows": plgpu.SMEM((len(row_names(mechanism)), cache.blocks, BLOCK), jnp.float32),
    }
    if mechanism == "lla":
        weighted = plgpu.SMEM((CONSUMERS, *SQUARE), cache.dtype, transforms=narrow_transforms())
        types["weighted"] = [weighted] * (2 if bf16x2 else 1)
        types["moments"] = plgpu.SMEM((2, *SQUARE), jnp.float32)
    return config, types


def body(cache, mechanism, bf16x2, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    split = Split.of_program(cache, given)
    ring = make_ring(config, scratch)
    warpgroup = lax.axis_index("warpgroup")

    for w in range(CONSUMERS):

        @pl.when(warpgroup == w)
        def _(w=w):
            set_registers(config, arithmetic, compute=True)
            _Pingpong(
                cache, mechanism, bf16x2, arithmetic, given, out, scratch, split, ring, w
            ).run()

    @pl.when(warpgroup == CONSUMERS)
    def _():
        set_registers(config, arithmetic, compute=False)
        stream(cache, given, split, ring)


class _Pingpong(Consumer):
    """A consumer that sums over every other tile."""

    def run(self) -> None:
        self.prepare()
        if self.mechanism == "lla" and self.w == 0:
            self.write_ones()

        def matrices(count):
            return tuple(full(SQUARE, 0, WGMMA) for _ in range(count))

        zero = full((ROW_BLOCK,), 0, WGMMA_ROW)
        start = {
            "largest": full((ROW_BLOCK,), LOWEST, WGMMA_ROW),
            "total": zero,
            "value": matrices(len(self.blocks)),
        }
        if self.mechanism == "lla":
            plgpu.barrier_wait(self.scratch["ones_written"])
            start |= {"moments": (*matrices(2), full((BLOCK, MIN_COLUMNS), 0, WGMMA))}
        if self.mechanism == "parallax":
            start |= {"along": zero, "along_value": matrices(len(self.blocks))}
        count = self.split.end - self.split.begin
        count_mine = lax.div(count + (CONSUMERS - 1 - self.w), jnp.int32(CONSUMERS))
        self.finish(lax.fori_loop(0, count_mine, self.add_tile, start))

    def add_tile(self, i, sums):
        t = CONSUMERS * i + self.w
        slot = self.ring.consumer_wait(t)
        self.zero_hidden(t, slot)
        tile = self.score(t, slot)
        largest, shrink_rows, (weights,) = self.weigh(sums["largest"], tile)
        shrink = by_row(shrink_rows, SQUARE)

        def add(matrices, terms):
            return tuple(a * shrink + b for a, b in zip(matrices, terms, strict=True))

        new = {"largest": largest, "total": sums["total"] * shrink_rows + weights}
        spread = by_row(weights, SQUARE)
        values = [self.values(slot, c) for c in self.blocks]
        new["value"] = add(sums["value"], [v * spread for v in values])
        if self.mechanism == "parallax":
            weighted = weights * tile.along
            new["along"] = sums["along"] * shrink_rows + weighted
            weighted = by_row(weighted, SQUARE)
            new["along_value"] = add(sums["along_value"], [v * weighted for v in values])
        if self.mechanism == "lla":
            parts = in_parts(self.keys(slot, 0) * spread, self.cache.dtype, self.bf16x2)
            # Not `self.w`: products with a constant index do not lower.
            refs = [ref.at[lax.axis_index("warpgroup")] for ref in self.scratch["weighted"]]
            for ref, part in zip(refs, parts, strict=True):
                ref[...] = part
            plgpu.commit_smem()
            factors = [*(tile.at[slot] for tile in self.ring.tiles), self.ones]
            new["moments"] = self.arithmetic.accumulate_transposed(
                [a * by_row(shrink_rows, a.shape) for a in sums["moments"]],
                *[[(ref, factor) for ref in refs] for factor in factors],
            )
        else:
            plgpu.commit_smem()
        self.ring.consumer_release(slot)
        return new

    def finish(self, sums) -> None:
        """Adds the sums of both consumers and writes them.

        Reductions across warps share one buffer, so the consumers reduce one after the other.
        """
        if self.w == 0:
            plgpu.barrier_wait(self.scratch["handed"])
        numbers = {name: sums[name] for name in ("largest", "total", "along") if name in sums}
        rows = {
            name: [matrix.sum(axis=0) for matrix in sums[name]]
            for name in ("value", "along_value")
            if name in sums
        }
        moments = sums.get("moments", ())
        if moments:
            *moments, keys = moments
            numbers["key"] = keys.sum(axis=1) / MIN_COLUMNS
        places = {name: self.scratch["numbers"].at[i] for i, name in enumerate(numbers)}
        row_places = {
            (name, c): self.scratch["rows"].at[r, c]
            for r, name in enumerate(rows)
            for c in self.blocks
        }
        if self.w:
            for name, vector in numbers.items():
                places[name][...] = vector
            for (name, c), place in row_places.items():
                place[...] = rows[name][c]
            for c, matrix in enumerate(moments):
                self.scratch["moments"].at[c][...] = matrix
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.scratch["handed"])
            return

        load = self.arithmetic.load
        others = {name: load(place, WGMMA_ROW) for name, place in places.items()}
        largest = jnp.maximum(numbers["largest"], others["largest"])
        own, other = (jnp.exp2(n["largest"] - largest) for n in (numbers, others))
        columns = self.to_columns(own), self.to_columns(other)
        joined = {
            name: [
                row * columns[0] + load(row_places[name, c], WGMMA_COL) * columns[1]
                for c, row in enumerate(blocks)
            ]
            for name, blocks in rows.items()
        }
        for name in numbers:
            joined[name] = numbers[name] * own + others[name] * other
        self.part("largest")[...] = largest
        self.store_rows(joined)
        for c, matrix in enumerate(moments):
            total = matrix * by_row(own, SQUARE)
            total = total + load(self.scratch["moments"].at[c]) * by_row(other, SQUARE)
            self.part("moments").at[pl.ds(0, BLOCK), pl.ds(c * BLOCK, BLOCK)][...] = total
