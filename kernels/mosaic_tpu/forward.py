"""The forward pass in one kernel: softmax statistics, solve and output."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from lla.kernels.mosaic_tpu import launch, tile
from lla.kernels.mosaic_tpu import solve as solver
from lla.kernels.mosaic_tpu.launch import Operands, RowTile, Shape, row_block, row_numbers, vectors
from lla.kernels.mosaic_tpu.solve import CGOptions
from lla.kernels.mosaic_tpu.tile import LOWEST, NT, Arithmetic, MaskSpec
from lla.kernels.tiles import row_dot

ROW_STATISTICS = ("log_sum_exp", "relative", "iterations", "residual")
"""Statistics of each row in `Forward.rows`.

`relative` is the log-sum-exp of the logits relative to the origin.
"""


class Forward(NamedTuple):
    """Results, padded.

    Attributes:
      out: ``[M, R, Dv]``.
      rows: float32 ``[M, 4, R]``, see `ROW_STATISTICS`.
      key_mean: float32 ``[M, R, D]``, relative to the origin; None for softmax attention.
      probe: float32 ``[M, R, D]``, the solution; None without a solve.
    """

    out: jax.Array
    rows: jax.Array
    key_mean: jax.Array | None
    probe: jax.Array | None


class Masking(NamedTuple):
    """int32 ``[B, 2]`` (offset and length), and segment ids ``[B, 1, R]`` and ``[B, 1, S]``."""

    numbers: jax.Array
    query_ids: jax.Array | None
    key_ids: jax.Array | None


def row_operands(shape: Shape, masking: Masking, query, key, value, probe, rows) -> Operands:
    """The operands that all kernels with query rows have in common."""
    operands = Operands(shape, masking.numbers)
    operands.blocked("query", query, row_block(shape, shape.head_dim))
    operands.blocked("probe", probe, row_block(shape, shape.head_dim))
    operands.blocked("rows", rows, row_numbers(shape, rows.shape[1]))
    operands.blocked("query_ids", masking.query_ids, launch.row_ids(shape))
    operands.streamed("key", key)
    operands.streamed("value", value)
    operands.streamed("key_ids", masking.key_ids)
    return operands


def forward(
    shape: Shape,
    mask: MaskSpec,
    arithmetic: Arithmetic,
    options: CGOptions | None,
    query,
    key,
    value,
    probe,
    rows,
    masking: Masking,
    *,
    interpret: Any = None,
) -> Forward:
    """Softmax attention, attention along `probe`, or along the solution if there is an `options`.

    Args:
      options: of the solve; None without one.
      query, probe: ``[M, R, D]``; `probe` is given for Parallax only.
      key, value: ``[M, S, D]`` and ``[M, S, Dv]``.
      rows: float32 ``[M, 1, R]`` or ``[M, 2, R]``, scale and (for a solve) ridge of each row.
    """
    operands = row_operands(shape, masking, query, key, value, probe, rows)
    groups, count, d, dv = shape.groups, shape.blocks.rows, shape.head_dim, shape.value_dim
    probed = probe is not None or options is not None

    def struct(*size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((groups, *size), dtype)

    whole, statistics = struct(shape.num_rows, d), len(ROW_STATISTICS)
    outputs = {
        "out": (struct(shape.num_rows, dv, dtype=shape.dtype), row_block(shape, dv)),
        "rows": (struct(statistics, shape.num_rows), row_numbers(shape, statistics)),
    }
    scratch = launch.row_scratch(shape) | {
        "largest": vectors(count), "total": vectors(count), "out": vectors(count, dv)
    }  # fmt: skip
    if probed:
        outputs["key_mean"] = (whole, row_block(shape, d))
        scratch["key_mean"] = vectors(count, d)
    if options is not None:
        outputs["probe"] = (whole, row_block(shape, d))
        scratch |= solver.scratch(count, d)

    def body(given, out, memory):
        _body(shape, mask, arithmetic, options, given, out, memory)

    results = launch.call(
        body, "lla_forward", operands, outputs, scratch,
        tiles=shape.num_rows // count, interpret=interpret,
    )  # fmt: skip
    return Forward(results["out"], results["rows"], results.get("key_mean"), results.get("probe"))


def _body(shape, mask, arithmetic: Arithmetic, options, given, out, memory):
    rows = RowTile(shape, mask, given, memory)
    scale = rows.number(0)
    probed = "key_mean" in out

    def logits(keys):
        return scale * tile.product((rows.queries,), (keys,), NT)

    # -- Statistics, by an online softmax, which is all that softmax attention needs.
    sums = memory["key_mean" if probed else "out"]
    largest, total = memory["largest"], memory["total"]
    largest[...] = jnp.full_like(largest, LOWEST)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

    def accumulate(valid, keys, vectors):
        scores = jnp.where(valid, logits(keys), LOWEST)
        before = largest[...]
        now = jnp.maximum(before, scores.max(1, keepdims=True))
        weights = jnp.where(valid, jnp.exp(scores - now), 0.0)
        added, added_total = arithmetic.weighted_sum(weights, vectors)
        shrink = jnp.exp(before - now)
        largest[...] = now
        total[...] = total[...] * shrink + added_total
        sums[...] = sums[...] * shrink + added

    if probed:
        rows.stream(lambda valid, keys: accumulate(valid, keys, keys), "key")
    else:
        rows.stream(accumulate, "key", "value")
    seen = total[...] > 0
    divisor = jnp.where(seen, total[...], 1.0)
    log_sum_exp = jnp.where(seen, largest[...] + jnp.log(divisor), -jnp.inf)
    shift = jnp.where(seen, log_sum_exp, 0.0)
    mean = sums[...] / divisor
    moved = rows.origin_logits()
    numbers = {
        "log_sum_exp": log_sum_exp if moved is None else log_sum_exp + scale * moved,
        "relative": log_sum_exp,
    }

    def weights(valid, keys):
        return jnp.where(valid, jnp.exp(logits(keys) - shift), 0.0)

    if not probed:
        out["out"][...] = mean.astype(shape.dtype)
    else:
        out["key_mean"][...] = mean
        if options is None:
            probe, centre = (given["probe"][...],), given["probe"][...].astype(jnp.float32)
        else:
            active = seen & rows.exists
            target = jnp.where(active, mean - rows.centred(), 0.0)
            probe, numbers["iterations"], numbers["residual"] = solver.solve(
                rows, memory, arithmetic, options, target, weights, mean, rows.number(1),
                active, energy_offset=1,
            )  # fmt: skip
            out["probe"][...] = probe
            centre, probe = arithmetic.rounded(probe), arithmetic.parts(probe)
        _output(rows, memory, arithmetic, weights, probe, row_dot(mean, centre), seen)
        out["out"][...] = memory["out"][...].astype(shape.dtype)
    for index, name in enumerate(ROW_STATISTICS):
        column = numbers.get(name, jnp.zeros_like(scale))
        out["rows"][pl.ds(index, 1), :] = tile.to_row(column)


def _output(rows: RowTile, memory, arithmetic: Arithmetic, weights, probe, centre, seen):
    """Writes the output along `probe` to ``memory["out"]``.

    The weights sum to 1 for any probe. Weights rounded to one part miss 1 by their rounding errors,
    so the output is divided by their sum. More precise weights do not need that, and their sum
    would bring in the error of `centre`.
    """
    sums, total = memory["out"], memory["total"]
    sums[...] = jnp.zeros_like(sums)
    total[...] = jnp.zeros_like(total)

    def accumulate(valid, keys, values):
        along = tile.product(probe, (keys,), NT) - centre
        added, added_total = arithmetic.weighted_sum(weights(valid, keys) * (1 - along), values)
        sums[...] += added
        total[...] += added_total

    rows.stream(accumulate, "key", "value")
    if arithmetic.coarse:
        sums[...] = sums[...] / jnp.where(seen, total[...], 1.0)
