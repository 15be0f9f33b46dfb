"""Shared memory, streaming and the launch of the kernels for all GPUs since Ampere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.compat import vary_like
from lla.kernels.mosaic_gpu import launch as hopper
from lla.kernels.mosaic_gpu.launch import Environment, ProgramIndex, Shape, shared_bytes
from lla.kernels.mosaic_gpu.tile import ROW_BLOCK, TileRange
from lla.kernels.mosaic_gpu_mma.tile import WarpArithmetic, tile_transforms

SHARED_MEMORY = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
    (12, 0): 101_376,
    (12, 1): 101_376,
}
"""Bytes that a program instance may have, by compute capability (CUDA programming guide)."""

TMA_SINCE = (9, 0)
"""The compute capability from which on tiles are copied by TMA; before, by cp.async."""


@dataclasses.dataclass(frozen=True)
class Config(hopper.Config):
    """How one kernel is launched: one warpgroup, on a device of `capability`.

    `resident_operand` says whether operands that belong to the rows stay in registers.
    """

    warpgroups: int = 1
    stages: int = 2
    shared_mean: bool = False
    hold_sums: bool = False
    resident_operand: bool = True
    capability: tuple[int, int] = (9, 0)

    @property
    def uses_tma(self) -> bool:
        return self.capability >= TMA_SINCE


def environment(shape: Shape, mask, config: Config, interpret) -> Environment:
    return Environment(shape, mask, config, WarpArithmetic(interpret is not None))


@dataclasses.dataclass
class Ring:
    """Tiles streamed through shared memory by the warpgroup that reads them.

    Attributes:
      config: whose `stages` are the tiles that there is memory for; one of them is being read.
      tiles: refs ``[stages, block, D]``.
      filled: barriers of the tiles, None where cp.async copies.
      sources: the refs in global memory that belong to a tile, by its number. It is asked for
        numbers beyond the last one, too, and has to give something that can be copied.
    """

    config: Config
    tiles: tuple
    filled: Any
    sources: Callable[[Any], list]

    def start(self):
        """Copies the first tiles; the next to be read has number 0."""
        for t in range(self.config.stages - 1):
            self._copy(jnp.int32(t))

    def consumer_wait(self, t):
        """Waits for tile t, and copies the one that takes the place of its predecessor."""
        stages = self.config.stages
        slot = lax.rem(t, jnp.int32(stages))
        if self.filled is None:
            # Also a barrier of the warpgroup: no warp reads the tile before t any more.
            plgpu.wait_gmem_to_smem((stages - 2) * len(self.tiles))
        else:
            plgpu.barrier_wait(self.filled.at[slot])
            plgpu.commit_smem()
        self._copy(t + (stages - 1))
        return slot

    def _copy(self, t):
        slot = lax.rem(t, jnp.int32(self.config.stages))
        for source, tile in zip(self.sources(t), self.tiles, strict=True):
            copy(source, tile.at[slot], None if self.filled is None else self.filled.at[slot])

    def finish(self, t):
        """Waits for the copies that nothing reads, given the number after the last tile."""
        if self.filled is None:
            plgpu.wait_gmem_to_smem(0)
            return
        for ahead in range(self.config.stages - 1):
            slot = lax.rem(t + ahead, jnp.int32(self.config.stages))
            plgpu.barrier_wait(self.filled.at[slot])
        plgpu.commit_smem()

    # The rows release the tiles of a ring that another warpgroup fills; this one needs no telling.

    def consumer_release(self, slot):
        del slot

    release_or_defer = consumer_release

    def release_deferred(self, t, first):
        del t, first


def copy(source, tile, barrier) -> None:
    """Starts a copy of a tile from global to shared memory."""
    if barrier is None:
        plgpu.copy_gmem_to_smem(source, tile, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
    else:
        plgpu.copy_gmem_to_smem(source, tile, barrier)


def key_sources(env: Environment, program: ProgramIndex, tiles: TileRange, arrays) -> Callable:
    """Tiles of keys (of `arrays`) by number, from the first to the last one over and over."""
    count = jnp.maximum(tiles.high - tiles.low, 1)
    # Where no tile is visible, any that exists.
    last = jnp.int32(env.shape.num_keys // env.config.block - 1)

    def sources(t):
        first = jnp.minimum(tiles.low + lax.rem(t, count), last) * env.config.block
        where = tile_index(env.shape, program.b, first, env.config.block, program.kv_head)
        return [array.at[where] for array in arrays]

    return sources


def tile_index(shape: Shape, b, first, rows: int, head) -> tuple:
    """Index of a tile of one head in global memory, where heads are side by side: see `launch`."""
    return b, pl.ds(first, rows), pl.ds(head * shape.head_dim, shape.head_dim)


class RowTiles:
    """Where the rows of a program instance find their tiles in global memory."""

    def row_tile(self, array):
        where = tile_index(self.env.shape, self.program.b, self.first, ROW_BLOCK, self.program.head)
        return array.at[where]


def ring_scratch(shape: Shape, config: Config, tiles: int) -> dict:
    """Scratch types of a ring of `tiles` tiles."""
    tile = plgpu.SMEM(
        (config.stages, config.block, shape.head_dim), shape.dtype,
        transforms=tile_transforms(shape.head_dim),
    )  # fmt: skip
    return {"tiles": (tile,) * tiles} | barriers(config, tiles)


def barriers(config: Config, tiles: int) -> dict:
    """The barriers of a ring, none where cp.async copies."""
    if not config.uses_tma:
        return {}
    return {"filled": plgpu.Barrier(num_arrivals=tiles, num_barriers=config.stages)}


def operand_scratch(shape: Shape, config: Config, count: int) -> dict:
    """Scratch types of operands that belong to the rows, none where they stay in registers."""
    if config.resident_operand:
        return {}
    tile = plgpu.SMEM(
        (count, ROW_BLOCK, shape.head_dim), shape.dtype, transforms=tile_transforms(shape.head_dim)
    )
    found = {"operands": tile}
    if config.uses_tma:
        found["loaded"] = plgpu.Barrier(num_arrivals=count)
    return found


def load_operands(env: Environment, scratch, sources) -> list:
    """Operands of products, from global memory: arrays in registers or refs in shared memory."""
    if env.config.resident_operand:
        return [env.arithmetic.load(source) for source in sources]
    loaded = scratch.get("loaded")
    refs = [scratch["operands"].at[i] for i in range(len(sources))]
    for source, ref in zip(sources, refs, strict=True):
        copy(source, ref, loaded)
    if loaded is None:
        plgpu.wait_gmem_to_smem(0)
    else:
        plgpu.barrier_wait(loaded)
    return refs


def launch(body, outputs, scratch, operands, *, programs: int, config: Config, interpret) -> dict:
    """Runs a kernel body on `programs` instances; see `lla.kernels.mosaic_gpu.launch.launch`.

    The body sees arrays ``[B, T, N, D]`` as ``[B, T, N * D]``: cp.async copies tiles whose axes are
    the last two.

    Raises:
      ValueError: the scratch does not fit into shared memory.
    """
    needed, limit = shared_bytes(scratch), SHARED_MEMORY[config.capability]
    if needed > limit:
        raise ValueError(f"{config} needs {needed} bytes of shared memory, there are {limit}.")
    leaves, tree = jax.tree.flatten(operands)

    def flat(array):
        return (*array.shape[:2], -1) if array.ndim == 4 else array.shape

    def flat_type(result):
        shape = result.shape
        if len(shape) == 4:
            shape = (*shape[:2], shape[2] * shape[3])
        return jax.ShapeDtypeStruct(shape, result.dtype)

    def kernel(*refs, **scratch):
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        body(given, dict(zip(outputs, refs[len(leaves) :], strict=True)), scratch)

    results = plgpu.kernel(
        kernel,
        out_type=[flat_type(result) for result in outputs.values()],
        grid=(programs,),
        grid_names=("program",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret if interpret is not None else False,
    )(*(array.reshape(flat(array)) for array in leaves))
    return {
        name: vary_like(result.reshape(outputs[name].shape), *leaves)
        for name, result in zip(outputs, results, strict=True)
    }
