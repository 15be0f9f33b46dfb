"""The systems of decoding: one per query head, small enough for the registers of a warpgroup."""

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
from lla.kernels.mosaic_gpu.decode import BLOCK, SQUARE
from lla.kernels.mosaic_gpu.tile import (
    COLS,
    MATRIX,
    ROW_BLOCK,
    ROWS,
    Arithmetic,
    by_column,
    by_row,
    full,
)

_FLOOR = 1e-13  # of squared residuals, relative to the energy: nothing below it is information


class Fit(NamedTuple):
    """What `fit` returns: out ``[B, N, D]``, iterations and residual ``[B, N]`` float32."""

    out: jax.Array
    iterations: jax.Array
    residual: jax.Array


def fit(
    covariance: jax.Array,
    cross: jax.Array,
    target: jax.Array,
    value_mean: jax.Array,
    ridge: jax.Array,
    dtype: Any,
    *,
    tol: float | None,
    max_iters: int,
    interpret: Any = None,
) -> Fit:
    """``value_mean - cross^T x`` with ``(covariance + ridge) x = target``, by conjugate gradients.

    Args:
      covariance: float32 ``[B, N, D, D]``, of the keys; D is 64 or 128.
      cross: float32 ``[B, N, D, D]``, covariance of keys and values.
      target, value_mean: float32 ``[B, N, D]``.
      ridge: float32 ``[B, N]``.
      dtype: of the result.
      tol: the error of x in the norm of the system is at most `tol` times
        ``sqrt(1 + x . A x)``; None for exactly `max_iters` iterations.
      interpret: parameters of the interpreter, or None to compile.
    """
    b, n, d = target.shape

    def rows(array):  # the kernel reads a number as a vector of equal ones
        return jnp.broadcast_to(array[..., None], (b, n, ROW_BLOCK))

    operands = (covariance, cross, target, value_mean, rows(ridge))
    shapes = [
        jax.ShapeDtypeStruct((b, n, d), dtype),
        *[jax.ShapeDtypeStruct((b, n, ROW_BLOCK), jnp.float32)] * 2,
    ]
    body = functools.partial(
        _body, n, d // BLOCK, tol, max_iters, Arithmetic(interpret is not None)
    )
    results = plgpu.kernel(
        body,
        out_type=shapes,
        grid=(b * n,),
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


def _body(heads, blocks, tol, max_iters, arithmetic, *refs, row, flag):
    program = lax.axis_index("program")
    b, n = lax.div(program, jnp.int32(heads)), lax.rem(program, jnp.int32(heads))
    covariance, cross, target, value_mean, ridge, *outs = (ref.at[b, n] for ref in refs)
    out, iterations, residual = outs

    def part(c):
        return pl.ds(c * BLOCK, BLOCK)

    def matrix(ref, h, c):
        ref = ref.at[part(h), part(c)]
        if arithmetic.interpreted:
            return ref[...]
        return plgpu.load(ref, layout=MATRIX, optimized=False)

    system = [[matrix(covariance, h, c) for c in range(blocks)] for h in range(blocks)]
    right = tuple(arithmetic.load(target.at[part(h)], ROWS) for h in range(blocks))
    solver = _Solver(
        arithmetic, row, flag, system, arithmetic.load(ridge, ROWS), tol, max_iters
    )  # fmt: skip
    x, count, remainder = solver.solve(right)
    for c in range(blocks):
        total = full(SQUARE, 0, MATRIX)
        for h in range(blocks):
            total = total + matrix(cross, h, c) * by_row(x[h], SQUARE)
        mean = arithmetic.load(value_mean.at[part(c)], COLS)
        out.at[part(c)][...] = (mean - total.sum(axis=0)).astype(out.dtype)
    iterations[...] = full((ROW_BLOCK,), 0, ROWS) + count.astype(jnp.float32)
    residual[...] = remainder


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
    """Vectors are lists of blocks, each a vector of rows; numbers are vectors of equal ones."""

    arithmetic: Arithmetic
    row: Any
    flag: Any
    system: list[list[jax.Array]]
    ridge: jax.Array
    tol: float | None
    max_iters: int

    def turned(self, vector):
        """A vector of rows as the columns of a matrix."""
        self.row[...] = vector
        return by_column(self.arithmetic.load(self.row, COLS), SQUARE)

    def dot(self, a, b):
        total = sum(x * y for x, y in zip(a, b, strict=True))
        return self.turned(total).sum(axis=1)

    def product(self, vector):
        columns = [self.turned(block) for block in vector]
        return tuple(
            sum((block * column).sum(axis=1) for block, column in zip(row, columns, strict=True))
            + self.ridge * own
            for row, own in zip(self.system, vector, strict=True)
        )

    def solve(self, target):
        """The solution, the number of iterations and the relative residual."""
        zero, one = (full((ROW_BLOCK,), number, ROWS) for number in (0, 1))
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
        more = full((ROW_BLOCK,), 0, ROWS, jnp.int32) + (count < self.max_iters).astype(jnp.int32)
        if self.tol is not None:
            # The ridge is at most the smallest eigenvalue.
            unfinished = (rz > self.tol**2 * energy * self.ridge) & (rz > _FLOOR * energy)
            more = jnp.where(unfinished, more, 0)
        self.flag[...] = more
        return self.flag[0]
