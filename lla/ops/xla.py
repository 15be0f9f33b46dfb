"""Blockwise implementation in plain XLA: tiles of queries against ranges of keys, one custom_vjp.

A tile keeps its softmax weights in memory, where every solver iteration reuses them; nothing else
of size queries x keys exists, so memory is linear in the number of keys. The derivation is in
``kernels/README.md``.
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
from lla.ops import direct
from lla.ops.masks import Mask, positional_mask
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


def xla(problem: Problem, solver: ResolvedSolver) -> tuple[jax.Array, Stats]:
    """Output ``[B, T, K, G, Hv]`` in the query's dtype, and the statistics."""
    b, t, k, g, h = problem.query.shape
    s = problem.key.shape[1]
    uses_direct = problem.member == "lla" and solver.method == "direct"
    plan = make_plan(problem.query.shape, s, problem.mask, uses_direct)
    spec = _Spec(problem.member, solver, plan, _precision(problem))

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
    out, stats = _attend(spec, operands, mask)

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
    saved, stats = _forward(spec, operands, mask)
    return saved.out, stats


def _attend_fwd(spec, operands, mask):
    saved, stats = _forward(spec, operands, mask)
    return (saved.out, stats), (operands, mask, saved)


def _attend_bwd(spec, residuals, cotangents):
    operands, mask, saved = residuals
    gradients = _backward(spec, operands, mask, saved, cotangents[0])
    return gradients, None


_attend.defvjp(_attend_fwd, _attend_bwd)


# ---------------------------------------------------------------------------------------------
# Tiles: rows of a tile are [M', R, ...] with R = G * block_q


def _for_groups(spec: _Spec, function, *trees):
    """Maps `function` over chunks of groups: every array ``[M, ...]`` arrives as ``[M', ...]``."""
    m, chunk = jax.tree.leaves(trees)[0].shape[0], spec.plan.groups
    if chunk == m:
        return function(*trees)
    split = jax.tree.map(lambda a: a.reshape(m // chunk, chunk, *a.shape[1:]), trees)
    out = lax.map(lambda args: function(*args), split)
    return jax.tree.map(lambda a: a.reshape(m, *a.shape[2:]), out)


def _pad_rows(spec: _Spec, array, axis: int, fill=0):
    """Pads the query axis to whole tiles."""
    missing = spec.plan.num_tiles * spec.plan.block_q - array.shape[axis]
    if missing == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=fill)


def _tile_rows(spec: _Spec, array, first, dtype):
    """``[M', G, T, ...] -> [M', R, ...]``, the rows of the tile that starts at query `first`."""
    rows = lax.dynamic_slice_in_dim(array, first, spec.plan.block_q, axis=2).astype(dtype)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])


def _join_tiles(spec: _Spec, array, num_heads: int, num_queries: int):
    """``[tiles, M', R, ...] -> [M', G, T, ...]``, the inverse of `_tile_rows` over all tiles."""
    count, m, _, *rest = array.shape
    array = array.reshape(count, m, num_heads, spec.plan.block_q, *rest)
    array = jnp.moveaxis(array, 0, 2).reshape(m, num_heads, -1, *rest)
    return array[:, :, :num_queries]


def _key_range(spec: _Spec, mask: Mask, first, num_keys: int, groups: int):
    """Keys ``[low, high)`` that the tile starting at query `first` can see, int32 ``[M']`` each."""
    low = jnp.zeros(groups, jnp.int32)
    high = jnp.full(groups, num_keys, jnp.int32)
    begin = first + (low if mask.offset is None else mask.offset)
    end = begin + spec.plan.block_q  # position after the last query
    if mask.lengths is not None:
        high = jnp.minimum(high, mask.lengths)
    if mask.is_causal:
        high = jnp.minimum(high, end)
    if mask.window is not None:
        left, right = mask.window
        low = jnp.maximum(low, begin - left)
        high = jnp.minimum(high, end + right)
    return low, high


def _with_key_range(spec: _Spec, mask: Mask, first, num_keys: int, groups: int, branch):
    """Calls ``branch(length, start)`` with the smallest bucket that holds the tile's keys."""
    low, high = _key_range(spec, mask, first, num_keys, groups)
    buckets = spec.plan.buckets
    longest = (high - low).max()
    index = sum((longest > size).astype(jnp.int32) for size in buckets[:-1])
    branches = [
        lambda size=size: branch(size, jnp.clip(low, 0, num_keys - size)) for size in buckets
    ]
    return branches[0]() if len(branches) == 1 else lax.switch(index, branches)


def _slice_keys(array, start, length: int, axis: int = 1):
    """Takes `length` keys along `axis` of ``[M', ..., S, ...]``, from a start per group."""
    if array.shape[axis] == length:
        return array
    if array.shape[0] == 1:
        return lax.dynamic_slice_in_dim(array, start[0], length, axis=axis)
    return jax.vmap(lambda a, i: lax.dynamic_slice_in_dim(a, i, length, axis=axis - 1))(
        array, start
    )


def _add_keys(total, update, start):
    """Adds ``[M', length, ...]`` to the keys of `total` that `_slice_keys` takes."""
    length = update.shape[1]
    if total.shape[1] == length:
        return total + update
    if total.shape[0] == 1:
        update = update + lax.dynamic_slice_in_dim(total, start[0], length, axis=1)
        return lax.dynamic_update_slice_in_dim(total, update, start[0], axis=1)

    def add(a, u, i):
        u = u + lax.dynamic_slice_in_dim(a, i, length, axis=0)
        return lax.dynamic_update_slice_in_dim(a, u, i, axis=0)

    return jax.vmap(add)(total, update, start)


def _tile_mask(spec: _Spec, mask: Mask, first, start, length: int, heads: int, num_queries: int):
    """Bool ``[M', R, length]``; False for the rows that only pad the last tile."""
    rows = first + jnp.arange(spec.plan.block_q, dtype=jnp.int32)[None, :, None]
    cols = start[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None]
    positions = rows if mask.offset is None else rows + mask.offset[:, None, None]
    lengths = None if mask.lengths is None else mask.lengths[:, None, None]
    valid = positional_mask(mask, positions, cols, lengths) & (rows < num_queries)
    if mask.query_segments is not None:
        query_ids = lax.dynamic_slice_in_dim(mask.query_segments, first, spec.plan.block_q, axis=1)
        key_ids = _slice_keys(mask.key_segments, start, length)
        valid &= query_ids[:, :, None] == key_ids[:, None, :]
    valid = valid[:, None]
    if mask.dense is not None:
        dense = mask.dense
        if dense.shape[2] != 1:
            dense = lax.dynamic_slice_in_dim(dense, first, spec.plan.block_q, axis=2)
        valid = valid & _slice_keys(dense, start, length, axis=3)
    shape = (start.shape[0], heads, spec.plan.block_q, length)
    return jnp.broadcast_to(valid, shape).reshape(shape[0], -1, length)


class _Keys(NamedTuple):
    """A tile's keys in the compute dtype, relative to `origin` ``[M', 1, H]``."""

    k: jax.Array  # [M', L, H]
    v: jax.Array  # [M', L, Hv]
    valid: jax.Array  # [M', R, L]
    origin: jax.Array


def _tile_keys(spec, operands: _Operands, mask: Mask, first, start, length: int, dtype) -> _Keys:
    _, heads, num_queries, _ = operands.query.shape
    valid = _tile_mask(spec, mask, first, start, length, heads, num_queries)
    k = _slice_keys(operands.key, start, length).astype(dtype)
    v = _slice_keys(operands.value, start, length).astype(dtype)
    origin = tiles.segment_origin(k, valid)
    return _Keys(k - origin, v, valid, origin)


def _solve(spec: _Spec, b, p, k, key_mean, ridge, active, *, forward: bool):
    """Solves ``A_i x_i = b_i`` for the rows of a tile; see `lla.kernels.cg.cg_solve`."""
    solver, precision = spec.solver, spec.precision

    def product(y):
        return tiles.system_product(p, k, key_mean, ridge, y, precision)

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
        precondition,
        smallest=smallest,
        zeros=full_varying((*b.shape[:-1], 1), 0, b.dtype, like=b),
        active=active[..., None],
        energy_offset=1 if forward else 0,
        tol=tol if solver.adaptive else None,
        max_iters=solver.max_iters,
    )
    return jnp.where(ridge[..., None] > 0, x, jnp.nan), iterations, residual


# ---------------------------------------------------------------------------------------------
# Forward


def _forward(spec: _Spec, operands: _Operands, mask: Mask) -> tuple[_Saved, Stats]:
    saved, stats = _for_groups(spec, functools.partial(_forward_groups, spec), operands, mask)
    arrays = []
    for array, name in zip(saved, RESIDUAL_NAMES, strict=True):
        arrays.append(None if array is None else checkpoint_name(array, name))
    saved = _Saved(*arrays)
    return saved, stats


def _forward_groups(spec: _Spec, operands: _Operands, mask: Mask) -> tuple[_Saved, Stats]:
    groups, heads, num_queries, _ = operands.query.shape
    padded, mask = _pad(spec, operands, mask)

    def tile(index):
        first = index * spec.plan.block_q

        def branch(length, start):
            return _forward_tile(spec, operands, padded, mask, first, length, start)

        return _with_key_range(spec, mask, first, operands.key.shape[1], groups, branch)

    results = _map_tiles(spec, tile)
    return jax.tree.map(lambda a: _join_tiles(spec, a, heads, num_queries), results)


def _map_tiles(spec: _Spec, tile):
    if spec.plan.num_tiles == 1:
        return jax.tree.map(lambda a: a[None], tile(jnp.int32(0)))
    return lax.map(tile, jnp.arange(spec.plan.num_tiles, dtype=jnp.int32))


def _pad(spec: _Spec, operands: _Operands, mask: Mask) -> tuple[_Operands, Mask]:
    """Row arrays padded to whole tiles."""
    padded = operands._replace(
        query=_pad_rows(spec, operands.query, 2),
        probe=None if operands.probe is None else _pad_rows(spec, operands.probe, 2),
        ridge=None if operands.ridge is None else _pad_rows(spec, operands.ridge, 2, 1),
        scale=_pad_rows(spec, operands.scale, 2),
    )
    if mask.query_segments is not None:
        mask = dataclasses.replace(mask, query_segments=_pad_rows(spec, mask.query_segments, 1))
    if mask.dense is not None and mask.dense.shape[2] != 1:
        mask = dataclasses.replace(mask, dense=_pad_rows(spec, mask.dense, 2))
    return padded, mask


def _forward_tile(spec, operands, padded, mask, first, length, start) -> tuple[_Saved, Stats]:
    dtype = padded.scale.dtype
    rows = functools.partial(_tile_rows, spec, first=first, dtype=dtype)
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
        active = lse > -jnp.inf
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


def _backward(spec: _Spec, operands: _Operands, mask: Mask, saved: _Saved, g) -> _Operands:
    function = functools.partial(_backward_groups, spec)
    gradients = _for_groups(spec, function, operands, mask, saved, g)
    return jax.tree.map(lambda d, like: d.astype(like.dtype), gradients, operands)


def _backward_groups(spec, operands: _Operands, mask: Mask, saved: _Saved, g) -> _Operands:
    groups, heads, num_queries, _ = operands.query.shape
    num_keys = operands.key.shape[1]
    dtype = operands.scale.dtype
    padded, mask = _pad(spec, operands, mask)
    g = _pad_rows(spec, g, 2)
    saved = _Saved(
        out=None,
        lse=_pad_rows(spec, saved.lse, 2, -jnp.inf),
        x=None if saved.x is None else _pad_rows(spec, saved.x, 2),
        key_mean=None if saved.key_mean is None else _pad_rows(spec, saved.key_mean, 2),
    )

    def tile(sums, index):
        first = index * spec.plan.block_q

        def branch(length, start):
            d_rows, d_key, d_value = _backward_tile(
                spec, operands, padded, mask, saved, g, first, length, start
            )
            d_key = _add_keys(sums[0], d_key, start)
            d_value = _add_keys(sums[1], d_value, start)
            return (d_key, d_value), d_rows

        return _with_key_range(spec, mask, first, num_keys, groups, branch)

    sums = tuple(
        full_varying(array.shape, 0, dtype, like=array) for array in (operands.key, operands.value)
    )
    indices = jnp.arange(spec.plan.num_tiles, dtype=jnp.int32)
    (d_key, d_value), d_rows = lax.scan(tile, sums, indices)
    d_rows = jax.tree.map(lambda a: _join_tiles(spec, a, heads, num_queries), d_rows)
    return d_rows._replace(key=d_key, value=d_value)


def _backward_tile(spec, operands, padded, mask, saved, g, first, length, start):
    """Gradients of a tile's rows (as `_Operands` without key and value), of its keys and values."""
    dtype, precision = padded.scale.dtype, spec.precision
    rows = functools.partial(_tile_rows, spec, first=first, dtype=dtype)
    keys = _tile_keys(spec, operands, mask, first, start, length, dtype)
    k, v = keys.k, keys.v
    q, scale, g = rows(padded.query), rows(padded.scale), rows(g)
    lse = rows(saved.lse)
    scaled_q = q * scale[..., None]
    p = tiles.saved_weights(tiles.product_nt(scaled_q, k, precision), keys.valid, lse)

    c = tiles.product_nt(g, v, precision)
    c = c - (p * c).sum(-1, keepdims=True)
    x = u = key_mean = d_probe = d_ridge = None
    if spec.member != "softmax":
        key_mean = rows(saved.key_mean)
        h = tiles.adjoint_target(p, k, c, precision)
    if spec.member == "parallax":
        x, d_probe = rows(padded.probe), -h
    if spec.member == "lla":
        x, active = rows(saved.x), lse > -jnp.inf
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
    d_value = tiles.product_tn(p * a, g, precision)
    if x is not None:
        d_key -= tiles.product_tn(p * e, x, precision)
    if u is not None:
        d_query += u
        d_key -= tiles.product_tn(p * a, u, precision)
    d_scale = tiles.row_dot(q, weighted_keys)[..., 0]
    d_rows = _Operands(d_query, None, None, d_probe, d_ridge, d_scale)
    return d_rows, d_key, d_value
