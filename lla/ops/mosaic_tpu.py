"""The TPU kernels behind the operator: layout, padding, and one custom_vjp.

The kernels themselves are in `lla.kernels.mosaic_tpu`, their design in ``kernels/TPU.md``.
Interpreted, lowered and compiled ahead of time, never run on hardware.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lla.compat import default_device, match_varying, target_platform
from lla.ops import again
from lla.ops.handover import Handover
from lla.ops.options import Stats
from lla.ops.problem import Member, Problem, refuse_for_kernels, resolve_solver
from lla.ops.xla import RESIDUAL_NAMES

_MAX_HEAD_DIM = 256
# From this ridge on the probe is so small that rounding it, and the weights, to bfloat16 once does
# not show in the result; below it, and where the ridge is traced, both have two parts.
_SPLIT_BELOW = 5.0


def refuse(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`, None if they can."""
    if (reason := _refuse_device()) is not None:
        return reason
    return refuse_shape(problem)


def refuse_shape(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem` on any device, None if they can."""
    return refuse_for_kernels(problem, ("bfloat16", "float32"), _MAX_HEAD_DIM)


def _refuse_device() -> str | None:
    if target_platform() == "tpu":
        return None
    if (platform := default_device().platform) != "tpu":
        return (
            f"the kernels need a TPU, the platform is {platform}; to lower for a TPU from here, "
            "use lla.compat.lowering_for"
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static part of a call."""

    member: Member
    shape: Any
    mask: Any
    arithmetic: Any
    forward: Any
    backward: Any
    interpret: Any


class _Operands(NamedTuple):
    """Padded arrays: ``[M, R, D]``, ``[M, S, D]``, rows ``[M, R]``; see `launch.Shape`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    probe: jax.Array | None
    ridge: jax.Array | None
    scale: jax.Array


class _Saved(NamedTuple):
    """What the backward pass needs, padded: out, rows ``[M, R]``, and float32 ``[M, R, D]``.

    The log-sum-exp and the mean key are relative to the origin of the row's tile.
    """

    out: jax.Array
    log_sum_exp: jax.Array
    probe: jax.Array | None
    key_mean: jax.Array | None


def mosaic_tpu(
    problem: Problem,
    *,
    blocks: Any = None,
    interpret: Any = None,
    handover: Handover | None = None,
) -> tuple[jax.Array, Stats]:
    """Output ``[B, T, K, G, Hv]`` in the query's dtype, and the statistics.

    Args:
      problem: one that `refuse_shape` accepts.
      blocks: a `lla.kernels.mosaic_tpu.launch.BlockSizes`; None chooses.
      interpret: True or a `pallas.tpu.InterpretParams` to interpret, None to compile.
      handover: see `lla.ops.handover`.
    """
    from lla.kernels.mosaic_tpu import configs, forward, launch, solve, tile

    b, t, k, g, h = problem.query.shape
    s, hv = problem.key.shape[1], problem.value.shape[-1]
    dtype = problem.query.dtype
    arithmetic = tile.Arithmetic(
        dtype, problem.member == "lla" and (problem.static_ridge or 0) < _SPLIT_BELOW
    )
    blocks = blocks or configs.choose(t * g, s)
    shape = launch.Shape(
        batch=b, kv_heads=k, group=g, num_queries=t,
        num_rows=configs.round_up(t * g, blocks.rows),
        num_keys=configs.round_up(s, math.lcm(blocks.keys, blocks.own_keys)),
        head_dim=configs.round_up(h, launch.LANES), value_dim=configs.round_up(hv, launch.LANES),
        dtype=dtype, blocks=blocks,
    )  # fmt: skip

    def pad(array, *sizes, fill=0):
        widths = [(0, size - n) for size, n in zip(sizes, array.shape, strict=True)]
        if not any(after for _, after in widths):
            return array
        return jnp.pad(array, widths, constant_values=fill)

    def queries(array):  # [B, T, K, G, H] -> [M, R, D]
        if array is None:
            return None
        array = jnp.moveaxis(array, 2, 1).reshape(b * k, t * g, h)
        return pad(array, b * k, shape.num_rows, shape.head_dim)

    def keys(array, width):  # [B, S, K, H] -> [M, S, D]
        array = jnp.moveaxis(array, 2, 1).reshape(b * k, s, -1)
        return pad(array, b * k, shape.num_keys, width)

    def rows(array):  # [B, T, K, G] -> [M, R]
        if array is None:
            return None
        array = jnp.moveaxis(array.astype(jnp.float32), 2, 1).reshape(b * k, t * g)
        return pad(array, b * k, shape.num_rows, fill=1)

    operands = _Operands(
        query=queries(problem.query),
        key=keys(problem.key, shape.head_dim),
        value=keys(problem.value, shape.value_dim),
        probe=queries(problem.probe),
        ridge=rows(problem.ridge),
        scale=rows(problem.scale),
    )
    mask = problem.mask
    offset = jnp.zeros(b, jnp.int32) if mask.offset is None else mask.offset
    length = jnp.full(b, s, jnp.int32)
    if mask.lengths is not None:
        length = jnp.clip(mask.lengths, 0, s)
    ids = (None, None)
    if mask.query_segments is not None:
        by_row = jnp.repeat(mask.query_segments, g, axis=1)
        ids = (
            pad(by_row, b, shape.num_rows)[:, None],
            pad(mask.key_segments, b, shape.num_keys)[:, None],
        )
    masking = forward.Masking(jnp.stack([offset, length], axis=1), *ids)
    iterations = (None, None)
    if problem.member == "lla":
        resolved = resolve_solver(problem, "cg")
        iterations = [
            solve.CGOptions(tol if resolved.adaptive else None, resolved.max_iters)
            for tol in (resolved.tol, resolved.backward_tol)
        ]
    spec = _Spec(
        member=problem.member,
        shape=shape,
        mask=tile.MaskSpec(mask.is_causal, mask.window, ids[0] is not None),
        arithmetic=arithmetic,
        forward=iterations[0],
        backward=iterations[1],
        interpret=interpret,
    )
    leaves, tree = jax.tree.flatten((operands, masking))
    operands, masking = jax.tree.unflatten(tree, match_varying(*leaves))

    def restore(array):  # [M, R, ...] -> [B, T, K, G, ...]
        array = array[:, : t * g].reshape(b, k, t, g, *array.shape[2:])
        return jnp.moveaxis(array, 1, 2)

    def pack(saved):
        arrays = (None if a is None else restore(a) for a in saved)
        arrays = tuple(None if a is None else a.reshape(b, t, k * g, *a.shape[4:]) for a in arrays)
        dims = zip(RESIDUAL_NAMES, ("tnh", "tn", "tnh", "tnh"), strict=True)
        dims = tuple(d for a, d in zip(arrays, dims, strict=True) if a is not None)
        return tuple(a for a in arrays if a is not None), dims

    def unpack(arrays):
        by_name = dict(zip((name for name, _ in handover.dims), arrays, strict=True))

        def back(array):  # [B, T, N, ...] -> [M, R, ...]
            if array is None:
                return None
            array = jnp.moveaxis(array.reshape(b, t, k, g, *array.shape[3:]), 2, 1)
            array = array.reshape(b * k, t * g, *array.shape[4:])
            return pad(array, b * k, shape.num_rows, *array.shape[2:])

        return _Saved(*(back(by_name.get(name)) for name in RESIDUAL_NAMES))

    if handover is None:
        out, stats = _attend(spec, operands, masking)
    else:
        out, stats = handover.attend(_results, _gradients, pack, unpack, spec, operands, (masking,))

    return restore(out)[..., :hv], Stats(*(restore(a) for a in stats))


# ---------------------------------------------------------------------------------------------
# Differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, operands: _Operands, masking) -> tuple[jax.Array, Stats]:
    saved, stats = _results(spec, operands, masking)
    return saved.out, stats


def _attend_fwd(spec: _Spec, operands: _Operands, masking):
    saved, stats = _results(spec, operands, masking)
    saved = _Saved(
        *(
            None if a is None else checkpoint_name(a, name)
            for a, name in zip(saved, RESIDUAL_NAMES, strict=True)
        )
    )
    return (saved.out, stats), (operands, masking, saved)


def _attend_bwd(spec: _Spec, residuals, cotangents):
    operands, masking, saved = residuals
    return _gradients(spec, operands, masking, saved, cotangents[0]), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec: _Spec, operands: _Operands, masking) -> tuple[_Saved, Stats]:
    from lla.kernels.mosaic_tpu.forward import ROW_STATISTICS, forward

    numbers = [operands.scale] if operands.ridge is None else [operands.scale, operands.ridge]
    results = forward(
        spec.shape, spec.mask, spec.arithmetic, spec.forward, operands.query, operands.key,
        operands.value, operands.probe, jnp.stack(numbers, axis=1), masking,
        interpret=spec.interpret,
    )  # fmt: skip
    rows = dict(zip(ROW_STATISTICS, jnp.moveaxis(results.rows, 1, 0), strict=True))
    saved = _Saved(results.out, rows["relative"], results.probe, results.key_mean)
    stats = Stats(rows["log_sum_exp"], rows["iterations"].astype(jnp.int32), rows["residual"])
    return saved, stats


def _backward(spec: _Spec, operands: _Operands, masking, saved: _Saved, cotangent) -> _Operands:
    from lla.kernels.mosaic_tpu.key_gradients import key_gradients
    from lla.kernels.mosaic_tpu.row_gradients import ROW_OUTPUTS, row_gradients

    count = spec.shape.num_rows
    shape = spec.shape.with_whole_lanes()

    def rows(array, fill=0, axis=1):
        """Few rows were not padded to whole lanes, which the key gradients need."""
        if array is None or shape.num_rows == count:
            return array
        widths = [(0, shape.num_rows - count if i == axis else 0) for i in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=fill)

    delta = (cotangent.astype(jnp.float32) * saved.out.astype(jnp.float32)).sum(-1)
    numbers = [operands.scale, saved.log_sum_exp, delta]
    if operands.ridge is not None:
        numbers.append(operands.ridge)
    numbers = jnp.stack([rows(a, fill=1) for a in numbers], axis=1)
    masking = masking._replace(query_ids=rows(masking.query_ids, axis=2))
    direction = rows(saved.probe if spec.member == "lla" else operands.probe)
    query, cotangent = rows(operands.query), rows(cotangent)
    by_row = row_gradients(
        shape, spec.mask, spec.arithmetic, spec.backward, query, operands.key, operands.value,
        cotangent, direction, rows(saved.key_mean), numbers, masking, interpret=spec.interpret,
    )  # fmt: skip
    d_key, d_value = key_gradients(
        shape, spec.mask, spec.arithmetic, query, operands.key, operands.value, cotangent,
        direction, by_row.direction if spec.member == "lla" else None, by_row.rows,
        by_row.origins, masking, interpret=spec.interpret,
    )  # fmt: skip
    by_query, by_direction = (
        None if a is None else a[:, :count] for a in (by_row.query, by_row.direction)
    )
    by_number = dict(zip(ROW_OUTPUTS, jnp.moveaxis(by_row.rows[..., :count], 1, 0), strict=False))
    return _Operands(
        query=by_query,
        key=d_key,
        value=d_value,
        probe=by_direction if spec.member == "parallax" else None,
        ridge=by_number["d_ridge"] if spec.member == "lla" else None,
        scale=by_number["d_scale"],
    )


_results = again.refuse_derivative(_forward, "mosaic_tpu")
_gradients = again.refuse_derivative(_backward, "mosaic_tpu")
