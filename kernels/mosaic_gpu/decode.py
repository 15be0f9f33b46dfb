"""Decoding: one query per sequence and head, and a single pass over the cache of keys and values.

The keys of a query head, or of several heads that share them, are split among program instances.
For its split, an instance sums the values with softmax weights, and for local linear attention the
products of keys with keys and values as well. Together these sums define the linear system of the
query, which a second kernel solves without reading the cache. Head dimensions are exactly 64 or
128, since padding would copy the cache.

``kernels/DECODING.md`` has the formulas and the measurements behind the design.
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
    LOG2E,
    LOWEST,
    ROW_BLOCK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    Arithmetic,
    Transposed,
    by_column,
    full,
    narrow_transforms,
    row_dot,
)

BLOCK = 64
"""Keys of a tile, and coordinates of a block of the head dimension."""

SQUARE = (BLOCK, BLOCK)
MIN_COLUMNS = 8
"""Columns of the narrowest wgmma, used for products with a vector."""
MAX_HEADS = 8
"""Query heads that an instance of `decode_gqa` can serve, and rows that it writes."""

# Rows of the scratch "vectors": of `Consumer.to_columns`, of `decode_specialized`, and the origin.
TRANSPOSE, SHRINK, ORIGIN = range(3)


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Sizes: key and value ``[B, S, K, D]``, and ``N = K * group`` query heads.

    `splits` is the number ``P`` of program instances among which the keys of a query head (or of
    the heads that an instance serves together) are split.
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
        """Number of blocks of the head dimension."""
        return self.head_dim // BLOCK

    def per_head(self, *shape: int) -> jax.ShapeDtypeStruct:
        """A float32 array with `shape` for every query head."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, *shape), jnp.float32)


class Sums(NamedTuple):
    """Sums over the splits of the keys, float32.

    A weight is ``w = exp2(logit - largest)``; k is relative to the first visible key, and
    ``t = k . probe``.

    Attributes:
      largest: ``[B, N, P, 64]``, the largest logit of the split in base 2, 64 times.
      rows: ``[B, N, P, R, D]``, in the order of `row_names`: "value" is the sum of w v, "key" that
        of w k, "along_value" that of w t v. "total" and "along" each add up to a scalar, the sums
        of w and of w t.
      moments: ``[B, N, P, D, 2 D]``, the sum of w k times (the key as stored, v); "lla" only.
    """

    largest: jax.Array
    rows: jax.Array
    moments: jax.Array | None = None


def heads_per_program(mechanism: str, group: int) -> int:
    """Number of query heads that a program instance serves, of a `group` that shares a key head.

    They are rows of the same products (`decode_gqa`). Local linear attention has separate moments
    for each head, for which an instance per head is faster than a warpgroup per head.
    """
    most = 1 if mechanism == "lla" else MAX_HEADS
    return max(heads for heads in range(1, most + 1) if group % heads == 0)


def row_names(mechanism: str) -> tuple[str, ...]:
    """Names of the rows of `Sums`."""
    return (
        "total",
        "value",
        *{"lla": ("key",), "parallax": ("along", "along_value")}.get(mechanism, ()),
    )


@functools.partial(jax.jit, static_argnames=("cache", "mechanism", "bf16x2", "interpret"))
def sum_over_cache(
    cache: CacheShape,
    mechanism: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: tuple[jax.Array, jax.Array],
    scale: jax.Array,
    probe: jax.Array | None = None,
    *,
    bf16x2: bool,
    interpret: Any = None,
) -> Sums:
    """The sums over all visible keys, by split.

    Args:
      cache: sizes; at least 64 keys.
      mechanism: "softmax", "parallax" or "lla".
      query, probe: ``[B, N, D]`` in 16 bits, the probe for "parallax".
      key, value: ``[B, S, K, D]`` in 16 bits.
      visible: two int32 ``[B]``, the first visible key and the one after the last.
      scale: of the logits, float32 ``[B, N]``, or ``[1, 1]`` if all are equal.
      bf16x2: whether the weighted keys in the moments have two 16-bit parts.
      interpret: parameters of the interpreter, or None to compile.
    """
    from lla.kernels.mosaic_gpu import decode_gqa, decode_pingpong, decode_specialized

    heads = heads_per_program(mechanism, cache.group)
    if heads > 1:
        kernel = decode_gqa
    else:
        kernel = decode_specialized if mechanism == "lla" and cache.blocks == 2 else decode_pingpong
    config, scratch = kernel.plan(cache, mechanism, bf16x2)
    if kernel is decode_gqa:
        outputs = decode_gqa.outputs(cache, mechanism)
    else:
        outputs = {
            "largest": cache.per_head(cache.splits, ROW_BLOCK),
            "rows": cache.per_head(cache.splits, len(row_names(mechanism)), cache.head_dim),
        }
    if mechanism == "lla":
        outputs["moments"] = cache.per_head(cache.splits, cache.head_dim, 2 * cache.head_dim)
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
        kernel.body, cache, mechanism, bf16x2, config, Arithmetic(interpret is not None)
    )
    results = launch(
        body, outputs, scratch, operands,
        programs=cache.batch * (cache.heads // heads) * cache.splits, config=config,
        interpret=interpret, reduction_bytes=1024,
    )  # fmt: skip
    return decode_gqa.sums(cache, mechanism, results) if kernel is decode_gqa else Sums(**results)


def ring_scratch(cache: CacheShape, config: Config, readers: int):
    """Scratch types of the ring; each tile is released by `readers` warpgroups."""
    shape = (config.stages, BLOCK, cache.head_dim)
    return (
        [plgpu.SMEM(shape, cache.dtype, transforms=narrow_transforms())] * 2,
        plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=readers, num_barriers=config.stages),
    )


def make_ring(config: Config, scratch) -> Ring:
    """The ring whose scratch is that of `ring_scratch`."""
    tiles, produced, consumed = scratch["ring"]
    return Ring(tuple(tiles), produced, consumed, config.stages, deferred=False)


def consumer_scratch(cache: CacheShape, mechanism: str, weighers: int) -> dict:
    """Scratch types of `Consumer`; `weighers` of them compute weights."""
    transforms = narrow_transforms()
    types = {
        "query": plgpu.SMEM((weighers, BLOCK, cache.head_dim), cache.dtype, transforms=transforms),
        "vectors": plgpu.SMEM((weighers, ORIGIN + cache.blocks, BLOCK), jnp.float32),
    }
    if mechanism == "lla":
        types["ones"] = plgpu.SMEM(SQUARE, cache.dtype, transforms=transforms)
        types["ones_written"] = plgpu.Barrier(num_arrivals=1)
    return types


class Split(NamedTuple):
    """The split of the keys that a program instance sums over: tiles ``[begin, end)``.

    `head` is the (first) query head that the instance serves, `number` that of the split.
    """

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    number: jax.Array
    low: jax.Array  # the first visible key, and the one after the last
    high: jax.Array
    begin: jax.Array
    end: jax.Array

    @classmethod
    def of_program(cls, cache: CacheShape, given, heads: int = 1) -> Split:
        """The split of this program instance, which serves `heads` query heads.

        Instances that share keys are adjacent, so that the keys stay in the L2 cache.
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


def per_head_scalar(ref, b, head):
    """An entry of ``[B, N]``, or the only one of ``[1, 1]``."""
    return ref[0, 0] if ref.shape == (1, 1) else ref[b, head]


def tile_start(cache: CacheShape, j):
    """First key of tile j; the last tile overlaps the one before where keys do not fill it."""
    return jnp.minimum(j * BLOCK, cache.num_keys - BLOCK)


def stream(cache: CacheShape, given, split: Split, ring: Ring, even: bool = False) -> None:
    """The producer warpgroup, which fills the ring with tiles of keys and values.

    `even` rounds the number of tiles up to an even one.
    """
    count = split.end - split.begin
    if even:
        count = 2 * lax.div(count + 1, jnp.int32(2))

    def produce(t, _):
        where = (split.b, pl.ds(tile_start(cache, split.begin + t), BLOCK), split.kv_head)
        return ring.produce(t, [given["key"].at[where], given["value"].at[where]])

    ring.drain(lax.fori_loop(0, count, produce, 0))


def valid_keys(cache: CacheShape, split: Split, t, shape, axis: int, layout):
    """Bool `shape`: which keys of tile t of the split, along `axis`, are to be summed."""
    first, last = valid_range(split, t)
    position = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
    position = position + tile_start(cache, split.begin + t)
    return (position >= first) & (position < last)


def valid_range(split: Split, t):
    """The first key of tile t of the split that is to be summed, and the one after the last."""
    first = jnp.maximum(split.low, (split.begin + t) * BLOCK)
    return first, jnp.minimum(split.high, split.end * BLOCK)


def zero_hidden(
    cache: CacheShape, split: Split, arithmetic: Arithmetic, ring: Ring, t, slot
) -> None:
    """Overwrites the keys and values of a tile that are not to be summed with zeros.

    Their weights are zero, but what the cache holds there may be NaN. Only the first and the last
    tile have such keys. One warpgroup does this, before any other reads the tile.
    """
    first, last = valid_range(split, t)
    start = tile_start(cache, split.begin + t)

    @pl.when((start < first) | (start + BLOCK > last))
    def _():
        valid = valid_keys(cache, split, t, SQUARE, 0, WGMMA)
        for tile in ring.tiles:
            for c in range(cache.blocks):
                ref = tile.at[slot, :, pl.ds(c * BLOCK, BLOCK)]
                ref[...] = jnp.where(valid, arithmetic.load(ref), jnp.zeros((), cache.dtype))
        plgpu.commit_smem()


class Scores(NamedTuple):
    """Of each key in a tile: the logit in base 2, whether to sum it, and t (see `Sums`)."""

    logits: jax.Array
    valid: jax.Array
    along: jax.Array


@dataclasses.dataclass
class Consumer:
    """A consumer warpgroup, with static index `w`."""

    cache: CacheShape
    mechanism: str
    bf16x2: bool
    arithmetic: Arithmetic
    given: Any
    out: Any
    scratch: Any
    split: Split
    ring: Ring
    w: int
    origin_along: jax.Array | None = None  # the origin times the probe

    @property
    def blocks(self) -> range:
        return range(self.cache.blocks)

    def prepare(self) -> None:
        """Writes what belongs to the query head to shared memory.

        The query becomes a matrix of equal rows. With a probe, half of the rows are the probe, so
        that the products with a tile of keys have the logits in some columns and t in the others.
        """
        split, given = self.split, self.given
        some_key = jnp.minimum(split.low, self.cache.num_keys - 1)
        origin = given["key"].at[split.b, some_key, split.kv_head]
        origin_along = full((ROW_BLOCK,), 0, WGMMA_ROW)
        for c in self.blocks:
            block = self.read(origin, c)
            self.scratch["vectors"].at[self.w, ORIGIN + c][...] = block
            rows = by_column(self.read(given["query"].at[split.b, split.head], c), SQUARE)
            if self.mechanism == "parallax":
                probe = by_column(self.read(given["probe"].at[split.b, split.head], c), SQUARE)
                origin_along = origin_along + row_dot(by_column(block, SQUARE), probe)
                row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
                rows = jnp.where(
                    lax.rem(row, jnp.int32(MIN_COLUMNS)) < MIN_COLUMNS // 2, rows, probe
                )
            tile = self.scratch["query"].at[self.w, :, pl.ds(c * BLOCK, BLOCK)]
            tile[...] = rows.astype(self.cache.dtype)
        self.origin_along = origin_along
        plgpu.commit_smem()

    def write_ones(self) -> None:
        """Called in one warpgroup; the others wait for "ones_written"."""
        self.scratch["ones"][...] = full(SQUARE, 1, WGMMA).astype(self.cache.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.scratch["ones_written"])

    def read(self, source, c: int):
        """Block c of a vector in global memory."""
        return self.arithmetic.load(source.at[pl.ds(c * BLOCK, BLOCK)], WGMMA_COL).astype(
            jnp.float32
        )

    @property
    def ones(self) -> Transposed:
        """A matrix whose product with weighted keys is their sum."""
        return Transposed(self.scratch["ones"].at[pl.ds(0, MIN_COLUMNS)])

    def keys(self, slot, c: int):
        """Block c of the keys of a tile, relative to the origin."""
        origin = self.arithmetic.load(self.scratch["vectors"].at[self.w, ORIGIN + c], WGMMA_COL)
        return self.block(0, slot, c) - by_column(origin, SQUARE)

    def values(self, slot, c: int):
        return self.block(1, slot, c)

    def zero_hidden(self, t, slot) -> None:
        zero_hidden(self.cache, self.split, self.arithmetic, self.ring, t, slot)

    def block(self, tile: int, slot, c: int):
        ref = self.ring.tiles[tile].at[slot, :, pl.ds(c * BLOCK, BLOCK)]
        return self.arithmetic.load(ref).astype(jnp.float32)

    def score(self, t, slot) -> Scores:
        """The scores of tile t, which lies in `slot`."""
        # Not `self.w`: products with a constant index do not lower.
        w = lax.axis_index("warpgroup")
        query = self.scratch["query"].at[w, pl.ds(0, MIN_COLUMNS)]
        (products,) = self.arithmetic.products(MIN_COLUMNS, [(self.ring.tiles[0].at[slot], query)])
        logits, along = products, full((ROW_BLOCK,), 0, WGMMA_ROW)
        copies = MIN_COLUMNS
        if self.mechanism == "parallax":
            copies = MIN_COLUMNS // 2
            column = plgpu.broadcasted_iota(jnp.int32, products.shape, 1, layout=WGMMA)
            logits = jnp.where(column < copies, products, 0.0)
            along = (products - logits).sum(axis=1) / copies - self.origin_along
        scale = per_head_scalar(self.given["scale"], self.split.b, self.split.head) * (
            LOG2E / copies
        )
        logits = logits.sum(axis=1) * scale
        valid = valid_keys(self.cache, self.split, t, (ROW_BLOCK,), 0, WGMMA_ROW)
        logits = jnp.where(valid, logits, LOWEST)
        return Scores(logits, valid, along)

    def weigh(self, largest, *tiles: Scores):
        """Updates the running maximum of the logits with some tiles.

        Returns:
          the new maximum, the factor that rescales earlier sums to it, and the weights of each
          tile.
        """
        logits = functools.reduce(jnp.maximum, [tile.logits for tile in tiles])
        new = jnp.maximum(largest, self.as_columns(logits).max(axis=1))
        weights = [jnp.where(tile.valid, jnp.exp2(tile.logits - new), 0.0) for tile in tiles]
        return new, jnp.exp2(largest - new), weights

    def as_columns(self, vector):
        """A vector of rows, broadcast along the columns of a matrix.

        Goes through memory of this warpgroup: that of reductions across warps is shared by all.
        """
        return by_column(self.to_columns(vector), SQUARE)

    def to_columns(self, vector):
        """A vector with layout `WGMMA_ROW`, converted to `WGMMA_COL`."""
        ref = self.scratch["vectors"].at[self.w, TRANSPOSE]
        ref[...] = vector
        return self.arithmetic.load(ref, WGMMA_COL)

    def part(self, name: str):
        """This instance's part of an output."""
        return self.out[name].at[self.split.b, self.split.head, self.split.number]

    def store_rows(self, rows) -> None:
        """Writes `rows`, by name: a list with a vector per block, or one vector, to be summed."""
        for r, name in enumerate(row_names(self.mechanism)):
            if name not in rows:
                continue
            blocks = rows[name]
            if not isinstance(blocks, list):  # to be summed: zeros in the other blocks
                blocks = [blocks] + [full((BLOCK,), 0, WGMMA_ROW)] * (self.cache.blocks - 1)
            for c, block in enumerate(blocks):
                self.part("rows").at[r, pl.ds(c * BLOCK, BLOCK)][...] = block
