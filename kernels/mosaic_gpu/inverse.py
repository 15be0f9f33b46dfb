"""The direct solver's preconditioner: the inverse systems of all rows, up to 32 dimensions.

One kernel writes the products of two coordinates for every key. Another sums them with the softmax
weights: a matrix product whose second factor has a column for each pair of coordinates. The third
takes one row a thread, forms ``C_i + ridge_i`` from these sums and inverts it.

The weights are rounded to 16 bits, which changes ``C_i`` by a factor of 1 +- 2^-8 in every
direction, whatever the ridge is; the products of coordinates, whose rounding would be compared with
the ridge, have two 16-bit parts.
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
    Place,
    Ring,
    Shape,
    hand_on_all,
    launch,
    ring_barriers,
    row_tile,
    work_or_pass,
)
from lla.kernels.mosaic_gpu.rows import QueryRows
from lla.kernels.mosaic_gpu.tile import (
    MATRIX,
    ROW_BLOCK,
    TURNED,
    Arithmetic,
    MaskSpec,
    Turned,
    by_row,
    full,
    narrow_transforms,
)

COLUMNS = 192
"""Sums that a program instance computes for each of its rows."""

LOADS = 4
"""Columns of an inverse that are loaded at a time."""

_BLOCK = 16  # rows and columns of what is inverted in registers
_ROWS = 128  # or keys, of a program instance that has one a thread
_DTYPE = jnp.bfloat16  # of weights and products: two float16 numbers may have one out of range


def system_dim(head_dim: int) -> int:
    """Rows of the systems, which are padded with the identity times the ridge."""
    return _BLOCK if head_dim <= _BLOCK else 2 * _BLOCK


def packed(a, b):
    """Where the product of coordinates a >= b is among the sums; ints or traced."""
    return a * (a + 1) // 2 + b if isinstance(a, int) else lax.div(a * (a + 1), 2) + b


def num_sums(dim: int) -> int:
    """Sums of a row: those of products, of coordinates, and of the weights; padded."""
    return -(-(packed(dim, 0) + dim + 1) // COLUMNS) * COLUMNS


def centred(key: jax.Array, length: jax.Array, dim: int) -> jax.Array:
    """Keys relative to the mean of those of the sequence, float32 ``[B, K, dim, S]``.

    A key that is not finite is left out of the mean, since earlier queries do not see it.

    Args:
      key: ``[B, S, K, D]``.
      length: int32 ``[B]``, how many of the keys exist.
      dim: `system_dim`; entries of a key beyond are zero, and so are those added.
    """
    key = jnp.moveaxis(key[..., :dim].astype(jnp.float32), 1, -1)
    key = jnp.pad(key, [(0, 0), (0, 0), (0, dim - key.shape[2]), (0, 0)])
    position = jnp.arange(key.shape[-1], dtype=jnp.int32)[None, None, None]
    exists = (position < length[:, None, None, None]) & jnp.isfinite(key).all(2, keepdims=True)
    count = jnp.maximum(exists.sum(-1, keepdims=True), 1).astype(jnp.float32)
    return key - jnp.where(exists, key, 0.0).sum(-1, keepdims=True) / count


def products(key: jax.Array, *, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """What is summed for every key, in two parts ``[B, K, F, S]``: of `centred` keys.

    The products of their coordinates, `packed`; the coordinates; 1. Padded with zeros.
    """
    b, k, dim, s = key.shape
    arithmetic = Arithmetic(interpret is not None)

    def body(given, out, scratch):
        del scratch
        *place, keys = _one_a_thread(k, s)
        _write_products(arithmetic, dim, given["key"], out, place, keys)

    size = jax.ShapeDtypeStruct((b, k, num_sums(dim), s), _DTYPE)
    parts = launch(
        body, {"high": size, "low": size}, {}, {"key": key}, programs=b * k * s // _ROWS,
        config=Config(), interpret=interpret, threads=1, lanes=True,
    )  # fmt: skip
    return parts["high"], parts["low"]


def _one_a_thread(heads: int, size: int) -> tuple:
    """Batch, head, and the 128 of `size` rows or keys that a program instance has."""
    tiles = jnp.int32(size // _ROWS)
    program = lax.axis_index("program")
    which = lax.div(program, tiles)
    here = pl.ds(lax.rem(program, tiles) * _ROWS, _ROWS)
    return lax.div(which, jnp.int32(heads)), lax.rem(which, jnp.int32(heads)), here


def _write_products(arithmetic: Arithmetic, dim: int, key, out, place, keys):
    """Of 128 keys, one a thread."""

    def coordinate(i):
        return arithmetic.load_row(key.at[*place, i, keys])

    def write(f, number):
        high = number.astype(_DTYPE)
        out["high"].at[*place, f, keys][...] = high
        out["low"].at[*place, f, keys][...] = (number - high.astype(jnp.float32)).astype(_DTYPE)

    for i in range(dim):
        first = coordinate(i)

        def multiply(j, _, i=i, first=first):
            write(packed(i, 0) + j, first * coordinate(j))

        lax.fori_loop(0, i + 1, multiply, None)
        write(packed(dim, 0) + i, first)
    zero = first * 0
    write(packed(dim, 0) + dim, zero + 1)
    for f in range(packed(dim, 0) + dim + 1, num_sums(dim)):
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

    Zero for a row in which a pivot is below half the ridge: no pivot of an exact system is below
    its smallest eigenvalue, so that rounding has spoiled this one.

    Args:
      shape: padded sizes, with ``shape.head_dim`` D = 32; T and S are multiples of 128.
      head_dim: of the keys before padding, at most 32; the result has its `system_dim`, and
        zeros in the other columns up to D.
      query, key: as for `lla.kernels.mosaic_gpu.solve.solve`; so are `scale`, `ridge`, `masking`.
      log_sum_exp: of the logits, ``[B, N, T]`` in base 2.
    """
    dim = system_dim(head_dim)
    parts = products(centred(key, masking.numbers[:, 1], dim), interpret=interpret)
    sums = moments(
        shape, mask, config, query, key, parts, scale, log_sum_exp, masking, interpret=interpret
    )
    return invert(shape, dim, sums, ridge, interpret=interpret)


# ---------------------------------------------------------------------------------------------
# Sums


def moments(
    shape: Shape, mask: MaskSpec, config: Config, query, key, parts, scale, log_sum_exp,
    masking: Masking, *, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """``sum_j p_ij (high_j + low_j)`` for the two `parts`, float32 ``[B, N, F, T]``."""
    env = Environment(shape, mask, config, Arithmetic(interpret is not None, config.hold_sums))
    groups = parts[0].shape[2] // COLUMNS
    size = (shape.batch, shape.heads, groups * COLUMNS, shape.num_queries)
    tile = plgpu.SMEM(
        (config.stages, COLUMNS, config.block), _DTYPE,
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
        functools.partial(_sum_body, env, groups),
        {"sums": jax.ShapeDtypeStruct(size, jnp.float32)}, scratch, operands,
        programs=env.query_programs * groups, config=config, interpret=interpret,
    )  # fmt: skip
    return results["sums"]


def _sum_place(env: Environment, groups: int) -> tuple[Place, jax.Array]:
    """Rows and group of columns of a program instance.

    Those of one head, whose products stay in the second-level cache, one after the other; the
    longest causal rows of a head first.
    """
    shape, rows = env.shape, env.config.warpgroups * ROW_BLOCK
    each = env.query_programs // (shape.batch * shape.heads) * groups
    program = lax.axis_index("program")
    which, rest = lax.div(program, jnp.int32(each)), lax.rem(program, jnp.int32(each))
    first = shape.num_queries - (lax.div(rest, jnp.int32(groups)) + 1) * rows
    b, head = lax.div(which, jnp.int32(shape.heads)), lax.rem(which, jnp.int32(shape.heads))
    place = Place(b, head, lax.div(head, jnp.int32(shape.group)), first)
    return place, lax.rem(rest, jnp.int32(groups))


def _sum_body(env: Environment, groups: int, given, out, scratch):
    count, block = env.config.warpgroups, env.config.block
    place, group = _sum_place(env, groups)
    tiles = env.key_tiles(given["masking"], place)
    *tile_refs, filled, released = scratch["ring"]
    ring = Ring(tuple(tile_refs), filled, released, env.config.stages, env.config.hold_sums)
    warpgroup = lax.axis_index("warpgroup")
    columns = pl.ds(group * COLUMNS, COLUMNS)

    @pl.when(warpgroup < count)
    def _():
        env.set_registers(compute=True)
        rows = _SumRows(env, given, out, scratch, place, tiles, warpgroup, ring)
        work_or_pass(
            env, place, warpgroup, lambda: rows.run(columns), lambda: hand_on_all(tiles, (ring,))
        )

    @pl.when(warpgroup == count)
    def _():
        env.set_registers(compute=False)

        def stream(j, t):
            keys = pl.ds(j * block, block)
            sources = [given["key"].at[place.b, keys, place.kv_head]]
            sources += [part.at[place.b, place.kv_head, columns, keys] for part in given["parts"]]
            return ring.fill(t, sources)

        ring.drain(lax.fori_loop(tiles.low, tiles.high, stream, jnp.int32(0)))


@dataclasses.dataclass
class _SumRows(QueryRows):
    """The sums of one compute warpgroup."""

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
            slot = self.ring.wait(t)
            keys, high, low = (tile.at[slot] for tile in self.ring.tiles)

            def use(scores):
                weights = self.weights(scores(), j, masked, scale, ids, log_sum_exp)
                self.ring.done_before(t, 0)
                return weights.astype(_DTYPE)

            weights = arithmetic.with_products(block, use, [(query, keys)])
            add([(weights, Turned(high)), (weights, Turned(low))])
            self.ring.done(slot)
            return t + 1

        t, (sums,) = arithmetic.summing((COLUMNS,), self.over_tiles, step, jnp.int32(0))
        self.ring.done_before(t, 0)
        rows = pl.ds(self.first, ROW_BLOCK)
        arithmetic.store_turned(
            self.out["sums"].at[self.place.b, self.place.head, columns, rows], sums
        )


# ---------------------------------------------------------------------------------------------
# Inverses


def invert(shape: Shape, dim: int, sums, ridge, *, interpret: Any = None) -> jax.Array:
    """The inverse systems ``[B, N, dim, D, T]`` from the sums ``[B, N, F, T]`` of `moments`."""
    size = (shape.batch, shape.heads, dim, shape.head_dim, shape.num_queries)
    programs = shape.batch * shape.heads * shape.num_queries // _ROWS
    arithmetic = Arithmetic(interpret is not None)
    results = launch(
        lambda given, out, scratch: _Invert(shape, dim, arithmetic, given, out).run(),
        {"inverse": jax.ShapeDtypeStruct(size, jnp.float32)}, {}, {"sums": sums, "ridge": ridge},
        programs=programs, config=Config(), interpret=interpret, threads=1, lanes=True,
    )  # fmt: skip
    return results["inverse"]


class _Invert:
    """The systems of 128 rows, one a thread; an array ``[128]`` is a number of each.

    What does not fit into registers is kept where the result will be: shared memory would leave
    room for one instance on a multiprocessor instead of two.
    """

    def __init__(self, shape: Shape, dim: int, arithmetic: Arithmetic, given, out):
        b, head, rows = _one_a_thread(shape.heads, shape.num_queries)
        self.dim, self.columns = dim, shape.head_dim
        self.arithmetic = arithmetic
        self.sums = lambda index: arithmetic.load_row(given["sums"].at[b, head, index, rows])
        self.place = lambda i, j: out["inverse"].at[b, head, i, j, rows]
        total = self.sums(packed(dim, 0) + dim)
        self.weight = 1 / jnp.where(total > 0, total, 1.0)  # no key: zero sums
        self.ridge = arithmetic.load_row(given["ridge"].at[b, head, rows])
        self.good = self.ridge > 0

    def mean(self, i):
        return self.sums(packed(self.dim, 0) + i) * self.weight

    def covariance(self, i, j, mean_i, mean_j):
        """Of coordinates ``i >= j``."""
        return self.sums(packed(i, j)) * self.weight - mean_i * mean_j

    def store(self, i, j, number, twice: bool = True):
        """Writes an element of the inverse, and its mirror image."""
        number = jnp.where(self.good, number, 0.0)
        self.place(i, j)[...] = number
        if twice:
            self.place(j, i)[...] = number

    def factor(self, i, j):
        """Where T is kept until its place is needed."""
        return self.place(j, _BLOCK + i)

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
        """The system within 16 coordinates, the packed lower triangle."""
        found = []
        for i in range(_BLOCK):
            for j in range(i + 1):
                number = self.covariance(first + i, first + j, means[i], means[j])
                found.append(number + self.ridge if i == j else number)
        return found

    def negative_inverse(self, a: list) -> list:
        """Minus the inverse of a packed system, by the sweep operator."""
        a = list(a)
        for k in range(_BLOCK):
            pivot = a[packed(k, k)]
            self.good = self.good & (pivot >= 0.5 * self.ridge)
            inverse = 1 / jnp.where(self.good, pivot, 1.0)
            column = [a[packed(max(i, k), min(i, k))] for i in range(_BLOCK)]
            scaled = [number * inverse for number in column]
            for i in range(_BLOCK):
                for j in range(i + 1):
                    if k not in (i, j):
                        a[packed(i, j)] = a[packed(i, j)] - column[i] * scaled[j]
            for i in range(_BLOCK):
                a[packed(max(i, k), min(i, k))] = scaled[i]
            a[packed(k, k)] = -inverse
        return a

    def write(self, first: int, a: list):
        for i in range(_BLOCK):
            for j in range(i + 1):
                self.store(first + i, first + j, a[packed(i, j)], twice=i != j)

    # With the system [[P, Q'], [Q, R]], the factor T = Q P^-1 and S = R - T Q', the inverse is
    # [[P^-1 + T' S^-1 T, -T' S^-1], [-S^-1 T, S^-1]].

    def factor_rows(self, corner: list, means):
        """Keeps P^-1 (`corner`) and T, row by row."""
        for i in range(_BLOCK):
            for j in range(i + 1):
                self.place(i, j)[...] = corner[packed(i, j)]

        def row(i, _):
            mean = self.mean(_BLOCK + i)
            q = [self.covariance(_BLOCK + i, k, mean, means[k]) for k in range(_BLOCK)]
            for j in range(_BLOCK):
                terms = [q[k] * corner[packed(max(j, k), min(j, k))] for k in range(_BLOCK)]
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
                    a[packed(i, j)] = a[packed(i, j)] - t[i] * q[j]
            return tuple(a)

        return list(lax.fori_loop(0, _BLOCK, column, tuple(a)))

    def off_diagonal(self, negative: list):
        """Writes ``-S^-1 T``, below the diagonal only; `negative` is ``-S^-1``."""

        def column(k, _):
            t = [self.load(self.factor(i, k)) for i in range(_BLOCK)]
            for i in range(_BLOCK):
                terms = [negative[packed(max(i, j), min(i, j))] * t[j] for j in range(_BLOCK)]
                self.store(_BLOCK + i, k, sum(terms[1:], terms[0]), twice=False)

        lax.fori_loop(0, _BLOCK, column, None)

    def first_corner(self):
        """Writes ``P^-1 + T' S^-1 T``, and ``-T' S^-1`` where T was."""

        def row(i, a):
            t = [self.load(self.factor(i, k)) for k in range(_BLOCK)]
            u = [self.load(self.place(_BLOCK + i, k)) for k in range(_BLOCK)]
            for k in range(_BLOCK):
                self.place(k, _BLOCK + i)[...] = u[k]
            a = list(a)
            for j in range(_BLOCK):
                for k in range(j + 1):
                    a[packed(j, k)] = a[packed(j, k)] - t[j] * u[k]
            return tuple(a)

        corner = [self.load(self.place(i, j)) for i in range(_BLOCK) for j in range(i + 1)]
        self.write(0, list(lax.fori_loop(0, _BLOCK, row, tuple(corner))))


# ---------------------------------------------------------------------------------------------
# Products


def apply_inverse(rows: QueryRows, inverse, r):
    """The inverses of a warpgroup's 64 rows times ``r [64, D]``, a `MATRIX`."""
    r = plgpu.layout_cast(r, TURNED)
    # An iota made in that layout is wrong on hardware (JAX 0.11.2), right in the interpreter.
    columns = plgpu.broadcasted_iota(jnp.int32, rows.matrix, 1, layout=MATRIX)
    columns = plgpu.layout_cast(columns.astype(jnp.float32), TURNED)
    here = pl.ds(rows.first, ROW_BLOCK)

    def step(i, z):
        for k in range(LOADS):  # which wait together
            column = i * LOADS + k
            tile = inverse.at[rows.place.b, rows.place.head, column, :, here]
            number = jnp.where(columns == column.astype(jnp.float32), r, 0.0).sum(axis=1)
            z = z + rows.env.arithmetic.load_turned(tile) * by_row(number, z.shape)
        return z

    z = lax.fori_loop(0, inverse.shape[2] // LOADS, step, full(rows.matrix, 0, TURNED))
    return plgpu.layout_cast(z, MATRIX)
