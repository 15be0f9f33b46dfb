"""Shapes, operands and the kernel call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from lla.compat import assume_tpu, shape_varying
from lla.kernels.mosaic_tpu import tile
from lla.kernels.mosaic_tpu.tile import MaskSpec, SequenceMask

LANES = 128
SUBLANES = 8  # of float32
# Shifting a float32 number of size 1 by this costs an error of 1.5e-5.
LARGEST_ORIGIN = 256.0


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes of one call.

    Attributes:
      rows: query rows of a program instance, and of a tile that the key gradients stream.
      keys: keys of a tile that is streamed for query rows.
      own_keys: keys of a program instance of the key gradients.
    """

    rows: int
    keys: int
    own_keys: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Padded sizes: keys ``[M, S, D]`` of ``M = batch * kv_heads`` heads, rows ``[M, R, D]``.

    The rows of a key head are those of all query heads that share it: row ``t * group + g`` is
    query t of head g. `num_keys` and `num_rows` are multiples of the blocks, `head_dim` and
    `value_dim` of 128. `num_queries` is T before padding.
    """

    batch: int
    kv_heads: int
    group: int
    num_queries: int
    num_rows: int
    num_keys: int
    head_dim: int
    value_dim: int
    dtype: Any
    blocks: BlockSizes

    @property
    def groups(self) -> int:
        return self.batch * self.kv_heads

    @property
    def has_origins(self) -> bool:
        """Whether keys are taken relative to an origin; see `RowTile`."""
        return self.dtype == jnp.float32

    def with_whole_lanes(self) -> Shape:
        """This shape with rows padded to a multiple of 128."""
        if self.num_rows % LANES == 0:
            return self
        count = -(-self.num_rows // LANES) * LANES
        blocks = dataclasses.replace(self.blocks, rows=LANES)
        return dataclasses.replace(self, num_rows=count, blocks=blocks)

    def sequence(self, head):
        """The sequence that a key head belongs to."""
        return lax.div(head, np.int32(self.kv_heads))


class Operands:
    """The operands of a kernel: arrays and block specs by name.

    `blocked` arrays are copied block by block along the grid, `streamed` ones stay in HBM, and
    `numbers` go to scalar memory.
    """

    def __init__(self, shape: Shape, numbers):
        self.shape = shape
        self.arrays: dict[str, jax.Array] = {"numbers": numbers}
        self.specs: dict[str, Any] = {"numbers": pltpu.SMEM}

    def blocked(self, name: str, array, spec):
        if array is not None:
            self.arrays[name], self.specs[name] = array, spec

    def streamed(self, name: str, array):
        self.blocked(name, array, pl.ANY)


def row_block(shape: Shape, width: int) -> pl.BlockSpec:
    """The rows of a program instance, from ``[M, R, width]``."""
    return pl.BlockSpec((None, shape.blocks.rows, width), lambda m, i: (m, i, 0))


def row_numbers(shape: Shape, count: int) -> pl.BlockSpec:
    """`count` numbers of each row of a program instance, from ``[M, count, R]``."""
    return pl.BlockSpec((None, count, shape.blocks.rows), lambda m, i: (m, 0, i))


def row_ids(shape: Shape) -> pl.BlockSpec:
    """The segment ids of the rows of a program instance, from ``[B, 1, R]``."""
    return pl.BlockSpec((None, 1, shape.blocks.rows), lambda m, i: (shape.sequence(m), 0, i))


def call(
    body: Callable[[dict, dict, dict], None],
    name: str,
    operands: Operands,
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: dict[str, Any],
    tiles: int,
    interpret: Any,
    vmem_limit: int | None = None,
) -> dict[str, jax.Array]:
    """Runs ``body(given, out, scratch)`` for every key head and each of its `tiles`.

    Args:
      body: takes dicts of refs by name.
      outputs: shape, dtype and block spec of each result.
      interpret: as for `pallas_call`; None to compile.
      vmem_limit: bytes of vector memory that the compiler may use; None for its default.

    Returns:
      the results by name.
    """
    names = list(operands.arrays)

    def kernel(*refs):
        given = dict(zip(names, refs, strict=False))
        out = dict(zip(outputs, refs[len(names) :], strict=False))
        body(given, out, dict(zip(scratch, refs[len(names) + len(outputs) :], strict=True)))

    @jax.custom_batching.custom_vmap
    def launched(*arrays):
        # Under `vmap` there are more sequences than in the shape.
        times = arrays[0].shape[0] // operands.shape.batch
        launch = pl.pallas_call(
            kernel,
            out_shape=[
                shape_varying((times * s.shape[0], *s.shape[1:]), s.dtype, *arrays)
                for s, _ in outputs.values()
            ],
            grid=(times * operands.shape.groups, tiles),
            in_specs=[
                _whole_array(a, operands.specs[n]) for n, a in zip(names, arrays, strict=True)
            ],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_limit
            ),
            interpret=False if interpret is None else interpret,
            name=name,
        )
        with assume_tpu():
            return tuple(launch(*arrays))

    @launched.def_vmap
    def fold(size, mapped, *arrays):
        """Folds the mapped axis into the sequences: Pallas cannot `vmap` arrays in HBM."""
        arrays = [
            a if given else jnp.broadcast_to(a[None], (size, *a.shape))
            for a, given in zip(arrays, mapped, strict=True)
        ]
        results = launched(*(a.reshape(-1, *a.shape[2:]) for a in arrays))
        results = tuple(r.reshape(size, -1, *r.shape[1:]) for r in results)
        return results, (True,) * len(results)

    return dict(zip(outputs, launched(*operands.arrays.values()), strict=True))


def _whole_array(array, spec) -> pl.BlockSpec:
    """The block spec of an operand; a memory space stands for the whole array in it."""
    if isinstance(spec, pl.BlockSpec):
        return spec
    return pl.BlockSpec(array.shape, lambda m, i: (0,) * array.ndim, memory_space=spec)


def vectors(rows: int, width: int = 1):
    """float32 scratch ``[rows, width]`` in vector memory."""
    return pltpu.VMEM((rows, width), jnp.float32)


def row_scratch(shape: Shape) -> dict:
    """Scratch that a `RowTile` needs."""
    return {"origin": vectors(SUBLANES, shape.head_dim)} if shape.has_origins else {}


class RowTile:
    """The query rows of a program instance, and the keys that they see.

    In float32 the keys are taken relative to an origin, the first key of the first tile, which
    keeps accuracy when the keys share an offset. In bfloat16 the origin is 0, since the differences
    would not be exact.

    Attributes:
      queries: ``[rows, D]``.
      exists: bool ``[rows, 1]``, False for padding rows.
      origin: float32 ``[1, D]``, or None for 0.
    """

    def __init__(self, shape: Shape, mask: MaskSpec, given: dict, memory: dict):
        self.shape, self.mask, self.given = shape, mask, given
        rows, group = shape.blocks.rows, jnp.int32(shape.group)
        self.head = pl.program_id(0)
        sequence = shape.sequence(self.head)
        self.sequence = SequenceMask(*(given["numbers"][sequence, i] for i in range(2)))
        first = pl.program_id(1) * rows
        index = first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        self.exists = index < shape.num_queries * shape.group
        self.positions = lax.div(index, group) + self.sequence.offset
        last = jnp.minimum(lax.div(first + (rows - 1), group), shape.num_queries - 1)
        self.low, self.high = tile.key_tiles(
            mask, self.sequence, lax.div(first, group), last, shape.blocks.keys
        )
        self.ids = tile.ids_to_column(given["query_ids"][...]) if mask.segments else None
        self.queries = given["query"][...]
        self.origin = None
        if shape.has_origins:
            start = jnp.minimum(self.low, shape.num_keys // shape.blocks.keys - 1)
            first_keys = pl.ds(pl.multiple_of(start * shape.blocks.keys, SUBLANES), SUBLANES)
            pltpu.sync_copy(given["key"].at[self.head, first_keys], memory["origin"])
            self.origin = memory["origin"][:1]
            if mask.window is not None or mask.segments:
                # Some rows may not see this key: see `lla.kernels.tiles.segment_origin`.
                small = jnp.abs(self.origin) <= LARGEST_ORIGIN
                self.origin = jnp.where(small, self.origin, 0.0)

    def centred(self):
        """``query - origin`` in float32."""
        queries = self.queries.astype(jnp.float32)
        return queries if self.origin is None else queries - self.origin

    def origin_logits(self):
        """``query . origin``, which relative logits lack; None for 0."""
        if self.origin is None:
            return None
        return (self.queries * self.origin).sum(1, keepdims=True)

    def number(self, index: int):
        """Number `index` of each row, as a column."""
        return tile.to_column(self.given["rows"][pl.ds(index, 1), :])

    def stream(self, body, *names: str):
        """Runs ``body(valid, *tiles)`` for each tile of keys of the arrays `names` in HBM."""
        block, low = self.shape.blocks.keys, self.low
        specs = [pl.BlockSpec((block, self.given[n].shape[-1]), _from(low)) for n in names]
        sources = [self.given[n].at[self.head] for n in names]
        if self.mask.segments:
            specs.append(pl.BlockSpec((1, block), lambda j: (0, low + j)))
            sources.append(self.given["key_ids"].at[self.shape.sequence(self.head)])

        def step(*refs):
            first = (low + pl.program_id(0)) * block
            keys = first + lax.broadcasted_iota(jnp.int32, (1, block), 1)
            ids = refs[-1][...] if self.mask.segments else None
            valid = tile.visible(
                self.mask, self.sequence.length, self.positions, keys, self.ids, ids
            )
            tiles = {n: ref[...] for n, ref in zip(names, refs, strict=False)}
            if self.origin is not None:
                tiles["key"] = tiles["key"] - self.origin
            body(valid, *tiles.values())

        pltpu.emit_pipeline(step, grid=(self.high - low,), in_specs=specs)(*sources)


def _from(low):
    return lambda j: (low + j, 0)
