"""Blockwise implementation in plain XLA: tiles of queries against ranges of keys, one custom_vjp.

A tile keeps its softmax weights in memory, where every solver iteration reuses them; nothing else
of size queries x keys exists, so memory is linear in the number of keys. The derivation is in
``kernels/MATHEMATICS.md``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lla.compat import full_varying, match_varying
from lla.kernels import cg, tiles
from lla.ops import again, blocks, direct
from lla.ops.handover import Handover
from lla.ops.masks import Mask
from lla.ops.options import ResolvedSolver, Stats
from lla.ops.plan import Plan, make_plan
from lla.ops.problem import Member, Problem

RESIDUAL_NAMES = ("lla_output", "lla_log_sum_exp", "lla_probe", "lla_key_mean")
"""Names of the forward results that the backward pass needs, for checkpoint policies."""


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static part of a call."""

    member: Member
    solver: ResolvedSolver
    plan: Plan
    precision: lax.Precision
    with_stats: bool


class _Operands(NamedTuple):
    """Arrays of a call, groups first: ``M = B * K`` pairs of sequence and key head.

    query, probe ``[M, G, T, H]``; key ``[M, S, H]``; value ``[M, S, Hv]``; ridge and scale
    ``[M, G, T]``. probe and ridge are None where the member has none.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    probe: jax.Array | None
    ridge: jax.Array | None
    scale: jax.Array


class _Saved(NamedTuple):
    """Per-row results: out ``[M, G, T, Hv]``; x and key_mean ``[M, G, T, H]``; lse ``[M, G, T]``.

    lse and key_mean are relative to the origin of the row's tile: with keys far from zero their
    absolute values would lose the digits that the backward pass needs.
    """

    out: jax.Array
    lse: jax.Array
    x: jax.Array | None
    key_mean: jax.Array | None


# Checkpoint name and axes of what `_Saved` holds, for `Handover`.
_SAVED_DIMS = dict(
    zip(_Saved._fields, zip(RESIDUAL_NAMES, ("nth", "nt", "nth", "nth"), strict=True), strict=True)
)


def xla(
    problem: Problem,
    solver: ResolvedSolver,
    with_stats: bool = True,
    handover: Handover | None = None,
) -> tuple[jax.Array, Stats]:
    """Output ``[B, T, K, G, Hv]`` in the query's dtype, and the statistics.

    Without `with_stats` their residual may be that of an earlier iterate.
    """
    b, t, k, g, h = problem.query.shape
    s = problem.key.shape[1]
    uses_direct = problem.member == "lla" and solver.method == "direct"
    overlap = problem.member == "lla" and not uses_direct and not solver.adaptive
    plan = make_plan(problem.query.shape, s, problem.mask, direct=uses_direct, overlap=overlap)
    spec = _Spec(problem.member, solver, plan, _precision(problem), with_stats)

    def rows_to_groups(array):  # [B, T, K, G, ...] -> [M, G, T, ...]
        if array is None:
            return None
        return jnp.moveaxis(array, 1, 3).reshape(b * k, g, t, *array.shape[4:])

    def keys_to_groups(array):  # [B, S, K, ...] -> [M, S, ...]
        return jnp.moveaxis(array, 1, 2).reshape(b * k, s, *array.shape[3:])

    operands = _Operands(
        query=rows_to_groups(problem.query),
        key=keys_to_groups(problem.key),
        value=keys_to_groups(problem.value),
        probe=rows_to_groups(problem.probe),
        ridge=rows_to_groups(problem.ridge),
        scale=rows_to_groups(problem.scale),
    )
    mask = _mask_by_group(problem.mask, b, k)
    leaves, tree = jax.tree.flatten((operands, mask))
    operands, mask = jax.tree.unflatten(tree, match_varying(*leaves))
    if handover is None:
        out, stats = _attend(spec, operands, mask)
    else:
        present = [n for n in _SAVED_DIMS if not (n == "x" and problem.member != "lla")]
        present = [n for n in present if not (n == "key_mean" and problem.member == "softmax")]

        def pack(saved):
            arrays = (getattr(saved, name) for name in present)
            arrays = tuple(a.reshape(b, k * g, *a.shape[2:]) for a in arrays)
            return arrays, tuple(_SAVED_DIMS[name] for name in present)

        def unpack(arrays):
            arrays = (a.reshape(b * k, g, *a.shape[2:]) for a in arrays)
            return _Saved(**dict.fromkeys(_Saved._fields) | dict(zip(present, arrays, strict=True)))

        out, stats = handover.attend(_results, _gradients, pack, unpack, spec, operands, (mask,))

    def groups_to_rows(array):  # [M, G, T, ...] -> [B, T, K, G, ...]
        return jnp.moveaxis(array.reshape(b, k, g, *array.shape[2:]), 3, 1)

    return groups_to_rows(out), Stats(*(groups_to_rows(a) for a in stats))


def _precision(problem: Problem) -> lax.Precision:
    """Precision of the products (all are the same on a CPU).

    TF32 suffices for 16-bit inputs, whose results are rounded more coarsely, unless a solve with a
    small ridge amplifies it: on an H200 the error of the output then exceeds the rounding.
    """
    sixteen_bits = problem.query.dtype in (jnp.bfloat16, jnp.float16)
    benign = problem.member != "lla" or (problem.static_ridge or 0) >= 1
    return lax.Precision.HIGH if sixteen_bits and benign else lax.Precision.HIGHEST


def _mask_by_group(mask: Mask, b: int, k: int) -> Mask:
    """Repeats the per-sequence parts for the key heads of a sequence; `dense` stays as it is."""

    def repeat(array):
        return None if array is None else jnp.repeat(array, k, axis=0)

    dense = mask.dense
    if dense is not None:
        dense = jnp.broadcast_to(dense, (b, k, *dense.shape[2:])).reshape(b * k, *dense.shape[2:])
    return dataclasses.replace(
        mask,
        offset=repeat(mask.offset),
        lengths=repeat(mask.lengths),
        query_segments=repeat(mask.query_segments),
        key_segments=repeat(mask.key_segments),
        dense=dense,
    )


# ---------------------------------------------------------------------------------------------
# Differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, operands: _Operands, mask: Mask) -> tuple[jax.Array, Stats]:
    saved, stats = _results(spec, operands, mask)
    return saved.out, stats


def _attend_fwd(spec, operands, mask):
    saved, stats = _results(spec, operands, mask)
    arrays = []
    for array, name in zip(saved, RESIDUAL_NAMES, strict=True):
        arrays.append(None if array is None else checkpoint_name(array, name))
    saved = _Saved(*arrays)
    return (saved.out, stats), (operands, mask, saved)


def _attend_bwd(spec, residuals, cotangents):
    operands, mask, saved = residuals
    return _gradients(spec, operands, mask, saved, cotangents[0]), None


_attend.defvjp(_attend_fwd, _attend_bwd)


# ---------------------------------------------------------------------------------------------
# A tile's keys and its solve


class _Keys(NamedTuple):
    """A tile's keys in the compute dtype, relative to `origin`."""

    k: jax.Array  # [M', L, H]
    v: jax.Array  # [M', L, Hv]
    valid: jax.Array  # [M', R, L]
    origin: jax.Array  # [M', 1, H]


def _tile_keys(spec, operands: _Operands, mask: Mask, first, start, length: int, dtype) -> _Keys:
    _, heads, num_queries, _ = operands.query.shape
    valid = blocks.drop_single(
        blocks.tile_mask(spec.plan, mask, first, start, length, heads, num_queries)
    )
    k = blocks.drop_single(blocks.slice_keys(operands.key, start, length)).astype(dtype)
    v = blocks.drop_single(blocks.slice_keys(operands.value, start, length)).astype(dtype)
    # Elsewhere a later row sees all that an earlier one sees.
    bounded = mask.window is not None or mask.dense is not None or mask.query_segments is not None
    origin = tiles.segment_origin(k, valid, bounded)
    return _Keys(k - origin, v, valid, origin)


def _solve(spec: _Spec, b, p, k, key_mean, ridge, active, *, forward: bool):
    """Solves ``A_i x_i = b_i`` for the rows of a tile; see `lla.kernels.cg.cg_solve`."""
    solver, precision = spec.solver, spec.precision

    def product(y):
        return tiles.system_product(p, k, key_mean, ridge, y, precision)

    def curvature(y):
        return tiles.system_curvature(p, k, key_mean, ridge, y, precision)

    def precondition(r):
        return r

    smallest = ridge[..., None]
    if solver.method == "direct":
        inverse, ok = direct.inverse_systems(p, k, key_mean, ridge, precision)
        precondition = functools.partial(direct.apply_inverse, inverse)
        # Half of the eigenvalue that an exact inverse leaves.
        smallest = jnp.where(ok[..., None], 0.5 * jnp.ones_like(smallest), smallest)
    tol = solver.tol if forward else solver.backward_tol
    x, iterations, residual = cg.cg_solve(
        b,
        product,
        curvature,
        precondition,
        smallest=smallest,
        zeros=full_varying((*b.shape[:-1], 1), 0, b.dtype, like=b),
        active=active[..., None],
        energy_offset=1 if forward else 0,
        tol=tol if solver.adaptive else None,
        max_iters=solver.max_iters,
        with_residual=forward and spec.with_stats,
    )
    return jnp.where(ridge[..., None] > 0, x, jnp.nan), iterations, residual


# ---------------------------------------------------------------------------------------------
# Forward


def _forward(spec: _Spec, operands: _Operands, mask: Mask) -> tuple[_Saved, Stats]:
    function = functools.partial(_forward_groups, spec, _forward_tile)
    return blocks.for_groups(spec.plan, function, operands, mask)


def _forward_groups(spec: _Spec, function, operands: _Operands, mask: Mask):
    """Results of ``function`` on every tile, one of `_forward_tile` and `_output_tile`."""
    groups, heads, num_queries, _ = operands.query.shape
    padded, mask = _pad(spec, operands, mask)

    def tile(buckets, carry, index):
        first = index * spec.plan.block_q

        def branch(length, start):
            results = function(spec, operands, padded, mask, first, length, start)
            return carry, blocks.with_groups(groups, results)

        return blocks.with_key_range(
            spec.plan, mask, first, operands.key.shape[1], groups, buckets, branch
        )

    _, results = blocks.scan_tiles(spec.plan, tile, None)
    return jax.tree.map(lambda a: blocks.join_tiles(spec.plan, a, heads, num_queries), results)


def _pad(spec: _Spec, operands: _Operands, mask: Mask) -> tuple[_Operands, Mask]:
    """Row arrays padded to whole tiles."""
    padded = operands._replace(
        query=blocks.pad_rows(spec.plan, operands.query, 2),
        probe=None if operands.probe is None else blocks.pad_rows(spec.plan, operands.probe, 2),
        ridge=None if operands.ridge is None else blocks.pad_rows(spec.plan, operands.ridge, 2, 1),
        scale=blocks.pad_rows(spec.plan, operands.scale, 2),
    )
    if mask.query_segments is not None:
        mask = dataclasses.replace(
            mask, query_segments=blocks.pad_rows(spec.plan, mask.query_segments, 1)
        )
    if mask.dense is not None and mask.dense.shape[2] != 1:
        mask = dataclasses.replace(mask, dense=blocks.pad_rows(spec.plan, mask.dense, 2))
    return padded, mask


def _forward_tile(spec, operands, padded, mask, first, length, start) -> tuple[_Saved, Stats]:
    dtype = padded.scale.dtype
    rows = functools.partial(blocks.tile_rows, spec.plan, first=first, dtype=dtype)
    keys = _tile_keys(spec, operands, mask, first, start, length, dtype)
    q, scale = rows(padded.query), rows(padded.scale)
    logits = tiles.product_nt(q * scale[..., None], keys.k, spec.precision)
    p, lse = tiles.softmax_weights(logits, keys.valid)

    x = key_mean = None
    iterations = jnp.zeros_like(lse, jnp.int32)
    residual = jnp.zeros_like(lse)
    if spec.member != "softmax":
        key_mean = tiles.product(p, keys.k, spec.precision)
    if spec.member == "parallax":
        x = rows(padded.probe)
    if spec.member == "lla":
        active = ~tiles.sees_nothing(lse)
        target = key_mean - (q - keys.origin)
        target = jnp.where(active[..., None], target, jnp.zeros_like(target))
        x, iterations, residual = _solve(
            spec, target, p, keys.k, key_mean, rows(padded.ridge), active, forward=True
        )
        iterations, residual = iterations[..., 0], residual[..., 0]
    out = tiles.probed_output(p, keys.k, keys.v, key_mean, x, spec.precision)
    saved = _Saved(
        out=out.astype(operands.query.dtype),
        lse=lse,
        x=x if spec.member == "lla" else None,
        key_mean=key_mean,
    )
    # The log-sum-exp of the logits as defined, whose keys are not shifted.
    shift = scale * tiles.row_dot(q, keys.origin)[..., 0]
    return saved, Stats(lse + shift, iterations, residual)


# ---------------------------------------------------------------------------------------------
# Backward


def _finite(array):
    return jnp.where(jnp.isfinite(array), array, jnp.zeros_like(array))


def _backward(spec: _Spec, operands: _Operands, mask: Mask, saved: _Saved, g) -> _Operands:
    function = functools.partial(_backward_groups, spec)
    gradients = blocks.for_groups(spec.plan, function, operands, mask, saved, g)
    return jax.tree.map(lambda d, like: d.astype(like.dtype), gradients, operands)


def _backward_groups(spec, operands: _Operands, mask: Mask, saved: _Saved, g) -> _Operands:
    groups, heads, num_queries, _ = operands.query.shape
    num_keys = operands.key.shape[1]
    dtype = operands.scale.dtype
    padded, mask = _pad(spec, operands, mask)
    g = blocks.pad_rows(spec.plan, g, 2)
    saved = _Saved(
        out=None,
        lse=blocks.pad_rows(spec.plan, saved.lse, 2, tiles.NOTHING),
        x=None if saved.x is None else blocks.pad_rows(spec.plan, saved.x, 2),
        key_mean=None if saved.key_mean is None else blocks.pad_rows(spec.plan, saved.key_mean, 2),
    )

    def tile(buckets, sums, index):
        first = index * spec.plan.block_q

        def branch(length, start):
            gradients = _backward_tile(spec, operands, padded, mask, saved, g, first, length, start)
            d_rows, d_key, d_value = blocks.with_groups(groups, gradients)
            d_key = blocks.add_keys(sums[0], d_key, start)
            d_value = blocks.add_keys(sums[1], d_value, start)
            return (d_key, d_value), d_rows

        return blocks.with_key_range(spec.plan, mask, first, num_keys, groups, buckets, branch)

    sums = tuple(
        full_varying(array.shape, 0, dtype, like=array) for array in (operands.key, operands.value)
    )
    (d_key, d_value), d_rows = blocks.scan_tiles(spec.plan, tile, sums)
    d_rows = jax.tree.map(lambda a: blocks.join_tiles(spec.plan, a, heads, num_queries), d_rows)
    return d_rows._replace(key=d_key, value=d_value)


def _backward_tile(spec, operands, padded, mask, saved, g, first, length, start):
    """Gradients of a tile's rows (as `_Operands` without key and value), of its keys and values."""
    dtype, precision = padded.scale.dtype, spec.precision
    rows = functools.partial(blocks.tile_rows, spec.plan, first=first, dtype=dtype)
    keys = _tile_keys(spec, operands, mask, first, start, length, dtype)
    k, v = keys.k, keys.v
    q, scale, g = rows(padded.query), rows(padded.scale), rows(g)
    lse = rows(saved.lse)
    scaled_q = q * scale[..., None]
    p = tiles.saved_weights(tiles.product_nt(scaled_q, k, precision), keys.valid, lse)

    c = tiles.product_nt(g, v, precision)
    c = c - tiles.weigh(p, c).sum(-1, keepdims=True)
    x = u = key_mean = d_probe = d_ridge = None
    if spec.member != "softmax":
        key_mean = rows(saved.key_mean)
        h = tiles.adjoint_target(p, k, c, precision)
    if spec.member == "parallax":
        x, d_probe = rows(padded.probe), -h
    if spec.member == "lla":
        x, active = rows(saved.x), ~tiles.sees_nothing(lse)
        u, _, _ = _solve(spec, h, p, k, key_mean, rows(padded.ridge), active, forward=False)
        d_ridge = tiles.row_dot(u, x)[..., 0]

    # a: effective weight over softmax weight; e: what a unit of it changes in the loss.
    a, e = jnp.ones_like(p), c
    if x is not None:
        a = 1 - tiles.centred_scores(k, key_mean, x, precision)
    if u is not None:
        e = c - tiles.centred_scores(k, key_mean, u, precision)
    d_logits = tiles.logit_gradient(p, a, e)
    weighted_keys = tiles.product(d_logits, k, precision)
    d_query = scale[..., None] * weighted_keys
    d_key = tiles.product_tn(d_logits, scaled_q, precision)
    weighted = tiles.weigh(p, a)
    d_value = tiles.product_tn(weighted, g, precision)
    # A row with a solution that overflowed is NaN in `d_logits`, for the keys that it sees.
    if x is not None:
        d_key -= tiles.product_tn(tiles.weigh(p, e), _finite(x), precision)
    if u is not None:
        d_query += u
        d_key -= tiles.product_tn(weighted, _finite(u), precision)
    d_scale = tiles.row_dot(q, weighted_keys)[..., 0]
    d_rows = _Operands(d_query, None, None, d_probe, d_ridge, d_scale)
    return d_rows, d_key, d_value


# ---------------------------------------------------------------------------------------------
# Further derivatives


def _output_tile(spec, operands, padded, mask, first, length, start):
    """The output of `_forward_tile` in a form that JAX can differentiate."""
    dtype = padded.scale.dtype

    @functools.partial(jax.checkpoint, static_argnums=(3,))
    def output(operands, padded, start, length):
        rows = functools.partial(blocks.tile_rows, spec.plan, first=first, dtype=dtype)
        keys = _tile_keys(spec, operands, mask, first, start, length, dtype)
        # Nothing depends on the origin.
        origin = lax.stop_gradient(keys.origin)
        k, valid = keys.k + (keys.origin - origin), keys.valid
        q, scale = rows(padded.query), rows(padded.scale)
        logits = tiles.product_nt(q * scale[..., None], k, spec.precision)
        p, lse = tiles.softmax_weights(logits, valid)
        x = key_mean = None
        if spec.member != "softmax":
            key_mean = tiles.product(p, k, spec.precision)
        if spec.member == "parallax":
            x = rows(padded.probe)
        if spec.member == "lla":
            active, ridge = ~tiles.sees_nothing(lse), rows(padded.ridge)
            target = key_mean - (q - origin)
            target = jnp.where(active[..., None], target, jnp.zeros_like(target))

            def find(b):
                return _solve(spec, b, p, k, key_mean, ridge, active, forward=False)[0]

            x = again.solve(find, p, k, key_mean, ridge, target, spec.precision)
        return tiles.probed_output(p, k, keys.v, key_mean, x, spec.precision)

    return output(operands, padded, start, length).astype(operands.query.dtype)


def _output(spec: _Spec, operands: _Operands, mask: Mask) -> jax.Array:
    solver = spec.solver
    tol = min(solver.tol, solver.backward_tol)
    spec = dataclasses.replace(spec, solver=dataclasses.replace(solver, backward_tol=tol))
    function = functools.partial(_forward_groups, spec, _output_tile)
    return blocks.for_groups(spec.plan, function, operands, mask)


def _differentiable_results(spec: _Spec, operands: _Operands, mask: Mask):
    out = _output(spec, operands, mask)
    return _Saved(out, *[None] * (len(_Saved._fields) - 1)), Stats(None, None, None)


def _differentiable_gradients(spec, operands: _Operands, mask: Mask, saved: _Saved, g) -> _Operands:
    del saved  # what it holds follows from the operands
    return jax.vjp(lambda operands: _output(spec, operands, mask), operands)[1](g)[0]


_results = again.with_derivative(_forward, _differentiable_results)
_gradients = again.with_derivative(_backward, _differentiable_gradients)
