"""One new query per sequence and head against a cache of keys and values that is read once.

A program instance sums over a part of the keys of one query head, or of several that share them:
softmax weights times values, and for local linear attention times the products of keys with keys
and values. The sums of all parts give the system of the query, which a second kernel solves
without the cache. The head dimension of the cache is 64 or 128, exactly: padding would copy it.

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
    Turned,
    by_column,
    full,
    narrow_transforms,
    row_dot,
)

BLOCK = 64
"""Keys of a tile, and columns of a block of the head dimension."""

SQUARE = (BLOCK, BLOCK)
COLUMNS = 8
"""Columns of the narrowest products, which a vector takes the place of."""
TOGETHER = 8
"""Query heads that an instance of `decode_group` can serve: rows that it writes."""

# Rows of the scratch "vectors": for `Reader.turned`, for `decode_roles`, and the origin.
EXCHANGED, SHRINK, ORIGIN = range(3)


@dataclasses.dataclass(frozen=True)
class Cache:
    """Sizes: key and value ``[B, S, K, D]``, and ``N = K * group`` query heads.

    `splits` is the number ``P`` of program instances that share the keys of a query head, or of
    the query heads that they serve together.
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

    The weights are ``exp2(logit - largest)``. Keys are relative to the first visible one in the
    moments and in ``t``, which is such a key times the probe.

    Attributes:
      largest: ``[B, N, P, 64]`` equal numbers, the largest logit of a part in base 2.
      rows: ``[B, N, P, R, D]``, named by `row_names`: "total" is a row of numbers that add up to
        the sum of the weights, "value" the sum of the weights times values, "key" of the weights
        times keys relative to the first one, "along" a row of numbers that add up to the sum of
        the weights times t, "along_value" the sum of the weights times t times values.
      moments: ``[B, N, P, D, 2 D]``, of the weights times keys times (keys as they are, values),
        for "lla" alone.
    """

    largest: jax.Array
    rows: jax.Array
    moments: jax.Array | None = None


def heads_together(member: str, group: int) -> int:
    """Query heads that a program instance serves, of the `group` that shares a key head.

    They are rows of one product (`decode_group`). Local linear attention has moments of each head
    alone, and a warpgroup for each head was slower than an instance for each.
    """
    most = 1 if member == "lla" else TOGETHER
    return max(heads for heads in range(1, most + 1) if group % heads == 0)


def row_names(member: str) -> tuple[str, ...]:
    """What the rows of `Sums` are."""
    return (
        "total",
        "value",
        *{"lla": ("key",), "parallax": ("along", "along_value")}.get(member, ()),
    )


@functools.partial(jax.jit, static_argnames=("cache", "member", "precise", "interpret"))
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
      scale: float32 ``[B, N]``, or ``[1, 1]`` if they are equal, of the logits.
      precise: whether weighted keys have two 16-bit parts in the moments.
      interpret: parameters of the interpreter, or None to compile.
    """
    from lla.kernels.mosaic_gpu import decode_group, decode_roles, decode_turns

    heads = heads_together(member, cache.group)
    if heads > 1:
        kernel = decode_group
    else:
        kernel = decode_roles if member == "lla" and cache.blocks == 2 else decode_turns
    config, scratch = kernel.plan(cache, member, precise)
    if kernel is decode_group:
        outputs = decode_group.outputs(cache, member)
    else:
        outputs = {
            "largest": cache.each(cache.splits, ROW_BLOCK),
            "rows": cache.each(cache.splits, len(row_names(member)), cache.head_dim),
        }
    if member == "lla":
        outputs["moments"] = cache.each(cache.splits, cache.head_dim, 2 * cache.head_dim)
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
        kernel.body, cache, member, precise, config, Arithmetic(interpret is not None)
    )
    results = launch(
        body, outputs, scratch, operands,
        programs=cache.batch * (cache.heads // heads) * cache.splits, config=config,
        interpret=interpret, reduction_bytes=1024,
    )  # fmt: skip
    return decode_group.sums(cache, member, results) if kernel is decode_group else Sums(**results)


def ring_scratch(cache: Cache, config: Config, readers: int):
    """Scratch types of the ring of tiles, each of which `readers` warpgroups release."""
    shape = (config.stages, BLOCK, cache.head_dim)
    return (
        [plgpu.SMEM(shape, cache.dtype, transforms=narrow_transforms())] * 2,
        plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=readers, num_barriers=config.stages),
    )


def make_ring(config: Config, scratch) -> Ring:
    """The ring of `ring_scratch`."""
    tiles, filled, released = scratch["ring"]
    return Ring(tuple(tiles), filled, released, config.stages, late=False)


def reader_scratch(cache: Cache, member: str, weighers: int) -> dict:
    """Scratch types of `Reader`, of which `weighers` weigh keys."""
    transforms = narrow_transforms()
    types = {
        "query": plgpu.SMEM((weighers, BLOCK, cache.head_dim), cache.dtype, transforms=transforms),
        "vectors": plgpu.SMEM((weighers, ORIGIN + cache.blocks, BLOCK), jnp.float32),
    }
    if member == "lla":
        types["ones"] = plgpu.SMEM(SQUARE, cache.dtype, transforms=transforms)
        types["ones_written"] = plgpu.Barrier(num_arrivals=1)
    return types


class Share(NamedTuple):
    """What a program instance sums over: tiles ``[begin, end)`` of the keys of a head.

    `head` is the query head, the first one of those that an instance serves.
    """

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    split: jax.Array
    low: jax.Array  # the first visible key, and the one after the last
    high: jax.Array
    begin: jax.Array
    end: jax.Array

    @classmethod
    def mine(cls, cache: Cache, given, heads: int = 1) -> Share:
        """That of an instance with `heads` query heads.

        Instances that share keys are next to each other, to meet in the second-level cache.
        """

        def cut(number, size):
            return lax.div(number, jnp.int32(size)), lax.rem(number, jnp.int32(size))

        rest, g = cut(lax.axis_index("program"), cache.group // heads)
        rest, split = cut(rest, cache.splits)
        b, kv_head = cut(rest, cache.kv_heads)
        low, high = given["first"][b], given["last"][b]
        first, last = lax.div(low, jnp.int32(BLOCK)), lax.div(high + (BLOCK - 1), jnp.int32(BLOCK))
        each = lax.div(jnp.maximum(last - first, 0) + (cache.splits - 1), jnp.int32(cache.splits))
        begin = jnp.minimum(first + split * each, last)
        end = jnp.minimum(begin + each, last)
        head = kv_head * cache.group + g * heads
        return cls(b, head, kv_head, split, low, high, begin, end)


def entry(ref, b, head):
    """An entry of ``[B, N]``, or the one of ``[1, 1]``."""
    return ref[0, 0] if ref.shape == (1, 1) else ref[b, head]


def tile_start(cache: Cache, j):
    """The last tile overlaps the one before it where the keys do not fill it."""
    return jnp.minimum(j * BLOCK, cache.num_keys - BLOCK)


def stream(cache: Cache, given, share: Share, ring: Ring, even: bool = False) -> None:
    """The warpgroup that fills the ring with tiles of keys and of values.

    If `even`, one more than there are where their number is odd.
    """
    count = share.end - share.begin
    if even:
        count = 2 * lax.div(count + 1, jnp.int32(2))

    def fill(t, _):
        where = (share.b, pl.ds(tile_start(cache, share.begin + t), BLOCK), share.kv_head)
        return ring.fill(t, [given["key"].at[where], given["value"].at[where]])

    ring.drain(lax.fori_loop(0, count, fill, 0))


def counting(cache: Cache, share: Share, t, shape, axis: int, layout):
    """Bool `shape`: which keys of the tile t of a share, along `axis`, count."""
    first, last = counted(share, t)
    position = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
    position = position + tile_start(cache, share.begin + t)
    return (position >= first) & (position < last)


def counted(share: Share, t):
    """The first key that counts in the tile t of a share, and the one after the last."""
    first = jnp.maximum(share.low, (share.begin + t) * BLOCK)
    return first, jnp.minimum(share.high, share.end * BLOCK)


def clear_hidden(cache: Cache, share: Share, arithmetic: Arithmetic, ring: Ring, t, slot) -> None:
    """Zeros for the keys and values of a tile that do not count.

    Their weights are zero, but products with what a cache holds behind its end may be NaN. Only
    the first and the last tile have any. Done by one warpgroup, before any other reads the tile.
    """
    first, last = counted(share, t)
    start = tile_start(cache, share.begin + t)

    @pl.when((start < first) | (start + BLOCK > last))
    def _():
        valid = counting(cache, share, t, SQUARE, 0, MATRIX)
        for tile in ring.tiles:
            for c in range(cache.blocks):
                ref = tile.at[slot, :, pl.ds(c * BLOCK, BLOCK)]
                ref[...] = jnp.where(valid, arithmetic.load(ref), jnp.zeros((), cache.dtype))
        plgpu.commit_smem()


class Scores(NamedTuple):
    """Of a tile, for each key: the logit in base 2, whether it counts, and t (see `Sums`)."""

    logits: jax.Array
    valid: jax.Array
    along: jax.Array


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
    level: jax.Array | None = None  # the origin times the probe

    @property
    def blocks(self) -> range:
        return range(self.cache.blocks)

    def prepare(self) -> None:
        """Brings what belongs to the query head into shared memory.

        The query becomes a matrix of equal rows, half of which are the probe if there is one: its
        products with a tile of keys have logits in some columns and probe products in the others.
        """
        share, given = self.share, self.given
        some_key = jnp.minimum(share.low, self.cache.num_keys - 1)
        origin = given["key"].at[share.b, some_key, share.kv_head]
        level = full((ROW_BLOCK,), 0, ROWS)
        for c in self.blocks:
            block = self.read(origin, c)
            self.scratch["vectors"].at[self.w, ORIGIN + c][...] = block
            rows = by_column(self.read(given["query"].at[share.b, share.head], c), SQUARE)
            if self.member == "parallax":
                probe = by_column(self.read(given["probe"].at[share.b, share.head], c), SQUARE)
                level = level + row_dot(by_column(block, SQUARE), probe)
                row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=MATRIX)
                rows = jnp.where(lax.rem(row, jnp.int32(COLUMNS)) < COLUMNS // 2, rows, probe)
            tile = self.scratch["query"].at[self.w, :, pl.ds(c * BLOCK, BLOCK)]
            tile[...] = rows.astype(self.cache.dtype)
        self.level = level
        plgpu.commit_smem()

    def write_ones(self) -> None:
        """Done by one warpgroup, before any of them adds up keys."""
        self.scratch["ones"][...] = full(SQUARE, 1, MATRIX).astype(self.cache.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.scratch["ones_written"])

    def read(self, source, c: int):
        """Block c of a vector in global memory."""
        return self.arithmetic.load(source.at[pl.ds(c * BLOCK, BLOCK)], COLS).astype(jnp.float32)

    @property
    def ones(self) -> Turned:
        """A matrix whose products with keys are their sums."""
        return Turned(self.scratch["ones"].at[pl.ds(0, COLUMNS)])

    def keys(self, slot, c: int):
        """Block c of the keys of a tile, relative to the origin."""
        origin = self.arithmetic.load(self.scratch["vectors"].at[self.w, ORIGIN + c], COLS)
        return self.block(0, slot, c) - by_column(origin, SQUARE)

    def values(self, slot, c: int):
        return self.block(1, slot, c)

    def clear_hidden(self, t, slot) -> None:
        clear_hidden(self.cache, self.share, self.arithmetic, self.ring, t, slot)

    def block(self, tile: int, slot, c: int):
        ref = self.ring.tiles[tile].at[slot, :, pl.ds(c * BLOCK, BLOCK)]
        return self.arithmetic.load(ref).astype(jnp.float32)

    def score(self, t, slot) -> Scores:
        """Tile t, which lies in `slot`."""
        # An index that is known would become a constant of the products, which do not lower.
        w = lax.axis_index("warpgroup")
        query = self.scratch["query"].at[w, pl.ds(0, COLUMNS)]
        (products,) = self.arithmetic.products(COLUMNS, [(self.ring.tiles[0].at[slot], query)])
        logits, along = products, full((ROW_BLOCK,), 0, ROWS)
        copies = COLUMNS
        if self.member == "parallax":
            copies = COLUMNS // 2
            column = plgpu.broadcasted_iota(jnp.int32, products.shape, 1, layout=MATRIX)
            logits = jnp.where(column < copies, products, 0.0)
            along = (products - logits).sum(axis=1) / copies - self.level
        scale = entry(self.given["scale"], self.share.b, self.share.head) * (LOG2E / copies)
        logits = logits.sum(axis=1) * scale
        valid = counting(self.cache, self.share, t, (ROW_BLOCK,), 0, ROWS)
        logits = jnp.where(valid, logits, LOWEST)
        return Scores(logits, valid, along)

    def weigh(self, largest, *tiles: Scores):
        """The largest logit so far, and what it makes of sums so far and of the tiles.

        Returns:
          the largest logit, the factor of sums relative to the one before, each tile's weights.
        """
        logits = functools.reduce(jnp.maximum, [tile.logits for tile in tiles])
        new = jnp.maximum(largest, self.across(logits).max(axis=1))
        weights = [jnp.where(tile.valid, jnp.exp2(tile.logits - new), 0.0) for tile in tiles]
        return new, jnp.exp2(largest - new), weights

    def across(self, vector):
        """A vector of rows as the columns of a matrix.

        The memory of reductions across warps is one for all warpgroups, so this has its own.
        """
        return by_column(self.turned(vector), SQUARE)

    def turned(self, vector):
        """A vector of rows as one of columns."""
        ref = self.scratch["vectors"].at[self.w, EXCHANGED]
        ref[...] = vector
        return self.arithmetic.load(ref, COLS)

    def part(self, name: str):
        """The place of this instance's sums in an output."""
        return self.out[name].at[self.share.b, self.share.head, self.share.split]

    def store_rows(self, rows) -> None:
        """Writes `rows`: by name a vector of numbers, or a vector for each block."""
        for r, name in enumerate(row_names(self.member)):
            if name not in rows:
                continue
            blocks = rows[name]
            if not isinstance(blocks, list):  # numbers to be added up, and nothing beside them
                blocks = [blocks] + [full((BLOCK,), 0, ROWS)] * (self.cache.blocks - 1)
            for c, block in enumerate(blocks):
                self.part("rows").at[r, pl.ds(c * BLOCK, BLOCK)][...] = block
