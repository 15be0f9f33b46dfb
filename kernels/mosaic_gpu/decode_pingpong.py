"""The sums of `lla.kernels.mosaic_gpu.decode` by two warpgroups that take turns with the tiles."""

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
    make_ring,
    reader_scratch,
    ring_scratch,
    row_names,
    stream,
)
from lla.kernels.mosaic_gpu.launch import Config, set_registers
from lla.kernels.mosaic_gpu.tile import (
    COLS,
    LOWEST,
    MATRIX,
    ROW_BLOCK,
    ROWS,
    by_row,
    full,
    in_parts,
    narrow_transforms,
)

TURNS = 2
"""Warpgroups that take turns."""


def plan(cache: Cache, member: str, precise: bool) -> tuple[Config, dict]:
    """How the kernel is launched, and its scratch types."""
    # Even, so that the warpgroups always meet the same barriers: one that has missed a phase of a
    # barrier waits forever.
    config = Config(warpgroups=TURNS, block=BLOCK, stages=4 if cache.blocks == 2 else 6)
    types = {
        "ring": ring_scratch(cache, config, 1),
        **reader_scratch(cache, member, TURNS),
        "handed": plgpu.Barrier(num_arrivals=1),
        "numbers": plgpu.SMEM((3, ROW_BLOCK), jnp.float32),
        "rows": plgpu.SMEM((len(row_names(member)), cache.blocks, BLOCK), jnp.float32),
    }
    if member == "lla":
        weighted = plgpu.SMEM((TURNS, *SQUARE), cache.dtype, transforms=narrow_transforms())
        types["weighted"] = [weighted] * (2 if precise else 1)
        types["moments"] = plgpu.SMEM((2, *SQUARE), jnp.float32)
    return config, types


def body(cache, member, precise, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    share = Share.mine(cache, given)
    ring = make_ring(config, scratch)
    warpgroup = lax.axis_index("warpgroup")

    for w in range(TURNS):

        @pl.when(warpgroup == w)
        def _(w=w):
            set_registers(config, arithmetic, compute=True)
            _Turns(cache, member, precise, arithmetic, given, out, scratch, share, ring, w).run()

    @pl.when(warpgroup == TURNS)
    def _():
        set_registers(config, arithmetic, compute=False)
        stream(cache, given, share, ring)


class _Turns(Reader):
    """One of the warpgroups that take every other tile each, with sums of its own."""

    def run(self) -> None:
        self.prepare()
        if self.member == "lla" and self.w == 0:
            self.write_ones()

        def matrices(count):
            return tuple(full(SQUARE, 0, MATRIX) for _ in range(count))

        zero = full((ROW_BLOCK,), 0, ROWS)
        start = {
            "largest": full((ROW_BLOCK,), LOWEST, ROWS),
            "total": zero,
            "value": matrices(len(self.blocks)),
        }
        if self.member == "lla":
            plgpu.barrier_wait(self.scratch["ones_written"])
            start |= {"moments": (*matrices(2), full((BLOCK, COLUMNS), 0, MATRIX))}
        if self.member == "parallax":
            start |= {"along": zero, "along_value": matrices(len(self.blocks))}
        count = self.share.end - self.share.begin
        turns = lax.div(count + (TURNS - 1 - self.w), jnp.int32(TURNS))
        self.finish(lax.fori_loop(0, turns, self.add_tile, start))

    def add_tile(self, i, sums):
        t = TURNS * i + self.w
        slot = self.ring.wait(t)
        self.clear_hidden(t, slot)
        tile = self.score(t, slot)
        largest, shrink_rows, (weights,) = self.weigh(sums["largest"], tile)
        shrink = by_row(shrink_rows, SQUARE)

        def add(matrices, terms):
            return tuple(a * shrink + b for a, b in zip(matrices, terms, strict=True))

        new = {"largest": largest, "total": sums["total"] * shrink_rows + weights}
        spread = by_row(weights, SQUARE)
        values = [self.values(slot, c) for c in self.blocks]
        new["value"] = add(sums["value"], [v * spread for v in values])
        if self.member == "parallax":
            weighted = weights * tile.along
            new["along"] = sums["along"] * shrink_rows + weighted
            weighted = by_row(weighted, SQUARE)
            new["along_value"] = add(sums["along_value"], [v * weighted for v in values])
        if self.member == "lla":
            parts = in_parts(self.keys(slot, 0) * spread, self.cache.dtype, self.precise)
            # An index that is known would become a constant of the products, which do not lower.
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
        self.ring.release(slot)
        return new

    def finish(self, sums) -> None:
        """Adds the sums of both warpgroups and writes them.

        Reductions across warps share memory, so the warpgroups reduce one after the other.
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
            numbers["key"] = keys.sum(axis=1) / COLUMNS
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
        others = {name: load(place, ROWS) for name, place in places.items()}
        largest = jnp.maximum(numbers["largest"], others["largest"])
        own, other = (jnp.exp2(n["largest"] - largest) for n in (numbers, others))
        columns = self.turned(own), self.turned(other)
        joined = {
            name: [
                row * columns[0] + load(row_places[name, c], COLS) * columns[1]
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
