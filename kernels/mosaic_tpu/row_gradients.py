"""Gradients of query, probe or ridge, and scale: adjoint solve and gradients in one kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from lla.kernels.mosaic_tpu import launch, tile
from lla.kernels.mosaic_tpu import solve as solver
from lla.kernels.mosaic_tpu.forward import Masking, row_operands
from lla.kernels.mosaic_tpu.launch import (
    SUBLANES,
    RowTile,
    Shape,
    row_block,
    row_numbers,
    vectors,
)
from lla.kernels.mosaic_tpu.solve import CGOptions
from lla.kernels.mosaic_tpu.tile import NT, Arithmetic, MaskSpec
from lla.kernels.tiles import row_dot

ROW_INPUTS = ("scale", "log_sum_exp", "delta", "ridge")
"""Inputs of each row: `log_sum_exp` is the relative one, `delta` is cotangent . output.

Only solves have a ridge.
"""

ROW_OUTPUTS = (
    "scale",
    "log_sum_exp",
    "probe_shift",
    "cotangent_shift",
    "mean",
    "d_scale",
    "d_ridge",
)
"""Outputs of each row in `RowGradients.rows`, which pads them to eight.

`key_gradients` reads the first five: the centred products are ``probe . k - probe_shift`` and
``cotangent . v - solution . k - cotangent_shift``, and `mean` is the sum of p a e.
"""


class RowGradients(NamedTuple):
    """Results, padded.

    Attributes:
      query: ``[M, R, D]``.
      direction: ``[M, R, D]``: the adjoint solution in float32, or the gradient of a given probe in
        its dtype; None for softmax attention.
      rows: float32 ``[M, 8, R]``, see `ROW_OUTPUTS`.
      origins: float32 ``[M, 8 * tiles, D]``, the origin of each tile of rows 8 times; None for 0.
    """

    query: jax.Array
    direction: jax.Array | None
    rows: jax.Array
    origins: jax.Array | None


def row_gradients(
    shape: Shape,
    mask: MaskSpec,
    arithmetic: Arithmetic,
    options: CGOptions | None,
    query,
    key,
    value,
    cotangent,
    probe,
    key_mean,
    rows,
    masking: Masking,
    *,
    interpret: Any = None,
) -> RowGradients:
    """Gradients with respect to query, probe or ridge, and scale.

    Args:
      query: ``[M, R, D]``; key ``[M, S, D]``; value ``[M, S, Dv]``; cotangent ``[M, R, Dv]``.
      probe: the solution, float32 ``[M, R, D]``, if there is an `options`, else the given probe.
      key_mean: float32 ``[M, R, D]``; None, as `probe`, for softmax attention.
      rows: float32 ``[M, 3, R]`` or ``[M, 4, R]``, see `ROW_INPUTS`.
    """
    operands = row_operands(shape, masking, query, key, value, probe, rows)
    operands.blocked("cotangent", cotangent, row_block(shape, shape.value_dim))
    operands.blocked("key_mean", key_mean, row_block(shape, shape.head_dim))
    groups, count, d = shape.groups, shape.blocks.rows, shape.head_dim

    def struct(*size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((groups, *size), dtype)

    whole, number = row_block(shape, d), len(ROW_OUTPUTS) + 1
    outputs = {
        "query": (struct(shape.num_rows, d, dtype=shape.dtype), whole),
        "rows": (struct(number, shape.num_rows), row_numbers(shape, number)),
    }
    scratch = launch.row_scratch(shape) | {"sums": vectors(count, d), "total": vectors(count)}
    if shape.has_origins:
        origins = struct(SUBLANES * (shape.num_rows // count), d)
        outputs["origins"] = (origins, pl.BlockSpec((None, SUBLANES, d), lambda m, i: (m, i, 0)))
    if probe is None:
        scratch |= {"key_mean": vectors(count, d), "weight": vectors(count)}
    else:
        outputs["direction"] = (struct(shape.num_rows, d, dtype=probe.dtype), whole)
    if options is not None:
        scratch |= solver.scratch(count, d)

    def body(given, out, memory):
        _body(shape, mask, arithmetic, options, given, out, memory)

    results = launch.call(
        body, "lla_row_gradients", operands, outputs, scratch,
        tiles=shape.num_rows // count, interpret=interpret,
    )  # fmt: skip
    return RowGradients(
        results["query"], results.get("direction"), results["rows"], results.get("origins")
    )


def _body(shape, mask, arithmetic: Arithmetic, options, given, out, memory):
    rows = RowTile(shape, mask, given, memory)
    if rows.origin is not None:
        out["origins"][...] = jnp.broadcast_to(rows.origin, (SUBLANES, shape.head_dim))
    scale, log_sum_exp, delta = (rows.number(i) for i in range(3))
    seen = log_sum_exp > -jnp.inf
    shift = jnp.where(seen, log_sum_exp, 0.0)
    cotangent = (given["cotangent"][...],)
    sums, total = memory["sums"], memory["total"]
    probed = "probe" in given

    def weights(valid, keys):
        logits = scale * tile.product((rows.queries,), (keys,), NT)
        return jnp.where(valid, jnp.exp(logits - shift), 0.0)

    def stream(weigh):
        """Sums the rounded ``weigh(p, keys, values)`` and its products with the keys.

        For softmax attention also p and p k: no other pass computes the mean key.
        """
        cleared = ("sums", "total") if probed else ("sums", "total", "key_mean", "weight")
        for name in cleared:
            memory[name][...] = jnp.zeros_like(memory[name])

        def add(valid, keys, values):
            p = weights(valid, keys)
            added, added_total = arithmetic.weighted_sum(weigh(p, keys, values), keys)
            sums[...] += added
            total[...] += added_total
            if not probed:
                added, added_total = arithmetic.weighted_sum(p, keys)
                memory["key_mean"][...] += added
                memory["weight"][...] += added_total

        rows.stream(add, "key", "value")

    cotangent_mean, key_mean, solution = delta, None, None
    if probed:
        key_mean = given["key_mean"][...]
        stream(lambda p, _, values: p * (tile.product(cotangent, (values,), NT) - delta))
        cotangent_mean = delta + total[...]
        target = sums[...] - total[...] * key_mean
    numbers = {"scale": scale, "log_sum_exp": log_sum_exp}
    if options is not None:
        ridge, probe = rows.number(3), given["probe"][...]
        solution, _, _ = solver.solve(
            rows, memory, arithmetic, options, target, weights, key_mean, ridge,
            seen & rows.exists, energy_offset=0,
        )  # fmt: skip
        out["direction"][...] = solution
        numbers["d_ridge"] = row_dot(solution, probe)
        probe_parts, probe = arithmetic.parts(probe), arithmetic.rounded(probe)
    elif probed:
        out["direction"][...] = (-target).astype(shape.dtype)
        probe_parts, probe = (given["probe"][...],), given["probe"][...].astype(jnp.float32)

    cotangent_shift = cotangent_mean
    if probed:
        probe_shift = numbers["probe_shift"] = row_dot(key_mean, probe)
    if options is not None:
        solution_parts = arithmetic.parts(solution)
        cotangent_shift = cotangent_mean - row_dot(key_mean, arithmetic.rounded(solution))
    numbers["cotangent_shift"] = cotangent_shift

    def weigh(p, keys, values):
        """p a e: softmax weight p, effective weight p a, and its cotangent e."""
        e = tile.product(cotangent, (values,), NT) - cotangent_shift
        if options is not None:
            e = e - tile.product(solution_parts, (keys,), NT)
        if probed:
            p = p * (1 - (tile.product(probe_parts, (keys,), NT) - probe_shift))
        return p * e

    stream(weigh)
    numbers["mean"] = total[...]
    if not probed:
        # Rounding of the output makes the sum of p e nonzero. Centring the keys keeps an offset
        # that they share from multiplying it.
        key_mean = memory["key_mean"][...] / jnp.where(seen, memory["weight"][...], 1.0)
    weighted_keys = sums[...] - total[...] * key_mean
    d_query = scale * weighted_keys
    if options is not None:
        d_query = d_query + solution
    out["query"][...] = d_query.astype(shape.dtype)
    numbers["d_scale"] = row_dot(rows.queries.astype(jnp.float32), weighted_keys)
    for index, name in enumerate((*ROW_OUTPUTS, None)):
        column = numbers.get(name, jnp.zeros_like(scale))
        out["rows"][pl.ds(index, 1), :] = tile.to_row(column)
