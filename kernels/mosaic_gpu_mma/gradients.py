"""The backward passes: `lla.kernels.mosaic_gpu.gradients` with products by mma.sync."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu import gradients as hopper
from lla.kernels.mosaic_gpu.gradients import (
    NUMBERS,
    Directions,
    QueryGradients,
    Rows,
    key_weights,
)
from lla.kernels.mosaic_gpu.launch import Masking, Shape, key_program_index, query_program_index
from lla.kernels.mosaic_gpu.tile import (
    LOG2E,
    ROW_BLOCK,
    WGMMA_COL,
    MaskSpec,
    by_column,
    by_row,
    over_tiles,
    row_dot,
)
from lla.kernels.mosaic_gpu_mma.launch import (
    Config,
    Ring,
    RowTiles,
    environment,
    key_sources,
    launch,
    load_operands,
    operand_scratch,
    ring_scratch,
    tile_index,
)
from lla.kernels.mosaic_gpu_mma.tile import store


@functools.partial(jax.jit, static_argnames=("shape", "mask", "config", "interpret"))
def query_gradients(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    rows: Rows,
    directions: Directions,
    masking: Masking,
    *,
    interpret: Any = None,
) -> QueryGradients:
    """See `lla.kernels.mosaic_gpu.gradients.query_gradients`."""
    env = environment(shape, mask, config, interpret)
    outputs = {"query": shape.queries(), "scale": shape.rows(), "mean": shape.rows()}
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "cotangent": cotangent,
        "scale": rows.scale,
        "rows": rows,
        "directions": directions,
        "masking": masking.operands(),
    }
    extra = sum(array is not None for array in (directions.probe, directions.adjoint))
    scratch = {
        "ring": ring_scratch(shape, config, 2),
        **operand_scratch(shape, config, 2 + extra),
    }
    results = launch(
        functools.partial(_query_body, env), outputs, scratch, operands,
        programs=env.query_programs, config=config, interpret=interpret,
    )  # fmt: skip
    return QueryGradients(**results)


def _query_body(env, given, out, scratch):
    program = query_program_index(env.shape, ROW_BLOCK)
    tiles = env.key_tiles(given["masking"], program)
    sources = key_sources(env, program, tiles, (given["key"], given["value"]))
    ring = Ring(env.config, scratch["ring"]["tiles"], scratch["ring"].get("filled"), sources)
    GradientRows(env, given, out, scratch, program, tiles, 0, ring).run()


@dataclasses.dataclass
class GradientRows(RowTiles, hopper.GradientRows):
    """The query gradients of 64 rows."""

    def run(self):
        given, load, f32 = self.given, self.env.arithmetic.load, jnp.float32
        directions = given["directions"]
        self.ring.start()
        arrays = [given["query"], given["cotangent"]]
        arrays += [a for a in (directions.probe, directions.adjoint) if a is not None]
        sources = [self.row_tile(array) for array in arrays]
        query, cotangent, *rest = load_operands(self.env, self.scratch, sources)
        probe = rest.pop(0) if directions.probe is not None else None
        adjoint = rest.pop(0) if directions.adjoint is not None else None
        excess, mean, weighted_keys = self.sums(query, cotangent, probe, adjoint)
        self.ring.finish(self.tiles.high - self.tiles.low)
        if directions.key_mean is not None:
            key_mean = load(self.row_tile(directions.key_mean))
            weighted_keys = weighted_keys - by_row(excess, self.matrix) * key_mean
        query = load(self.row_tile(given["query"])).astype(f32)
        store(self.row_slice(self.out["scale"]), row_dot(query, weighted_keys))
        store(self.row_slice(self.out["mean"]), mean)
        gradient = by_row(self.row_vector(given["scale"]), self.matrix) * weighted_keys
        if adjoint is not None:
            for part in (directions.adjoint, directions.adjoint_low):
                gradient = gradient - load(self.row_tile(part)).astype(f32)
        store(self.row_tile(self.out["query"]), gradient.astype(self.env.shape.dtype))


@functools.partial(jax.jit, static_argnames=("shape", "mask", "config", "interpret"))
def key_gradients(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    rows: Rows,
    mean: jax.Array,
    directions: Directions,
    masking: Masking,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `lla.kernels.mosaic_gpu.gradients.key_gradients`."""
    env = environment(shape, mask, config, interpret)
    lows = ()
    if directions.probe_low is not None:
        lows = (directions.probe_low, directions.adjoint_low)
    constant = mean if directions.probe is None else 1 - directions.probe_shift
    operands = {
        "key": key,
        "value": value,
        "streamed": [
            array
            for array in (query, cotangent, directions.probe, directions.adjoint, *lows)
            if array is not None
        ],
        "numbers": dict(
            zip(
                NUMBERS,
                (rows.scale, rows.log_sum_exp, rows.cotangent_mean, mean, constant),
                strict=True,
            )
        ),
        "masking": masking.operands(),
    }
    scratch = {
        "ring": ring_scratch(shape, config, len(operands["streamed"])),
        **operand_scratch(shape, config, 2),
    }
    has = (directions.probe is not None, directions.adjoint is not None)
    results = launch(
        functools.partial(_key_body, env, has),
        {"key": shape.keys(), "value": shape.keys()}, scratch, operands,
        programs=shape.batch * shape.kv_heads * (shape.num_keys // ROW_BLOCK),
        config=config, interpret=interpret,
    )  # fmt: skip
    return results["key"], results["value"]


def _key_body(env, has: tuple[bool, bool], given, out, scratch):
    arithmetic, dtype = env.arithmetic, env.shape.dtype
    block, group = env.config.block, env.shape.group
    program = key_program_index(env.shape, ROW_BLOCK)
    tiles = env.query_tiles(given["masking"], program)
    count = jnp.maximum(tiles.high - tiles.low, 1)
    last = jnp.int32(env.shape.num_queries // block - 1)

    def sources(t):
        head = program.head + jnp.minimum(lax.div(t, count), jnp.int32(group - 1))
        first = jnp.minimum(tiles.low + lax.rem(t, count), last) * block
        where = tile_index(env.shape, program.b, first, block, head)
        return [array.at[where] for array in given["streamed"]]

    ring = Ring(env.config, scratch["ring"]["tiles"], scratch["ring"].get("filled"), sources)
    ring.start()
    where = tile_index(env.shape, program.b, program.first, ROW_BLOCK, program.kv_head)
    key, value = load_operands(env, scratch, [given["key"].at[where], given["value"].at[where]])
    ids = env.row_ids(given["masking"], program.b, program.first, transposed=True)
    scores_shape = (ROW_BLOCK, block)

    def step(i, state, masked, add):
        t, head = state
        slot = ring.consumer_wait(t)
        query, cotangent, *directions = (tile.at[slot] for tile in ring.tiles)
        probe = directions[0] if has[0] else None
        adjoint = directions[1] if has[1] else None

        @functools.cache
        def number(name):
            ref = given["numbers"][name].at[program.b, head, pl.ds(i * block, block)]
            return by_column(arithmetic.load(ref, WGMMA_COL), scores_shape)

        products = [[(key, query)], [(value, cotangent)]]
        if adjoint is not None:
            products[1].append((key, adjoint))
        if probe is not None:
            products.append([(key, probe)])
        if len(directions) == 4:  # what rounding has taken from both
            products[2].append((key, directions[2]))
            products[1].append((key, directions[3]))
        scores, e, *along = arithmetic.products(block, *products)
        scores = scores * (number("scale") * LOG2E)
        if masked:
            valid = env.valid(
                given["masking"], program.b, scores_shape, i * block, program.first,
                transposed=True, row_ids=ids,
            )  # fmt: skip
            scores = jnp.where(valid, scores, -jnp.inf)
        p_a, p_e, d_logits = key_weights(scores, e, along, number)
        weights = p_a.astype(dtype)
        key_products = [(d_logits.astype(dtype), query)]
        if probe is not None:
            key_products.append((p_e.astype(dtype), probe))
        if adjoint is not None:
            key_products.append((weights, adjoint))
        add(key_products, [(weights, cotangent)])
        return t + 1, head

    def loop(body, carry):
        def one_head(g, carry):
            (t, _), sums = carry
            carry = (t, program.head + g), sums
            return over_tiles(env.mask, tiles, body, carry, low_edge=True)

        return lax.fori_loop(0, group, one_head, carry)

    start = (jnp.int32(0), program.head)
    (t, _), (d_key, d_value) = arithmetic.summing((env.shape.head_dim,) * 2, loop, step, start)
    ring.finish(t)
    store(out["key"].at[where], d_key.astype(dtype))
    store(out["value"].at[where], d_value.astype(dtype))
