"""Which implementation serves a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lla.kernels.tiles import sees_nothing
from lla.ops import mosaic_gpu, mosaic_tpu
from lla.ops.auto import choose_method
from lla.ops.handover import Handover
from lla.ops.options import Stats
from lla.ops.problem import Problem, resolve_solver
from lla.ops.reference import reference
from lla.ops.shield import shield
from lla.ops.xla import xla

NAMES = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")
Implementation = str | Sequence[str] | None


def _refuse_reference(problem: Problem) -> str | None:
    if problem.solver.num_iters is not None:
        return "it solves exactly and cannot honour Solver.num_iters"
    return None


def _refuse_xla(problem: Problem) -> str | None:
    del problem
    return None


_REFUSALS: dict[str, Callable[[Problem], str | None]] = {
    "reference": _refuse_reference,
    "xla": _refuse_xla,
    "mosaic_gpu": mosaic_gpu.refuse,
    "mosaic_tpu": mosaic_tpu.refuse,
}


ROW_UNITS = {"xla": 1, "mosaic_gpu": 128, "mosaic_tpu": 1}
"""Queries that an implementation pads their number to a multiple of, in what it hands over."""


def _run(
    name: str, problem: Problem, with_stats: bool, handover: Handover | None = None
) -> tuple[jax.Array, Stats]:
    if name == "reference":
        return reference(problem)
    problem, restore = shield(problem, fast=name != "xla")
    # Functions of tests in the place of a back end need not know of it.
    extra = {} if handover is None else {"handover": handover}
    if name == "mosaic_gpu":
        out, stats = mosaic_gpu.mosaic_gpu(problem, **extra)
    elif name == "mosaic_tpu":
        out, stats = mosaic_tpu.mosaic_tpu(problem, **extra)
    else:
        solver = resolve_solver(problem, choose_method(problem))
        out, stats = xla(problem, solver, with_stats, **extra)
    if handover is not None:
        if handover.given:
            stats = stats._replace(lse=handover.lse)
        handover.lse = stats.lse
    return restore(out, stats)


def preference() -> tuple[str, ...]:
    """Implementations in the order tried by ``implementation=None`` on this platform.

    The TPU kernels are not among them: they have never run on hardware, so they have to be named.
    """
    kernels = {"gpu": ("mosaic_gpu",)}
    return (*kernels.get(jax.default_backend(), ()), "xla")


def check_names(implementation: Implementation) -> tuple[str, ...]:
    """The implementations to try, in order."""
    if implementation is None:
        return preference()
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(
            f"implementation must be None, one of {NAMES} or a non-empty sequence of them, got "
            f"{implementation!r}."
        )
    return names


def refusals(problem: Problem, names: Sequence[str]) -> dict[str, str | None]:
    """For each name the reason why it cannot serve `problem`, None where it can."""
    return {name: _REFUSALS[name](problem) for name in names}


def restore(
    problem: Problem, out: jax.Array, stats: Stats, with_stats: bool
) -> tuple[jax.Array, Stats]:
    """The results of an implementation in the public layout; what `run` says of `with_stats`."""
    stats = Stats(*(jax.lax.stop_gradient(problem.restore(a)) for a in stats))
    if with_stats:
        lse = jnp.where(sees_nothing(stats.lse), -jnp.inf, stats.lse)
        stats = stats._replace(lse=lse)
    return problem.restore(out), stats


def run(
    problem: Problem,
    implementation: Implementation,
    with_stats: bool,
    handover: Handover | None = None,
) -> tuple[jax.Array, Stats]:
    """Runs the first implementation that can serve, with the public output layout.

    Without `with_stats` the statistics may be incomplete.

    Raises:
      NotImplementedError: if none can, with every reason.
    """
    name = choose(problem, implementation)
    return restore(problem, *_run(name, problem, with_stats, handover), with_stats)


def choose(problem: Problem, implementation: Implementation) -> str:
    """The first implementation that can serve; NotImplementedError if none can."""
    names = check_names(implementation)
    reasons = refusals(problem, names)
    for name, reason in reasons.items():
        if reason is None:
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no implementation can serve this call ({listed}).")
