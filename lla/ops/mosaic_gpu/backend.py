"""Which family of GPU kernels serves a problem."""

from __future__ import annotations

from types import ModuleType

import jax

from lla.ops.mosaic_gpu import decode as hopper_decode
from lla.ops.mosaic_gpu import hopper, portable
from lla.ops.problem import Problem
from lla.ops.solver import Stats

FAMILIES: tuple[tuple[ModuleType, ModuleType | None], ...] = (
    (hopper, hopper_decode),
    (portable, None),
)
"""Kernels for some GPUs: those for whole sequences, and those for decoding or None.

Both are modules with `unsupported` and `attend` as in `lla.ops.backend.Backend`; the second is
asked only about problems that the first can serve. The first family that serves a problem on this
machine runs it.
"""


def _choose(problem: Problem) -> tuple[ModuleType, ModuleType | None] | str:
    """The family that serves `problem`, or why none does."""
    reasons = []
    for family in FAMILIES:
        reason = family[0].unsupported(problem)
        if reason is None:
            return family
        reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons))


def unsupported(problem: Problem) -> str | None:
    """Why no kernels can serve `problem` on this machine, None if some can."""
    found = _choose(problem)
    return found if isinstance(found, str) else None


def caveats(problem: Problem) -> dict[str, str]:
    """Why not the kernels for Hopper, and why these only by name, of a problem that is served."""
    if _choose(problem)[0] is hopper:
        return {}
    found = {"hopper": hopper.unsupported(problem), "default": portable.untried(problem)}
    return {word: reason for word, reason in found.items() if reason is not None}


def attend(problem: Problem, with_stats: bool) -> tuple[jax.Array, Stats]:
    """Output and statistics of a problem that `unsupported` accepts."""
    return _choose(problem)[0].attend(problem, with_stats)


def unsupported_decoding(problem: Problem) -> str | None:
    """Why no decoding kernels can serve a problem that `unsupported` accepts, None if some can."""
    _, decoding = _choose(problem)
    return "this GPU has no decoding kernels" if decoding is None else decoding.unsupported(problem)


def decode(problem: Problem, with_stats: bool) -> tuple[jax.Array, Stats]:
    """Output and statistics of a problem that `unsupported_decoding` accepts."""
    return _choose(problem)[1].attend(problem, with_stats)
