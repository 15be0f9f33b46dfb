"""Numerical helpers that the operator and the mixers share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Largest matrix that `spd_inverse` eliminates column by column.
_BASE = 16


def compute_dtype(dtype) -> jnp.dtype:
    """Statistics, solves and states use float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@jax.jit
def nan_where(flags: jax.Array, array: jax.Array) -> jax.Array:
    """`array` with NaN where `flags` is set; `flags` has the leading axes of `array`.

    It is compiled as one program, so that no NaN exists without a flag: JAX's debugging modes
    would find it.
    """
    flags = flags.reshape(*flags.shape, *(1,) * (array.ndim - flags.ndim))
    return jnp.where(jnp.broadcast_to(flags, array.shape), jnp.full_like(array, jnp.nan), array)


def pad_to(array: jax.Array, *sizes: int, fill=0) -> jax.Array:
    """`array` with `fill` behind every axis that is shorter than its one of `sizes`."""
    widths = [(0, size - n) for size, n in zip(sizes, array.shape, strict=True)]
    if not any(after for _, after in widths):
        return array
    return jnp.pad(array, widths, constant_values=fill)


def spd_inverse(a: jax.Array, precision) -> tuple[jax.Array, jax.Array]:
    """Inverses of many small symmetric positive definite matrices, by matrix products alone.

    XLA's batched factorisations call a library once per matrix. On a CPU these calls wait for
    workers of the thread pool that they run on, so several at a time can block it for good. Here
    the inverse Cholesky factor is found by halves: nearly all the work is batched matrix products,
    and blocks of at most 16 x 16 are eliminated column by column, all matrices at once.

    Args:
      a: ``[..., H, H]``, of which only the lower triangle is read.
      precision: of the products.

    Returns:
      The inverses, and bool ``[...]``: whether every pivot was positive and finite. Where one was
      not (rounding has made a matrix indefinite), the inverse is the identity.
    """
    factor, ok = _inverse_factor(a, precision)
    inverted = jnp.matmul(jnp.swapaxes(factor, -1, -2), factor, precision=precision)
    eye = jnp.eye(a.shape[-1], dtype=a.dtype).reshape((1,) * (a.ndim - 2) + a.shape[-2:])
    return jnp.where(ok[..., None, None], inverted, eye), ok


def _inverse_factor(a, precision):
    """``L^{-1}`` of ``a = L L^T``, and whether the pivots were good."""
    h = a.shape[-1]
    if h <= _BASE:
        return _eliminate(a)
    # Multiples of the base size keep the products aligned.
    cut = -(-h // (2 * _BASE)) * _BASE if h > 2 * _BASE else -(-h // 2)

    def product(x, y):
        return jnp.matmul(x, y, precision=precision)

    upper, upper_ok = _inverse_factor(a[..., :cut, :cut], precision)
    panel = product(a[..., cut:, :cut], jnp.swapaxes(upper, -1, -2))
    schur = a[..., cut:, cut:] - product(panel, jnp.swapaxes(panel, -1, -2))
    lower, lower_ok = _inverse_factor(schur, precision)
    corner = -product(lower, product(panel, upper))
    top = jnp.concatenate([upper, jnp.zeros_like(jnp.swapaxes(corner, -1, -2))], axis=-1)
    bottom = jnp.concatenate([corner, lower], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2), upper_ok & lower_ok


def _eliminate(a):
    """`_inverse_factor` by Gaussian elimination; the matrices run along the last axis, a vector.

    Column by column, the multipliers of the elimination take the place of the zeros they produce,
    so that the strictly lower triangle ends as that of the inverse unit factor.
    """
    h, batch = a.shape[-1], a.shape[:-2]
    a = jnp.moveaxis(a.reshape(-1, h, h), 0, -1)
    index = jnp.arange(h, dtype=jnp.int32)

    def column(k, a):
        row = lax.dynamic_slice_in_dim(a, k, 1, axis=0)
        below = lax.dynamic_slice_in_dim(a, k, 1, axis=1)
        multiplier = below / lax.dynamic_slice_in_dim(row, k, 1, axis=1)
        reduced = jnp.where((index == k)[None, :, None], -multiplier, a - multiplier * row)
        return jnp.where((index > k)[:, None, None], reduced, a)

    a = lax.fori_loop(0, h, column, a)
    pivots = jnp.stack([a[i, i] for i in range(h)])
    ok = ((pivots > 0) & (pivots < jnp.inf)).all(0)
    unit = jnp.where((index[:, None] > index[None, :])[..., None], a, jnp.zeros_like(a))
    unit = jnp.where((index[:, None] == index[None, :])[..., None], jnp.ones_like(a), unit)
    factor = unit * lax.rsqrt(pivots)[:, None]
    return jnp.moveaxis(factor, -1, 0).reshape(*batch, h, h), ok.reshape(batch)
