"""One new query per sequence and head against a cache of keys and values that is read once.

A program instance sums over a part of the keys of one query head: softmax weights times values,
and for local linear attention times the products of keys with keys and values. The sums of all
parts give the system of the query, which a second kernel solves without the cache. The head
dimension of the cache is 64 or 128, exactly: padding would copy it.

See ``kernels/README.md`` for the formulas and for the numbers behind the design.
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

from lla.kernels.mosaic_gpu.launch import Config, Ring, launch
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
)

BLOCK = 64
"""Keys of a tile, and columns of a block of the head dimension."""

SQUARE = (BLOCK, BLOCK)
_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class Cache:
    """Sizes: key and value ``[B, S, K, D]``, and ``N = K * group`` query heads.

    `splits` is the number of program instances that share the keys of a query head.
    """

    batch: int
    num_keys: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: Any
    splits: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def blocks(self) -> int:
        """Blocks of a head."""
        return self.head_dim // BLOCK

    def halved(self, member: str) -> bool:
        """Whether both warpgroups of an instance take every tile, each for a half of the head.

        Otherwise they take turns. The moments of a wide head do not fit one warpgroup's registers.
        """
        return member == "lla" and self.blocks == 2

    def parts(self, member: str) -> int:
        """Parts ``P`` whose sums are kept apart."""
        return self.splits * (1 if self.halved(member) else _WARPGROUPS)

    def each(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An array of every query head, float32."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, *shape), jnp.float32)


class Sums(NamedTuple):
    """Sums over parts of the keys, ``[B, N, P, ...]`` float32, None where a member has none.

    The weights are ``exp2(logit - largest)``; keys are relative to the first visible one, and
    ``t`` is such a key times the probe.

    Attributes:
      largest: ``[64]`` equal numbers, the largest logit of a part in base 2.
      total: ``[64]`` numbers that add up to the sum of the weights.
      value: ``[D]``, of the weights times values.
      key: ``[D]``, of the weights times keys.
      moments: ``[D, 2 D]``, of the weights times keys times (keys as they are, values).
      along: ``[64]`` numbers that add up to the sum of the weights times t.
      along_value: ``[D]``, of the weights times t times values.
    """

    largest: jax.Array
    total: jax.Array
    value: jax.Array
    key: jax.Array | None = None
    moments: jax.Array | None = None
    along: jax.Array | None = None
    along_value: jax.Array | None = None


def sum_over_cache(
    cache: Cache,
    member: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    probe: jax.Array | None = None,
    *,
    precise: bool,
    stages: int = 6,
    interpret: Any = None,
) -> Sums:
    """The sums over all visible keys, in parts.

    Args:
      cache: sizes; at least 64 keys.
      member: "softmax", "parallax" or "lla".
      query: float32 ``[B, N, D]``, times the scale of the logits.
      key, value: ``[B, S, K, D]`` in 16 bits.
      visible: int32 ``[B, 2]``, the first visible key and the one after the last.
      probe: float32 ``[B, N, D]``, for "parallax".
      precise: whether weighted keys have two 16-bit parts in the moments.
      stages: tiles in flight, an even number.
      interpret: parameters of the interpreter, or None to compile.
    """
    halved, parts = cache.halved(member), cache.parts(member)
    config = Config(warpgroups=_WARPGROUPS, block=BLOCK, stages=stages)
    outputs = {
        "largest": cache.each(parts, ROW_BLOCK),
        "total": cache.each(parts, ROW_BLOCK),
        "value": cache.each(parts, cache.head_dim),
    }
    if member == "lla":
        outputs["key"] = cache.each(parts, cache.head_dim)
        outputs["moments"] = cache.each(parts, cache.head_dim, 2 * cache.head_dim)
    if member == "parallax":
        outputs["along"] = cache.each(parts, ROW_BLOCK)
        outputs["along_value"] = cache.each(parts, cache.head_dim)
    transforms = narrow_transforms()
    tile = plgpu.SMEM((stages, *SQUARE), cache.dtype, transforms=transforms)
    scratch = {
        "ring": (
            [tile] * (2 * cache.blocks),
            plgpu.Barrier(num_arrivals=2 * cache.blocks, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_WARPGROUPS if halved else 1, num_barriers=stages),
        ),
        "rows": plgpu.SMEM((_WARPGROUPS, ROW_BLOCK), jnp.float32),
        "reduced": plgpu.Barrier(num_arrivals=1),
    }
    if member == "lla":
        weighted = plgpu.SMEM((_WARPGROUPS, *SQUARE), cache.dtype, transforms=transforms)
        scratch["weighted"] = [weighted] * (2 if precise else 1)
    operands = {
        "query": query * LOG2E,
        "key": key,
        "value": value,
        "visible": visible,
        "probe": probe,
    }
    body = functools.partial(
        _sum_body, cache, member, precise, config, Arithmetic(interpret is not None)
    )
    results = launch(
        body, outputs, scratch, operands,
        programs=cache.batch * cache.heads * cache.splits, config=config, interpret=interpret,
        reduction_bytes=1024,
    )  # fmt: skip
    return Sums(**results)


class _Share(NamedTuple):
    """What a program instance sums over: tiles ``[begin, end)`` of the keys of a head."""

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    split: jax.Array
    low: jax.Array  # the first visible key, and the one after the last
    high: jax.Array
    begin: jax.Array
    end: jax.Array


def _share(cache: Cache, visible) -> _Share:
    """Heads that share keys are next to each other, so that they meet in the second-level cache."""

    def cut(number, size):
        return lax.div(number, jnp.int32(size)), lax.rem(number, jnp.int32(size))

    rest, g = cut(lax.axis_index("program"), cache.group)
    rest, split = cut(rest, cache.splits)
    b, kv_head = cut(rest, cache.kv_heads)
    low, high = visible[b, 0], visible[b, 1]
    first, last = lax.div(low, jnp.int32(BLOCK)), lax.div(high + (BLOCK - 1), jnp.int32(BLOCK))
    each = lax.div(jnp.maximum(last - first, 0) + (cache.splits - 1), jnp.int32(cache.splits))
    begin = jnp.minimum(first + split * each, last)
    end = jnp.minimum(begin + each, last)
    return _Share(b, kv_head * cache.group + g, kv_head, split, low, high, begin, end)


def _tile_start(cache: Cache, j):
    """The last tile overlaps the one before it where the keys do not fill it."""
    return jnp.minimum(j * BLOCK, cache.num_keys - BLOCK)


def _sum_body(cache, member, precise, config, arithmetic, given, out, scratch):
    share = _share(cache, given["visible"])
    tiles, *barriers = scratch["ring"]
    ring = Ring(tuple(tiles), *barriers, config.stages, late=False)
    warpgroup = lax.axis_index("warpgroup")

    def registers(index: int):
        if not arithmetic.interpreted:
            action = "decrease" if index else "increase"
            plgpu.set_max_registers(config.registers[index], action=action)

    for w in range(_WARPGROUPS):

        @pl.when(warpgroup == w)
        def _(w=w):
            registers(0)
            half = w if cache.halved(member) else None
            _PartialSums(cache, member, precise, arithmetic, given, out, scratch, share, ring,
                         w, half).run()  # fmt: skip

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        registers(1)

        def stream(j, t):
            start = _tile_start(cache, j)
            sources = [
                given[name].at[share.b, pl.ds(start, BLOCK), share.kv_head, pl.ds(c * BLOCK, BLOCK)]
                for name in ("key", "value")
                for c in range(cache.blocks)
            ]
            return ring.fill(t, sources)

        ring.drain(lax.fori_loop(share.begin, share.end, stream, jnp.int32(0)))


@dataclasses.dataclass
class _PartialSums:
    """The sums of one compute warpgroup, static number `w`.

    With a `half` it takes every tile and keeps the sums of that block of the head; without, every
    other tile and all blocks.
    """

    cache: Cache
    member: str
    precise: bool
    arithmetic: Arithmetic
    given: Any
    out: Any
    scratch: Any
    share: _Share
    ring: Ring
    w: int
    half: int | None

    @property
    def mine(self) -> range:
        """Blocks of the head whose sums are kept here."""
        return range(self.cache.blocks) if self.half is None else range(self.half, self.half + 1)

    def row(self, array):
        """Blocks of a row ``[D]`` of an array in global memory, float32 vectors of columns."""
        blocks = [array.at[pl.ds(c * BLOCK, BLOCK)] for c in range(self.cache.blocks)]
        return [self.arithmetic.load(block, COLS).astype(jnp.float32) for block in blocks]

    def run(self):
        cache, share = self.cache, self.share
        query = self.row(self.given["query"].at[share.b, share.head])
        some_key = jnp.minimum(share.low, cache.num_keys - 1)
        origin = self.row(self.given["key"].at[share.b, some_key, share.kv_head])
        probe = None
        if self.member == "parallax":
            probe = self.row(self.given["probe"].at[share.b, share.head])

        def matrices(count):
            return tuple(full(SQUARE, 0, MATRIX) for _ in range(count))

        zero = full((ROW_BLOCK,), 0, ROWS)
        start = {
            "largest": full((ROW_BLOCK,), LOWEST, ROWS),
            "total": zero,
            "value": matrices(len(self.mine)),
        }
        if self.member == "lla":
            start |= {"key": matrices(len(self.mine)), "moments": matrices(2 * cache.blocks)}
        if self.member == "parallax":
            start |= {"along": zero, "along_value": matrices(len(self.mine))}
        count = share.end - share.begin
        if self.half is not None:
            last = lax.fori_loop(
                0, count, lambda t, c: self.add_tile(t, c, query, origin, probe), start
            )
        else:
            turns = lax.div(count + (1 - self.w), jnp.int32(_WARPGROUPS))
            last = lax.fori_loop(
                0, turns,
                lambda i, c: self.add_tile(_WARPGROUPS * i + self.w, c, query, origin, probe),
                start,
            )  # fmt: skip
        self.store(last)

    def add_tile(self, t, sums, query, origin, probe):
        cache, load = self.cache, self.arithmetic.load
        slot = self.ring.wait(t)
        tiles = [tile.at[slot] for tile in self.ring.tiles]
        j = self.share.begin + t
        logits = along = full((ROW_BLOCK,), 0, ROWS)
        keys = {}
        for c in range(cache.blocks):
            keys[c] = load(tiles[c]).astype(jnp.float32) - by_column(origin[c], SQUARE)
            logits = logits + row_dot(keys[c], by_column(query[c], SQUARE))
            if probe is not None:
                along = along + row_dot(keys[c], by_column(probe[c], SQUARE))
        position = plgpu.broadcasted_iota(jnp.int32, (ROW_BLOCK,), 0, layout=ROWS)
        position = position + _tile_start(cache, j)
        first = jnp.maximum(self.share.low, j * BLOCK)
        valid = (position >= first) & (position < self.share.high)
        logits = jnp.where(valid, logits, LOWEST)
        largest = jnp.maximum(sums["largest"], self.over_rows(logits, "max"))
        shrink = jnp.exp2(sums["largest"] - largest)
        weights = jnp.where(valid, jnp.exp2(logits - largest), 0.0)

        def add(total, term):
            return total * by_row(shrink, total.shape) + term

        new = {"largest": largest, "total": sums["total"] * shrink + weights}
        values = [load(tiles[cache.blocks + c]).astype(jnp.float32) for c in self.mine]
        spread = by_row(weights, SQUARE)
        new["value"] = tuple(add(a, v * spread) for a, v in zip(sums["value"], values, strict=True))
        if probe is not None:
            weighted = weights * along
            new["along"] = sums["along"] * shrink + weighted
            spread = by_row(weighted, SQUARE)
            new["along_value"] = tuple(
                add(a, v * spread) for a, v in zip(sums["along_value"], values, strict=True)
            )
        if self.member == "lla":
            (mine,) = self.mine
            weighted = keys[mine] * spread
            new["key"] = (add(sums["key"][0], weighted),)
            parts = in_parts(weighted, cache.dtype, self.precise)
            # An index that is known would become a constant of the products, which do not lower.
            refs = [ref.at[lax.axis_index("warpgroup")] for ref in self.scratch["weighted"]]
            for ref, part in zip(refs, parts, strict=True):
                ref[...] = part
            plgpu.commit_smem()
            moments = [a * by_row(shrink, SQUARE) for a in sums["moments"]]
            new["moments"] = self.arithmetic.accumulate_transposed(
                moments, *[[(ref, tile) for ref in refs] for tile in tiles]
            )
        else:
            plgpu.commit_smem()
        self.ring.release(slot)
        return new

    def over_rows(self, vector, kind: str):
        """The largest number, or the sum, of a vector of rows, in all of its places.

        The memory of reductions across warps is one for all warpgroups, so this has its own.
        """
        ref = self.scratch["rows"].at[self.w]
        ref[...] = vector
        columns = by_column(self.arithmetic.load(ref, COLS), SQUARE)
        return columns.max(axis=1) if kind == "max" else columns.sum(axis=1)

    def store(self, sums):
        share = self.share
        part = share.split
        if self.half is None:
            part = share.split * _WARPGROUPS + self.w
        out = {name: ref.at[share.b, share.head, part] for name, ref in self.out.items()}
        for name in ("largest", "total", "along"):
            if name in out and self.half in (None, 0):
                out[name][...] = sums[name]
        if self.member == "lla":
            (mine,) = self.mine
            for c, block in enumerate(sums["moments"]):
                where = pl.ds(mine * BLOCK, BLOCK), pl.ds(c * BLOCK, BLOCK)
                out["moments"].at[where][...] = block
        # Reductions across warps share memory: one warpgroup after the other.
        if self.w:
            plgpu.barrier_wait(self.scratch["reduced"])
        for name in ("value", "key", "along_value"):
            if name in out:
                for c, block in zip(self.mine, sums[name], strict=True):
                    out[name].at[pl.ds(c * BLOCK, BLOCK)][...] = block.sum(axis=0)
        if not self.w:
            plgpu.barrier_arrive(self.scratch["reduced"])
