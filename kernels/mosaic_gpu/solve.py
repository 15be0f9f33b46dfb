"""The solve: ``A_i x_i = k_mean_i - q_i`` (forward) or ``A_i u_i = h_i`` (adjoint).

A program instance takes 64 rows a warpgroup. It streams the keys once for the right-hand side (the
statistics of the softmax and the mean key; or the weighted cotangents) and once for every iteration
of conjugate gradients, recomputing the weights. Iterate and residual stay in shared memory in
float32; the direction is rounded to 16 bits and used as rounded everywhere.

See ``kernels/README.md`` for the formulas and for the stopping rule.
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

from lla.kernels.mosaic_gpu.launch import (
    Config,
    Environment,
    Masking,
    Ring,
    Shape,
    Turns,
    hand_on_all,
    launch,
    ones_scratch,
    query_place,
    ring_scratch,
    row_tile,
    run_by_tile,
    turns_scratch,
    work_or_pass,
)
from lla.kernels.mosaic_gpu.solve_rows import ROW_OUTPUTS, Iteration, SolveRows, any_flag
from lla.kernels.mosaic_gpu.tile import (
    ROW_BLOCK,
    ROWS,
    Arithmetic,
    MaskSpec,
    full,
    wide_transforms,
)


class Solution(NamedTuple):
    """Vectors are ``[B, T, N, D]``, rows ``[B, N, T]`` in float32.

    Attributes:
      high, low: the *negated* solution as a sum of two 16-bit parts (the right-hand side if there
        was no iteration).
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
    """What the adjoint solve needs beside the operands of the forward one.

    `key_mean` None means that it is computed here; `delta` is cotangent times output,
    ``[B, N, T]``. `probe_square` is the square length of the probe, ``[B, N, T]``: an error of the
    solution reaches the gradient of the keys times the probe. Read where the iteration has a
    tolerance.
    """

    value: jax.Array
    cotangent: jax.Array
    log_sum_exp: jax.Array
    delta: jax.Array
    key_mean: jax.Array | None
    probe_square: jax.Array | None = None


class Preconditioner(NamedTuple):
    """What the direct method has computed before the solve.

    `inverse` comes from `lla.kernels.mosaic_gpu.inverse.inverse_systems`, the rest from a forward
    solve without iterations; the adjoint solve has its own.
    """

    inverse: jax.Array
    log_sum_exp: jax.Array | None = None
    key_mean: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["marked"], meta_fields=["iteration"]
)
@dataclasses.dataclass(frozen=True)
class Choice:
    """Another iteration for some tiles of 64 rows: those with a nonzero in ``marked [B, N, T/64]``.

    `marked` is int32. Both iterations must be able to move, or neither.
    """

    iteration: Iteration
    marked: jax.Array


@functools.partial(jax.jit, static_argnames=("shape", "mask", "config", "iteration", "interpret"))
def solve(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    iteration: Iteration,
    query: jax.Array,
    key: jax.Array,
    scale: jax.Array,
    ridge: jax.Array | None,
    masking: Masking,
    adjoint: Adjoint | None = None,
    choice: Choice | None = None,
    preconditioner: Preconditioner | None = None,
    *,
    interpret: Any = None,
) -> Solution:
    """Solves for all rows; `scale` and `ridge` are ``[B, N, T]`` float32.

    With a `choice`, the tiles it marks follow its iteration instead of `iteration`. With a
    `preconditioner` its mean key and log-sum-exp are not in the results again.
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
    # A warpgroup's part of a pair has the bytes of its part of a wide tile.
    pair = row_tile(shape, config, 2)
    ring = ring_scratch(shape, config, 1)
    scratch = {
        "ring": ring,
        # One member of a union at a time.
        "iterate": plgpu.RefUnion(*((wide, pair) if forward else (wide, pair, ring[0]))),
        "remainder": plgpu.RefUnion(wide, pair),
        "rows": plgpu.SMEM((count, len(ROW_OUTPUTS), ROW_BLOCK), jnp.float32),
        "flags": plgpu.SMEM((2, count, ROW_BLOCK), jnp.int32),
        "loaded": plgpu.Barrier(num_arrivals=1 if forward else 2, num_barriers=count),
        "reloaded": plgpu.Barrier(num_barriers=count),
        "decision": plgpu.Barrier(num_arrivals=count),
    }
    if not config.resident_operand:
        scratch["query"] = row_tile(shape, config)
    scratch |= ones_scratch(shape, config) | turns_scratch(config)
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
        "marked": None if choice is None else choice.marked,
        "preconditioner": preconditioner,
    }
    body = functools.partial(_body, env, iteration, None if choice is None else choice.iteration)
    results = launch(
        body, outputs, scratch, operands,
        programs=env.query_programs, config=config, interpret=interpret,
    )  # fmt: skip
    return Solution(**results)


def _body(env: Environment, iteration: Iteration, other: Iteration | None, given, out, scratch):
    count = env.config.warpgroups
    place = query_place(env.shape, count * ROW_BLOCK)
    tiles = env.key_tiles(given["masking"], place)
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
        turns = Turns(scratch.get("turns"), count)
        turns.start(warpgroup)

        def run(iteration):
            SolveRows(
                env, given, out, scratch, place, tiles, warpgroup, iteration, keys, values
            ).run()

        work_or_pass(
            env, place, warpgroup,
            lambda: run_by_tile(given["marked"], place, warpgroup, run, iteration, other),
            lambda: _hand_on(env, iteration, given, scratch, tiles, warpgroup, keys, values),
        )  # fmt: skip
        turns.finish(warpgroup)

    @pl.when(warpgroup == count)
    def _():
        env.set_registers(compute=False)
        _stream(env, iteration, given, scratch, place, tiles, keys, values)


def _target_known(given) -> bool:
    """Whether the solve starts without a pass for its right-hand side."""
    return given["adjoint"] is None and given["preconditioner"] is not None


def _hand_on(env, iteration, given, scratch, tiles, w, keys: Ring, values: Ring | None):
    """A compute warpgroup without rows: keeps step with the others and wants no iteration."""
    flags, decision = scratch["flags"], scratch["decision"]
    rings = (keys,) if values is None else (keys, values)
    t = jnp.int32(0) if _target_known(given) else hand_on_all(tiles, rings)
    if not iteration.max_iters:
        return

    def decide():
        plgpu.barrier_arrive(decision)
        plgpu.barrier_wait(decision)

    turns = Turns(scratch.get("turns"), env.config.warpgroups)

    def turn():
        turns.take(w)
        turns.end(w)

    def one_more(carry):
        i, _, t = carry
        t = hand_on_all(tiles, (keys,), t, turn)
        decide()
        return i + 1, any_flag(flags, i, env.config.warpgroups), t

    for slot in range(2):
        flags.at[slot, w][...] = full((ROW_BLOCK,), 0, ROWS, jnp.int32)
    decide()  # that the iterations can start
    lax.while_loop(lambda c: c[1] > 0, one_more, (jnp.int32(0), jnp.int32(1), t))


def _stream(env, iteration, given, scratch, place, tiles, keys: Ring, values: Ring | None):
    """The streaming warpgroup: keys once for the right-hand side and once for every iteration."""
    block = env.config.block

    def source(array, j):
        return array.at[place.b, pl.ds(j * block, block), place.kv_head]

    def stream(t):
        def step(j, t):
            return keys.fill(t, [source(given["key"], j)])

        return lax.fori_loop(tiles.low, tiles.high, step, t)

    def stream_both(j, t):
        values.fill(t, [source(given["adjoint"].value, j)])
        return keys.fill(t, [source(given["key"], j)])

    if _target_known(given):
        t = jnp.int32(0)
    elif values is None:
        t = stream(jnp.int32(0))
    else:
        t = lax.fori_loop(tiles.low, tiles.high, stream_both, jnp.int32(0))
        values.drain(t)
    if iteration.max_iters:
        plgpu.barrier_wait(scratch["decision"])  # that the iterations can start

        def one_more(carry):
            i, _, t = carry
            t = stream(t)
            plgpu.barrier_wait(scratch["decision"])
            return i + 1, any_flag(scratch["flags"], i, env.config.warpgroups), t

        _, _, t = lax.while_loop(lambda c: c[1] > 0, one_more, (jnp.int32(0), jnp.int32(1), t))
    keys.drain(t)
