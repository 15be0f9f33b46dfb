"""The choice that ``Solver(method="auto")`` stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np

from lla.ops.problem import Problem
from lla.ops.solver import DEFAULT_TOLERANCES, resolve_tolerances

# By platform, dtype and head dimension: the ridge below which the direct solver is faster than
# conjugate gradients for forward and backward pass together, at the default tolerances of the
# dtype; 0 where it never is. Read from experiments/benchmarks/results, which tests/ops/test_auto.py
# compares: solver_choice_<platform>.json, on normal inputs; for the Hopper kernels ("mosaic_gpu")
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


def choose_method(problem: Problem, platform: str | None = None) -> Literal["cg", "direct"]:
    """The solver method for `problem`: the caller's, or the faster one as far as is known.

    A ridge that is traced is unknown, and so is what a fixed number of iterations is worth to the
    caller: both leave conjugate gradients. `platform` is as for `crossing`.
    """
    solver = problem.solver
    if solver.method != "auto":
        return solver.method
    if problem.static_ridge is None or solver.num_iters is not None:
        return "cg"
    tol, _ = resolve_tolerances(solver, problem.query.dtype)
    ridge = crossing(problem.query.shape[-1], tol, platform)
    return "direct" if problem.static_ridge < ridge else "cg"
