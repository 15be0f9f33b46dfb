"""What a back end is, the table of them, and which one serves a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lla.kernels.tiles import sees_nothing
from lla.ops import reference
from lla.ops.mosaic_gpu import backend as mosaic_gpu
from lla.ops.mosaic_gpu import portable as mosaic_gpu_portable
from lla.ops.mosaic_tpu import backend as mosaic_tpu
from lla.ops.problem import Problem
from lla.ops.solver import Stats
from lla.ops.xla import backend as xla
from lla.ops.xla import decode as xla_decode
from lla.version import document

Implementation = str | Sequence[str] | None
Results = tuple[jax.Array, Stats]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a back end decodes where it does not treat a step as a call on the whole cache.

    Attributes:
      unsupported: why it cannot serve a problem that its back end can serve, None if it can. The
        problem is that of `lla.ops.decode`: causal, with an offset and lengths, perhaps a window.
      attend: as in `Backend`.
    """

    unsupported: Callable[[Problem], str | None]
    attend: Callable[[Problem, bool], Results]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the operator.

    Attributes:
      name: what callers pass as ``implementation``.
      unsupported: why it cannot serve a problem on this machine, None if it can. It is called
        while tracing and must not compute anything. No option may be ignored: what is not
        supported has to be named here.
      attend: ``(problem, with_stats) -> (out, Stats)`` in the layout of `Problem`, the output in
        the query's dtype. Without `with_stats` the statistics may be incomplete.
      decode: its own way of decoding; None: `attend` serves there, too.
      default_on: platforms, as `jax.default_backend` names them, on which ``implementation=None``
        tries it before "xla".
      caveats: what a caller should know about a problem that it can serve, by a name of one word:
        `explain` lists it as ``"<name>:<word>"``. One named "default" says why
        ``implementation=None`` passes the back end over.
    """

    name: str
    unsupported: Callable[[Problem], str | None]
    attend: Callable[[Problem, bool], Results]
    decode: Decoder | None = None
    default_on: tuple[str, ...] = ()
    caveats: Callable[[Problem], dict[str, str]] = lambda problem: {}


BACKENDS: dict[str, Backend] = {}
"""Every back end by name, in the order in which they are tried and listed."""


def register_backend(backend: Backend) -> None:
    """Adds a back end, which callers reach by ``implementation=backend.name`` from then on.

    Raises:
      ValueError: the name is taken.
    """
    if backend.name in BACKENDS:
        raise ValueError(f"there is a back end {backend.name!r} already.")
    BACKENDS[backend.name] = backend


register_backend(Backend("reference", reference.unsupported, reference.attend))
register_backend(
    Backend(
        "xla",
        xla.unsupported,
        xla.attend,
        decode=Decoder(xla_decode.unsupported, xla_decode.attend),
    )
)
register_backend(
    Backend(
        "mosaic_gpu",
        mosaic_gpu.unsupported,
        mosaic_gpu.attend,
        decode=Decoder(mosaic_gpu.unsupported_decoding, mosaic_gpu.decode),
        default_on=("gpu",),
        caveats=mosaic_gpu.caveats,
    )
)
# Its kernels for all NVIDIA GPUs since Ampere alone: to test them on Hopper, too.
register_backend(
    Backend(
        mosaic_gpu_portable.NAME,
        mosaic_gpu_portable.unsupported,
        mosaic_gpu_portable.attend,
    )
)
# It has never run on hardware, so it has to be asked for by name.
register_backend(Backend("mosaic_tpu", mosaic_tpu.unsupported, mosaic_tpu.attend))


def preference() -> tuple[str, ...]:
    """Names in the order tried by ``implementation=None`` on this platform."""
    platform = jax.default_backend()
    return (*(name for name, b in BACKENDS.items() if platform in b.default_on), "xla")


def check_names(implementation: Implementation) -> tuple[str, ...]:
    """The names to try, in order.

    Raises:
      ValueError: `implementation` is empty or names no back end.
    """
    if implementation is None:
        return preference()
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in BACKENDS for name in names):
        raise ValueError(
            f"implementation must be None, one of {tuple(BACKENDS)} or a non-empty sequence of "
            f"them, got {implementation!r}."
        )
    return names


def explain(
    problem: Problem, names: Sequence[str], *, decoding: bool = False
) -> dict[str, str | None]:
    """For each name the reason why it cannot serve `problem`, None where it can.

    With `decoding` there is also ``"<name>:decode"`` for a back end that has a `Decoder`, and
    ``"<name>:<word>"`` for the caveats of one that can serve.
    """
    reasons = {}
    for name in names:
        backend = BACKENDS[name]
        reasons[name] = reason = backend.unsupported(problem)
        if reason is None:
            reasons |= {f"{name}:{word}": text for word, text in backend.caveats(problem).items()}
        if decoding and backend.decode is not None:
            reasons[f"{name}:decode"] = reason or backend.decode.unsupported(problem)
    return reasons


def choose(problem: Problem, implementation: Implementation) -> str:
    """The name of the first back end that can serve.

    Raises:
      NotImplementedError: if none can, with every reason.
    """
    reasons = {}
    for name in check_names(implementation):
        reason = BACKENDS[name].unsupported(problem)
        if reason is None and implementation is None:
            reason = BACKENDS[name].caveats(problem).get("default")
        if reason is None:
            return name
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(
        f"no implementation can serve this call ({listed}). What each of them has: "
        f"{document('docs/how-to/operator.md')}."
    )


def run(
    problem: Problem, implementation: Implementation, with_stats: bool, *, decoding: bool = False
) -> Results:
    """Runs the first back end that can serve, and returns the public layout.

    Args:
      problem: the call.
      implementation: what the caller asked for.
      with_stats: otherwise the statistics may be incomplete.
      decoding: whether a `Decoder` may serve.

    Raises:
      NotImplementedError: if no back end can, with every reason.
    """
    backend = BACKENDS[choose(problem, implementation)]
    attend = backend.attend
    if decoding and backend.decode and backend.decode.unsupported(problem) is None:
        attend = backend.decode.attend
    return _public(problem, *attend(problem, with_stats), with_stats)


def _public(problem: Problem, out: jax.Array, stats: Stats, with_stats: bool) -> Results:
    """The results of a back end in the public layout, the statistics without gradients."""
    stats = Stats(*(jax.lax.stop_gradient(problem.restore(a)) for a in stats))
    if with_stats:
        lse = jnp.where(sees_nothing(stats.lse), -jnp.inf, stats.lse)
        stats = stats._replace(lse=lse)
    return problem.restore(out), stats
