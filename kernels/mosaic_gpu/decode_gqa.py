"""The sums of `lla.kernels.mosaic_gpu.decode` for query heads that share keys, without moments.

The query heads of an instance are the first rows of one operand of 64, so that a tile of keys and
values is read once for all of them, by products alone. Two warpgroups take turns with the tiles.
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
    SQUARE,
    TOGETHER,
    Cache,
    Share,
    Sums,
    clear_hidden,
    counting,
    entry,
    heads_together,
    make_ring,
    ring_scratch,
    row_names,
    stream,
)
from lla.kernels.mosaic_gpu.launch import Config, Ring, set_registers
from lla.kernels.mosaic_gpu.tile import (
    COLS,
    LOG2E,
    LOWEST,
    MATRIX,
    ROW_BLOCK,
    ROWS,
    Arithmetic,
    by_column,
    by_row,
    full,
    in_parts,
    narrow_transforms,
    row_dot,
    wide_transforms,
)

TURNS = 2
"""Warpgroups that take turns."""


def _names(member: str) -> dict[str, int]:
    """Places of the sums in the output: those of `row_names`, and the largest logit."""
    return {name: i for i, name in enumerate((*row_names(member), "largest"))}


def outputs(cache: Cache, member: str) -> dict:
    """Arrays ``[B, N / H, P, R + 1, 8, D]`` for instances with H query heads."""
    heads = heads_together(member, cache.group)
    lead = (cache.batch, cache.heads // heads, cache.splits, len(_names(member)))
    return {"rows": jax.ShapeDtypeStruct((*lead, TOGETHER, cache.head_dim), jnp.float32)}


def sums(cache: Cache, member: str, results: dict) -> Sums:
    """The sums by query head from those by instance."""
    rows = results["rows"][:, :, :, :, : heads_together(member, cache.group)]
    rows = jnp.moveaxis(rows, 4, 2)  # [B, N / H, H, P, R + 1, D]
    rows = rows.reshape(cache.batch, cache.heads, *rows.shape[3:])
    return Sums(rows[..., -1, :ROW_BLOCK], rows[..., :-1, :])


def plan(cache: Cache, member: str, precise: bool) -> tuple[Config, dict]:
    """How the kernel is launched, and its scratch types."""
    del precise  # the weights always have two parts
    # Even, so that the warpgroups always meet the same barriers.
    config = Config(warpgroups=TURNS, block=BLOCK, stages=4 if cache.blocks == 2 else 6)
    shape = (ROW_BLOCK, cache.head_dim)
    rows = plgpu.SMEM(shape, cache.dtype, transforms=narrow_transforms())
    return config, {
        "ring": ring_scratch(cache, config, 1),
        # Row h is the query of head h, and its probe.
        "heads": [rows] * (2 if member == "parallax" else 1),
        "heads_written": plgpu.Barrier(num_arrivals=1),
        # From the second warpgroup to the first.
        "numbers": plgpu.SMEM((3, ROW_BLOCK), jnp.float32),
        "matrix": plgpu.SMEM(shape, jnp.float32, transforms=wide_transforms()),
        "handed": plgpu.Barrier(num_arrivals=1),
        "taken": plgpu.Barrier(num_arrivals=1),
    }


def body(cache, member, precise, config, arithmetic, given, out, scratch):
    """Body of the kernel, for `lla.kernels.mosaic_gpu.launch.launch`."""
    del precise
    heads = heads_together(member, cache.group)
    share = Share.mine(cache, given, heads)
    ring = make_ring(config, scratch)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < TURNS)
    def _():
        set_registers(config, arithmetic, compute=True)
        w = warpgroup
        _Rows(cache, member, heads, arithmetic, given, out, scratch, share, ring, w).run()

    @pl.when(warpgroup == TURNS)
    def _():
        set_registers(config, arithmetic, compute=False)
        stream(cache, given, share, ring)


def _by_row(vector, shape):
    """`by_row` in a layout that is named, which spares the compiler a long search."""
    return plgpu.layout_cast(by_row(vector, shape), MATRIX)


def _by_column(vector, shape):
    return plgpu.layout_cast(by_column(vector, shape), MATRIX)


@dataclasses.dataclass
class _Rows:
    """Every other tile, number `w` of `TURNS`: sums ``[64, D]`` with a row for each head."""

    cache: Cache
    member: str
    heads: int
    arithmetic: Arithmetic
    given: Any
    out: Any
    scratch: Any
    share: Share
    ring: Ring
    w: jax.Array
    scale: jax.Array | None = None  # [64], of logits in base 2
    level: jax.Array | None = None  # [64], the first visible key times the probes

    def run(self) -> None:
        pl.when(self.w == 0)(self.write_heads)
        plgpu.barrier_wait(self.scratch["heads_written"])
        self.prepare()
        zero = full((ROW_BLOCK,), 0, ROWS)
        wide = full((ROW_BLOCK, self.cache.head_dim), 0, MATRIX)
        # Above the logits of hidden keys, which so have no weight in tiles without another key.
        largest = full((ROW_BLOCK,), LOWEST / 2, ROWS)
        start = {"largest": largest, "total": zero, "value": wide}
        if self.member == "parallax":
            start |= {"along": zero, "along_value": wide}
        count = self.share.end - self.share.begin
        turns = lax.div(count + (TURNS - 1 - self.w), jnp.int32(TURNS))
        sums = lax.fori_loop(0, turns, self.add_tile, start)
        pl.when(self.w != 0)(lambda: self.hand_over(sums))
        pl.when(self.w == 0)(lambda: self.finish(sums))

    @property
    def columns(self) -> list:
        """The columns of each block of the head dimension."""
        return [pl.ds(c * BLOCK, BLOCK) for c in range(self.cache.blocks)]

    def vector(self, source, columns):
        """A block of a vector in global memory."""
        return self.arithmetic.load(source.at[columns], COLS).astype(jnp.float32)

    def write_heads(self) -> None:
        share = self.share
        row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=MATRIX)
        for name, tile in zip(("query", "probe"), self.scratch["heads"], strict=False):
            for columns in self.columns:
                rows = full(SQUARE, 0, MATRIX)
                for h in range(self.heads):
                    vector = self.vector(self.given[name].at[share.b, share.head + h], columns)
                    rows = jnp.where(row == h, _by_column(vector, SQUARE), rows)
                tile.at[:, columns][...] = rows.astype(self.cache.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.scratch["heads_written"])

    def prepare(self) -> None:
        share, given = self.share, self.given
        row = plgpu.broadcasted_iota(jnp.int32, (ROW_BLOCK,), 0, layout=ROWS)
        scale = full((ROW_BLOCK,), 0, ROWS)
        for h in range(self.heads):
            own = entry(given["scale"], share.b, share.head + h)
            scale = jnp.where(row == h, own * LOG2E, scale)
        self.scale = scale
        if self.member != "parallax":
            return
        some_key = jnp.minimum(share.low, self.cache.num_keys - 1)
        origin = given["key"].at[share.b, some_key, share.kv_head]
        level = full((ROW_BLOCK,), 0, ROWS)
        for columns in self.columns:
            probes = self.arithmetic.load(self.scratch["heads"][1].at[:, columns])
            key = _by_column(self.vector(origin, columns), SQUARE)
            level = level + row_dot(probes.astype(jnp.float32), key)
        self.level = level

    def add_tile(self, i, sums):
        t = TURNS * i + self.w
        slot = self.ring.wait(t)
        clear_hidden(self.cache, self.share, self.arithmetic, self.ring, t, slot)
        keys, values = (tile.at[slot] for tile in self.ring.tiles)
        logits, *along = self.arithmetic.products(
            BLOCK, *[[(tile, keys)] for tile in self.scratch["heads"]]
        )
        valid = counting(self.cache, self.share, t, SQUARE, 1, MATRIX)
        logits = jnp.where(valid, logits * _by_row(self.scale, SQUARE), LOWEST)
        largest = jnp.maximum(sums["largest"], logits.max(axis=1))
        shrink = jnp.exp2(sums["largest"] - largest)
        weights = jnp.exp2(logits - _by_row(largest, SQUARE))
        new = {"largest": largest, "total": sums["total"] * shrink + weights.sum(axis=1)}
        factors = {"value": weights}
        if self.member == "parallax":
            weighted = weights * (along[0] - _by_row(self.level, SQUARE))
            new["along"] = sums["along"] * shrink + weighted.sum(axis=1)
            factors["along_value"] = weighted
        for name, factor in factors.items():
            # One after the other, as there are no registers for both.
            total = sums[name] * _by_row(shrink, sums[name].shape)
            parts = in_parts(factor, self.cache.dtype, True)
            pairs = [(part, values) for part in parts]
            (new[name],) = self.arithmetic.accumulate([total], pairs)
        self.ring.release(slot)
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
        """Adds the sums of both warpgroups and writes them."""
        numbers, matrices = self.numbers(sums), self.matrices(sums)
        for i, (name, matrix) in enumerate(matrices.items()):
            plgpu.barrier_wait(self.scratch["handed"])
            if i == 0:
                others = {
                    name: self.arithmetic.load(self.scratch["numbers"].at[n], ROWS)
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
            if name != "largest":  # numbers that add up to the one of each row
                total = (numbers[name] * own + others[name] * other) / self.cache.head_dim
                self.write(name, _by_row(total, shape))

    def write(self, name: str, matrix) -> None:
        """The first rows of a matrix to their place in the output."""
        share, heads = self.share, self.heads
        place = self.out["rows"].at[
            share.b, lax.div(share.head, jnp.int32(heads)), share.split, _names(self.member)[name]
        ]
        self.scratch["matrix"][...] = matrix
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.scratch["matrix"].at[pl.ds(0, TOGETHER)], place)
        plgpu.wait_smem_to_gmem(0)
