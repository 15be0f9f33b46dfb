"""Conjugate gradients for the rows of a program instance; every iteration streams the keys.

Iteration and stopping rule are those of `lla.kernels.cg`: every row stops by its own error bound,
independently of the others. The state lies in vector memory. A program instance ends when all of
its rows have stopped.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from lla.kernels import cg
from lla.kernels.mosaic_tpu import tile
from lla.kernels.mosaic_tpu.launch import RowTile, vectors
from lla.kernels.mosaic_tpu.tile import NT, Arithmetic
from lla.kernels.tiles import row_dot

_VECTORS = ("x", "r", "direction", "image")
_SCALARS = ("rz", "radau", "energy", "done", "iterations", "excess")


@dataclasses.dataclass(frozen=True)
class CGOptions:
    """Options of conjugate gradients.

    `tol` is as in `lla.Solver`; None runs exactly `max_iters` iterations.
    """

    tol: float | None
    max_iters: int


def scratch(rows: int, head_dim: int) -> dict:
    """What `solve` keeps in vector memory."""
    return {name: vectors(rows, head_dim) for name in _VECTORS} | {
        name: vectors(rows) for name in _SCALARS
    }


def solve(
    rows: RowTile,
    memory: dict,
    arithmetic: Arithmetic,
    options: CGOptions,
    target,
    weights,
    key_mean,
    ridge,
    active,
    *,
    energy_offset: int,
):
    """Solves ``(C_i + ridge_i) x_i = target_i``.

    Args:
      memory: refs of `scratch`.
      target: ``[rows, D]`` float32.
      weights: maps ``(valid, keys)`` of a tile to its softmax weights ``[rows, L]``.
      key_mean: ``[rows, D]``.
      ridge, active: ``[rows, 1]``; inactive rows keep the solution 0.
      energy_offset: see `lla.kernels.cg.cg_solve`.

    Returns:
      solution ``[rows, D]``, iterations and relative residual as float32 columns.
    """

    def read():
        fields = {name: memory[name][...] for name in ("x", "r", "direction", *_SCALARS[:3])}
        return cg.CGState(
            done=memory["done"][...] > 0,
            iterations=memory["iterations"][...].astype(jnp.int32),
            **fields,
        )

    def write(state: cg.CGState):
        # Use the rounded direction everywhere, as the products do.
        state = state._replace(direction=arithmetic.rounded(state.direction))
        for name, array in state._asdict().items():
            memory[name][...] = array.astype(jnp.float32)

    def product(direction):
        parts, centre = arithmetic.parts(direction), row_dot(key_mean, direction)
        for name in ("image", "excess"):
            memory[name][...] = jnp.zeros_like(memory[name])

        def add(valid, keys):
            scores = tile.product(parts, (keys,), NT) - centre
            image, excess = arithmetic.weighted_sum(weights(valid, keys) * scores, keys)
            memory["image"][...] += image
            memory["excess"][...] += excess

        rows.stream(add, "key")
        return memory["image"][...] - memory["excess"][...] * key_mean + ridge * direction

    def identity(r):
        return r

    def step(carry):
        count, _ = carry
        state = cg.cg_step(read(), product, identity, ridge, options.tol)
        write(state)
        return count + 1, unfinished()

    def unfinished():
        """A scalar: 1 if any row goes on, else 0."""
        return 1 - memory["done"][...].min()

    norm = row_dot(target, target)
    write(
        cg.cg_start(
            target, identity, smallest=ridge, energy_offset=energy_offset,
            zeros=jnp.zeros_like(norm), active=active & (norm > 0),
        )
    )  # fmt: skip
    lax.while_loop(
        lambda carry: (carry[0] < options.max_iters) & (carry[1] > 0),
        step,
        (jnp.int32(0), unfinished()),
    )
    r = memory["r"][...]
    residual = jnp.sqrt(row_dot(r, r) / jnp.where(norm > 0, norm, jnp.ones_like(norm)))
    x = jnp.where(ridge > 0, memory["x"][...], jnp.nan)
    return x, memory["iterations"][...], residual
