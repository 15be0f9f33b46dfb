"""One new token per sequence on a Hopper GPU: the kernels that read the cache once.

The kernels themselves are in `lla.kernels.mosaic_gpu.decode`, their design in
``kernels/DECODING.md``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lla.compat import match_varying
from lla.ops import again, mosaic_gpu
from lla.ops.masks import Mask
from lla.ops.options import Solver, Stats
from lla.ops.problem import Member, Problem, resolve_solver
from lla.ops.shield import nan_where, shield

_HEAD_DIMS = (64, 128)
_BLOCK = 64  # keys of a tile
# Program instances that an H100 or H200 runs at once, one per multiprocessor.
_INSTANCES = 132
# Time of an instance beside its tiles, in tiles.
_OVERHEAD = 4
# At this ridge and above, weighted keys may have one 16-bit part.
_LARGE_RIDGE = 5.0


def serves(problem: Problem) -> bool:
    """Whether the kernels can serve a problem that `mosaic_gpu.refuse` accepts.

    It is one of decoding: causal, with an offset and lengths, without segments.
    """
    _, t, _, _, h = problem.query.shape
    return (
        t == 1
        and problem.query.size > 0
        and h in _HEAD_DIMS
        and problem.value.shape[-1] == h
        and problem.key.shape[1] >= _BLOCK
    )


def choose_splits(queries: int, num_keys: int, instances: int = _INSTANCES) -> int:
    """Program instances that share the keys of one of `queries` query heads of all sequences.

    Heads that one instance serves together count once. The fewest that take the least time: rounds
    of instances, times the tiles of a share and what an instance takes without any. A share has at
    least four tiles, as its sums have to be joined.
    """
    tiles = -(-num_keys // _BLOCK)

    def time(splits):
        return -(-queries * splits // instances) * (-(-tiles // splits) + _OVERHEAD)

    return min(range(1, max(1, tiles // 4) + 1), key=time)


@dataclasses.dataclass(frozen=True)
class _Static:
    member: Member
    window: tuple[int, int] | None
    solver: Solver
    static_ridge: float | None
    static_scale: float | None
    one_ridge: bool
    interpret: Any


class _Floats(NamedTuple):
    """As in `Problem`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    probe: jax.Array | None
    ridge: jax.Array | None
    scale: jax.Array


class _Places(NamedTuple):
    """Int32 ``[B]``: the position of the query, and the tokens in the cache."""

    offset: jax.Array
    lengths: jax.Array


def attend(problem: Problem, *, interpret: Any = None) -> tuple[jax.Array, Stats]:
    """Output ``[B, 1, K, G, H]`` in the query's dtype, and the statistics.

    Where a gradient is taken, it is that of the kernels for whole sequences.

    Args:
      problem: one that `serves` accepts.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    static = _Static(
        problem.member, problem.mask.window, problem.solver, problem.static_ridge,
        problem.static_scale, problem.one_ridge, interpret,
    )  # fmt: skip
    floats = _Floats(*(getattr(problem, name) for name in _Floats._fields))
    places = _Places(problem.mask.offset, problem.mask.lengths)
    leaves, tree = jax.tree.flatten((floats, places))
    return _attend(static, *jax.tree.unflatten(tree, match_varying(*leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, floats: _Floats, places: _Places) -> tuple[jax.Array, Stats]:
    return _results(static, floats, places)


def _run(static: _Static, floats: _Floats, places: _Places) -> tuple[jax.Array, Stats]:
    from lla.kernels.mosaic_gpu.decode import CacheShape, heads_per_program
    from lla.kernels.mosaic_gpu.decode_attend import attend_cache

    b, _, k, g, h = floats.query.shape
    s = floats.key.shape[1]
    queries = b * k * g // heads_per_program(static.member, g)
    cache = CacheShape(b, s, k, g, h, floats.query.dtype, choose_splits(queries, s))
    high = jnp.clip(jnp.minimum(places.offset + 1, places.lengths), 0, s)
    low = jnp.zeros_like(high)
    if static.window is not None:
        low = jnp.clip(places.offset - static.window[0], 0, high)

    def rows(array):
        """``[B, 1, K, G, ...] -> [B, N, ...]``."""
        return None if array is None else array.reshape(b, k * g, *array.shape[4:])

    ridge, scale = rows(floats.ridge), rows(floats.scale)
    # A constant of one element is at hand; to fill an array takes a kernel.
    if static.static_scale is not None:
        scale = jnp.full((1, 1), static.static_scale, jnp.float32)
    if static.one_ridge:
        ridge = jnp.full((1, 1), static.static_ridge, jnp.float32)
    solver = resolve_solver(_problem(static, floats, places), "cg")
    found = attend_cache(
        cache, static.member, rows(floats.query), floats.key, floats.value,
        (low, high), scale, ridge, rows(floats.probe),
        tol=solver.tol if solver.adaptive else None, max_iters=solver.max_iters,
        bf16x2=(static.static_ridge or 0) < _LARGE_RIDGE or solver.tol < 1e-4,
        interpret=static.interpret,
    )  # fmt: skip
    out = found.out
    if ridge is not None and not static.one_ridge:
        out = nan_where(jnp.broadcast_to(jnp.isnan(ridge), out.shape[:-1]), out)
    shape = (b, 1, k, g)
    iterations = found.iterations.astype(jnp.int32).reshape(shape)
    stats = Stats(found.log_sum_exp.reshape(shape), iterations, found.residual.reshape(shape))
    return out.reshape(*shape, h), stats


def _problem(static: _Static, floats: _Floats, places: _Places) -> Problem:
    mask = Mask(True, static.window, places.offset, places.lengths, None, None, None)
    return Problem(
        static.member, **floats._asdict(), mask=mask, solver=static.solver,
        static_ridge=static.static_ridge, static_scale=static.static_scale,
        one_ridge=static.one_ridge,
        leading=floats.query.shape[:1],
    )  # fmt: skip


def _forward(static: _Static, floats: _Floats, places: _Places):
    def whole(floats):
        problem, restore = shield(_problem(static, floats, places))
        return restore(*mosaic_gpu.mosaic_gpu(problem, interpret=static.interpret))[0]

    return _results(static, floats, places), jax.vjp(whole, floats)[1]


def _backward(static: _Static, pullback, cotangents):
    del static
    return *pullback(cotangents[0]), None


_attend.defvjp(_forward, _backward)
_results = again.refuse_derivative(_run, "mosaic_gpu")
