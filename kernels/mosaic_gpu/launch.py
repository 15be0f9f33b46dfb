"""Shapes, launch configurations, and what all kernels have in common."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.compat import vary_like
from lla.kernels.mosaic_gpu.tile import (
    ONES,
    ROW_BLOCK,
    WGMMA_COL,
    WGMMA_ROW,
    Arithmetic,
    MaskSpec,
    SequenceMask,
    TileRange,
    key_tiles,
    narrow_transforms,
    ones_transforms,
    query_tiles,
    visible,
)

SHARED_MEMORY = 232_448
"""Bytes of shared memory that a program instance can have on Hopper."""

REGISTERS = 65_536
"""Registers of a multiprocessor."""

_THREADS = 128  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class Shape:
    """Padded sizes: query ``[B, T, K * G, D]``, key and value ``[B, S, K, D]``.

    ``num_queries`` is a multiple of 64. ``num_keys`` is a multiple of every key tile, and of the
    rows of a program instance that owns keys. ``head_dim``, of keys and values alike, is 32, 64 or
    128.
    """

    batch: int
    num_queries: int
    num_keys: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: Any

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def rows(self, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        """``[B, N, T]``: one number per query."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.num_queries), dtype)

    def queries(self, dtype=None) -> jax.ShapeDtypeStruct:
        dtype = self.dtype if dtype is None else dtype
        return jax.ShapeDtypeStruct(
            (self.batch, self.num_queries, self.heads, self.head_dim), dtype
        )

    def keys(self, dtype=None) -> jax.ShapeDtypeStruct:
        dtype = self.dtype if dtype is None else dtype
        shape = (self.batch, self.num_keys, self.kv_heads, self.head_dim)
        return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Config:
    """The launch configuration of a kernel.

    Attributes:
      warpgroups: consumer warpgroups of a program instance, 64 rows each.
      block: columns of a tile: keys, or queries where the rows are keys.
      stages: tiles in flight.
      registers: registers per thread of a consumer, and of the producer.
      resident_operand: whether the query is kept in registers rather than in shared memory.
      shared_mean: whether the solve also keeps the mean key in shared memory.
      hold_sums: see `lla.kernels.mosaic_gpu.tile.Arithmetic`.
      sum_products: whether the output and the solve compute the row sums of weights as products
        with a tile of ones. Needs tiles of at most 64 keys.
      pingpong: whether the consumers of the solve take turns in issuing the products of an
        iteration, so that the exponentials of one overlap with the products of the others.
    """

    warpgroups: int = 2
    block: int = 64
    stages: int = 2
    registers: tuple[int, int] = (240, 24)
    resident_operand: bool = False
    shared_mean: bool = True
    hold_sums: bool = True
    sum_products: bool = False
    pingpong: bool = False

    def check_registers(self) -> None:
        """Raises ValueError unless `registers` fit."""
        compute, stream = self.registers
        needed = _THREADS * (self.warpgroups * compute + stream)
        if needed > REGISTERS or any(count % 8 for count in self.registers):
            raise ValueError(
                f"{self} needs {needed} registers, by multiples of 8 a thread; "
                f"there are {REGISTERS}."
            )


class Masking(NamedTuple):
    """Mask operands: int32 ``[B, 2]`` (offset, length); segment ids ``[B, T]`` and ``[B, S]``."""

    numbers: jax.Array
    query_segments: jax.Array | None
    key_segments: jax.Array | None

    def operands(self) -> tuple[jax.Array, ...]:
        return tuple(a for a in self if a is not None)


@dataclasses.dataclass(frozen=True)
class Environment:
    """Static context of a kernel body."""

    shape: Shape
    mask: MaskSpec
    config: Config
    arithmetic: Arithmetic

    def __post_init__(self):
        self.config.check_registers()

    def sequence(self, masking, b) -> SequenceMask:
        return SequenceMask(masking[0][b, 0], masking[0][b, 1])

    def key_tiles(self, masking, program: ProgramIndex) -> TileRange:
        """Key tiles that the query rows of a program instance see."""
        rows = self.config.warpgroups * ROW_BLOCK
        sequence = self.sequence(masking, program.b)
        return key_tiles(self.mask, sequence, program.first, rows, self.config.block)

    def query_tiles(self, masking, program: ProgramIndex) -> TileRange:
        """Query tiles that see the keys of a program instance."""
        keys = self.config.warpgroups * ROW_BLOCK
        sequence = self.sequence(masking, program.b)
        return query_tiles(
            self.mask, sequence, program.first, keys, self.config.block, self.shape.num_queries
        )

    def valid(self, masking, b, shape, first_query, first_key, *, transposed, row_ids=None):
        """The mask of one tile; `row_ids` are the segment ids of the rows, loaded beforehand."""
        column_ids = None
        if self.mask.segments:
            ref, first = (masking[1], first_query) if transposed else (masking[2], first_key)
            column_ids = self.arithmetic.load(ref.at[b, pl.ds(first, shape[1])], WGMMA_COL)
        ids = (column_ids, row_ids) if transposed else (row_ids, column_ids)
        return visible(
            self.mask, self.sequence(masking, b), shape, first_query, first_key,
            transposed=transposed, query_segments=ids[0], key_segments=ids[1],
        )  # fmt: skip

    def row_ids(self, masking, b, first, *, transposed: bool):
        if not self.mask.segments:
            return None
        ref = masking[2 if transposed else 1]
        return self.arithmetic.load(ref.at[b, pl.ds(first, ROW_BLOCK)], WGMMA_ROW)

    @property
    def query_programs(self) -> int:
        """Number of program instances that it takes to own all query rows."""
        rows = self.config.warpgroups * ROW_BLOCK
        return self.shape.batch * self.shape.heads * -(-self.shape.num_queries // rows)

    def set_registers(self, *, compute: bool):
        set_registers(self.config, self.arithmetic, compute=compute)


def set_registers(config: Config, arithmetic: Arithmetic, *, compute: bool) -> None:
    """Reallocates registers between the warpgroups; the first call of every warpgroup."""
    if arithmetic.interpreted:
        return
    count = config.registers[0 if compute else 1]
    plgpu.set_max_registers(count, action="increase" if compute else "decrease")


class ProgramIndex(NamedTuple):
    """What a program instance works on: batch, query head, key head, and its first row."""

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    first: jax.Array


def query_program_index(shape: Shape, rows: int) -> ProgramIndex:
    """Programs that own query rows: longest causal rows first, heads that share keys adjacent.

    Rows are assigned from the end. If their number is not a multiple of `rows`, the last program
    starts before row 0: see `run_or_skip`.
    """
    program = lax.axis_index("program")
    per_tile = jnp.int32(shape.batch * shape.heads)
    which = lax.rem(program, per_tile)
    first = shape.num_queries - (lax.div(program, per_tile) + 1) * rows
    b, head = lax.div(which, jnp.int32(shape.heads)), lax.rem(which, jnp.int32(shape.heads))
    return ProgramIndex(b, head, lax.div(head, jnp.int32(shape.group)), first)


def key_program_index(shape: Shape, keys: int) -> ProgramIndex:
    """Programs that own keys: those that most causal queries see first."""
    program = lax.axis_index("program")
    per_tile = jnp.int32(shape.batch * shape.kv_heads)
    which, tile = lax.rem(program, per_tile), lax.div(program, per_tile)
    b, head = lax.div(which, jnp.int32(shape.kv_heads)), lax.rem(which, jnp.int32(shape.kv_heads))
    return ProgramIndex(b, head * shape.group, head, tile * keys)


class Ring(NamedTuple):
    """A ring buffer of tiles in shared memory, refs ``[stages, block, D]``, and its barriers."""

    tiles: tuple
    produced: Any  # one arrival per ref in `tiles`
    consumed: Any  # one arrival per consumer warpgroup
    stages: int
    deferred: bool  # whether a tile is read until the products of the next one are done

    def consumer_wait(self, t):
        slot = lax.rem(t, jnp.int32(self.stages))
        plgpu.barrier_wait(self.produced.at[slot])
        return slot

    def consumer_release(self, slot):
        plgpu.barrier_arrive(self.consumed.at[slot])

    def release_or_defer(self, slot):
        """Call after issuing a tile's last product: releases the tile unless that is deferred."""
        if not self.deferred:
            self.consumer_release(slot)

    def release_deferred(self, t, first):
        """Call once the products of the tile before t are done: releases it if that was deferred.

        There is no such tile if t is `first`.
        """
        if not self.deferred:
            return

        @pl.when(t > first)
        def _():
            self.consumer_release(lax.rem(t - 1, jnp.int32(self.stages)))

    def skip(self, t):
        """Waits for tile t and releases it without reading it."""
        self.consumer_release(self.consumer_wait(t))

    def produce(self, t, sources):
        """Copies `sources` (tiles in global memory) into slot t once it is free; returns t + 1."""
        slot = lax.rem(t, jnp.int32(self.stages))

        @pl.when(t >= self.stages)
        def _():
            plgpu.barrier_wait(self.consumed.at[slot])

        for source, tile in zip(sources, self.tiles, strict=True):
            plgpu.copy_gmem_to_smem(source, tile.at[slot], self.produced.at[slot])
        return t + 1

    def drain(self, t):
        """Waits until every tile before t has been consumed."""
        left = jnp.minimum(t, jnp.int32(self.stages))

        def wait(i, _):
            plgpu.barrier_wait(self.consumed.at[lax.rem(i, jnp.int32(self.stages))])

        lax.fori_loop(t - left, t, wait, None)


def ring_scratch(shape: Shape, config: Config, tiles: int):
    """Scratch types of a ring: the tiles, then produced, then consumed."""
    tile = plgpu.SMEM(
        (config.stages, config.block, shape.head_dim), shape.dtype,
        transforms=narrow_transforms(config.block, shape.head_dim),
    )  # fmt: skip
    return (*([tile] * tiles), *ring_barriers(config, tiles))


def ring_barriers(config: Config, tiles: int) -> tuple:
    """Scratch types of a ring's barriers: produced, then consumed."""
    return (
        plgpu.Barrier(num_arrivals=tiles, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    )


def ones_scratch(shape: Shape, config: Config) -> dict:
    """Scratch types by name: the ones that `Config.sum_products` needs, for each warpgroup."""
    if not config.sum_products:
        return {}
    if config.block > ROW_BLOCK:
        raise ValueError(f"sum_products needs tiles of at most {ROW_BLOCK} rows, got {config}.")
    lead = (config.warpgroups, ROW_BLOCK, ONES)
    return {"ones": plgpu.SMEM(lead, shape.dtype, transforms=ones_transforms())}


class Pingpong(NamedTuple):
    """Makes consumer warpgroups take turns, so that one multiplies while another does the softmax.

    All of them must acquire and release equally often.
    """

    barriers: Any  # one per warpgroup, or None to let them run freely
    count: int

    def start(self, w):
        """Called once by every consumer warpgroup, before its first `acquire`."""
        if self.barriers is not None:

            @pl.when(w == self.count - 1)
            def _():
                plgpu.barrier_arrive(self.barriers.at[0])

    def acquire(self, w):
        if self.barriers is not None:
            plgpu.barrier_wait(self.barriers.at[w])

    def release(self, w):
        """Passes the turn of warpgroup `w` to the next one."""
        if self.barriers is not None:
            plgpu.barrier_arrive(self.barriers.at[lax.rem(w + 1, jnp.int32(self.count))])

    def finish(self, w):
        """Called once by every consumer warpgroup, after its last `release`."""
        if self.barriers is not None:

            @pl.when(w == 0)
            def _():
                plgpu.barrier_wait(self.barriers.at[0])


def pingpong_scratch(config: Config) -> dict:
    """Scratch types by name that `Pingpong` needs."""
    if not config.pingpong:
        return {}
    return {"scheduler": plgpu.Barrier(num_barriers=config.warpgroups)}


def row_tile(shape: Shape, config: Config, copies: int = 1):
    """Scratch type of 16-bit row tiles ``[warpgroups, copies, 64, D]`` (no axis for one copy)."""
    lead = (config.warpgroups,) if copies == 1 else (config.warpgroups, copies)
    return plgpu.SMEM(
        (*lead, ROW_BLOCK, shape.head_dim),
        shape.dtype,
        transforms=narrow_transforms(config.block, shape.head_dim),
    )


def run_or_skip(env: Environment, program: ProgramIndex, w, run, skip) -> None:
    """``run()`` in a consumer warpgroup that has query rows, ``skip()`` in one that has none.

    `skip` has to arrive at every barrier that waits for all consumers.
    """
    if env.shape.num_queries % (env.config.warpgroups * ROW_BLOCK) == 0:
        run()
        return
    first = program.first + w * ROW_BLOCK

    @pl.when(first >= 0)
    def _():
        run()

    @pl.when(first < 0)
    def _():
        skip()


def skip_tiles(tiles: TileRange, rings: tuple[Ring, ...], t=0, each_tile=lambda: None):
    """Skips all `tiles` in `rings`, the first of which is number t; returns the next number.

    `each_tile` is called once per tile.
    """

    def step(_, t):
        each_tile()
        for ring in rings:
            ring.skip(t)
        return t + 1

    return lax.fori_loop(tiles.low, tiles.high, step, jnp.int32(t))


def run_by_tile(marked, program: ProgramIndex, w, run, usual, other) -> None:
    """``run(other)`` in a warpgroup whose 64 rows are `marked`, else ``run(usual)``.

    `marked` is ``[B, N, T/64]``, nonzero for marked tiles; None marks none.
    """
    if marked is None:
        run(usual)
        return
    tile = lax.div(program.first, jnp.int32(ROW_BLOCK)) + w
    mark = marked[program.b, program.head, tile]

    @pl.when(mark == 0)
    def _():
        run(usual)

    @pl.when(mark != 0)
    def _():
        run(other)


def shared_bytes(scratch) -> int:
    """Bytes of shared memory that scratch types take, with every buffer aligned to 1 KiB."""
    total = 0
    for leaf in jax.tree.leaves(scratch):
        if isinstance(leaf, plgpu.Barrier):
            total += 8 * math.prod(leaf.num_barriers)
        else:  # a union counts as its largest member
            size = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            total += -(-size // 1024) * 1024
    return total


def launch(
    body, outputs, scratch, operands, *, programs: int, config: Config, interpret,
    reduction_bytes: int = 0, threads: int | None = None, lanes: bool = False,
) -> dict:  # fmt: skip
    """Runs a kernel body on `programs` instances of `threads` warpgroups.

    The functions that call this are under `jax.jit`, so that equal launches, such as those of a
    model's layers, are lowered and compiled once.

    Args:
      body: ``body(given, out, scratch)``, with refs in the structure of the other arguments.
      outputs: `jax.ShapeDtypeStruct` by name.
      scratch: scratch types by name.
      operands: a pytree of arrays.
      reduction_bytes: shared memory for reductions across warps, one buffer for all warpgroups.
      threads: None for the consumers of `config` and one producer.
      lanes: whether to lower with lane semantics, without layout inference. For bodies of thousands
        of operations, since the time of the inference grows faster than the body.

    Returns:
      the results by name.

    Raises:
      ValueError: if the scratch does not fit into shared memory.
    """
    needed = shared_bytes(scratch) + reduction_bytes
    if needed > SHARED_MEMORY:
        raise ValueError(
            f"{config} needs {needed} bytes of shared memory, there are {SHARED_MEMORY}."
        )
    leaves, tree = jax.tree.flatten(operands)

    def kernel(*refs, **scratch):
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        body(given, dict(zip(outputs, refs[len(leaves) :], strict=True)), scratch)

    results = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        grid=(programs,),
        grid_names=("program",),
        num_threads=config.warpgroups + 1 if threads is None else threads,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=reduction_bytes,
            lowering_semantics=getattr(plgpu.LoweringSemantics, "Lane" if lanes else "Warpgroup"),
        ),
        interpret=interpret if interpret is not None else False,
    )(*leaves)
    # Kernel results carry no varying mesh axes.
    return {n: vary_like(r, *leaves) for n, r in zip(outputs, results, strict=True)}


def stream_keys_and_values(
    env: Environment, given, program: ProgramIndex, tiles: TileRange, ring: Ring
):
    """The producer warpgroup of a kernel that reads keys and values once."""
    block = env.config.block

    def stream(j, t):
        where = (program.b, pl.ds(j * block, block), program.kv_head)
        return ring.produce(t, [given["key"].at[where], given["value"].at[where]])

    ring.drain(lax.fori_loop(tiles.low, tiles.high, stream, jnp.int32(0)))
