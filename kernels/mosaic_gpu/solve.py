"""The solve: ``A_i x_i = k_mean_i - q_i`` (forward) or ``A_i u_i = h_i`` (adjoint).

A consumer warpgroup owns 64 rows. The keys are streamed once for the right-hand side (log-sum-exp
and mean key, or the weighted cotangents) and once per iteration of conjugate gradients, which
recomputes the weights. Iterate and residual stay in shared memory in float32. The direction is
rounded to 16 bits, and the rounded direction is used everywhere.

The formulas are derived in ``kernels/MATHEMATICS.md``, the stopping rule in ``kernels/HOPPER.md``.
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
    Pingpong,
    Ring,
    Shape,
    launch,
    ones_scratch,
    pingpong_scratch,
    query_program_index,
    ring_scratch,
    row_tile,
    run_by_tile,
    run_or_skip,
    skip_tiles,
)
from lla.kernels.mosaic_gpu.solve_rows import ROW_OUTPUTS, CGOptions, SolveRows, any_flag
from lla.kernels.mosaic_gpu.tile import (
    ROW_BLOCK,
    WGMMA_ROW,
    Arithmetic,
    MaskSpec,
    full,
    wide_transforms,
)


class Solution(NamedTuple):
    """Vectors are ``[B, T, N, D]``, rows ``[B, N, T]`` in float32.

    Attributes:
      high, low: the *negated* solution as a sum of two 16-bit parts; without iterations, the
        right-hand side.
      shift_high, shift: the mean key times `high`, and times both.
      iterations, residual: diagnostics.
      key_mean: float32, weighted mean of the keys.
      log_sum_exp: of the logits, in base 2; ``inf`` for rows without keys. Forward only.
      cotangent_mean: weighted mean of ``cotangent . value``. Adjoint only.
    """

    high: jax.Array
    low: jax.Array
    shift_high: jax.Array
    shift: jax.Array
    iterations: jax.Array
    residual: jax.Array
    key_mean: jax.Array | None = None
    log_sum_exp: jax.Array | None = None
    cotangent_mean: jax.Array | None = None


class Adjoint(NamedTuple):
    """Operands of the adjoint solve in addition to those of the forward solve.

    Attributes:
      value, cotangent: ``[B, S, K, D]`` and ``[B, T, N, D]``.
      log_sum_exp: from the forward pass.
      delta: cotangent times output, ``[B, N, T]``.
      key_mean: None to compute it here.
      probe_square: squared norm of the probe, ``[B, N, T]``, which multiplies errors of the
        solution in the gradient of the keys. Read only if there is a tolerance.
    """

    value: jax.Array
    cotangent: jax.Array
    log_sum_exp: jax.Array
    delta: jax.Array
    key_mean: jax.Array | None
    probe_square: jax.Array | None = None


class Preconditioner(NamedTuple):
    """What the direct solver computes before the solve.

    `inverse` comes from `lla.kernels.mosaic_gpu.inverse.inverse_systems`, the rest from a forward
    solve without iterations. The adjoint solve takes the rest from `Adjoint`.
    """

    inverse: jax.Array
    log_sum_exp: jax.Array | None = None
    key_mean: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["marked"], meta_fields=["options"]
)
@dataclasses.dataclass(frozen=True)
class TileOverride:
    """Other options for the tiles of 64 rows where ``marked [B, N, T/64]`` (int32) is nonzero.

    Either both options allow iterations or neither does.
    """

    options: CGOptions
    marked: jax.Array


@lowered.jit("shape", "mask", "config", "options", "interpret")
def solve(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    options: CGOptions,
    query: jax.Array,
    key: jax.Array,
    scale: jax.Array,
    ridge: jax.Array | None,
    masking: Masking,
    adjoint: Adjoint | None = None,
    override: TileOverride | None = None,
    preconditioner: Preconditioner | None = None,
    *,
    interpret: Any = None,
) -> Solution:
    """Solves for all rows; `scale` and `ridge` are ``[B, N, T]`` float32.

    The tiles that `override` marks use its options instead of `options`. The mean key and
    log-sum-exp of a `preconditioner` are not repeated in the results.
    """
    env = Environment(shape, mask, config, Arithmetic(interpret is not None, config.hold_sums))
    count = config.warpgroups
    forward = adjoint is None
    outputs = {
        "high": shape.queries(),
        "low": shape.queries(),
        "shift_high": shape.rows(),
        "shift": shape.rows(),
        "iterations": shape.rows(),
        "residual": shape.rows(),
    }
    if not forward:
        outputs["cotangent_mean"] = shape.rows()
    elif preconditioner is None:
        outputs["log_sum_exp"] = shape.rows()
    if (preconditioner is None) if forward else (adjoint.key_mean is None):
        outputs["key_mean"] = shape.queries(jnp.float32)

    wide = plgpu.SMEM((count, ROW_BLOCK, shape.head_dim), jnp.float32, transforms=wide_transforms())
    # A warpgroup's slice of `pair` takes the same bytes as its slice of `wide`.
    pair = row_tile(shape, config, 2)
    ring = ring_scratch(shape, config, 1)
    scratch = {
        "ring": ring,
        # Only one member of a union is in use at a time.
        "iterate": plgpu.RefUnion(*((wide, pair) if forward else (wide, pair, ring[0]))),
        "residual": plgpu.RefUnion(wide, pair),
        "rows": plgpu.SMEM((count, len(ROW_OUTPUTS), ROW_BLOCK), jnp.float32),
        "flags": plgpu.SMEM((2, count, ROW_BLOCK), jnp.int32),
        "loaded": plgpu.Barrier(num_arrivals=1 if forward else 2, num_barriers=count),
        "reloaded": plgpu.Barrier(num_barriers=count),
        "decision": plgpu.Barrier(num_arrivals=count),
    }
    if not config.resident_operand:
        scratch["query"] = row_tile(shape, config)
    scratch |= ones_scratch(shape, config) | pingpong_scratch(config)
    if config.shared_mean:
        scratch["mean"] = row_tile(shape, config, 2)
    if not forward:
        scratch["values"] = ring[1:]
    operands = {
        "query": query,
        "key": key,
        "scale": scale,
        "ridge": ridge,
        "masking": masking.operands(),
        "adjoint": adjoint,
        "marked": None if override is None else override.marked,
        "preconditioner": preconditioner,
    }
    body = functools.partial(_body, env, options, None if override is None else override.options)
    results = launch(
        body, outputs, scratch, operands,
        programs=env.query_programs, config=config, interpret=interpret,
    )  # fmt: skip
    return Solution(**results)


def _body(env: Environment, options: CGOptions, other: CGOptions | None, given, out, scratch):
    count = env.config.warpgroups
    program = query_program_index(env.shape, count * ROW_BLOCK)
    tiles = env.key_tiles(given["masking"], program)
    key_tile, *barriers = scratch["ring"]
    keys = Ring((key_tile,), *barriers, env.config.stages, env.config.hold_sums)
    values = None
    if given["adjoint"] is not None:
        values = Ring(
            (scratch["iterate"][2],), *scratch["values"], env.config.stages, env.config.hold_sums
        )
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < count)
    def _():
        env.set_registers(compute=True)
        pingpong = Pingpong(scratch.get("scheduler"), count)
        pingpong.start(warpgroup)

        def run(options):
            SolveRows(
                env, given, out, scratch, program, tiles, warpgroup, options, keys, values
            ).run()

        run_or_skip(
            env, program, warpgroup,
            lambda: run_by_tile(given["marked"], program, warpgroup, run, options, other),
            lambda: _skip(env, options, given, scratch, tiles, warpgroup, keys, values),
        )  # fmt: skip
        pingpong.finish(warpgroup)

    @pl.when(warpgroup == count)
    def _():
        env.set_registers(compute=False)
        _stream(env, options, given, scratch, program, tiles, keys, values)


def _target_known(given) -> bool:
    """Whether the right-hand side is known without a pass over the keys."""
    return given["adjoint"] is None and given["preconditioner"] is not None


def _skip(env, options, given, scratch, tiles, w, keys: Ring, values: Ring | None):
    """A consumer warpgroup without rows: keeps step with the others, and never votes to go on."""
    flags, decision = scratch["flags"], scratch["decision"]
    rings = (keys,) if values is None else (keys, values)
    t = jnp.int32(0) if _target_known(given) else skip_tiles(tiles, rings)
    if not options.max_iters:
        return

    def decide():
        plgpu.barrier_arrive(decision)
        plgpu.barrier_wait(decision)

    pingpong = Pingpong(scratch.get("scheduler"), env.config.warpgroups)

    def take_turn():
        pingpong.acquire(w)
        pingpong.release(w)

    def one_more(carry):
        i, _, t = carry
        t = skip_tiles(tiles, (keys,), t, take_turn)
        decide()
        return i + 1, any_flag(flags, i, env.config.warpgroups), t

    for slot in range(2):
        flags.at[slot, w][...] = full((ROW_BLOCK,), 0, WGMMA_ROW, jnp.int32)
    decide()  # the iterations start
    lax.while_loop(lambda c: c[1] > 0, one_more, (jnp.int32(0), jnp.int32(1), t))


def _stream(env, options, given, scratch, program, tiles, keys: Ring, values: Ring | None):
    """The producer: streams the keys once for the right-hand side and once per iteration."""
    block = env.config.block

    def source(array, j):
        return array.at[program.b, pl.ds(j * block, block), program.kv_head]

    def stream(t):
        def step(j, t):
            return keys.produce(t, [source(given["key"], j)])

        return lax.fori_loop(tiles.low, tiles.high, step, t)

    def stream_both(j, t):
        values.produce(t, [source(given["adjoint"].value, j)])
        return keys.produce(t, [source(given["key"], j)])

    if _target_known(given):
        t = jnp.int32(0)
    elif values is None:
        t = stream(jnp.int32(0))
    else:
        t = lax.fori_loop(tiles.low, tiles.high, stream_both, jnp.int32(0))
        values.drain(t)
    if options.max_iters:
        plgpu.barrier_wait(scratch["decision"])  # the iterations start

        def one_more(carry):
            i, _, t = carry
            t = stream(t)
            plgpu.barrier_wait(scratch["decision"])
            return i + 1, any_flag(scratch["flags"], i, env.config.warpgroups), t

        _, _, t = lax.while_loop(lambda c: c[1] > 0, one_more, (jnp.int32(0), jnp.int32(1), t))
    keys.drain(t)
