"""Shapes, configurations and the pieces that every kernel launch needs."""

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
    COLS,
    ONES,
    ROW_BLOCK,
    ROWS,
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
"""Bytes that a program instance may have on Hopper."""

REGISTERS = 65_536
"""Registers of a multiprocessor, which a program instance has to itself."""

_THREADS = 128  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class Shape:
    """Padded sizes: query ``[B, T, K * G, D]``, key and value ``[B, S, K, D]``.

    ``num_queries`` is a multiple of 64, ``num_keys`` of every key tile and of the rows of a program
    instance that owns keys, ``head_dim`` (of keys and values alike) is 32, 64 or 128.
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
        """One number for every query."""
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
    """How one kernel is launched.

    Attributes:
      warpgroups: compute warpgroups of a program instance, 64 rows each.
      block: columns of a tile: keys, or queries where the rows are keys.
      stages: tiles in flight.
      registers: registers of a thread of the compute warpgroups and of the streaming one.
      resident_operand: whether the query is kept in registers rather than in shared memory.
      shared_mean: whether the solve keeps the mean key in shared memory, too.
      hold_sums: see `lla.kernels.mosaic_gpu.tile.Arithmetic`.
      sum_products: whether the output and the solve take sums over the rows of weights from
        products with a tile of ones, too, for tiles of at most 64 rows.
      turns: whether the compute warpgroups of the solve issue the products of an iteration one
        after the other, so that the exponentials of one run beside the products of the others.
    """

    warpgroups: int = 2
    block: int = 64
    stages: int = 2
    registers: tuple[int, int] = (240, 24)
    resident_operand: bool = False
    shared_mean: bool = True
    hold_sums: bool = True
    sum_products: bool = False
    turns: bool = False

    def check_registers(self) -> None:
        """Raises ValueError unless the warpgroups can have their `registers`."""
        compute, stream = self.registers
        needed = _THREADS * (self.warpgroups * compute + stream)
        if needed > REGISTERS or any(count % 8 for count in self.registers):
            raise ValueError(
                f"{self} needs {needed} registers, by multiples of 8 a thread; "
                f"there are {REGISTERS}."
            )


class Masking(NamedTuple):
    """What a mask reads: int32 ``[B, 2]`` (offset, length); segment ids ``[B, T]``, ``[B, S]``."""

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

    def key_tiles(self, masking, place: Place) -> TileRange:
        """Key tiles that the query rows of a program instance see."""
        rows = self.config.warpgroups * ROW_BLOCK
        sequence = self.sequence(masking, place.b)
        return key_tiles(self.mask, sequence, place.first, rows, self.config.block)

    def query_tiles(self, masking, place: Place) -> TileRange:
        """Query tiles that see the keys of a program instance."""
        keys = self.config.warpgroups * ROW_BLOCK
        sequence = self.sequence(masking, place.b)
        return query_tiles(
            self.mask, sequence, place.first, keys, self.config.block, self.shape.num_queries
        )

    def valid(self, masking, b, shape, first_query, first_key, *, transposed, row_ids=None):
        """The mask of one tile; `row_ids` are the segment ids along the rows, loaded once."""
        column_ids = None
        if self.mask.segments:
            ref, first = (masking[1], first_query) if transposed else (masking[2], first_key)
            column_ids = self.arithmetic.load(ref.at[b, pl.ds(first, shape[1])], COLS)
        ids = (column_ids, row_ids) if transposed else (row_ids, column_ids)
        return visible(
            self.mask, self.sequence(masking, b), shape, first_query, first_key,
            transposed=transposed, query_segments=ids[0], key_segments=ids[1],
        )  # fmt: skip

    def row_ids(self, masking, b, first, *, transposed: bool):
        if not self.mask.segments:
            return None
        ref = masking[2 if transposed else 1]
        return self.arithmetic.load(ref.at[b, pl.ds(first, ROW_BLOCK)], ROWS)

    @property
    def query_programs(self) -> int:
        """Program instances that own all query rows."""
        rows = self.config.warpgroups * ROW_BLOCK
        return self.shape.batch * self.shape.heads * -(-self.shape.num_queries // rows)

    def set_registers(self, *, compute: bool):
        set_registers(self.config, self.arithmetic, compute=compute)


def set_registers(config: Config, arithmetic: Arithmetic, *, compute: bool) -> None:
    """Called first by every warpgroup, those that compute and the one that streams."""
    if arithmetic.interpreted:
        return
    count = config.registers[0 if compute else 1]
    plgpu.set_max_registers(count, action="increase" if compute else "decrease")


class Place(NamedTuple):
    """Where a program instance works: batch, query head, key head, and its first row."""

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    first: jax.Array


def query_place(shape: Shape, rows: int) -> Place:
    """Longest causal rows first; heads that share keys next to each other.

    Rows are dealt out from the end, so that the first place begins before row 0 where they do not
    come out even: see `work_or_pass`.
    """
    program = lax.axis_index("program")
    per_tile = jnp.int32(shape.batch * shape.heads)
    which = lax.rem(program, per_tile)
    first = shape.num_queries - (lax.div(program, per_tile) + 1) * rows
    b, head = lax.div(which, jnp.int32(shape.heads)), lax.rem(which, jnp.int32(shape.heads))
    return Place(b, head, lax.div(head, jnp.int32(shape.group)), first)


def key_place(shape: Shape, keys: int) -> Place:
    """The first keys, which most queries see, first."""
    program = lax.axis_index("program")
    per_tile = jnp.int32(shape.batch * shape.kv_heads)
    which, tile = lax.rem(program, per_tile), lax.div(program, per_tile)
    b, head = lax.div(which, jnp.int32(shape.kv_heads)), lax.rem(which, jnp.int32(shape.kv_heads))
    return Place(b, head * shape.group, head, tile * keys)


class Ring(NamedTuple):
    """Tiles streamed through shared memory: refs ``[stages, block, D]`` and their barriers."""

    tiles: tuple
    filled: Any  # one arrival for each of `tiles`
    released: Any  # one arrival for each compute warpgroup
    stages: int
    late: bool  # whether a tile is read until the products of the next one are done

    def wait(self, t):
        slot = lax.rem(t, jnp.int32(self.stages))
        plgpu.barrier_wait(self.filled.at[slot])
        return slot

    def release(self, slot):
        plgpu.barrier_arrive(self.released.at[slot])

    def done(self, slot):
        """Called after a tile's last product was issued: releases it unless that still runs."""
        if not self.late:
            self.release(slot)

    def done_before(self, t, first):
        """Called once the products before tile t are done: releases it unless t is `first`."""
        if not self.late:
            return

        @pl.when(t > first)
        def _():
            self.release(lax.rem(t - 1, jnp.int32(self.stages)))

    def hand_on(self, t):
        """Waits for tile t and releases it unread."""
        self.release(self.wait(t))

    def fill(self, t, sources):
        """Copies `sources` (refs to tiles in global memory) once slot t is free; returns t + 1."""
        slot = lax.rem(t, jnp.int32(self.stages))

        @pl.when(t >= self.stages)
        def _():
            plgpu.barrier_wait(self.released.at[slot])

        for source, tile in zip(sources, self.tiles, strict=True):
            plgpu.copy_gmem_to_smem(source, tile.at[slot], self.filled.at[slot])
        return t + 1

    def drain(self, t):
        """Waits until everything filled has been released."""
        left = jnp.minimum(t, jnp.int32(self.stages))

        def wait(i, _):
            plgpu.barrier_wait(self.released.at[lax.rem(i, jnp.int32(self.stages))])

        lax.fori_loop(t - left, t, wait, None)


def ring_scratch(shape: Shape, config: Config, tiles: int):
    """Scratch types of a ring: the tiles, then filled, then released."""
    tile = plgpu.SMEM(
        (config.stages, config.block, shape.head_dim), shape.dtype,
        transforms=narrow_transforms(config.block, shape.head_dim),
    )  # fmt: skip
    return (*([tile] * tiles), *ring_barriers(config, tiles))


def ring_barriers(config: Config, tiles: int) -> tuple:
    """Scratch types of a ring's barriers: filled, then released."""
    return (
        plgpu.Barrier(num_arrivals=tiles, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    )


def ones_scratch(shape: Shape, config: Config) -> dict:
    """Scratch types by name of the ones that `Config.sum_products` takes, for each warpgroup."""
    if not config.sum_products:
        return {}
    if config.block > ROW_BLOCK:
        raise ValueError(f"sum_products needs tiles of at most {ROW_BLOCK} rows, got {config}.")
    lead = (config.warpgroups, ROW_BLOCK, ONES)
    return {"ones": plgpu.SMEM(lead, shape.dtype, transforms=ones_transforms())}


class Turns(NamedTuple):
    """Lets compute warpgroups do something one after the other, as often as each other."""

    barriers: Any  # one for each of them, or None: no turns
    count: int

    def start(self, w):
        """Called once by every compute warpgroup, before the first `take`."""
        if self.barriers is not None:

            @pl.when(w == self.count - 1)
            def _():
                plgpu.barrier_arrive(self.barriers.at[0])

    def take(self, w):
        if self.barriers is not None:
            plgpu.barrier_wait(self.barriers.at[w])

    def end(self, w):
        """Ends the turn of warpgroup `w`; the next one's begins."""
        if self.barriers is not None:
            plgpu.barrier_arrive(self.barriers.at[lax.rem(w + 1, jnp.int32(self.count))])

    def finish(self, w):
        """Called once by every compute warpgroup, after the last `end`."""
        if self.barriers is not None:

            @pl.when(w == 0)
            def _():
                plgpu.barrier_wait(self.barriers.at[0])


def turns_scratch(config: Config) -> dict:
    """Scratch types by name of `Turns`."""
    if not config.turns:
        return {}
    return {"turns": plgpu.Barrier(num_barriers=config.warpgroups)}


def row_tile(shape: Shape, config: Config, copies: int = 1):
    """Scratch of 16-bit row tiles ``[warpgroups, copies, 64, D]`` (no `copies` axis if it is 1)."""
    lead = (config.warpgroups,) if copies == 1 else (config.warpgroups, copies)
    return plgpu.SMEM(
        (*lead, ROW_BLOCK, shape.head_dim),
        shape.dtype,
        transforms=narrow_transforms(config.block, shape.head_dim),
    )


def work_or_pass(env: Environment, place: Place, w, work, hand_on) -> None:
    """``work()`` in a compute warpgroup that has query rows, ``hand_on()`` in one that has none.

    The latter has to arrive at every barrier at which the others are waited for.
    """
    if env.shape.num_queries % (env.config.warpgroups * ROW_BLOCK) == 0:
        work()
        return
    first = place.first + w * ROW_BLOCK

    @pl.when(first >= 0)
    def _():
        work()

    @pl.when(first < 0)
    def _():
        hand_on()


def hand_on_all(tiles: TileRange, rings: tuple[Ring, ...], t=0, turn=lambda: None):
    """Hands on every tile of `rings`, the first of which has number t; returns that of the next.

    `turn` is called for every tile.
    """

    def step(_, t):
        turn()
        for ring in rings:
            ring.hand_on(t)
        return t + 1

    return lax.fori_loop(tiles.low, tiles.high, step, jnp.int32(t))


def run_by_tile(marked, place: Place, w, run, usual, other) -> None:
    """``run(other)`` in a warpgroup whose 64 rows ``marked [B, N, T/64]`` holds nonzero for.

    Elsewhere, and without `marked`, ``run(usual)``.
    """
    if marked is None:
        run(usual)
        return
    tile = lax.div(place.first, jnp.int32(ROW_BLOCK)) + w
    mark = marked[place.b, place.head, tile]

    @pl.when(mark == 0)
    def _():
        run(usual)

    @pl.when(mark != 0)
    def _():
        run(other)


def shared_bytes(scratch) -> int:
    """Bytes of shared memory that scratch types take, every buffer aligned to 1 KiB."""
    total = 0
    for leaf in jax.tree.leaves(scratch):
        if isinstance(leaf, plgpu.Barrier):
            total += 8 * math.prod(leaf.num_barriers)
        else:  # a union has the size of its largest member
            size = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            total += -(-size // 1024) * 1024
    return total


def launch(
    body, outputs, scratch, operands, *, programs: int, config: Config, interpret,
    reduction_bytes: int = 0, threads: int | None = None, lanes: bool = False,
) -> dict:  # fmt: skip
    """Runs a kernel body on `programs` instances of `threads` warpgroups.

    The functions that launch kernels are under `jax.jit`, so that equal launches of a program,
    those of a model's layers, are lowered and compiled once.

    Args:
      body: ``body(given, out, scratch)`` with refs in the structure of the other arguments.
      outputs: `jax.ShapeDtypeStruct` by name.
      scratch: scratch types by name.
      operands: a pytree of arrays.
      reduction_bytes: memory for reductions across warps, which all warpgroups share.
      threads: None means those of `config` that compute, and one that streams.
      lanes: for bodies with thousands of operations, each on one register of a thread: lowers
        without inferring layouts, which takes time that grows faster than the body.

    Returns:
      the results by name.

    Raises:
      ValueError: the scratch does not fit into shared memory.
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
    # The results of a kernel carry no varying axes of their own.
    return {n: vary_like(r, *leaves) for n, r in zip(outputs, results, strict=True)}


def stream_keys_and_values(env: Environment, given, place: Place, tiles: TileRange, ring: Ring):
    """The streaming warpgroup of a kernel that needs keys and values once."""
    block = env.config.block

    def stream(j, t):
        where = (place.b, pl.ds(j * block, block), place.kv_head)
        return ring.fill(t, [given["key"].at[where], given["value"].at[where]])

    ring.drain(lax.fori_loop(tiles.low, tiles.high, stream, jnp.int32(0)))
