"""Backward kernels: gradients of the queries, and of the keys and values.

Both recompute the weights from the log-sum-exp. For local linear attention the probe x and the
adjoint solution u come from `lla.kernels.mosaic_gpu.solve`, negated and in 16 bits. Parallax has a
probe only, softmax attention neither. With ``a = 1 - (k - k_mean) . x`` and
``e = c - c_mean - (k - k_mean) . u`` the gradient of a logit is ``p (a e - sum p a e)``.

The program instance that owns keys sums their gradients over the queries of all heads that share
them. There are no atomics, so that results are deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels import lowered
from lla.kernels.mosaic_gpu.launch import (
    Config,
    Environment,
    Masking,
    Ring,
    Shape,
    key_program_index,
    launch,
    query_program_index,
    ring_scratch,
    row_tile,
    run_or_skip,
    skip_tiles,
    stream_keys_and_values,
)
from lla.kernels.mosaic_gpu.query_rows import QueryRows
from lla.kernels.mosaic_gpu.tile import (
    LOG2E,
    ROW_BLOCK,
    WGMMA_COL,
    Arithmetic,
    MaskSpec,
    by_column,
    by_row,
    narrow_transforms,
    over_tiles,
    rounded,
    row_dot,
    wide_transforms,
)


class Directions(NamedTuple):
    """The negated probe and adjoint solution, ``[B, T, N, D]`` in 16 bits; None where absent.

    Attributes:
      probe, adjoint: the high parts.
      probe_low, adjoint_low: the low parts, that is, the rounding errors of the high ones.
      probe_shift: the mean key times the probe, ``[B, N, T]``.
      key_mean: float32; given whenever there is a probe.
    """

    probe: jax.Array | None = None
    probe_shift: jax.Array | None = None
    adjoint: jax.Array | None = None
    adjoint_low: jax.Array | None = None
    key_mean: jax.Array | None = None
    probe_low: jax.Array | None = None


class Rows(NamedTuple):
    """Scalars of every query, float32 ``[B, N, T]``.

    `cotangent_mean` is ``c_mean`` plus the mean key times the *negated* adjoint solution.
    """

    scale: jax.Array
    log_sum_exp: jax.Array
    cotangent_mean: jax.Array


class QueryGradients(NamedTuple):
    """Gradients of query and scale; `mean` is ``sum_j p a e`` of every query."""

    query: jax.Array
    scale: jax.Array
    mean: jax.Array


@lowered.jit("shape", "mask", "config", "interpret")
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
    """Gradients with respect to the queries and their scales."""
    env = Environment(shape, mask, config, Arithmetic(interpret is not None, config.hold_sums))
    count = config.warpgroups
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
        "inputs": row_tile(shape, config, 2),
        "ring": ring_scratch(shape, config, 2),
        "rows": plgpu.SMEM((count, 2, ROW_BLOCK), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=2 + extra, num_barriers=count),
        "reloaded": plgpu.Barrier(num_barriers=count),
    }
    if extra:
        wide = plgpu.SMEM(
            (count, ROW_BLOCK, shape.head_dim), jnp.float32, transforms=wide_transforms()
        )
        scratch["directions"] = plgpu.RefUnion(row_tile(shape, config, 2), wide)
    body = functools.partial(_query_body, env)
    results = launch(
        body, outputs, scratch, operands,
        programs=env.query_programs, config=config, interpret=interpret,
    )  # fmt: skip
    return QueryGradients(**results)


def _query_body(env: Environment, given, out, scratch):
    count = env.config.warpgroups
    program = query_program_index(env.shape, count * ROW_BLOCK)
    tiles = env.key_tiles(given["masking"], program)
    key_tile, value_tile, *barriers = scratch["ring"]
    ring = Ring((key_tile, value_tile), *barriers, env.config.stages, env.config.hold_sums)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < count)
    def _():
        env.set_registers(compute=True)
        run_or_skip(
            env, program, warpgroup,
            lambda: GradientRows(env, given, out, scratch, program, tiles, warpgroup, ring).run(),
            lambda: skip_tiles(tiles, (ring,)),
        )  # fmt: skip

    @pl.when(warpgroup == count)
    def _():
        env.set_registers(compute=False)
        stream_keys_and_values(env, given, program, tiles, ring)


@dataclasses.dataclass
class GradientRows(QueryRows):
    """The query gradients of one consumer warpgroup."""

    ring: Ring

    def run(self):
        given, load = self.given, self.env.arithmetic.load
        directions, loaded = given["directions"], self.scratch["loaded"].at[self.w]
        query, cotangent = (self.scratch["inputs"].at[self.w, i] for i in range(2))
        copies = [(given["query"], query), (given["cotangent"], cotangent)]
        probe = adjoint = None
        if directions.probe is not None:
            probe = self.scratch["directions"][0].at[self.w, 0]
            copies.append((directions.probe, probe))
        if directions.adjoint is not None:
            adjoint = self.scratch["directions"][0].at[self.w, 1]
            copies.append((directions.adjoint, adjoint))
        for array, tile in copies:
            plgpu.copy_gmem_to_smem(self.row_tile(array), tile, loaded)
        plgpu.barrier_wait(loaded)

        excess, mean, weighted_keys = self.sums(query, cotangent, probe, adjoint)
        if adjoint is not None:
            adjoint = load(adjoint)
        if directions.key_mean is not None:
            reloaded = self.scratch["reloaded"].at[self.w]
            tile = self.scratch["directions"][1].at[self.w]
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(self.row_tile(directions.key_mean), tile, reloaded)
            plgpu.barrier_wait(reloaded)
            weighted_keys = weighted_keys - by_row(excess, self.matrix) * load(tile)
        rows = self.scratch["rows"].at[self.w]
        rows.at[0][...] = row_dot(load(query).astype(jnp.float32), weighted_keys)
        rows.at[1][...] = mean
        scale = self.row_vector(given["scale"])
        gradient = by_row(scale, self.matrix) * weighted_keys
        if adjoint is not None:
            reloaded = self.scratch["reloaded"].at[self.w]
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(self.row_tile(directions.adjoint_low), cotangent, reloaded)
            plgpu.barrier_wait(reloaded)
            gradient = gradient - adjoint.astype(jnp.float32)
            gradient = gradient - load(cotangent).astype(jnp.float32)
        query[...] = gradient.astype(self.env.shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query, self.row_tile(self.out["query"]))
        plgpu.copy_smem_to_gmem(rows.at[0], self.row_slice(self.out["scale"]))
        plgpu.copy_smem_to_gmem(rows.at[1], self.row_slice(self.out["mean"]))
        plgpu.wait_smem_to_gmem(0)

    def sums(self, query, cotangent, probe, adjoint):
        """The sums of ``p a e`` after and before rounding, and that of ``p a e k``."""
        arithmetic, block = self.env.arithmetic, self.env.config.block
        rows = self.given["rows"]
        scale, ids = self.scale_and_ids()
        log_sum_exp = self.row_vector(rows.log_sum_exp)
        cotangent_mean = self.row_vector(rows.cotangent_mean)
        if probe is not None:
            constant = 1 - self.row_vector(self.given["directions"].probe_shift)

        def step(j, carry, masked, add):
            t, excess, mean = carry
            slot = self.ring.consumer_wait(t)
            keys, values = (tile.at[slot] for tile in self.ring.tiles)
            products = [[(query, keys)], [(cotangent, values)]]
            if adjoint is not None:
                products[1].append((adjoint, keys))
            if probe is not None:
                products.append([(probe, keys)])

            def use(scores, e, *along):
                weights = self.weights(scores(), j, masked, scale, ids, log_sum_exp)
                self.ring.release_deferred(t, 0)
                e = e()
                weights = weights * (e - by_row(cotangent_mean, e.shape))
                for part in along:
                    part = part()
                    weights = weights * (part + by_row(constant, part.shape))
                return *rounded(weights, self.env.shape.dtype), weights.sum(axis=1)

            weights, weights_sum, exact_sum = arithmetic.with_products(block, use, *products)
            mean = mean + exact_sum
            add([(weights, keys)])
            self.ring.release_or_defer(slot)
            return t + 1, excess + weights_sum, mean

        zero = self.zeros(rows=True)
        (t, excess, mean), (total,) = arithmetic.summing(
            (self.env.shape.head_dim,), self.over_tiles, step, (jnp.int32(0), zero, zero)
        )
        self.ring.release_deferred(t, 0)
        return excess, mean, total


# ---------------------------------------------------------------------------------------------
# Keys and values

NUMBERS = ("scale", "log_sum_exp", "cotangent_mean", "mean", "constant")


@lowered.jit("shape", "mask", "config", "interpret")
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
    """Gradients of key and value, in the dtype of the operands.

    `mean` is that of `QueryGradients`, and ``config.block`` is a number of queries. If the
    directions have low parts, the scores along them use both parts; `rows` and `probe_shift` must
    then be those of both parts as well.
    """
    env = Environment(shape, mask, config, Arithmetic(interpret is not None, config.hold_sums))
    count = config.warpgroups
    lows = ()
    if directions.probe_low is not None:
        lows = (directions.probe_low, directions.adjoint_low)
    constant = mean if directions.probe is None else 1 - directions.probe_shift
    numbers = jnp.stack(
        [rows.scale, rows.log_sum_exp, rows.cotangent_mean, mean, constant], axis=2
    )  # [B, N, 5, T]
    operands = {
        "key": key,
        "value": value,
        "streamed": [
            array
            for array in (query, cotangent, directions.probe, directions.adjoint, *lows)
            if array is not None
        ],
        "numbers": numbers,
        "masking": masking.operands(),
    }
    streams = len(operands["streamed"])
    tile = plgpu.SMEM(
        (config.stages, config.block, shape.head_dim), shape.dtype,
        transforms=narrow_transforms(config.block, shape.head_dim),
    )  # fmt: skip
    scratch = {
        "inputs": row_tile(shape, config, 2),
        "ring": (
            *([tile] * streams),
            plgpu.SMEM((config.stages, len(NUMBERS), config.block), jnp.float32),
            plgpu.Barrier(num_arrivals=streams + 1, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=count, num_barriers=config.stages),
        ),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=count),
    }
    has = (directions.probe is not None, directions.adjoint is not None)
    results = launch(
        functools.partial(_key_body, env, has),
        {"key": shape.keys(), "value": shape.keys()}, scratch, operands,
        programs=shape.batch * shape.kv_heads * (shape.num_keys // (count * ROW_BLOCK)),
        config=config, interpret=interpret,
    )  # fmt: skip
    return results["key"], results["value"]


def key_weights(scores, e, along, number):
    """The weights ``p a``, ``p e`` and the gradients of the logits, keys by queries.

    `scores` are logits in base 2 and `along` holds the scores along the probe, if there is one;
    `number` gives a row of numbers of the queries by its name.
    """
    p = jnp.exp2(scores - number("log_sum_exp"))
    e = e - number("cotangent_mean")
    p_a = p
    for part in along:
        p_a = p * (part + number("constant"))
    return p_a, p * e, number("scale") * (p_a * e - p * number("mean"))


def _key_body(env: Environment, has: tuple[bool, bool], given, out, scratch):
    count, block, group = env.config.warpgroups, env.config.block, env.shape.group
    program = key_program_index(env.shape, count * ROW_BLOCK)
    tiles = env.query_tiles(given["masking"], program)
    *streamed, produced, consumed = scratch["ring"]
    ring = Ring(tuple(streamed), produced, consumed, env.config.stages, env.config.hold_sums)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < count)
    def _():
        env.set_registers(compute=True)
        _key_rows(env, has, given, out, scratch, program, tiles, ring, warpgroup)

    @pl.when(warpgroup == count)
    def _():
        env.set_registers(compute=False)

        def stream(g, i, t):
            head = program.head + g
            where = (program.b, pl.ds(i * block, block), head)
            sources = [array.at[where] for array in given["streamed"]]
            numbers = given["numbers"].at[program.b, head, :, pl.ds(i * block, block)]
            return ring.produce(t, [*sources, numbers])

        def stream_head(g, t):
            return lax.fori_loop(tiles.low, tiles.high, lambda i, t: stream(g, i, t), t)

        ring.drain(lax.fori_loop(0, group, stream_head, jnp.int32(0)))


def _key_rows(env: Environment, has, given, out, scratch, program, tiles, ring: Ring, w):
    """The key and value gradients of one consumer warpgroup."""
    arithmetic, dtype, block = env.arithmetic, env.shape.dtype, env.config.block
    first = program.first + w * ROW_BLOCK
    scores_shape = (ROW_BLOCK, block)
    key, value = (scratch["inputs"].at[w, i] for i in range(2))
    loaded = scratch["loaded"].at[w]
    where = (program.b, pl.ds(first, ROW_BLOCK), program.kv_head)
    plgpu.copy_gmem_to_smem(given["key"].at[where], key, loaded)
    plgpu.copy_gmem_to_smem(given["value"].at[where], value, loaded)
    plgpu.barrier_wait(loaded)
    ids = env.row_ids(given["masking"], program.b, first, transposed=True)

    def step(i, t, masked, add):
        slot = ring.consumer_wait(t)
        query, cotangent, *directions = (tile.at[slot] for tile in ring.tiles[:-1])
        probe = directions[0] if has[0] else None
        adjoint = directions[1] if has[1] else None

        @functools.cache
        def number(name):
            ref = ring.tiles[-1].at[slot, NUMBERS.index(name)]
            return by_column(arithmetic.load(ref, WGMMA_COL), scores_shape)

        products = [[(key, query)], [(value, cotangent)]]
        if adjoint is not None:
            products[1].append((key, adjoint))
        if probe is not None:
            products.append([(key, probe)])
        if len(directions) == 4:  # the low parts
            products[2].append((key, directions[2]))
            products[1].append((key, directions[3]))
        scores, e, *along = arithmetic.products(block, *products)
        ring.release_deferred(t, 0)
        scores = scores * (number("scale") * LOG2E)
        if masked:
            valid = env.valid(
                given["masking"], program.b, scores_shape, i * block, first,
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
        ring.release_or_defer(slot)
        return t + 1

    def loop(body, carry):
        def head(_, carry):
            return over_tiles(env.mask, tiles, body, carry, low_edge=True)

        return lax.fori_loop(0, env.shape.group, head, carry)

    t, (d_key, d_value) = arithmetic.summing((env.shape.head_dim,) * 2, loop, step, jnp.int32(0))
    ring.release_deferred(t, 0)
    for gradient, tile, target in ((d_key, key, out["key"]), (d_value, value, out["value"])):
        tile[...] = gradient.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, target.at[where])
    plgpu.wait_smem_to_gmem(0)
