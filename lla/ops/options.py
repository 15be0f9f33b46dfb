"""What a caller can choose about the solve, and what the operator can report about it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Method = Literal["auto", "cg", "direct"]


@dataclasses.dataclass(frozen=True)
class Solver:
    """How the ridge systems ``(C_i + ridge_i I) x_i = k_mean_i - q_i`` are solved.

    The tolerances are dimensionless: a row stops as soon as a bound of its error in the norm
    ``sqrt(x . A x)`` is below the tolerance times ``sqrt(1 + x . A x)`` (in the backward pass
    ``sqrt(u . A u)``), independently of every other row. That bounds the error of its attention
    weights in the L2 norm weighted by the softmax weights.

    Attributes:
      method: ``"cg"`` iterates with the weights of a tile held in memory; ``"direct"`` forms the
        covariance of every row, inverts the system and polishes the solution with at least one
        iteration; ``"auto"`` takes the faster of the two for the head dimension, ridge and
        tolerance at hand, as measured in ``experiments/benchmarks``, and ``"cg"`` where the ridge
        is traced, `num_iters` is given or the platform was not measured. The Hopper kernels have
        both up to 32 dimensions, and a table of their own for ``"auto"``.
      tol: forward tolerance; None means 1e-6 for float32 inputs, 5e-4 for bfloat16, 1e-4 for
        float16, 1e-12 for float64. The Hopper kernels compare it with an estimate, averaged over
        64 queries, instead of a bound; their defaults are 1e-3 and 1.5e-3, and below 1e-3 they
        multiply in two 16-bit parts what rounding would spoil, as they do where the ridge is small
        for the keys (``kernels/HOPPER.md``).
      backward_tol: tolerance of the adjoint solve; None means ten times ``tol`` where that is
        given, else 1e-5, 5e-4, 1e-4 and 1e-11 (Hopper kernels: 1e-3 to 5e-3).
      max_iters: bound on the iterations of a solve; None means ``max(64, 4 * head_dim)``, in the
        Hopper kernels 64, or 256 where they multiply in two parts. A row that reaches it returns
        its last iterate; ``Stats.residual`` shows how far it got.
      num_iters: if given, run exactly this many iterations without any test (a fixed cost under
        ``jit``); excludes ``tol``, ``backward_tol`` and ``max_iters``.

    Raises:
      ValueError: for an unknown method, a tolerance outside (0, 1), or a count below 1.
    """

    method: Method = "auto"
    tol: float | None = None
    backward_tol: float | None = None
    max_iters: int | None = None
    num_iters: int | None = None

    def __post_init__(self):
        if self.method not in ("auto", "cg", "direct"):
            raise ValueError(
                f"Solver.method must be 'auto', 'cg' or 'direct', got {self.method!r}."
            )
        for name in ("tol", "backward_tol"):
            tol = getattr(self, name)
            if tol is not None and not (math.isfinite(tol) and 0 < tol < 1):
                raise ValueError(f"Solver.{name} must lie strictly between 0 and 1, got {tol}.")
        for name in ("max_iters", "num_iters"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"Solver.{name} must be a positive int, got {count!r}.")
        adaptive = (self.tol, self.backward_tol, self.max_iters)
        if self.num_iters is not None and any(option is not None for option in adaptive):
            raise ValueError(
                "Solver.num_iters runs without a stopping test, so it cannot be combined with tol, "
                "backward_tol or max_iters."
            )


class Stats(NamedTuple):
    """Diagnostics of one call; none of them carries a gradient.

    Attributes:
      lse: ``[*B, T, N]`` float32, natural-log sum of the exponentiated logits; ``-inf`` for a row
        without any valid key.
      iterations: ``[*B, T, N]`` int32, solver iterations of each row (0 without a solve).
      residual: ``[*B, T, N]`` float32, ``|b - A x| / |b|`` of each row's system as tracked by the
        solver (0 without a solve).
    """

    lse: jax.Array
    iterations: jax.Array
    residual: jax.Array


DEFAULT_TOLERANCES = {
    # dtype: (forward, backward); the float32 pair is what keeps outputs within 1e-5 and gradients
    # within 1e-4 of float64 for ridge >= 1, the 16-bit pair stays below the output rounding.
    "float64": (1e-12, 1e-11),
    "float32": (1e-6, 1e-5),
    "bfloat16": (5e-4, 5e-4),
    "float16": (1e-4, 1e-4),
}


@dataclasses.dataclass(frozen=True)
class ResolvedSolver:
    """A `Solver` with every choice made; static and hashable."""

    method: Literal["cg", "direct"]
    tol: float
    backward_tol: float
    max_iters: int
    adaptive: bool


def resolve_tolerances(solver: Solver, dtype: jnp.dtype) -> tuple[float, float]:
    """Forward and backward tolerance for inputs of `dtype`."""
    forward, backward = DEFAULT_TOLERANCES[jnp.dtype(dtype).name]
    if solver.tol is not None:
        forward, backward = solver.tol, min(10 * solver.tol, 0.5)
    return forward, solver.backward_tol if solver.backward_tol is not None else backward
