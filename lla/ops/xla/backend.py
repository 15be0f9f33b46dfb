"""Blockwise implementation in plain XLA: tiles of queries against ranges of keys.

A tile keeps its softmax weights in memory, and every solver iteration reuses them. No other array
has a size of queries times keys, so memory is linear in the number of keys. The derivation is in
``kernels/MATHEMATICS.md``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lla.compat import full_varying, vary_like
from lla.kernels import cg, tiles
from lla.ops.differentiation import Residuals, attention
from lla.ops.masks import Mask, hides
from lla.ops.problem import Mechanism, Operands, Problem
from lla.ops.shield import shield
from lla.ops.solver import ResolvedSolver, Stats, resolve
from lla.ops.xla import blocks, direct
from lla.ops.xla.plan import Plan, make_plan


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static part of a call."""

    mechanism: Mechanism
    solver: ResolvedSolver
    plan: Plan
    precision: lax.Precision
    with_stats: bool
    bias_places: tuple[int, int, bool, bool] | None = None  # see `_places`
    soft_cap: float | None = None


def unsupported(problem: Problem) -> str | None:
    """None: it serves every problem."""
    del problem
    return None


def attend(problem: Problem, with_stats: bool) -> tuple[jax.Array, Stats]:
    """Output and statistics in the layout of `Problem`.

    Without `with_stats` their residual may be that of an earlier iterate.
    """
    problem, restore = shield(problem)
    return restore(*attend_shielded(problem, resolve(problem), with_stats))


def attend_shielded(
    problem: Problem, solver: ResolvedSolver, with_stats: bool = True
) -> tuple[jax.Array, Stats]:
    """`attend` of a problem without hidden or non-finite numbers.

    Inside, arrays come with groups first, ``M = B * K`` pairs of sequence and key head: query and
    probe ``[M, G, T, H]``, key ``[M, S, H]``, value ``[M, S, Hv]``, ridge and scale ``[M, G, T]``.
    A bias is ``[P, G | 1, T | 1, S | 1]`` with a place for each sequence and key head that it
    differs for.
    """
    b, t, n, h = problem.query.shape
    _, s, k, _ = problem.key.shape
    g = problem.group
    uses_direct = problem.mechanism == "lla" and solver.method == "direct"
    overlap = problem.mechanism == "lla" and not uses_direct and not solver.adaptive
    plan = make_plan((b, t, k, g, h), s, problem.mask, direct=uses_direct, overlap=overlap)
    bias, bias_places = problem.bias, None
    if bias is not None:
        bias_places = (b, k, bias.shape[0] != 1, bias.shape[1] != 1)
        bias = _by_group(bias, k)
        bias = bias.reshape(-1, *bias.shape[2:])
    spec = _Spec(
        problem.mechanism,
        solver,
        plan,
        _precision(problem),
        with_stats,
        bias_places,
        problem.soft_cap,
    )

    def rows_to_groups(array):  # [B, T, N, ...] -> [M, G, T, ...]
        if array is None:
            return None
        array = jnp.broadcast_to(array, (b, t, n, *array.shape[3:]))
        return jnp.swapaxes(array, 1, 2).reshape(b * k, g, t, *array.shape[3:])

    def keys_to_groups(array):  # [B, S, K, ...] -> [M, S, ...]
        return jnp.moveaxis(array, 1, 2).reshape(b * k, s, *array.shape[3:])

    operands = Operands(
        query=rows_to_groups(problem.query),
        key=keys_to_groups(problem.key),
        value=keys_to_groups(problem.value),
        probe=rows_to_groups(problem.probe),
        ridge=rows_to_groups(problem.ridge),
        scale=rows_to_groups(problem.scale),
        bias=bias,
    )
    mask = _mask_by_group(problem.mask, b, k)
    out, stats = _attend(spec, operands, mask)

    def groups_to_rows(array):  # [M, G, T, ...] -> [B, T, N, ...]
        return jnp.swapaxes(array.reshape(b, n, *array.shape[2:]), 1, 2)

    return groups_to_rows(out), Stats(*(groups_to_rows(a) for a in stats))


def _precision(problem: Problem) -> lax.Precision:
    """Precision of the products (all are the same on a CPU).

    TF32 suffices for 16-bit inputs, whose results are rounded more coarsely, unless a solve with a
    small ridge amplifies it: on an H200 the error of the output then exceeds the rounding.
    """
    sixteen_bits = problem.query.dtype in (jnp.bfloat16, jnp.float16)
    benign = problem.mechanism != "lla" or (problem.static_ridge or 0) >= 1
    return lax.Precision.HIGH if sixteen_bits and benign else lax.Precision.HIGHEST


def _by_group(array, k: int):
    """``[B | 1, N | 1, ...] -> [B | 1, K | 1, G | 1, ...]``."""
    batch, n, *rest = array.shape
    return array.reshape(batch, *((1, 1) if n == 1 else (k, n // k)), *rest)


def _mask_by_group(mask: Mask, b: int, k: int) -> Mask:
    """The mask of every pair of sequence and key head."""

    def repeat(array):
        return None if array is None else jnp.repeat(array, k, axis=0)

    dense = mask.dense
    if dense is not None:
        dense = _by_group(dense, k)
        dense = jnp.broadcast_to(dense, (b, k, *dense.shape[2:])).reshape(b * k, *dense.shape[2:])
    return dataclasses.replace(
        mask,
        offset=repeat(mask.offset),
        lengths=repeat(mask.lengths),
        query_segments=repeat(mask.query_segments),
        key_segments=repeat(mask.key_segments),
        dense=dense,
        bias=None,  # the operand says what it hides
    )


def _split_bias(spec: _Spec, operands: Operands):
    """What is divided among groups, the bias padded to whole tiles, and the places in it."""
    if operands.bias is None:
        return operands, None, None
    bias = operands.bias
    if bias.shape[2] != 1:
        bias = blocks.pad_rows(spec.plan, bias, 2)
    b, k, by_sequence, by_head = spec.bias_places
    # Traced: a function that the compiler divides must not hold constant arrays.
    sequence, head = jnp.divmod(jnp.arange(b * k, dtype=jnp.int32), jnp.int32(k))
    places = sequence * (int(by_sequence) * (k if by_head else 1)) + head * int(by_head)
    places = vary_like(jnp.asarray(places, jnp.int32), operands.query)
    return operands._replace(bias=None), bias, places


# ---------------------------------------------------------------------------------------------
# A tile's keys and its solve


class _Keys(NamedTuple):
    """A tile's keys in the compute dtype, relative to `origin`."""

    k: jax.Array  # [M', L, H]
    v: jax.Array  # [M', L, Hv]
    valid: jax.Array  # [M', R, L]
    bias: jax.Array | None  # [M', R, L], finite
    origin: jax.Array  # [M', 1, H]


def _tile_keys(
    spec, operands: Operands, mask: Mask, bias, first, start, length: int, dtype
) -> _Keys:
    _, heads, num_queries, _ = operands.query.shape
    valid = blocks.drop_single(
        blocks.tile_mask(spec.plan, mask, first, start, length, heads, num_queries)
    )
    if bias is not None:
        bias = blocks.tile_bias(spec.plan, bias, first, start, length, heads, dtype)
        bias = blocks.drop_single(bias)
        valid &= ~hides(bias)
        bias = jnp.where(valid & jnp.isfinite(bias), bias, jnp.zeros_like(bias))
    k = blocks.drop_single(blocks.slice_keys(operands.key, start, length)).astype(dtype)
    v = blocks.drop_single(blocks.slice_keys(operands.value, start, length)).astype(dtype)
    # Elsewhere a later row sees all that an earlier one sees.
    bounded = mask.window is not None or mask.dense is not None or mask.query_segments is not None
    bounded |= bias is not None
    origin = tiles.segment_origin(k, valid, bounded)
    if spec.soft_cap is not None:
        origin = jnp.zeros_like(origin)  # the cap is one of the logits themselves
    return _Keys(k - origin, v, valid, bias, origin)


def _logits(spec: _Spec, scaled_q, k, bias):
    logits = tiles.product_nt(scaled_q, k, spec.precision)
    if bias is not None:
        logits = logits + bias
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    return logits


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
    x, iterations, residual = cg.cg_solve(
        b,
        product,
        curvature,
        precondition,
        smallest=smallest,
        zeros=full_varying((*b.shape[:-1], 1), 0, b.dtype, like=b),
        active=active[..., None],
        energy_offset=1 if forward else 0,
        tol=solver.stopping_tol(forward=forward),
        max_iters=solver.max_iters,
        with_residual=forward and spec.with_stats,
    )
    return jnp.where(ridge[..., None] > 0, x, jnp.nan), iterations, residual


# ---------------------------------------------------------------------------------------------
# Forward


def _forward(spec: _Spec, operands: Operands, mask: Mask) -> tuple[Residuals, Stats]:
    return _by_tiles(spec, _forward_tile, operands, mask)


def _by_tiles(spec: _Spec, tile, operands: Operands, mask: Mask):
    operands, bias, places = _split_bias(spec, operands)
    function = functools.partial(_forward_groups, spec, tile, bias)
    return blocks.for_groups(spec.plan, function, operands, mask, places)


def _forward_groups(spec: _Spec, function, bias, operands: Operands, mask: Mask, places):
    """Results of ``function`` on every tile, one of `_forward_tile` and `_output_tile`."""
    groups, heads, num_queries, _ = operands.query.shape
    padded, mask = _pad(spec, operands, mask)
    bias = None if bias is None else blocks.Bias(bias, places)

    def tile(buckets, carry, index):
        first = index * spec.plan.block_q

        def branch(length, start):
            results = function(spec, operands, padded, mask, bias, first, length, start)
            return carry, blocks.with_groups(groups, results)

        return blocks.with_key_range(
            spec.plan, mask, first, operands.key.shape[1], groups, buckets, branch
        )

    _, results = blocks.scan_tiles(spec.plan, tile, None)
    return jax.tree.map(lambda a: blocks.join_tiles(spec.plan, a, heads, num_queries), results)


def _pad(spec: _Spec, operands: Operands, mask: Mask) -> tuple[Operands, Mask]:
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


def _forward_tile(
    spec, operands, padded, mask, bias, first, length, start
) -> tuple[Residuals, Stats]:
    dtype = padded.scale.dtype
    rows = functools.partial(blocks.tile_rows, spec.plan, first=first, dtype=dtype)
    keys = _tile_keys(spec, operands, mask, bias, first, start, length, dtype)
    q, scale = rows(padded.query), rows(padded.scale)
    logits = _logits(spec, q * scale[..., None], keys.k, keys.bias)
    p, lse = tiles.softmax_weights(logits, keys.valid)

    x = key_mean = None
    iterations = jnp.zeros_like(lse, jnp.int32)
    residual = jnp.zeros_like(lse)
    if spec.mechanism != "softmax":
        key_mean = tiles.product(p, keys.k, spec.precision)
    if spec.mechanism == "parallax":
        x = rows(padded.probe)
    if spec.mechanism == "lla":
        active = ~tiles.sees_nothing(lse)
        target = key_mean - (q - keys.origin)
        target = jnp.where(active[..., None], target, jnp.zeros_like(target))
        x, iterations, residual = _solve(
            spec, target, p, keys.k, key_mean, rows(padded.ridge), active, forward=True
        )
        iterations, residual = iterations[..., 0], residual[..., 0]
    out = tiles.probed_output(p, keys.k, keys.v, key_mean, x, spec.precision)
    # The last two are relative to the origin of the tile: with keys far from zero their absolute
    # values would lose the digits that the backward pass needs.
    saved = Residuals(
        out=out.astype(operands.query.dtype),
        log_sum_exp=lse,
        probe=x if spec.mechanism == "lla" else None,
        key_mean=key_mean,
    )
    # The log-sum-exp of the logits as defined, whose keys are not shifted.
    shift = scale * tiles.row_dot(q, keys.origin)[..., 0]
    return saved, Stats(lse + shift, iterations, residual)


# ---------------------------------------------------------------------------------------------
# Backward


def _finite(array):
    return jnp.where(jnp.isfinite(array), array, jnp.zeros_like(array))


def _backward(spec: _Spec, operands: Operands, mask: Mask, saved: Residuals, g) -> Operands:
    like, total = operands, None
    operands, bias, places = _split_bias(spec, operands)
    if bias is not None:
        total = full_varying(bias.shape, 0, operands.scale.dtype, like=bias)
    function = functools.partial(_backward_groups, spec, bias)
    total, gradients = blocks.scan_groups(
        spec.plan, function, total, operands, mask, places, saved, g
    )
    if bias is not None:
        gradients = gradients._replace(bias=total[:, :, : like.bias.shape[2]])
    return jax.tree.map(lambda d, like: d.astype(like.dtype), gradients, like)


def _backward_groups(
    spec, bias, d_bias, operands: Operands, mask: Mask, places, saved: Residuals, g
) -> tuple[jax.Array | None, Operands]:
    """The sum of the bias's gradients so far, and the other gradients of these groups."""
    groups, heads, num_queries, _ = operands.query.shape
    num_keys = operands.key.shape[1]
    dtype = operands.scale.dtype
    padded, mask = _pad(spec, operands, mask)
    bias = None if bias is None else blocks.Bias(bias, places)
    g = blocks.pad_rows(spec.plan, g, 2)
    saved = Residuals(
        out=None,
        log_sum_exp=blocks.pad_rows(spec.plan, saved.log_sum_exp, 2, tiles.NOTHING),
        probe=None if saved.probe is None else blocks.pad_rows(spec.plan, saved.probe, 2),
        key_mean=None if saved.key_mean is None else blocks.pad_rows(spec.plan, saved.key_mean, 2),
    )

    def tile(buckets, sums, index):
        first = index * spec.plan.block_q

        def branch(length, start):
            gradients = _backward_tile(
                spec, operands, padded, mask, bias, saved, g, first, length, start
            )
            d_rows, d_key, d_value, d_bias = blocks.with_groups(groups, gradients)
            d_key = blocks.add_keys(sums[0], d_key, start)
            d_value = blocks.add_keys(sums[1], d_value, start)
            if bias is not None:
                d_bias = blocks.bias_rows(spec.plan, bias.array.shape, d_bias, start, heads)
            return (d_key, d_value), (d_rows, d_bias)

        # The bias's gradient may be large: a conditional would copy it for every tile.
        *sums, d_bias = sums
        sums, (d_rows, part) = blocks.with_key_range(
            spec.plan, mask, first, num_keys, groups, buckets, branch
        )
        if bias is not None:
            d_bias = blocks.add_bias(d_bias, part, places, first)
        return (*sums, d_bias), d_rows

    sums = tuple(
        full_varying(array.shape, 0, dtype, like=array) for array in (operands.key, operands.value)
    )
    (d_key, d_value, d_bias), d_rows = blocks.scan_tiles(spec.plan, tile, (*sums, d_bias))
    d_rows = jax.tree.map(lambda a: blocks.join_tiles(spec.plan, a, heads, num_queries), d_rows)
    return d_bias, d_rows._replace(key=d_key, value=d_value)


def _backward_tile(spec, operands, padded, mask, bias, saved, g, first, length, start):
    """Gradients of a tile's rows (as `Operands` of these alone), keys, values and bias."""
    dtype, precision = padded.scale.dtype, spec.precision
    rows = functools.partial(blocks.tile_rows, spec.plan, first=first, dtype=dtype)
    keys = _tile_keys(spec, operands, mask, bias, first, start, length, dtype)
    k, v = keys.k, keys.v
    q, scale, g = rows(padded.query), rows(padded.scale), rows(g)
    lse = rows(saved.log_sum_exp)
    scaled_q = q * scale[..., None]
    logits = _logits(spec, scaled_q, k, keys.bias)
    p = tiles.saved_weights(logits, keys.valid, lse)

    c = tiles.product_nt(g, v, precision)
    c = c - tiles.weigh(p, c).sum(-1, keepdims=True)
    x = u = key_mean = d_probe = d_ridge = None
    if spec.mechanism != "softmax":
        key_mean = rows(saved.key_mean)
        h = tiles.adjoint_target(p, k, c, precision)
    if spec.mechanism == "parallax":
        x, d_probe = rows(padded.probe), -h
    if spec.mechanism == "lla":
        x, active = rows(saved.probe), ~tiles.sees_nothing(lse)
        u, _, _ = _solve(spec, h, p, k, key_mean, rows(padded.ridge), active, forward=False)
        d_ridge = tiles.row_dot(u, x)[..., 0]

    # a: effective weight over softmax weight; e: what a unit of it changes in the loss.
    a, e = jnp.ones_like(p), c
    if x is not None:
        a = 1 - tiles.centred_scores(k, key_mean, x, precision)
    if u is not None:
        e = c - tiles.centred_scores(k, key_mean, u, precision)
    d_logits = tiles.logit_gradient(p, a, e)
    if spec.soft_cap is not None:
        d_logits = tiles.weigh(d_logits, 1 - (logits / spec.soft_cap) ** 2)
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
    d_rows = Operands(d_query, None, None, d_probe, d_ridge, d_scale)
    return d_rows, d_key, d_value, None if bias is None else d_logits


# ---------------------------------------------------------------------------------------------
# Further derivatives: JAX applies the implicit function theorem to `lax.custom_linear_solve`, in
# forward and reverse mode, as often as asked. A derivative is as exact as the solves.


def _differentiable_solve(find, p, k, key_mean, ridge, target, precision):
    """Solves the systems of a tile, with the derivatives of the exact solution.

    Args:
      find: the map from right-hand sides to approximate solutions, ``[..., R, H]``; not
        differentiated.
      p, k, key_mean, ridge: see `lla.kernels.tiles`.
      target: right-hand sides ``[..., R, H]``.
    """

    def product(y):
        return tiles.system_product(p, k, key_mean, ridge, y, precision)

    return lax.custom_linear_solve(product, target, lambda _, b: find(b), symmetric=True)


def _output_tile(spec, operands, padded, mask, bias, first, length, start):
    """The output of `_forward_tile` in a form that JAX can differentiate."""
    dtype = padded.scale.dtype

    @functools.partial(jax.checkpoint, static_argnums=(4,))
    def output(operands, padded, bias, start, length):
        rows = functools.partial(blocks.tile_rows, spec.plan, first=first, dtype=dtype)
        keys = _tile_keys(spec, operands, mask, bias, first, start, length, dtype)
        # Nothing depends on the origin.
        origin = lax.stop_gradient(keys.origin)
        k, valid = keys.k + (keys.origin - origin), keys.valid
        q, scale = rows(padded.query), rows(padded.scale)
        logits = _logits(spec, q * scale[..., None], k, keys.bias)
        p, lse = tiles.softmax_weights(logits, valid)
        x = key_mean = None
        if spec.mechanism != "softmax":
            key_mean = tiles.product(p, k, spec.precision)
        if spec.mechanism == "parallax":
            x = rows(padded.probe)
        if spec.mechanism == "lla":
            active, ridge = ~tiles.sees_nothing(lse), rows(padded.ridge)
            target = key_mean - (q - origin)
            target = jnp.where(active[..., None], target, jnp.zeros_like(target))

            def find(b):
                return _solve(spec, b, p, k, key_mean, ridge, active, forward=False)[0]

            x = _differentiable_solve(find, p, k, key_mean, ridge, target, spec.precision)
        return tiles.probed_output(p, k, keys.v, key_mean, x, spec.precision)

    return output(operands, padded, bias, start, length).astype(operands.query.dtype)


def _output(spec: _Spec, operands: Operands, mask: Mask) -> jax.Array:
    solver = spec.solver
    tol = min(solver.tol, solver.backward_tol)
    spec = dataclasses.replace(spec, solver=dataclasses.replace(solver, backward_tol=tol))
    return _by_tiles(spec, _output_tile, operands, mask)


_attend = attention("xla", _forward, _backward, _output, {3: "nt", 4: "nth"})
