"""The linear systems of decoding, one per query head, in the registers of a warpgroup."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.compat import vary_like
from lla.kernels.mosaic_gpu.decode import BLOCK, SQUARE, CacheShape, per_head_scalar
from lla.kernels.mosaic_gpu.tile import (
    ROW_BLOCK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    Arithmetic,
    by_column,
    by_row,
    full,
)

_FLOOR = 1e-13  # squared residuals below this, relative to the energy, are rounding errors


class Fit(NamedTuple):
    """What `fit` returns: out ``[B, N, D]``, iterations and residual ``[B, N]`` float32."""

    out: jax.Array
    iterations: jax.Array
    residual: jax.Array


@functools.partial(jax.jit, static_argnames=("cache", "tol", "max_iters", "interpret"))
def fit(
    cache: CacheShape,
    rows: jax.Array,
    moments: jax.Array,
    query: jax.Array,
    key: jax.Array,
    first: jax.Array,
    ridge: jax.Array,
    *,
    tol: float | None,
    max_iters: int,
    interpret: Any = None,
) -> Fit:
    """The outputs from the sums over all keys, by conjugate gradients.

    With the weighted means k of the keys and v of the values, the covariances C of the keys and S
    of keys and values, and ``(C + ridge I) x = k - query``, the output is ``v - S^T x``. It is zero
    for a query without keys.

    Args:
      cache: sizes.
      rows: float32 ``[B, N, 3, D]``, see `lla.kernels.mosaic_gpu.decode.row_names`.
      moments: float32 ``[B, N, D, 2 D]``, see `lla.kernels.mosaic_gpu.decode.Sums`.
      query: ``[B, N, D]``.
      key: ``[B, S, K, D]``.
      first: int32 ``[B]``, the key that the sums are relative to.
      ridge: float32 ``[B, N]``, or ``[1, 1]`` if all are equal.
      tol: the error of x in the norm of the system is at most `tol` times
        ``sqrt(1 + x . A x)``; None for exactly `max_iters` iterations.
      interpret: parameters of the interpreter, or None to compile.
    """
    operands = (rows, moments, query, key, first, ridge)
    number = cache.per_head(ROW_BLOCK)
    shapes = [jax.ShapeDtypeStruct(query.shape, cache.dtype), number, number]
    body = functools.partial(_body, cache, tol, max_iters, Arithmetic(interpret is not None))
    results = plgpu.kernel(
        body,
        out_type=shapes,
        grid=(cache.batch * cache.heads,),
        grid_names=("program",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types={
            "row": plgpu.SMEM((ROW_BLOCK,), jnp.float32),
            "flag": plgpu.SMEM((ROW_BLOCK,), jnp.int32),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret if interpret is not None else False,
    )(*operands)
    out, iterations, residual = (vary_like(r, *operands) for r in results)
    return Fit(out, iterations[..., 0], residual[..., 0])


def _body(cache, tol, max_iters, arithmetic, *refs, row, flag):
    program = lax.axis_index("program")
    b, n = lax.div(program, jnp.int32(cache.heads)), lax.rem(program, jnp.int32(cache.heads))
    rows, moments, query, key, first, ridge, *outs = refs
    rows, moments, query = (ref.at[b, n] for ref in (rows, moments, query))
    out, iterations, residual = (ref.at[b, n] for ref in outs)
    some_key = jnp.minimum(first[b], cache.num_keys - 1)
    origin = key.at[b, some_key, lax.div(n, jnp.int32(cache.group))]
    total, value, key_sum = (rows.at[i] for i in range(3))
    blocks = range(cache.blocks)

    def part(c):
        return pl.ds(c * BLOCK, BLOCK)

    def vector(ref, c, layout):
        return arithmetic.load(ref.at[part(c)], layout).astype(jnp.float32)

    def matrix(h, c):
        ref = moments.at[part(h), part(c)]
        if arithmetic.interpreted:
            return ref[...]
        return plgpu.load(ref, layout=WGMMA, optimized=False)

    weight = _row_sums(_columns(vector(total, 0, WGMMA_COL)))
    some, one = weight > 0, full((ROW_BLOCK,), 1, WGMMA_ROW)
    inverse = jnp.where(some, one / jnp.where(some, weight, one), 0.0)
    row[...] = inverse
    scale, scale_columns = _rows(inverse), arithmetic.load(row, WGMMA_COL)
    key_means = [vector(key_sum, h, WGMMA_ROW) * inverse for h in blocks]  # relative to the origin
    value_means = [vector(value, c, WGMMA_COL) * scale_columns for c in blocks]

    def centred(h, c, mean):
        """Block (h, c) of the moments as a covariance, given the mean of the second factor."""
        return matrix(h, c) * scale - _rows(key_means[h]) * _columns(mean)

    # No vector is loaded with two layouts, since the compiler merges such loads into one.
    means = [vector(origin, h, WGMMA_ROW) + key_means[h] for h in blocks]
    mean_columns = []
    for mean in means:
        row[...] = mean
        mean_columns.append(arithmetic.load(row, WGMMA_COL))
    system = [[centred(h, c, mean_columns[c]) for c in blocks] for h in blocks]
    target = tuple(means[h] - vector(query, h, WGMMA_ROW) for h in blocks)
    ridge = full((ROW_BLOCK,), 0, WGMMA_ROW) + per_head_scalar(ridge, b, n)
    solver = _Solver(arithmetic, row, flag, system, ridge, tol, max_iters)
    x, count, remainder = solver.solve(target)
    for c in blocks:
        product = full(SQUARE, 0, WGMMA)
        for h in blocks:
            product = product + centred(h, cache.blocks + c, value_means[c]) * _rows(x[h])
        out.at[part(c)][...] = (value_means[c] - product.sum(axis=0)).astype(out.dtype)
    iterations[...] = full((ROW_BLOCK,), 0, WGMMA_ROW) + count.astype(jnp.float32)
    residual[...] = remainder


# Without these casts layout inference gives up.


def _rows(vector):
    return plgpu.layout_cast(by_row(vector, SQUARE), WGMMA)


def _columns(vector):
    return plgpu.layout_cast(by_column(vector, SQUARE), WGMMA)


def _row_sums(matrix):
    return plgpu.layout_cast(matrix.sum(axis=1), WGMMA_ROW)


class _State(NamedTuple):
    count: jax.Array
    go: jax.Array
    x: tuple[jax.Array, ...]
    r: tuple[jax.Array, ...]
    direction: tuple[jax.Array, ...]
    rz: jax.Array
    energy: jax.Array


@dataclasses.dataclass
class _Solver:
    """Conjugate gradients for one system.

    A vector is a sequence of blocks with layout `WGMMA_ROW`, a scalar a block of equal numbers.
    """

    arithmetic: Arithmetic
    row: Any
    flag: Any
    system: list[list[jax.Array]]
    ridge: jax.Array
    tol: float | None
    max_iters: int

    def to_columns(self, vector):
        """A block, broadcast along the columns of a matrix."""
        self.row[...] = vector
        return _columns(self.arithmetic.load(self.row, WGMMA_COL))

    def dot(self, a, b):
        total = sum(x * y for x, y in zip(a, b, strict=True))
        return _row_sums(self.to_columns(total))

    def product(self, vector):
        columns = [self.to_columns(block) for block in vector]
        return tuple(
            sum(_row_sums(block * column) for block, column in zip(row, columns, strict=True))
            + self.ridge * own
            for row, own in zip(self.system, vector, strict=True)
        )

    def solve(self, target):
        """The solution, the number of iterations and the relative residual."""
        zero, one = (full((ROW_BLOCK,), number, WGMMA_ROW) for number in (0, 1))
        norm = self.dot(target, target)
        start = _State(
            jnp.int32(0), self.decide(jnp.int32(0), norm, one), (zero,) * len(target), target,
            target, norm, one,
        )  # fmt: skip
        last = lax.while_loop(lambda state: state.go > 0, self.step, start)
        ratio = jnp.sqrt(last.rz / jnp.where(norm > 0, norm, 1.0))
        return last.x, last.count, ratio

    def step(self, state: _State) -> _State:
        image = self.product(state.direction)
        curvature = self.dot(state.direction, image)
        moving = curvature > 0
        length = jnp.where(moving, state.rz / jnp.where(moving, curvature, 1.0), 0.0)
        x = tuple(a + length * p for a, p in zip(state.x, state.direction, strict=True))
        r = tuple(a - length * y for a, y in zip(state.r, image, strict=True))
        rz = self.dot(r, r)
        ratio = jnp.where(moving, rz / jnp.where(state.rz > 0, state.rz, 1.0), 0.0)
        direction = tuple(a + ratio * p for a, p in zip(r, state.direction, strict=True))
        energy = state.energy + length * state.rz
        count = state.count + 1
        return _State(count, self.decide(count, rz, energy), x, r, direction, rz, energy)

    def decide(self, count, rz, energy):
        """Whether another iteration is needed, a scalar."""
        zero = full((ROW_BLOCK,), 0, WGMMA_ROW, jnp.int32)
        more = zero + (count < self.max_iters).astype(jnp.int32)
        if self.tol is not None:
            # No eigenvalue is smaller than the ridge.
            unfinished = (rz > self.tol**2 * energy * self.ridge) & (rz > _FLOOR * energy)
            more = jnp.where(unfinished, more, 0)
        self.flag[...] = more
        return self.flag[0]
