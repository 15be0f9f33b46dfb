"""One new token per sequence on a Hopper GPU: the kernels that read the cache once.

The kernels themselves are in `lla.kernels.mosaic_gpu.decode`, their design in
``kernels/DECODING.md``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lla.compat import match_varying
from lla.numerics import nan_where
from lla.ops.differentiation import refuse_derivative
from lla.ops.mosaic_gpu import hopper
from lla.ops.problem import Problem
from lla.ops.solver import Stats, resolve

_HEAD_DIMS = (64, 128)
_BLOCK = 64  # keys of a tile
# Program instances that an H100 or H200 runs at once, one per multiprocessor.
_INSTANCES = 132
# Time of an instance beside its tiles, in tiles.
_OVERHEAD = 4
# At this ridge and above, weighted keys may have one 16-bit part.
_LARGE_RIDGE = 5.0


def unsupported(problem: Problem) -> str | None:
    """Why they cannot serve one that `hopper.unsupported` accepts, None if they can."""
    _, t, _, h = problem.query.shape
    if t != 1 or not problem.query.size:
        return f"the decoding kernels take one token of some sequences, query has {t}"
    if h not in _HEAD_DIMS or problem.value.shape[-1] != h:
        return (
            f"the decoding kernels need equal head dimensions of 64 or 128, query has {h} and "
            f"value {problem.value.shape[-1]}"
        )
    if problem.key.shape[1] < _BLOCK:
        return (
            f"the decoding kernels need room for {_BLOCK} tokens, the cache has "
            f"{problem.key.shape[1]}"
        )
    return None


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


def attend(
    problem: Problem, with_stats: bool = True, *, interpret: Any = None
) -> tuple[jax.Array, Stats]:
    """Output and statistics, always complete, in the layout of `Problem`.

    Where a gradient is taken, it is that of the kernels for whole sequences.

    Args:
      problem: one that `unsupported` accepts.
      with_stats: ignored.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    del with_stats
    leaves, tree = jax.tree.flatten(problem)
    return _attend(interpret, jax.tree.unflatten(tree, match_varying(*leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret: Any, problem: Problem) -> tuple[jax.Array, Stats]:
    return _results(interpret, problem)


def _run(interpret: Any, problem: Problem) -> tuple[jax.Array, Stats]:
    from lla.kernels.mosaic_gpu.decode import CacheShape, heads_per_program
    from lla.kernels.mosaic_gpu.decode_attend import attend_cache

    b, _, n, h = problem.query.shape
    _, s, k, _ = problem.key.shape
    g, mask = problem.group, problem.mask
    queries = b * n // heads_per_program(problem.mechanism, g)
    cache = CacheShape(b, s, k, g, h, problem.query.dtype, choose_splits(queries, s))
    high = jnp.clip(jnp.minimum(mask.offset + 1, mask.lengths), 0, s)
    low = jnp.zeros_like(high)
    if mask.window is not None:
        low = jnp.clip(mask.offset - mask.window[0], 0, high)

    def by_head(array):
        """``[B | 1, 1, N | 1] -> [B, N]``, one number for all as it is: filling takes a kernel."""
        if array is None or array.size == 1:
            return None if array is None else array.reshape(1, 1)
        return jnp.broadcast_to(array[:, 0], (b, n))

    ridge, scale = by_head(problem.ridge), by_head(problem.scale)
    probe = None if problem.probe is None else problem.probe[:, 0]
    solver = resolve(problem, method="cg")
    found = attend_cache(
        cache, problem.mechanism, problem.query[:, 0], problem.key, problem.value,
        (low, high), scale, ridge, probe,
        tol=solver.stopping_tol(forward=True), max_iters=solver.max_iters,
        bf16x2=(problem.static_ridge or 0) < _LARGE_RIDGE or solver.tol < 1e-4,
        interpret=interpret,
    )  # fmt: skip
    out = found.out
    if ridge is not None and problem.static_ridge is None:
        out = nan_where(jnp.broadcast_to(jnp.isnan(ridge), out.shape[:-1]), out)
    stats = Stats(found.log_sum_exp, found.iterations.astype(jnp.int32), found.residual)
    return out.reshape(b, 1, n, h), Stats(*(a.reshape(b, 1, n) for a in stats))


_results = refuse_derivative(_run, "mosaic_gpu")


def _forward(interpret: Any, problem: Problem):
    def whole(problem):
        return hopper.attend(problem, interpret=interpret)[0]

    return _results(interpret, problem), jax.vjp(whole, problem)[1]


def _backward(interpret: Any, pullback, cotangents):
    del interpret
    return pullback(cotangents[0])


_attend.defvjp(_forward, _backward)
