"""What a caller can choose about the solve, and the one policy that fills in the rest.

`resolve` turns a caller's `Solver` into a `ResolvedSolver`: the method, both tolerances and the
bound on the iterations. A back end passes the defaults that are its own; what a caller's option
means is decided here, for all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import numpy as np

if TYPE_CHECKING:
    from lla.ops.problem import Problem

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


DEFAULT_TOLERANCES: Mapping[str, tuple[float, float]] = {
    # dtype: (forward, backward). The float32 pair keeps outputs within 1e-5 and gradients within
    # 1e-4 of float64 for ridge >= 1; the 16-bit pairs stay below the rounding of the output.
    "float64": (1e-12, 1e-11),
    "float32": (1e-6, 1e-5),
    "bfloat16": (5e-4, 5e-4),
    "float16": (1e-4, 1e-4),
}

# By platform, dtype and head dimension: the ridge below which the direct solver is faster than
# conjugate gradients for forward and backward pass together, at the default tolerances of the
# dtype; 0 where it never is. Read from experiments/benchmarks/results, as tests/ops/test_solver.py
# checks: solver_choice_<platform>.json, on normal inputs; for the Hopper kernels ("mosaic_gpu")
# hopper_solvers_h100.json, the geometric mean over five kinds of inputs.
CROSSINGS: Mapping[str, Mapping[str, Mapping[int, float]]] = {
    "cpu": {
        "float32": {16: 0.047, 32: 0.023, 64: 0.0075, 128: 0.0},
        "bfloat16": {16: 0.02, 32: 0.0047, 64: 0.0, 128: 0.0},
    },
    "gpu": {  # an H200, whose kernels serve 16 bits before this choice is made
        "float32": {16: 10.0, 32: 1.6, 64: 0.081, 128: 0.0},
        "bfloat16": {16: 2.3, 32: 0.071, 64: 0.0083, 128: 0.0},
    },
    "mosaic_gpu": {"bfloat16": {16: 0.62, 32: 0.067}},
}


@dataclasses.dataclass(frozen=True)
class ResolvedSolver:
    """A `Solver` with every choice made; static and hashable.

    Attributes:
      method: as in `Solver`.
      tol, backward_tol: tolerances of the forward and of the adjoint solve.
      max_iters: bound on the iterations of each.
      adaptive: whether a solve stops at its tolerance; otherwise it runs `max_iters` iterations.
    """

    method: Literal["cg", "direct"]
    tol: float
    backward_tol: float
    max_iters: int
    adaptive: bool

    def stopping_tol(self, *, forward: bool) -> float | None:
        """The tolerance at which the forward or the adjoint solve stops, None without a test."""
        if not self.adaptive:
            return None
        return self.tol if forward else self.backward_tol


def resolve(
    problem: Problem,
    *,
    method: Literal["cg", "direct"] | None = None,
    tolerances: tuple[float, float] | None = None,
    max_iters: int | None = None,
) -> ResolvedSolver:
    """What the caller chose, and the given defaults for what was left open.

    Args:
      problem: the call.
      method: of a back end that leaves no choice; None means `choose_method`.
      tolerances: forward and backward; None means `DEFAULT_TOLERANCES`.
      max_iters: None means ``max(64, 4 * head_dim)``.
    """
    solver = problem.solver
    tol, backward_tol = resolve_tolerances(problem, tolerances)
    if max_iters is None:
        max_iters = max(64, 4 * problem.query.shape[-1])
    return ResolvedSolver(
        method=choose_method(problem) if method is None else method,
        tol=tol,
        backward_tol=backward_tol,
        max_iters=solver.num_iters or solver.max_iters or max_iters,
        adaptive=solver.num_iters is None,
    )


def resolve_tolerances(
    problem: Problem, defaults: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Forward and backward tolerance; `defaults` are as in `resolve`."""
    solver = problem.solver
    forward, backward = defaults or DEFAULT_TOLERANCES[problem.query.dtype.name]
    if solver.tol is not None:
        forward, backward = solver.tol, min(10 * solver.tol, 0.5)
    return forward, backward if solver.backward_tol is None else solver.backward_tol


def choose_method(problem: Problem, platform: str | None = None) -> Literal["cg", "direct"]:
    """The solver method for `problem`: the caller's, or the faster one as far as is known.

    Conjugate gradients serve where the ridge is traced, and so unknown, and where the number of
    iterations is fixed: what that is worth to the caller is unknown, too. `platform` is as for
    `crossing`.
    """
    solver = problem.solver
    if solver.method != "auto":
        return solver.method
    if problem.static_ridge is None or solver.num_iters is not None:
        return "cg"
    tol, _ = resolve_tolerances(problem)
    ridge = crossing(problem.query.shape[-1], tol, platform)
    return "direct" if problem.static_ridge < ridge else "cg"


def crossing(head_dim: int, tol: float, platform: str | None = None) -> float:
    """The ridge below which the direct solver is taken; 0 if it never is.

    The next larger measured head dimension counts. Between the tolerances measured (a dtype stands
    for its default one) the crossing is interpolated in the logarithm of the tolerance, and beyond
    them the nearest counts. Without measurements for the head dimension or platform it is 0.

    Args:
      head_dim: of queries and keys.
      tol: forward tolerance.
      platform: None means JAX's default, "mosaic_gpu" the Hopper kernels.
    """
    points = []
    for dtype, by_dim in CROSSINGS.get(platform or jax.default_backend(), {}).items():
        measured = min((dim for dim in by_dim if dim >= head_dim), default=None)
        if measured is not None:
            points.append((math.log(DEFAULT_TOLERANCES[dtype][0]), by_dim[measured]))
    if not points:
        return 0.0
    log_tolerances, ridges = zip(*sorted(points), strict=True)
    return float(np.interp(math.log(tol), log_tolerances, ridges))
