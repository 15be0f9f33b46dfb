"""Which tiles of the Hopper kernels need two 16-bit parts, and how far their solves go.

Rounding a direction or a weight to 16 bits once is enough where the ridge is large for the keys.
Elsewhere a second 16-bit part holds the remainder. The reasons are in ``kernels/HOPPER.md``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lla.ops.problem import Problem
from lla.ops.solver import resolve, resolve_tolerances

# Forward and backward: the estimated relative error of the effective weights at which a tile stops.
_TOLERANCES = {
    "large": (1e-3, 3e-3), "medium": (1.5e-3, 5e-3), "small": (1e-3, 1e-3), "direct": (1e-3, 1e-4),
}  # fmt: skip
_LARGE_RIDGE = 10.0
_MAX_ITERS, _MAX_PRECISE_ITERS = 64, 256
# Above this ridge the probe is small enough to be used in one 16-bit part.
SPLIT_BELOW = 5.0
# Below this ridge, or where a tolerance below this one is asked for, directions and weights have
# two 16-bit parts. The ridge is relative to the mean square of the key coordinates where that is
# looked at: for a ridge that is traced, or known to be between this number and the one above.
_PRECISE_RIDGE = 0.5
_PRECISE_TOL = 1e-3


def choose_by_tile(problem: Problem) -> bool:
    """Whether the ridges and keys of a tile decide if it needs two parts."""
    if problem.mechanism != "lla" or iterations(problem, precise=False)[0].bf16x2:
        return False
    return problem.static_ridge is None or problem.static_ridge < SPLIT_BELOW


def mark_small(
    ridge: jax.Array, key: jax.Array, numbers: jax.Array, is_causal: bool, head_dim: int,
    shape: tuple[int, int],
) -> jax.Array:  # fmt: skip
    """The tiles of 64 queries, int32 ``[B, N, T/64]``, with a ridge that is small for their keys.

    The smallest ridge of a tile is compared with the mean square of the coordinates of the keys up
    to the last one that the tile sees: no tile depends on later keys.

    Args:
      ridge: ``[B | 1, N | 1, T | 1]``, padded along axes that are not 1. There is no minimum over
        rows that share a ridge: for a constant, XLA would compute it while it compiles, in seconds.
      key: ``[B, S, K, D]``, padded.
      numbers: int32 ``[B, 2]``, the offset and the number of keys of each sequence.
      is_causal: whether later keys are invisible.
      head_dim: D before padding.
      shape: ``(N, T)``, padded.
    """
    rows = 64
    b, s, k, _ = key.shape
    n, t = shape
    offset, length = (numbers[:, i, None, None] for i in range(2))
    exists = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None, None], (b, 1, s)) < length
    squares = jnp.square(key.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    squares = jnp.where(exists, squares, 0.0).reshape(b, k, s // rows, rows).sum(-1)
    first = jnp.arange(s // rows, dtype=jnp.int32)[None, None] * rows
    counts = jnp.clip(length - first, 0, rows).astype(jnp.float32) * head_dim
    if is_causal:
        squares, counts = jnp.cumsum(squares, axis=-1), jnp.cumsum(counts, axis=-1)
        end = (jnp.arange(t // rows, dtype=jnp.int32)[None, None] + 1) * rows + offset
        last = jnp.clip((end + (rows - 1)) // rows - 1, 0, s // rows - 1)
        squares = jnp.take_along_axis(squares, jnp.broadcast_to(last, (b, k, t // rows)), axis=-1)
        counts = jnp.take_along_axis(counts, last, axis=-1)
    else:
        squares, counts = squares.sum(-1, keepdims=True), counts.sum(-1, keepdims=True)
    mean = squares / jnp.maximum(counts, 1.0)
    mean = jnp.broadcast_to(jnp.repeat(mean, n // k, axis=1), (b, n, t // rows))
    if ridge.shape[2] > 1:
        ridge = ridge.reshape(*ridge.shape[:2], t // rows, rows).min(-1)
    return (ridge < _PRECISE_RIDGE * mean).astype(jnp.int32)


def iterations(problem: Problem, *, precise: bool, direct: bool = False):
    """When the forward and the adjoint solve stop; `precise` asks for two parts."""
    from lla.kernels.mosaic_gpu.solve import CGOptions

    ridge = problem.static_ridge
    small = precise or (ridge is not None and ridge < _PRECISE_RIDGE)
    # A ridge that is not known may be large, where the result is exact enough to notice.
    large = ridge is None or ridge >= _LARGE_RIDGE
    kind = "direct" if direct else "small" if small else "large" if large else "medium"
    tol, _ = resolve_tolerances(problem, _TOLERANCES[kind])
    precise = small or tol < _PRECISE_TOL
    solver = resolve(
        problem, method="direct" if direct else "cg", tolerances=_TOLERANCES[kind],
        max_iters=_MAX_PRECISE_ITERS if precise else _MAX_ITERS,
    )  # fmt: skip
    return tuple(
        CGOptions(solver.stopping_tol(forward=forward), solver.max_iters, precise)
        for forward in (True, False)
    )
