"""The TPU kernels behind the operator: layout and padding.

The kernels themselves are in `lla.kernels.mosaic_tpu`, their design in ``kernels/TPU.md``.
Interpreted, lowered and compiled ahead of time, never run on hardware.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lla.compat import default_device, target_platform
from lla.numerics import pad_to
from lla.ops.differentiation import Residuals, attention
from lla.ops.problem import (
    Mechanism,
    Operands,
    Problem,
    options_unsupported_by_kernels,
    unsupported_by_kernels,
)
from lla.ops.shield import shielded
from lla.ops.solver import Stats, resolve

_MAX_HEAD_DIM = 256
# From this ridge on the probe is so small that rounding it, and the weights, to bfloat16 once does
# not show in the result; below it, and where the ridge is traced, both have two parts.
_SPLIT_BELOW = 5.0


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`, None if they can."""
    reason = options_unsupported_by_kernels(problem) or _unsupported_device()
    if reason is not None:
        return reason
    return unsupported_shape(problem)


def unsupported_shape(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem` on any device, None if they can."""
    return unsupported_by_kernels(problem, ("bfloat16", "float32"), _MAX_HEAD_DIM)


def _unsupported_device() -> str | None:
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

    mechanism: Mechanism
    shape: Any
    mask: Any
    arithmetic: Any
    forward: Any
    backward: Any
    interpret: Any


def attend_shielded(
    problem: Problem, *, blocks: Any = None, interpret: Any = None
) -> tuple[jax.Array, Stats]:
    """Output and statistics, always complete, in the layout of `Problem`.

    Hidden numbers and those that are not finite reach other rows; `attend` keeps them away.

    Inside, arrays are padded: query and probe ``[M, R, D]``, key and value ``[M, S, D]``, ridge and
    scale ``[M, R]``; see `lla.kernels.mosaic_tpu.launch.Shape`. The log-sum-exp and the mean key
    that are kept for the backward pass are relative to the origin of the row's tile.

    Args:
      problem: one that `unsupported_shape` accepts.
      blocks: a `lla.kernels.mosaic_tpu.launch.BlockSizes`; None chooses.
      interpret: True or a `pallas.tpu.InterpretParams` to interpret, None to compile.
    """
    from lla.kernels.mosaic_tpu import configs, launch, solve, tile
    from lla.kernels.mosaic_tpu.forward import Masking

    b, t, n, h = problem.query.shape
    _, s, k, hv = problem.value.shape
    g = problem.group
    dtype = problem.query.dtype
    arithmetic = tile.Arithmetic(
        dtype, problem.mechanism == "lla" and (problem.static_ridge or 0) < _SPLIT_BELOW
    )
    blocks = blocks or configs.choose(t * g, s)
    shape = launch.Shape(
        batch=b, kv_heads=k, group=g, num_queries=t,
        num_rows=configs.round_up(t * g, blocks.rows),
        num_keys=configs.round_up(s, math.lcm(blocks.keys, blocks.own_keys)),
        head_dim=configs.round_up(h, launch.LANES), value_dim=configs.round_up(hv, launch.LANES),
        dtype=dtype, blocks=blocks,
    )  # fmt: skip

    def queries(array):  # [B, T, N, H] -> [M, R, D]
        if array is None:
            return None
        array = jnp.swapaxes(array.reshape(b, t, k, g * h), 1, 2).reshape(b * k, t * g, h)
        return pad_to(array, b * k, shape.num_rows, shape.head_dim)

    def keys(array, width):  # [B, S, K, H] -> [M, S, D]
        array = jnp.moveaxis(array, 2, 1).reshape(b * k, s, -1)
        return pad_to(array, b * k, shape.num_keys, width)

    def rows(array):  # [B | 1, T | 1, N | 1] -> [M, R]
        if array is None:
            return None
        array = problem.by_row(array.astype(jnp.float32)).reshape(b, t, k, g)
        array = jnp.swapaxes(array, 1, 2).reshape(b * k, t * g)
        return pad_to(array, b * k, shape.num_rows, fill=1)

    operands = Operands(
        query=queries(problem.query),
        key=keys(problem.key, shape.head_dim),
        value=keys(problem.value, shape.value_dim),
        probe=queries(problem.probe),
        ridge=rows(problem.ridge),
        scale=rows(problem.scale),
    )
    mask = problem.mask
    ids = (None, None)
    if mask.query_segments is not None:
        by_row = jnp.repeat(mask.query_segments, g, axis=1)
        ids = (
            pad_to(by_row, b, shape.num_rows)[:, None],
            pad_to(mask.key_segments, b, shape.num_keys)[:, None],
        )
    masking = Masking(mask.numbers(b, s), *ids)
    iterations = (None, None)
    if problem.mechanism == "lla":
        solver = resolve(problem, method="cg")
        iterations = [
            solve.CGOptions(solver.stopping_tol(forward=forward), solver.max_iters)
            for forward in (True, False)
        ]
    spec = _Spec(
        mechanism=problem.mechanism,
        shape=shape,
        mask=tile.MaskSpec(mask.is_causal, mask.window, ids[0] is not None),
        arithmetic=arithmetic,
        forward=iterations[0],
        backward=iterations[1],
        interpret=interpret,
    )
    out, stats = _attend(spec, operands, masking)

    def restore(array):  # [M, R, ...] -> [B, T, N, ...]
        array = array[:, : t * g].reshape(b, k, t, g, *array.shape[2:])
        return jnp.swapaxes(array, 1, 2).reshape(b, t, n, *array.shape[4:])

    return restore(out)[..., :hv], Stats(*(restore(a) for a in stats))


attend = shielded(attend_shielded)


# ---------------------------------------------------------------------------------------------
# Forward and backward pass


def _forward(spec: _Spec, operands: Operands, masking) -> tuple[Residuals, Stats]:
    from lla.kernels.mosaic_tpu.forward import ROW_STATISTICS, forward

    numbers = [operands.scale] if operands.ridge is None else [operands.scale, operands.ridge]
    results = forward(
        spec.shape, spec.mask, spec.arithmetic, spec.forward, operands.query, operands.key,
        operands.value, operands.probe, jnp.stack(numbers, axis=1), masking,
        interpret=spec.interpret,
    )  # fmt: skip
    rows = dict(zip(ROW_STATISTICS, jnp.moveaxis(results.rows, 1, 0), strict=True))
    saved = Residuals(results.out, rows["relative"], results.probe, results.key_mean)
    stats = Stats(rows["log_sum_exp"], rows["iterations"].astype(jnp.int32), rows["residual"])
    return saved, stats


def _backward(spec: _Spec, operands: Operands, masking, saved: Residuals, cotangent) -> Operands:
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
    direction = rows(saved.probe if spec.mechanism == "lla" else operands.probe)
    query, cotangent = rows(operands.query), rows(cotangent)
    by_row = row_gradients(
        shape, spec.mask, spec.arithmetic, spec.backward, query, operands.key, operands.value,
        cotangent, direction, rows(saved.key_mean), numbers, masking, interpret=spec.interpret,
    )  # fmt: skip
    d_key, d_value = key_gradients(
        shape, spec.mask, spec.arithmetic, query, operands.key, operands.value, cotangent,
        direction, by_row.direction if spec.mechanism == "lla" else None, by_row.rows,
        by_row.origins, masking, interpret=spec.interpret,
    )  # fmt: skip
    by_query, by_direction = (
        None if a is None else a[:, :count] for a in (by_row.query, by_row.direction)
    )
    by_number = dict(zip(ROW_OUTPUTS, jnp.moveaxis(by_row.rows[..., :count], 1, 0), strict=False))
    return Operands(
        query=by_query,
        key=d_key,
        value=d_value,
        probe=by_direction if spec.mechanism == "parallax" else None,
        ridge=by_number["d_ridge"] if spec.mechanism == "lla" else None,
        scale=by_number["d_scale"],
    )


_attend = attention("mosaic_tpu", _forward, _backward)
