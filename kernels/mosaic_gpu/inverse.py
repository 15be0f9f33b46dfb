"""The preconditioner of the direct solver: the inverse system of every row, up to 32 dimensions.

Three kernels. `key_products` writes, for every key, the products of its coordinates in pairs.
`moments` sums them with the softmax weights: a matrix product whose right operand has a column for
each pair. `invert` forms ``C_i + ridge_i`` from these sums and inverts it, one row per thread.

Rounding the weights to 16 bits changes ``C_i`` by a factor of 1 +- 2^-8 in every direction, however
small the ridge. Rounding the products of coordinates would add an error that does not shrink with
``C_i``, so they have two 16-bit parts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.launch import (
    Config,
    Environment,
    Masking,
    ProgramIndex,
    Ring,
    Shape,
    launch,
    ring_barriers,
    row_tile,
    run_or_skip,
    skip_tiles,
)
from lla.kernels.mosaic_gpu.query_rows import QueryRows
from lla.kernels.mosaic_gpu.tile import (
    ROW_BLOCK,
    WGMMA,
    WGMMA_TRANSPOSED,
    Arithmetic,
    MaskSpec,
    Transposed,
    by_row,
    full,
    narrow_transforms,
)

SUMS_PER_PROGRAM = 192
"""Sums per row that a program instance computes."""

COLUMNS_PER_LOAD = 4
"""Columns of an inverse that are loaded together."""

_BLOCK = 16  # the size of a matrix that is inverted in registers
_THREADS = 128  # of a program instance with one row, or one key, per thread
_DTYPE = jnp.bfloat16  # of weights and products: the product of two float16 numbers may overflow


def system_dim(head_dim: int) -> int:
    """Size of the systems, which are padded with the identity times the ridge."""
    return _BLOCK if head_dim <= _BLOCK else 2 * _BLOCK


def packed_index(a, b):
    """Index of the product of coordinates a >= b among the sums; ints or traced."""
    return a * (a + 1) // 2 + b if isinstance(a, int) else lax.div(a * (a + 1), 2) + b


def num_sums(dim: int) -> int:
    """Number of sums of a row, padded: of products, of coordinates, and of the weights."""
    return -(-(packed_index(dim, 0) + dim + 1) // SUMS_PER_PROGRAM) * SUMS_PER_PROGRAM


def centred(key: jax.Array, length: jax.Array, dim: int) -> jax.Array:
    """Keys relative to the mean key of their sequence, float32 ``[B, K, dim, S]``.

    Keys that are not finite are left out of the mean, since earlier queries do not see them.

    Args:
      key: ``[B, S, K, D]``.
      length: int32 ``[B]``, the number of keys that exist.
      dim: `system_dim`; keys are cut or padded with zeros to it, and hold zeros beyond it.
    """
    key = jnp.moveaxis(key[..., :dim].astype(jnp.float32), 1, -1)
    key = jnp.pad(key, [(0, 0), (0, 0), (0, dim - key.shape[2]), (0, 0)])
    position = jnp.arange(key.shape[-1], dtype=jnp.int32)[None, None, None]
    exists = (position < length[:, None, None, None]) & jnp.isfinite(key).all(2, keepdims=True)
    count = jnp.maximum(exists.sum(-1, keepdims=True), 1).astype(jnp.float32)
    return key - jnp.where(exists, key, 0.0).sum(-1, keepdims=True) / count


def key_products(key: jax.Array, *, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """What `moments` sums for every key, in two 16-bit parts ``[B, K, F, S]``.

    For a `centred` key: the products of its coordinates in the order of `packed_index`, the
    coordinates, and 1, padded with zeros.
    """
    b, k, dim, s = key.shape
    arithmetic = Arithmetic(interpret is not None)

    def body(given, out, scratch):
        del scratch
        *lead, keys = _thread_rows(k, s)
        _write_products(arithmetic, dim, given["key"], out, lead, keys)

    size = jax.ShapeDtypeStruct((b, k, num_sums(dim), s), _DTYPE)
    parts = launch(
        body, {"high": size, "low": size}, {}, {"key": key}, programs=b * k * s // _THREADS,
        config=Config(), interpret=interpret, threads=1, lanes=True,
    )  # fmt: skip
    return parts["high"], parts["low"]


def _thread_rows(heads: int, size: int) -> tuple:
    """Batch, head, and the slice of 128 of `size` rows or keys that a program instance owns."""
    tiles = jnp.int32(size // _THREADS)
    program = lax.axis_index("program")
    which = lax.div(program, tiles)
    here = pl.ds(lax.rem(program, tiles) * _THREADS, _THREADS)
    return lax.div(which, jnp.int32(heads)), lax.rem(which, jnp.int32(heads)), here


def _write_products(arithmetic: Arithmetic, dim: int, key, out, lead, keys):
    """The products of 128 keys, one per thread."""

    def coordinate(i):
        return arithmetic.load_row(key.at[*lead, i, keys])

    def write(f, number):
        high = number.astype(_DTYPE)
        out["high"].at[*lead, f, keys][...] = high
        out["low"].at[*lead, f, keys][...] = (number - high.astype(jnp.float32)).astype(_DTYPE)

    for i in range(dim):
        first = coordinate(i)

        def multiply(j, _, i=i, first=first):
            write(packed_index(i, 0) + j, first * coordinate(j))

        lax.fori_loop(0, i + 1, multiply, None)
        write(packed_index(dim, 0) + i, first)
    zero = first * 0
    write(packed_index(dim, 0) + dim, zero + 1)
    for f in range(packed_index(dim, 0) + dim + 1, num_sums(dim)):
        write(f, zero)


@functools.partial(jax.jit, static_argnames=("shape", "mask", "config", "head_dim", "interpret"))
def inverse_systems(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    head_dim: int,
    query: jax.Array,
    key: jax.Array,
    scale: jax.Array,
    ridge: jax.Array,
    log_sum_exp: jax.Array,
    masking: Masking,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Approximate inverses of ``C_i + ridge_i``, float32 ``[B, N, dim, D, T]``.

    Zero for a row with a pivot below half the ridge. In exact arithmetic no pivot is smaller than
    the smallest eigenvalue, hence than the ridge, so such a row is spoilt by rounding.

    Args:
      shape: padded sizes, with ``shape.head_dim`` D = 32; T and S are multiples of 128.
      head_dim: of the keys before padding, at most 32. The result has its `system_dim`, and zero
        columns from there up to D.
      query, key: as for `lla.kernels.mosaic_gpu.solve.solve`; so are `scale`, `ridge`, `masking`.
      log_sum_exp: of the logits, ``[B, N, T]`` in base 2.
    """
    dim = system_dim(head_dim)
    parts = key_products(centred(key, masking.numbers[:, 1], dim), interpret=interpret)
    sums = moments(
        shape, mask, config, query, key, parts, scale, log_sum_exp, masking, interpret=interpret
    )
    return invert(shape, dim, sums, ridge, interpret=interpret)


# ---------------------------------------------------------------------------------------------
# Second moments


def moments(
    shape: Shape, mask: MaskSpec, config: Config, query, key, parts, scale, log_sum_exp,
    masking: Masking, *, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """``sum_j p_ij (high_j + low_j)`` for the two `parts`, float32 ``[B, N, F, T]``."""
    env = Environment(shape, mask, config, Arithmetic(interpret is not None, config.hold_sums))
    groups = parts[0].shape[2] // SUMS_PER_PROGRAM
    size = (shape.batch, shape.heads, groups * SUMS_PER_PROGRAM, shape.num_queries)
    tile = plgpu.SMEM(
        (config.stages, SUMS_PER_PROGRAM, config.block), _DTYPE,
        transforms=narrow_transforms(config.block),
    )  # fmt: skip
    keys = plgpu.SMEM(
        (config.stages, config.block, shape.head_dim), shape.dtype,
        transforms=narrow_transforms(config.block, shape.head_dim),
    )  # fmt: skip
    scratch = {
        "query": row_tile(shape, config),
        "ring": (keys, tile, tile, *ring_barriers(config, 3)),
        "loaded": plgpu.Barrier(num_barriers=config.warpgroups),
    }
    operands = {
        "query": query,
        "key": key,
        "parts": parts,
        "scale": scale,
        "log_sum_exp": log_sum_exp,
        "masking": masking.operands(),
    }
    results = launch(
        functools.partial(_moment_body, env, groups),
        {"sums": jax.ShapeDtypeStruct(size, jnp.float32)}, scratch, operands,
        programs=env.query_programs * groups, config=config, interpret=interpret,
    )  # fmt: skip
    return results["sums"]


def _moment_program_index(env: Environment, groups: int) -> tuple[ProgramIndex, jax.Array]:
    """Rows and group of columns of a program instance.

    The programs of a head are adjacent, so that its products stay in the L2 cache; its longest
    causal rows come first.
    """
    shape, rows = env.shape, env.config.warpgroups * ROW_BLOCK
    each = env.query_programs // (shape.batch * shape.heads) * groups
    program = lax.axis_index("program")
    which, rest = lax.div(program, jnp.int32(each)), lax.rem(program, jnp.int32(each))
    first = shape.num_queries - (lax.div(rest, jnp.int32(groups)) + 1) * rows
    b, head = lax.div(which, jnp.int32(shape.heads)), lax.rem(which, jnp.int32(shape.heads))
    program = ProgramIndex(b, head, lax.div(head, jnp.int32(shape.group)), first)
    return program, lax.rem(rest, jnp.int32(groups))


def _moment_body(env: Environment, groups: int, given, out, scratch):
    count, block = env.config.warpgroups, env.config.block
    program, group = _moment_program_index(env, groups)
    tiles = env.key_tiles(given["masking"], program)
    *tile_refs, produced, consumed = scratch["ring"]
    ring = Ring(tuple(tile_refs), produced, consumed, env.config.stages, env.config.hold_sums)
    warpgroup = lax.axis_index("warpgroup")
    columns = pl.ds(group * SUMS_PER_PROGRAM, SUMS_PER_PROGRAM)

    @pl.when(warpgroup < count)
    def _():
        env.set_registers(compute=True)
        rows = _MomentRows(env, given, out, scratch, program, tiles, warpgroup, ring)
        run_or_skip(
            env, program, warpgroup, lambda: rows.run(columns), lambda: skip_tiles(tiles, (ring,))
        )

    @pl.when(warpgroup == count)
    def _():
        env.set_registers(compute=False)

        def stream(j, t):
            keys = pl.ds(j * block, block)
            sources = [given["key"].at[program.b, keys, program.kv_head]]
            sources += [
                part.at[program.b, program.kv_head, columns, keys] for part in given["parts"]
            ]
            return ring.produce(t, sources)

        ring.drain(lax.fori_loop(tiles.low, tiles.high, stream, jnp.int32(0)))


@dataclasses.dataclass
class _MomentRows(QueryRows):
    """The second moments of one consumer warpgroup."""

    ring: Ring

    def run(self, columns):
        arithmetic, block = self.env.arithmetic, self.env.config.block
        loaded = self.scratch["loaded"].at[self.w]
        query = self.scratch["query"].at[self.w]
        plgpu.copy_gmem_to_smem(self.row_tile(self.given["query"]), query, loaded)
        plgpu.barrier_wait(loaded)
        scale, ids = self.scale_and_ids()
        log_sum_exp = self.row_vector(self.given["log_sum_exp"])

        def step(j, t, masked, add):
            slot = self.ring.consumer_wait(t)
            keys, high, low = (tile.at[slot] for tile in self.ring.tiles)

            def use(scores):
                weights = self.weights(scores(), j, masked, scale, ids, log_sum_exp)
                self.ring.release_deferred(t, 0)
                return weights.astype(_DTYPE)

            weights = arithmetic.with_products(block, use, [(query, keys)])
            add([(weights, Transposed(high)), (weights, Transposed(low))])
            self.ring.release_or_defer(slot)
            return t + 1

        t, (sums,) = arithmetic.summing((SUMS_PER_PROGRAM,), self.over_tiles, step, jnp.int32(0))
        self.ring.release_deferred(t, 0)
        rows = pl.ds(self.first, ROW_BLOCK)
        arithmetic.store_transposed(
            self.out["sums"].at[self.program.b, self.program.head, columns, rows], sums
        )


# ---------------------------------------------------------------------------------------------
# Inverses


def invert(shape: Shape, dim: int, sums, ridge, *, interpret: Any = None) -> jax.Array:
    """The inverse systems ``[B, N, dim, D, T]`` from the sums ``[B, N, F, T]`` of `moments`."""
    size = (shape.batch, shape.heads, dim, shape.head_dim, shape.num_queries)
    programs = shape.batch * shape.heads * shape.num_queries // _THREADS
    arithmetic = Arithmetic(interpret is not None)
    results = launch(
        lambda given, out, scratch: _Invert(shape, dim, arithmetic, given, out).run(),
        {"inverse": jax.ShapeDtypeStruct(size, jnp.float32)}, {}, {"sums": sums, "ridge": ridge},
        programs=programs, config=Config(), interpret=interpret, threads=1, lanes=True,
    )  # fmt: skip
    return results["inverse"]


class _Invert:
    """The systems of 128 rows, one per thread; arrays ``[128]`` have one number for each.

    Intermediate results that do not fit into registers are kept in the output. With shared memory
    instead, a multiprocessor would have room for only one program instance, not two.
    """

    def __init__(self, shape: Shape, dim: int, arithmetic: Arithmetic, given, out):
        b, head, rows = _thread_rows(shape.heads, shape.num_queries)
        self.dim, self.columns = dim, shape.head_dim
        self.arithmetic = arithmetic
        self.sums = lambda index: arithmetic.load_row(given["sums"].at[b, head, index, rows])
        self.entry = lambda i, j: out["inverse"].at[b, head, i, j, rows]
        total = self.sums(packed_index(dim, 0) + dim)
        self.weight = 1 / jnp.where(total > 0, total, 1.0)  # without keys all sums are zero
        self.ridge = arithmetic.load_row(given["ridge"].at[b, head, rows])
        self.good = self.ridge > 0

    def mean(self, i):
        return self.sums(packed_index(self.dim, 0) + i) * self.weight

    def covariance(self, i, j, mean_i, mean_j):
        """The covariance of coordinates ``i >= j``."""
        return self.sums(packed_index(i, j)) * self.weight - mean_i * mean_j

    def store(self, i, j, number, twice: bool = True):
        """Writes an element of the inverse, and its mirror image."""
        number = jnp.where(self.good, number, 0.0)
        self.entry(i, j)[...] = number
        if twice:
            self.entry(j, i)[...] = number

    def factor(self, i, j):
        """The entry that holds T, until the result needs the space."""
        return self.entry(j, _BLOCK + i)

    def load(self, ref):
        return self.arithmetic.load_row(ref)

    def run(self):
        means = [self.mean(i) for i in range(_BLOCK)]
        corner = self.negative_inverse(self.block(0, means))
        if self.dim == _BLOCK:
            self.write(0, [-number for number in corner])
            zero = self.ridge * 0
            for i in range(_BLOCK):
                for j in range(_BLOCK, self.columns):
                    self.store(i, j, zero, twice=False)
            return
        self.factor_rows([-number for number in corner], means)
        del corner, means
        means = [self.mean(_BLOCK + i) for i in range(_BLOCK)]
        rest = self.negative_inverse(self.complement(self.block(_BLOCK, means), means))
        self.write(_BLOCK, [-number for number in rest])
        self.off_diagonal(rest)
        del rest
        self.first_corner()

    def block(self, first: int, means) -> list:
        """The system of 16 coordinates: its lower triangle, packed."""
        found = []
        for i in range(_BLOCK):
            for j in range(i + 1):
                number = self.covariance(first + i, first + j, means[i], means[j])
                found.append(number + self.ridge if i == j else number)
        return found

    def negative_inverse(self, a: list) -> list:
        """The negated inverse of a packed system, by the sweep operator."""
        a = list(a)
        for k in range(_BLOCK):
            pivot = a[packed_index(k, k)]
            self.good = self.good & (pivot >= 0.5 * self.ridge)
            inverse = 1 / jnp.where(self.good, pivot, 1.0)
            column = [a[packed_index(max(i, k), min(i, k))] for i in range(_BLOCK)]
            scaled = [number * inverse for number in column]
            for i in range(_BLOCK):
                for j in range(i + 1):
                    if k not in (i, j):
                        a[packed_index(i, j)] = a[packed_index(i, j)] - column[i] * scaled[j]
            for i in range(_BLOCK):
                a[packed_index(max(i, k), min(i, k))] = scaled[i]
            a[packed_index(k, k)] = -inverse
        return a

    def write(self, first: int, a: list):
        for i in range(_BLOCK):
            for j in range(i + 1):
                self.store(first + i, first + j, a[packed_index(i, j)], twice=i != j)

    # With the system [[P, Q'], [Q, R]], the factor T = Q P^-1 and S = R - T Q', the inverse is
    # [[P^-1 + T' S^-1 T, -T' S^-1], [-S^-1 T, S^-1]].

    def factor_rows(self, corner: list, means):
        """Stores P^-1 (`corner`) and T, row by row."""
        for i in range(_BLOCK):
            for j in range(i + 1):
                self.entry(i, j)[...] = corner[packed_index(i, j)]

        def row(i, _):
            mean = self.mean(_BLOCK + i)
            q = [self.covariance(_BLOCK + i, k, mean, means[k]) for k in range(_BLOCK)]
            for j in range(_BLOCK):
                terms = [q[k] * corner[packed_index(max(j, k), min(j, k))] for k in range(_BLOCK)]
                self.factor(i, j)[...] = sum(terms[1:], terms[0])

        lax.fori_loop(0, _BLOCK, row, None)

    def complement(self, a: list, means) -> list:
        """S, packed."""

        def column(k, a):
            mean = self.mean(k)
            q = [self.covariance(_BLOCK + j, k, means[j], mean) for j in range(_BLOCK)]
            t = [self.load(self.factor(i, k)) for i in range(_BLOCK)]
            a = list(a)
            for i in range(_BLOCK):
                for j in range(i + 1):
                    a[packed_index(i, j)] = a[packed_index(i, j)] - t[i] * q[j]
            return tuple(a)

        return list(lax.fori_loop(0, _BLOCK, column, tuple(a)))

    def off_diagonal(self, negative: list):
        """Writes ``-S^-1 T``, below the diagonal block only; `negative` is ``-S^-1``."""

        def column(k, _):
            t = [self.load(self.factor(i, k)) for i in range(_BLOCK)]
            for i in range(_BLOCK):
                terms = [negative[packed_index(max(i, j), min(i, j))] * t[j] for j in range(_BLOCK)]
                self.store(_BLOCK + i, k, sum(terms[1:], terms[0]), twice=False)

        lax.fori_loop(0, _BLOCK, column, None)

    def first_corner(self):
        """Writes ``P^-1 + T' S^-1 T``, and ``-T' S^-1`` in place of T."""

        def row(i, a):
            t = [self.load(self.factor(i, k)) for k in range(_BLOCK)]
            u = [self.load(self.entry(_BLOCK + i, k)) for k in range(_BLOCK)]
            for k in range(_BLOCK):
                self.entry(k, _BLOCK + i)[...] = u[k]
            a = list(a)
            for j in range(_BLOCK):
                for k in range(j + 1):
                    a[packed_index(j, k)] = a[packed_index(j, k)] - t[j] * u[k]
            return tuple(a)

        corner = [self.load(self.entry(i, j)) for i in range(_BLOCK) for j in range(i + 1)]
        self.write(0, list(lax.fori_loop(0, _BLOCK, row, tuple(corner))))


# ---------------------------------------------------------------------------------------------
# Products


def apply_inverse(rows: QueryRows, inverse, r):
    """The inverses of a warpgroup's 64 rows times ``r [64, D]``, with layout `WGMMA`."""
    r = plgpu.layout_cast(r, WGMMA_TRANSPOSED)
    # Made with layout `WGMMA_TRANSPOSED`, an iota is wrong on hardware (JAX 0.11.2), though right
    # in the interpreter.
    columns = plgpu.broadcasted_iota(jnp.int32, rows.matrix, 1, layout=WGMMA)
    columns = plgpu.layout_cast(columns.astype(jnp.float32), WGMMA_TRANSPOSED)
    here = pl.ds(rows.first, ROW_BLOCK)

    def step(i, z):
        for k in range(COLUMNS_PER_LOAD):  # loads in flight together
            column = i * COLUMNS_PER_LOAD + k
            tile = inverse.at[rows.program.b, rows.program.head, column, :, here]
            number = jnp.where(columns == column.astype(jnp.float32), r, 0.0).sum(axis=1)
            z = z + rows.env.arithmetic.load_transposed(tile) * by_row(number, z.shape)
        return z

    z = lax.fori_loop(
        0, inverse.shape[2] // COLUMNS_PER_LOAD, step, full(rows.matrix, 0, WGMMA_TRANSPOSED)
    )
    return plgpu.layout_cast(z, WGMMA)
