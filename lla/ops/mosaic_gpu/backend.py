"""Which family of GPU kernels serves a problem.

A family is a set of kernels for some GPUs, with limits of its own: `hopper` and `portable`. They
are tried in the order of `FAMILIES`, and the first that serves the problem on this machine runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from lla.ops.mosaic_gpu import decode as hopper_decode
from lla.ops.mosaic_gpu import hopper, portable
from lla.ops.problem import Problem
from lla.ops.solver import Stats


@dataclasses.dataclass(frozen=True)
class Family:
    """Kernels for some GPUs.

    Attributes:
      unsupported: why they cannot serve a problem on this machine, None if they can.
      attend: ``(problem, with_stats) -> (out, Stats)`` in the layout of `Problem`.
      unsupported_decoding, decode: the same for the kernels of decoding, asked for problems that
        `unsupported` accepts; None if there are none.
    """

    unsupported: Callable[[Problem], str | None]
    attend: Callable[[Problem, bool], tuple[jax.Array, Stats]]
    unsupported_decoding: Callable[[Problem], str | None] | None = None
    decode: Callable[[Problem, bool], tuple[jax.Array, Stats]] | None = None


FAMILIES = (
    Family(
        hopper.unsupported, hopper.attend, hopper_decode.unsupported, hopper_decode.attend
    ),
    Family(portable.unsupported_or_unmeasured, portable.attend),
)  # fmt: skip


def _choose(problem: Problem) -> Family | str:
    """The first family that serves `problem`, or why none does."""
    reasons = []
    for family in FAMILIES:
        reason = family.unsupported(problem)
        if reason is None:
            return family
        reasons.append(reason)
    return "; ".join(reasons)


def unsupported(problem: Problem) -> str | None:
    """Why no kernels can serve `problem` on this machine, None if some can."""
    family = _choose(problem)
    return family if isinstance(family, str) else None


def attend(problem: Problem, with_stats: bool) -> tuple[jax.Array, Stats]:
    """Output and statistics of a problem that `unsupported` accepts."""
    return _choose(problem).attend(problem, with_stats)


def unsupported_decoding(problem: Problem) -> str | None:
    """Why no decoding kernels can serve a problem that `unsupported` accepts, None if some can."""
    family = _choose(problem)
    if isinstance(family, str):
        return family
    if family.unsupported_decoding is None:
        return "this GPU has no decoding kernels"
    return family.unsupported_decoding(problem)


def decode(problem: Problem, with_stats: bool) -> tuple[jax.Array, Stats]:
    """Output and statistics of a problem that `unsupported_decoding` accepts."""
    return _choose(problem).decode(problem, with_stats)
