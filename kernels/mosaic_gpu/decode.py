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
_TURNS = 2  # warpgroups that take turns
_VECTORS = ("query", "origin", "probe")


@dataclasses.dataclass(frozen=True)
class Cache:
    """Sizes: key and value ``[B, S, K, D]``, and ``N = K * group`` query heads.

    `splits` is the number ``P`` of program instances that share the keys of a query head.
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

    def each(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An array of every query head, float32."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, *shape), jnp.float32)


class Sums(NamedTuple):
    """Sums over parts of the keys, float32.

    The weights are ``exp2(logit - largest)``; keys are relative to the first visible one, and ``t``
    is such a key times the probe.

    Attributes:
      largest: ``[B, N, P, 64]`` equal numbers, the largest logit of a part in base 2.
      rows: ``[B, N, P, R, D]``, named by `row_names`: "total" is a row of numbers that add up to
        the sum of the weights, "value" the sum of the weights times values, "key" of the weights
        times keys, "along" a row of numbers that add up to the sum of the weights times t,
        "along_value" the sum of the weights times t times values.
      moments: ``[B, N, P, D, 2 D]``, of the weights times keys times (keys as they are, values),
        for "lla" alone.
    """

    largest: jax.Array
    rows: jax.Array
    moments: jax.Array | None = None


def row_names(member: str) -> tuple[str, ...]:
    """What the rows of `Sums` are."""
    return (
        "total",
        "value",
        *{"lla": ("key",), "parallax": ("along", "along_value")}.get(member, ()),
    )


def sum_over_cache(
    cache: Cache,
    member: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: tuple[jax.Array, jax.Array],
    scale: jax.Array,
    probe: jax.Array | None = None,
    *,
    precise: bool,
    interpret: Any = None,
) -> Sums:
    """The sums over all visible keys, in parts.

    Args:
      cache: sizes; at least 64 keys.
      member: "softmax", "parallax" or "lla".
      query, probe: ``[B, N, D]`` in 16 bits, the probe for "parallax".
      key, value: ``[B, S, K, D]`` in 16 bits.
      visible: int32 ``[B]`` twice, the first visible key and the one after the last.
      scale: float32 ``[B, N]``, of the logits.
      precise: whether weighted keys have two 16-bit parts in the moments.
      interpret: parameters of the interpreter, or None to compile.
    """
    from lla.kernels.mosaic_gpu import decode_roles

    roles = member == "lla" and cache.blocks == 2
    readers = decode_roles.READERS if roles else _TURNS
    # At 64 numbers a head the memory of one instance holds more tiles than are of use.
    config = Config(warpgroups=readers, block=BLOCK, stages=4 if roles else 6)
    names = row_names(member)
    outputs = {
        "largest": cache.each(cache.splits, ROW_BLOCK),
        "rows": cache.each(cache.splits, len(names), cache.head_dim),
    }
    transforms = narrow_transforms()
    tile = plgpu.SMEM((config.stages, *SQUARE), cache.dtype, transforms=transforms)
    scratch = {
        "ring": (
            [tile] * (2 * cache.blocks),
            plgpu.Barrier(num_arrivals=2 * cache.blocks, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=readers if roles else 1, num_barriers=config.stages),
        ),
        "exchanged": plgpu.SMEM((_TURNS, ROW_BLOCK), jnp.float32),
    }
    if cache.blocks == 2:  # too much for registers
        shape = (_TURNS, len(_VECTORS), cache.blocks, BLOCK)
        scratch["vectors"] = plgpu.SMEM(shape, jnp.float32)
    if member == "lla":
        outputs["moments"] = cache.each(cache.splits, cache.head_dim, 2 * cache.head_dim)
    if roles:
        scratch |= decode_roles.scratch(cache, precise)
    else:
        scratch["handed"] = plgpu.Barrier(num_arrivals=1)
        scratch["numbers"] = plgpu.SMEM((3, ROW_BLOCK), jnp.float32)
        scratch["rows"] = plgpu.SMEM((len(names), cache.blocks, BLOCK), jnp.float32)
        if member == "lla":
            scratch["moments"] = plgpu.SMEM((2, *SQUARE), jnp.float32)
            weighted = plgpu.SMEM((_TURNS, *SQUARE), cache.dtype, transforms=transforms)
            scratch["weighted"] = [weighted] * (2 if precise else 1)
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "first": visible[0],
        "last": visible[1],
        "scale": scale,
        "probe": probe,
    }
    body = functools.partial(
        decode_roles.body if roles else _take_turns,
        cache, member, precise, config, Arithmetic(interpret is not None),
    )  # fmt: skip
    results = launch(
        body, outputs, scratch, operands,
        programs=cache.batch * cache.heads * cache.splits, config=config, interpret=interpret,
        reduction_bytes=1024,
    )  # fmt: skip
    return Sums(**results)


class Share(NamedTuple):
    """What a program instance sums over: tiles ``[begin, end)`` of the keys of a head."""

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    split: jax.Array
    low: jax.Array  # the first visible key, and the one after the last
    high: jax.Array
    begin: jax.Array
    end: jax.Array

    @classmethod
    def mine(cls, cache: Cache, given) -> Share:
        """Heads that share keys are next to each other, to meet in the second-level cache."""

        def cut(number, size):
            return lax.div(number, jnp.int32(size)), lax.rem(number, jnp.int32(size))

        rest, g = cut(lax.axis_index("program"), cache.group)
        rest, split = cut(rest, cache.splits)
        b, kv_head = cut(rest, cache.kv_heads)
        low, high = given["first"][b], given["last"][b]
        first, last = lax.div(low, jnp.int32(BLOCK)), lax.div(high + (BLOCK - 1), jnp.int32(BLOCK))
        each = lax.div(jnp.maximum(last - first, 0) + (cache.splits - 1), jnp.int32(cache.splits))
        begin = jnp.minimum(first + split * each, last)
        end = jnp.minimum(begin + each, last)
        return cls(b, kv_head * cache.group + g, kv_head, split, low, high, begin, end)


def _tile_start(cache: Cache, j):
    """The last tile overlaps the one before it where the keys do not fill it."""
    return jnp.minimum(j * BLOCK, cache.num_keys - BLOCK)


def stream(cache: Cache, given, share: Share, ring: Ring) -> None:
    """The warpgroup that fills the ring with tiles: blocks of the keys, then of the values."""

    def fill(j, t):
        start = _tile_start(cache, j)
        sources = [
            given[name].at[share.b, pl.ds(start, BLOCK), share.kv_head, pl.ds(c * BLOCK, BLOCK)]
            for name in ("key", "value")
            for c in range(cache.blocks)
        ]
        return ring.fill(t, sources)

    ring.drain(lax.fori_loop(share.begin, share.end, fill, jnp.int32(0)))


class Weighed(NamedTuple):
    """Of a tile: weights ``[64]`` relative to the `largest` logit so far, the factor that makes
    earlier sums relative to it, t (see `Sums`), and the keys if registers hold them.
    """

    weights: jax.Array
    largest: jax.Array
    shrink: jax.Array
    along: jax.Array
    keys: jax.Array | None


@dataclasses.dataclass
class Reader:
    """A warpgroup, static number `w`, that weighs the keys of tiles."""

    cache: Cache
    member: str
    precise: bool
    arithmetic: Arithmetic
    given: Any
    out: Any
    scratch: Any
    share: Share
    ring: Ring
    w: int
    held: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def blocks(self) -> range:
        return range(self.cache.blocks)

    def prepare(self) -> None:
        """Reads the vectors of the query head, into registers or shared memory."""
        share, given = self.share, self.given
        some_key = jnp.minimum(share.low, self.cache.num_keys - 1)
        sources = {
            "query": given["query"].at[share.b, share.head],
            "origin": given["key"].at[share.b, some_key, share.kv_head],
        }
        if self.member == "parallax":
            sources["probe"] = given["probe"].at[share.b, share.head]
        scale = given["scale"][share.b, share.head] * LOG2E
        for name, source in sources.items():
            for c in self.blocks:
                block = self.arithmetic.load(source.at[pl.ds(c * BLOCK, BLOCK)], COLS)
                block = block.astype(jnp.float32)
                if name == "query":
                    block = block * scale
                if self.cache.blocks == 1:
                    self.held[name] = block
                else:
                    self.scratch["vectors"].at[self.w, _VECTORS.index(name), c][...] = block

    def vector(self, name: str, c: int):
        """Block c of a vector as the columns of a matrix."""
        if name in self.held:
            return by_column(self.held[name], SQUARE)
        ref = self.scratch["vectors"].at[self.w, _VECTORS.index(name), c]
        return by_column(self.arithmetic.load(ref, COLS), SQUARE)

    def keys(self, slot, c: int):
        """Block c of the keys of a tile, relative to the origin."""
        tile = self.arithmetic.load(self.ring.tiles[c].at[slot])
        return tile.astype(jnp.float32) - self.vector("origin", c)

    def values(self, slot, c: int):
        return self.arithmetic.load(self.ring.tiles[self.cache.blocks + c].at[slot]).astype(
            jnp.float32
        )

    def weigh(self, t, slot, largest) -> Weighed:
        """The weights of tile t, which lies in `slot`."""
        logits = along = full((ROW_BLOCK,), 0, ROWS)
        for c in self.blocks:
            keys = self.keys(slot, c)
            logits = logits + row_dot(keys, self.vector("query", c))
            if self.member == "parallax":
                along = along + row_dot(keys, self.vector("probe", c))
        j = self.share.begin + t
        position = plgpu.broadcasted_iota(jnp.int32, (ROW_BLOCK,), 0, layout=ROWS)
        position = position + _tile_start(self.cache, j)
        first = jnp.maximum(self.share.low, j * BLOCK)
        valid = (position >= first) & (position < self.share.high)
        logits = jnp.where(valid, logits, LOWEST)
        new = jnp.maximum(largest, self.across(logits).max(axis=1))
        weights = jnp.where(valid, jnp.exp2(logits - new), 0.0)
        kept = keys if self.cache.blocks == 1 else None
        return Weighed(weights, new, jnp.exp2(largest - new), along, kept)

    def across(self, vector):
        """A vector of rows as the columns of a matrix.

        The memory of reductions across warps is one for all warpgroups, so this has its own.
        """
        return by_column(self.turned(vector), SQUARE)

    def turned(self, vector):
        """A vector of rows as one of columns."""
        ref = self.scratch["exchanged"].at[self.w]
        ref[...] = vector
        return self.arithmetic.load(ref, COLS)

    def part(self, name: str):
        """The place of this instance's sums in an output."""
        return self.out[name].at[self.share.b, self.share.head, self.share.split]

    def store_rows(self, rows) -> None:
        """Writes `rows`: by name a vector of numbers, or a vector for each block."""
        for r, name in enumerate(row_names(self.member)):
            blocks = rows[name]
            if not isinstance(blocks, list):  # numbers to be added up, and nothing beside them
                blocks = [blocks] + [full((BLOCK,), 0, ROWS)] * (self.cache.blocks - 1)
            for c, block in enumerate(blocks):
                self.part("rows").at[r, pl.ds(c * BLOCK, BLOCK)][...] = block


# ---------------------------------------------------------------------------------------------
# Two warpgroups that take turns


def _take_turns(cache, member, precise, config, arithmetic, given, out, scratch):
    share = Share.mine(cache, given)
    tiles, *barriers = scratch["ring"]
    ring = Ring(tuple(tiles), *barriers, config.stages, late=False)
    warpgroup = lax.axis_index("warpgroup")

    def registers(index: int):
        if not arithmetic.interpreted:
            action = "decrease" if index else "increase"
            plgpu.set_max_registers(config.registers[index], action=action)

    for w in range(_TURNS):

        @pl.when(warpgroup == w)
        def _(w=w):
            registers(0)
            _Turns(cache, member, precise, arithmetic, given, out, scratch, share, ring, w).run()

    @pl.when(warpgroup == _TURNS)
    def _():
        registers(1)
        stream(cache, given, share, ring)


class _Turns(Reader):
    """One of the warpgroups that take every other tile each, with sums of its own."""

    def run(self) -> None:
        self.prepare()

        def matrices(count):
            return tuple(full(SQUARE, 0, MATRIX) for _ in range(count))

        zero = full((ROW_BLOCK,), 0, ROWS)
        start = {
            "largest": full((ROW_BLOCK,), LOWEST, ROWS),
            "total": zero,
            "value": matrices(len(self.blocks)),
        }
        if self.member == "lla":
            start |= {"key": matrices(1), "moments": matrices(2)}
        if self.member == "parallax":
            start |= {"along": zero, "along_value": matrices(len(self.blocks))}
        count = self.share.end - self.share.begin
        turns = lax.div(count + (_TURNS - 1 - self.w), jnp.int32(_TURNS))
        self.finish(lax.fori_loop(0, turns, self.add_tile, start))

    def add_tile(self, i, sums):
        t = _TURNS * i + self.w
        slot = self.ring.wait(t)
        tile = self.weigh(t, slot, sums["largest"])
        shrink = by_row(tile.shrink, SQUARE)

        def add(matrices, terms):
            return tuple(a * shrink + b for a, b in zip(matrices, terms, strict=True))

        new = {"largest": tile.largest, "total": sums["total"] * tile.shrink + tile.weights}
        spread = by_row(tile.weights, SQUARE)
        values = [self.values(slot, c) for c in self.blocks]
        new["value"] = add(sums["value"], [v * spread for v in values])
        if self.member == "parallax":
            weighted = tile.weights * tile.along
            new["along"] = sums["along"] * tile.shrink + weighted
            weighted = by_row(weighted, SQUARE)
            new["along_value"] = add(sums["along_value"], [v * weighted for v in values])
        if self.member == "lla":
            weighted = tile.keys * spread
            new["key"] = add(sums["key"], [weighted])
            parts = in_parts(weighted, self.cache.dtype, self.precise)
            # An index that is known would become a constant of the products, which do not lower.
            refs = [ref.at[lax.axis_index("warpgroup")] for ref in self.scratch["weighted"]]
            for ref, part in zip(refs, parts, strict=True):
                ref[...] = part
            plgpu.commit_smem()
            new["moments"] = self.arithmetic.accumulate_transposed(
                [a * shrink for a in sums["moments"]],
                *[[(ref, tile.at[slot]) for ref in refs] for tile in self.ring.tiles],
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
            for name in ("value", "key", "along_value")
            if name in sums
        }
        moments = sums.get("moments", ())
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
