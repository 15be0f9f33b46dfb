"""Preconditioned conjugate gradients for the rows of a tile, with a dimensionless stopping rule.

Every row solves its own system ``A_i x_i = b_i``; the products are computed for all rows together.
Each row stops on its own, once an upper bound on its error is small enough. A row that has stopped
or broken down (zero residual, non-positive curvature) is frozen, so that it neither becomes NaN nor
affects other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lla.kernels.tiles import row_dot


class CGState(NamedTuple):
    """Rows of a tile: vectors are ``[..., R, H]``, scalars ``[..., R, 1]``."""

    x: jax.Array  # iterate; the result once a row is done
    r: jax.Array  # residual b - A x, updated recursively
    direction: jax.Array
    rz: jax.Array  # r . M^-1 r
    radau: jax.Array  # the error of x in the A-norm is at most sqrt(radau * rz)
    energy: jax.Array  # offset + x . A x
    done: jax.Array
    iterations: jax.Array


def cg_start(b, precondition, *, smallest, energy_offset, zeros, active):
    """State before the first iteration, from ``x = 0``; the arguments are those of `cg_solve`."""
    z = precondition(b)
    return CGState(
        x=zeros * jnp.ones_like(b),
        r=b,
        direction=z,
        rz=row_dot(b, z),
        radau=zeros + 1 / smallest,
        energy=zeros + energy_offset,
        done=~active,
        iterations=zeros.astype(jnp.int32),
    )


def cg_step(state: CGState, product, precondition, smallest, tol: float | None) -> CGState:
    """One iteration; with ``tol=None`` no row stops by the test."""
    zero, one = jnp.zeros_like(state.rz), jnp.ones_like(state.rz)
    image = product(state.direction)
    curvature = row_dot(state.direction, image)
    moving = ~state.done & (curvature > 0) & (state.rz > 0)
    safe_curvature = jnp.where(moving, curvature, one)
    step = jnp.where(moving, row_dot(state.r, state.direction) / safe_curvature, zero)
    r = jnp.where(moving, state.r - step * image, state.r)
    z = precondition(r)
    rz = row_dot(r, z)
    # Flexible CG: conjugate to the previous direction as it was rounded.
    beta = jnp.where(moving, -row_dot(image, z) / safe_curvature, zero)
    energy = state.energy + step * state.rz

    # Gauss-Radau quadrature gives an upper bound of the error, provided that `smallest` is at most
    # the smallest eigenvalue of M^-1 A (Meurant and Tichy, Numer. Algorithms 62, 2013).
    left = state.radau - step
    contraction = rz / jnp.where(moving, state.rz, one)
    radau = jnp.where(left > 0, left / (smallest * left + contraction), 1 / smallest)
    stop = ~moving
    if tol is not None:
        # Negated, so that a NaN stops the row.
        stop |= ~(radau * rz > tol**2 * energy)
    return CGState(
        x=state.x + step * state.direction,
        r=r,
        direction=z + beta * state.direction,
        rz=rz,
        radau=radau,
        energy=energy,
        done=state.done | stop,
        iterations=state.iterations + (~state.done).astype(jnp.int32),
    )


def cg_last_step(state: CGState, curvature, product=None) -> CGState:
    """The last of a fixed number of iterations.

    Only x is updated, which needs the curvature alone. ``A direction`` is computed only if
    `product` is given, to update the residual.
    """
    length = curvature(state.direction)
    moving = ~state.done & (length > 0) & (state.rz > 0)
    step = row_dot(state.r, state.direction) / jnp.where(moving, length, jnp.ones_like(length))
    step = jnp.where(moving, step, jnp.zeros_like(step))
    residual = state.r if product is None else state.r - step * product(state.direction)
    return state._replace(
        x=state.x + step * state.direction,
        r=jnp.where(moving, residual, state.r),
        iterations=state.iterations + (~state.done).astype(jnp.int32),
    )


def cg_solve(
    b,
    product,
    curvature,
    precondition,
    *,
    smallest,
    zeros,
    active,
    energy_offset,
    tol,
    max_iters,
    with_residual=True,
):
    """Iterates until every row meets the tolerance; exactly `max_iters` times for ``tol=None``.

    A row stops once the bound of its error in the A-norm is below ``tol * sqrt(energy)``.

    Args:
      b: right-hand sides ``[..., R, H]``.
      product: the map ``y -> A y`` on ``[..., R, H]``.
      curvature: the map ``y -> y . A y``, ``[..., R, H]`` to ``[..., R, 1]``.
      precondition: the map ``r -> M^-1 r``.
      smallest: ``[..., R, 1]``, positive, at most the smallest eigenvalue of ``M^-1 A``.
      zeros: ``[..., R, 1]`` zeros of b's dtype (varying over the mesh axes that b varies over).
      active: bool ``[..., R, 1]``, False for rows to leave at zero.
      energy_offset: added to ``x . A x`` to get the energy that errors are measured against: 1 for
        the forward system (the weights of softmax attention), 0 for the adjoint one.
      tol: relative tolerance, or None.
      max_iters: maximum number of iterations.
      with_residual: with ``tol=None``, whether to spend a product on the last residual.

    Returns:
      x ``[..., R, H]``, iterations int32 ``[..., R, 1]``, relative residual ``[..., R, 1]`` (that
      before the last step, unless `with_residual`).
    """

    def step(state):
        return cg_step(state, product, precondition, smallest, tol)

    start = cg_start(
        b,
        precondition,
        smallest=smallest,
        energy_offset=energy_offset,
        zeros=zeros,
        active=active,
    )
    if tol is None:
        # Unroll short loops: compilers then overlap the operations of independent tiles.
        state = jax.lax.fori_loop(
            0, max_iters - 1, lambda _, state: step(state), start, unroll=max_iters <= 4
        )
        state = cg_last_step(state, curvature, product if with_residual else None)
    else:
        _, state = jax.lax.while_loop(
            lambda carry: (carry[0] < max_iters) & ~carry[1].done.all(),
            lambda carry: (carry[0] + 1, step(carry[1])),
            (jnp.int32(0), start),
        )
    norm = row_dot(b, b)
    ratio = row_dot(state.r, state.r) / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    return state.x, state.iterations, jnp.sqrt(ratio)
