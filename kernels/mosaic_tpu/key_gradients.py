"""Gradients of keys and values: a program instance owns keys and streams the rows that see them.

The rows of a key head are those of all its query heads, so that summing over these needs neither
atomics nor copies of the keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_tpu import launch, tile
from lla.kernels.mosaic_tpu.forward import Masking
from lla.kernels.mosaic_tpu.launch import SUBLANES, Operands, Shape, vectors
from lla.kernels.mosaic_tpu.row_gradients import ROW_OUTPUTS
from lla.kernels.mosaic_tpu.tile import NT, Arithmetic, MaskSpec, SequenceMask


def key_gradients(
    shape: Shape,
    mask: MaskSpec,
    arithmetic: Arithmetic,
    query,
    key,
    value,
    cotangent,
    probe,
    solution,
    rows,
    origins,
    masking: Masking,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients ``[M, S, D]`` and ``[M, S, Dv]`` in the inputs' dtype.

    Args:
      query: ``[M, R, D]``; key ``[M, S, D]``; value ``[M, S, Dv]``; cotangent ``[M, R, Dv]``.
      probe: ``[M, R, D]``, in float32 if it is a solution; None for softmax attention.
      solution: of the adjoint system, float32 ``[M, R, D]``; None without a solve.
      rows, origins: float32 ``[M, 8, R]`` and ``[M, 8 * tiles, D]``, from
        `lla.kernels.mosaic_tpu.row_gradients`.
    """
    own = shape.blocks.own_keys

    def block(width):
        return pl.BlockSpec((None, own, width), lambda m, i: (m, i, 0))

    operands = Operands(shape, masking.numbers)
    operands.blocked("key", key, block(shape.head_dim))
    operands.blocked("value", value, block(shape.value_dim))
    ids = pl.BlockSpec((None, 1, own), lambda m, i: (shape.sequence(m), 0, i))
    operands.blocked("key_ids", masking.key_ids, ids)
    streamed = {
        "query": query, "cotangent": cotangent, "probe": probe, "solution": solution, "rows": rows,
        "origins": origins, "query_ids": masking.query_ids,
    }  # fmt: skip
    for name, array in streamed.items():
        if array is not None:
            operands.streamed(name, array)
    outputs, scratch = {}, {}
    for name, width in (("d_key", shape.head_dim), ("d_value", shape.value_dim)):
        size = (shape.groups, shape.num_keys, width)
        outputs[name] = (jax.ShapeDtypeStruct(size, shape.dtype), block(width))
        scratch[name] = vectors(own, width)

    def body(given, out, memory):
        _body(shape, mask, arithmetic, given, out, memory)

    results = launch.call(
        body, "lla_key_gradients", operands, outputs, scratch,
        tiles=shape.num_keys // own, interpret=interpret,
    )  # fmt: skip
    return results["d_key"], results["d_value"]


def _body(shape: Shape, mask: MaskSpec, arithmetic: Arithmetic, given, out, memory):
    own, size = shape.blocks.own_keys, shape.blocks.rows
    head, group = pl.program_id(0), jnp.int32(shape.group)
    first = pl.program_id(1) * own
    b = shape.sequence(head)
    sequence = SequenceMask(*(given["numbers"][b, i] for i in range(2)))
    low, high = tile.row_tiles(
        mask, sequence, first, own, shape.num_queries, shape.group, size
    )  # fmt: skip
    positions = first + lax.broadcasted_iota(jnp.int32, (own, 1), 0)
    key_ids = tile.ids_to_column(given["key_ids"][...]) if mask.segments else None
    values = (given["value"][...],)
    d_key, d_value = memory["d_key"], memory["d_value"]
    d_key[...] = jnp.zeros_like(d_key)
    d_value[...] = jnp.zeros_like(d_value)

    def in_parts(ref):
        """A direction as operands of products; a given probe is exact in its own dtype."""
        array = ref[...]
        return (array,) if array.dtype == shape.dtype else arithmetic.parts(array)

    def step(refs):
        query, cotangent = (refs["query"][...],), (refs["cotangent"][...],)
        keys = given["key"][...]
        keys = (keys - refs["origins"][:1] if shape.has_origins else keys,)
        number = {name: refs["rows"][i : i + 1, :] for i, name in enumerate(ROW_OUTPUTS)}
        index = (low + pl.program_id(0)) * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        valid = tile.visible(
            mask, sequence.length, lax.div(index, group) + sequence.offset, positions,
            refs["query_ids"][...] if mask.segments else None, key_ids,
        )  # fmt: skip
        logits = number["scale"] * tile.product(keys, query, NT)
        p = jnp.where(valid, jnp.exp(logits - number["log_sum_exp"]), 0.0)
        # p, p a and e are as in `row_gradients`.
        e = tile.product(values, cotangent, NT) - number["cotangent_shift"]
        weighted = p
        if "probe" in refs:
            probe = in_parts(refs["probe"])
            weighted = p * (1 - (tile.product(keys, probe, NT) - number["probe_shift"]))
        if "solution" in refs:
            solution = arithmetic.parts(refs["solution"][...])
            e = e - tile.product(keys, solution, NT)
        d_logits = weighted * e - p * number["mean"]
        weighted = arithmetic.parts(weighted)
        change = tile.product(arithmetic.parts(number["scale"] * d_logits), query)
        if "probe" in refs:
            change = change - tile.product(arithmetic.parts(p * e), probe)
        if "solution" in refs:
            change = change - tile.product(weighted, solution)
        d_key[...] += change
        d_value[...] += tile.product(weighted, cotangent)

    order = ("query", "cotangent", "probe", "solution", "rows", "origins")
    names = [name for name in order if name in given]
    specs, sources = [], []
    for name in names:
        ref = given[name]
        if name == "rows":
            specs.append(pl.BlockSpec((ref.shape[1], size), lambda i: (0, low + i)))
        else:
            count = SUBLANES if name == "origins" else size
            specs.append(pl.BlockSpec((count, ref.shape[-1]), lambda i: (low + i, 0)))
        sources.append(ref.at[head])
    if mask.segments:
        names.append("query_ids")
        specs.append(pl.BlockSpec((1, size), lambda i: (0, low + i)))
        sources.append(given["query_ids"].at[b])
    pltpu.emit_pipeline(
        lambda *refs: step(dict(zip(names, refs, strict=True))), grid=(high - low,), in_specs=specs
    )(*sources)
    out["d_key"][...] = d_key[...].astype(shape.dtype)
    out["d_value"][...] = d_value[...].astype(shape.dtype)
