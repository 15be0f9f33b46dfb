"""The solve of one compute warpgroup; see `lla.kernels.mosaic_gpu.solve`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lla.kernels.mosaic_gpu.inverse import apply_inverse
from lla.kernels.mosaic_gpu.launch import Ring
from lla.kernels.mosaic_gpu.rows import QueryRows
from lla.kernels.mosaic_gpu.tile import (
    COLS,
    MATRIX,
    ROW_BLOCK,
    ROWS,
    by_column,
    by_row,
    full,
    in_parts,
    rounded,
    rounded_parts,
    row_dot,
)

WORST_ROW = 4.0
"""No row of a tile may have more than this multiple of the tolerance, which is for their mean."""

SMALLEST = 1e-36
"""Rows with a curvature below this stand still: float32 holds no inverse of what is much smaller.

A row that a loss hardly depends on, behind softmax weights of e^-45, say, has an adjoint target
whose square is of that size.
"""

WORST_BOUND = 10.0
"""Where `Iteration.precise`, no row's error bound may exceed this multiple of the tolerance."""

LEAST_LEFT = 0.01
"""Of the variance of the cotangents, this part at least counts as not explained by the keys."""

LEAST_VARIANCE = 1e-5
"""The variance of the cotangents is at least this part of their squared weighted sum.

Where values are equal it would be rounding errors, and so would what an iteration improves.
"""


@dataclasses.dataclass(frozen=True)
class Iteration:
    """When to stop: at the estimated relative error `tol`, or after `max_iters`.

    ``tol=None`` runs exactly `max_iters` iterations; ``max_iters=0`` computes the right-hand side
    only. `precise` uses two 16-bit parts for directions and for all weights (of the mean key, the
    adjoint target and the scores): five products an iteration instead of three, for systems that
    the rounding of one part would spoil.
    """

    tol: float | None
    max_iters: int
    precise: bool = False


# Rows of the scratch buffer that outputs pass through.
ROW_OUTPUTS = (
    "shift_high", "shift", "iterations", "residual", "log_sum_exp", "cotangent_mean",
)  # fmt: skip


# Rows of that buffer which are free while the iterations run.
VARIANCE, WEIGHTED = "shift_high", "shift"


def any_flag(flags, i, count: int):
    """Whether any warpgroup wants another iteration after the i-th."""
    slot = lax.rem(i, jnp.int32(2))
    return functools.reduce(lambda a, b: a | b, [flags[slot, w, 0] for w in range(count)])


class _CG(NamedTuple):
    """Conjugate gradients of 64 rows; rows ``[64]`` from `rz` on."""

    count: jax.Array
    go: jax.Array
    t: jax.Array  # tiles consumed so far
    direction: tuple[jax.Array, ...]  # [64, D], the sum of one or two 16-bit parts
    rz: jax.Array
    energy: jax.Array
    contraction: jax.Array
    free_step: jax.Array  # a step along `direction` that takes no product


def _sum_of(parts: tuple[jax.Array, ...]) -> jax.Array:
    return functools.reduce(lambda a, b: a + b, [part.astype(jnp.float32) for part in parts])


@dataclasses.dataclass
class SolveRows(QueryRows):
    """The solve of one compute warpgroup."""

    iteration: Iteration
    keys: Ring
    values: Ring | None
    query: Any = None  # first operand of the logits, in shared memory or in registers

    # -- Data

    @property
    def forward(self) -> bool:
        return self.values is None

    @property
    def preconditioned(self) -> bool:
        return self.given["preconditioner"] is not None

    def load(self, name: str, member: int | None = None):
        """A warpgroup's part of the scratch array `name`."""
        array = self.scratch[name] if member is None else self.scratch[name][member]
        return self.env.arithmetic.load(array.at[self.w])

    def kept(self, name: str):
        """Where the "iterate" or the "remainder" of a warpgroup lies between iterations."""
        return self.scratch[name][0].at[self.w]

    def global_mean(self):
        """The mean key ``[B, T, N, D]`` in global memory."""
        if "key_mean" in self.out:
            return self.out["key_mean"]
        return self.given["preconditioner" if self.forward else "adjoint"].key_mean

    def centre(self):
        """The mean key that a product is centred with, ``[64, D]``.

        An error e of it adds e eᵀ to the system, which is why shared memory has two parts of it.
        """
        if self.env.config.shared_mean:
            tiles = [self.scratch["mean"].at[self.w, part] for part in range(2)]
            return _sum_of(tuple(self.env.arithmetic.load(tile) for tile in tiles))
        tile = self.row_tile(self.global_mean())
        if self.env.arithmetic.interpreted:
            return tile[...]
        return plgpu.load(tile, layout=MATRIX, optimized=False)

    def reload_mean(self):
        """The mean key in float32, through the memory of the remainder."""
        mean = self.global_mean()
        tile, barrier = self.scratch["remainder"][0].at[self.w], self.scratch["reloaded"].at[self.w]
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(self.row_tile(mean), tile, barrier)
        plgpu.barrier_wait(barrier)
        return self.env.arithmetic.load(tile)

    # -- Stages

    def run(self):
        given, scratch = self.given, self.scratch
        loaded = scratch["loaded"].at[self.w]
        resident = self.env.config.resident_operand
        if resident:
            self.query = scratch["remainder"][1].at[self.w, 1]
        else:
            self.query = scratch["query"].at[self.w]
        plgpu.copy_gmem_to_smem(self.row_tile(given["query"]), self.query, loaded)
        if not self.forward:
            plgpu.copy_gmem_to_smem(
                self.row_tile(given["adjoint"].cotangent), self.cotangent, loaded
            )
        plgpu.barrier_wait(loaded)
        self.write_ones()
        if resident:
            self.query = self.env.arithmetic.load(self.query)
        if self.forward and self.preconditioned:
            t, target, key_mean = self.known_target()
        elif self.forward:
            t, target, key_mean = self.statistics()
        else:
            t, target, key_mean = self.adjoint_target()
        if not self.iteration.max_iters:
            self.finish(-target, None, jnp.int32(0), self.zeros(rows=True))
            return
        if self.env.config.shared_mean:
            for part, rounded_mean in enumerate(in_parts(key_mean, self.env.shape.dtype, True)):
                scratch["mean"].at[self.w, part][...] = rounded_mean
        # All warpgroups are done with the values, whose memory the iterates take.
        plgpu.barrier_arrive(scratch["decision"])
        plgpu.barrier_wait(scratch["decision"])
        self.store_row("residual", row_dot(target, target))
        scratch["remainder"][0].at[self.w][...] = target
        scratch["iterate"][0].at[self.w][...] = self.zeros()
        state = self.iterate(t, target)
        x = self.load("iterate", 0)
        x = x + by_row(state.free_step, x.shape) * _sum_of(state.direction)
        norm, square = self.load_row("residual"), state.rz
        if self.preconditioned:
            r = self.load("remainder", 0)
            square = row_dot(r, r)
        residual = jnp.sqrt(square / jnp.where(norm > 0, norm, 1.0))
        self.finish(-x, self.reload_mean(), state.count, residual)

    @property
    def cotangent(self):
        return self.scratch["remainder"][1].at[self.w, 0]

    def statistics(self):
        """Log-sum-exp and mean key by the online softmax; the target is ``k_mean - q``."""
        t, largest, total, mean = self.online_softmax(self.keys, self.query, 0, self.rounded_parts)
        # The sum of the weights as rounded serves both: the error of the log-sum-exp is that of the
        # rounding, averaged over the keys, and only scales the weights of a row.
        some = total > 0
        total = jnp.where(some, total, 1.0)
        mean = mean * by_row(1 / total, mean.shape)
        log_sum_exp = jnp.where(some, largest + jnp.log2(total), jnp.inf)
        self.store_row("log_sum_exp", log_sum_exp)
        self.store_mean(mean)
        return t, self.target(mean, some), mean

    def target(self, mean, some):
        """``k_mean - q``, zero in rows without keys."""
        query = self.query
        if not self.env.config.resident_operand:
            query = self.env.arithmetic.load(query)
        query = query.astype(jnp.float32)
        return by_row(jnp.where(some, 1.0, 0.0), mean.shape) * (mean - query)

    def known_target(self):
        """The same from statistics that are given, without a tile."""
        mean = self.reload_mean()
        some = self.row_vector(self.given["preconditioner"].log_sum_exp) < jnp.inf
        return jnp.int32(0), self.target(mean, some), mean

    def adjoint_target(self):
        """``h = sum_j p_j (c_j - c_mean) k_j`` with ``c_j = cotangent . v_j``."""
        arithmetic, dtype, block = self.env.arithmetic, self.env.shape.dtype, self.env.config.block
        adjoint = self.given["adjoint"]
        scale, ids = self.scale_and_ids()
        log_sum_exp, delta = self.row_vector(adjoint.log_sum_exp), self.row_vector(adjoint.delta)
        with_mean = adjoint.key_mean is None
        with_variance = self.iteration.precise and self.iteration.max_iters > 0

        def step(j, carry, masked, add):
            t, excess, square, rounded_excess, rounded_total = carry
            slot = self.keys.wait(t)
            self.values.wait(t)
            keys, values = self.keys.tiles[0].at[slot], self.values.tiles[0].at[slot]

            def use(scores, c):
                weights = self.weights(scores(), j, masked, scale, ids, log_sum_exp)
                self.keys.done_before(t, 0)
                c = c()
                c = c - by_row(delta, c.shape)
                weighted = weights * c
                target = *self.rounded_parts(weighted), weighted.sum(axis=1)
                target += ((weighted * c).sum(axis=1) if with_variance else zero,)
                return (*target, rounded(weights, dtype)) if with_mean else target

            parts, parts_sum, exact_sum, exact_square, *rounded_weights = arithmetic.with_products(
                block, use, [(self.query, keys)], [(self.cotangent, values)]
            )
            self.values.release(slot)
            excess, square = excess + exact_sum, square + exact_square
            rounded_excess = rounded_excess + parts_sum
            products = [[(part, keys) for part in parts]]
            for weights, weights_sum in rounded_weights:
                rounded_total = rounded_total + weights_sum
                products.append([(weights, keys)])
            add(*products)
            self.keys.done(slot)
            return t + 1, excess, square, rounded_excess, rounded_total

        zero = self.zeros(rows=True)
        (t, excess, square, rounded_excess, rounded_total), sums = arithmetic.summing(
            (self.env.shape.head_dim,) * (2 if with_mean else 1), self.over_tiles, step,
            (jnp.int32(0), zero, zero, zero, zero),
        )  # fmt: skip
        self.keys.done_before(t, 0)
        self.store_row("cotangent_mean", delta + excess)
        if with_variance:
            variance = jnp.maximum(square - excess * excess, LEAST_VARIANCE * delta * delta)
            self.store_row(VARIANCE, variance)
        if with_mean:
            some = rounded_total > 0
            mean = sums[1] * by_row(1 / jnp.where(some, rounded_total, 1.0), self.matrix)
            self.store_mean(mean)
        else:
            mean = self.reload_mean()
        return t, sums[0] - by_row(rounded_excess, self.matrix) * mean, mean

    def iterate(self, t, target) -> _CG:
        """Conjugate gradients from zero; the rule of ``kernels/README.md`` ends them."""
        scale, ids = self.scale_and_ids()
        if self.forward and self.preconditioned:
            log_sum_exp = self.row_vector(self.given["preconditioner"].log_sum_exp)
        elif self.forward:
            log_sum_exp = self.load_row("log_sum_exp")
        else:
            log_sum_exp = self.row_vector(self.given["adjoint"].log_sum_exp)
        ridge = self.row_vector(self.given["ridge"])
        one = full((ROW_BLOCK,), 1, ROWS)
        iterates, remainders = self.kept("iterate"), self.kept("remainder")

        def step(state: _CG) -> _CG:
            t, image = self.product(state.t, state.direction, scale, log_sum_exp, ids)
            p = _sum_of(state.direction)
            image = image + by_row(ridge, p.shape) * p
            curvature = row_dot(p, image)
            moving = (curvature > SMALLEST) & (state.rz > 1e-13 * state.energy)
            inverse = jnp.where(moving, 1 / jnp.where(moving, curvature, one), 0.0)
            r = self.env.arithmetic.load(remainders)
            length = row_dot(r, p) * inverse
            x = self.env.arithmetic.load(iterates) + by_row(length, p.shape) * p
            iterates[...] = x
            r = r - by_row(length, p.shape) * image
            remainders[...] = r
            z, rz, error_bound = self.precondition(r, ridge)
            energy = state.energy + length * state.rz
            next_p = z + by_row(-row_dot(image, z) * inverse, p.shape) * p

            contraction = rz / jnp.where(state.rz > 0, state.rz, one)
            rate = jnp.minimum(0.95, jnp.maximum(contraction, state.contraction))
            fast = contraction < 0.3
            # Step lengths are much alike, but for the second one of a system that has no
            # preconditioner: see "The last step" in kernels/README.md.
            free = length
            if not self.preconditioned:
                first = jnp.where(state.count == 0, 1.0, 0.0)
                share = jnp.minimum(length * ridge, 0.999)
                free = length * (1 - share) / (1 - share + first * contraction * share)
            free = jnp.where(fast, free, 0.0)
            error = length * rz * jnp.where(fast, rate, one) / (1 - rate)
            left = energy
            if not self.forward and self.iteration.precise:
                variance = self.load_row(VARIANCE)
                left = variance - energy - ridge * row_dot(x, x)
                left = jnp.maximum(left, LEAST_LEFT * variance)
            go = self.decide(state.count, error, error_bound, energy, left)
            return _CG(state.count + 1, go, t, self.parts(next_p), rz, energy, contraction, free)

        zero = self.zeros(rows=True)
        direction, rz, _ = self.precondition(target, ridge)
        start = _CG(
            count=jnp.int32(0),
            go=jnp.int32(1),
            t=t,
            direction=self.parts(direction),
            rz=rz,
            energy=one if self.forward else zero,
            contraction=zero,
            free_step=zero,
        )
        return lax.while_loop(lambda state: state.go > 0, step, start)

    def precondition(self, r, ridge):
        """Approximate inverse systems times the residual, or the residual where there are none.

        Also the product of both, and the bound of the squared error in the A-norm.
        """
        square = row_dot(r, r)
        if not self.preconditioned:
            return r, square, square / ridge
        z = apply_inverse(self, self.given["preconditioner"].inverse, r)
        rz = row_dot(r, z)
        good = (rz > 0) & (rz < 1e30)
        z = jnp.where(by_row(good, z.shape), z, r)
        # The eigenvalues of the preconditioned system are 1 up to rounding.
        return z, jnp.where(good, rz, square), jnp.where(good, 2 * rz, square / ridge)

    def decide(self, count, error, error_bound, energy, left):
        """Whether to go on after iteration `count`; the same for all warpgroups.

        `left`, of the adjoint solve: what the gradient of the keys sees of each row is the error
        relative to that.

        The sum over the rows of a warpgroup goes through memory of its own: the scratch memory of
        reductions across warps is one for all warpgroups.
        """
        more = full((ROW_BLOCK,), 0, ROWS, jnp.int32) + (
            count + 1 < self.iteration.max_iters
        ).astype(jnp.int32)
        if self.iteration.tol is not None:
            bound = self.iteration.tol**2
            # Mean over the rows of the relative error, or of the error relative to the mean.
            excess = error / energy - bound if self.forward else error - bound * energy
            if self.forward and self.iteration.precise:
                # The estimate is blind to small eigenvalues that the iteration has not met yet.
                far = error_bound > WORST_BOUND**2 * bound * energy
                excess = jnp.where(far, 1.0, excess)
            # A row that is not finite must not decide for the others.
            excess = jnp.where(jnp.abs(excess) < 1e30, excess, 0.0)
            columns = self.to_columns("iterations", excess)
            unfinished = columns.sum(axis=1) > 0
            if self.forward:
                # Few bad rows among many good ones do not show in the mean.
                unfinished = unfinished | (columns.max(axis=1) > (WORST_ROW**2 - 1) * bound)
            else:
                # In the gradient of the keys a row counts times its probe, of which few can be by
                # far the longest, and with the cotangents less what the keys explain of them,
                # which can be little.
                weight = self.row_vector(self.given["adjoint"].probe_square)
                weighted = weight * (error - bound * left)
                weighted = jnp.where(jnp.abs(weighted) < 1e30, weighted, 0.0)
                columns = self.to_columns(WEIGHTED, weighted)
                unfinished = unfinished | (columns.sum(axis=1) > 0)
            more = jnp.where(unfinished, more, 0)
        return self.agree(count, more)

    def agree(self, count, more):
        """Whether any row of any warpgroup wants more."""
        flags, decision = self.scratch["flags"], self.scratch["decision"]
        flags.at[lax.rem(count, jnp.int32(2)), self.w][...] = more
        plgpu.barrier_arrive(decision)
        plgpu.barrier_wait(decision)
        return any_flag(flags, count, self.env.config.warpgroups)

    def product(self, t, direction, scale, log_sum_exp, ids):
        """``C_i y_i`` for the directions, centred before and after the weights are rounded."""
        centre = row_dot(self.centre(), _sum_of(direction))

        def scores_along(slot):
            return ([(part, self.keys.tiles[0].at[slot]) for part in direction],)

        def weigh(j, masked, excess, scores, along):
            weights = self.weights(scores(), j, masked, scale, ids, log_sum_exp)
            along = along()
            weighted = weights * (along - by_row(centre, along.shape))
            parts, total = self.rounded_parts(weighted, not self.env.config.sum_products)
            return excess if total is None else excess + total, parts

        t, excess, image = self.sum_over_tiles(
            self.keys, t, self.query, scores_along, weigh, 0, self.zeros(rows=True)
        )
        return t, image - by_row(excess, self.matrix) * self.centre()

    def parts(self, array) -> tuple[jax.Array, ...]:
        """`array` in as many 16-bit parts as the iteration uses."""
        return in_parts(array, self.env.shape.dtype, self.iteration.precise)

    def rounded_parts(self, array, summed: bool = True):
        """`parts`, and the sums of the rows of what they represent."""
        return rounded_parts(array, self.env.shape.dtype, self.iteration.precise, summed)

    # -- Results

    def finish(self, negated, mean, count, residual):
        """Writes the negated solution in two parts, and the rows."""
        dtype = self.env.shape.dtype
        high = negated.astype(dtype)
        low = (negated - high.astype(jnp.float32)).astype(dtype)
        if mean is not None:
            shift_high = row_dot(mean, high.astype(jnp.float32))
            self.store_row("shift_high", shift_high)
            self.store_row("shift", shift_high + row_dot(mean, low.astype(jnp.float32)))
        self.store_row("iterations", full((ROW_BLOCK,), 0, ROWS) + count.astype(jnp.float32))
        self.store_row("residual", residual)
        # Without iterations no warpgroup has waited for the others to be done with the values,
        # whose memory the iterates share.
        pair = self.scratch["remainder" if mean is None else "iterate"][1]
        for member, (name, part) in enumerate((("high", high), ("low", low))):
            tile = pair.at[self.w, member]
            tile[...] = part
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, self.row_tile(self.out[name]))
        for index, name in enumerate(ROW_OUTPUTS):
            if name in self.out:
                row = self.scratch["rows"].at[self.w, index]
                plgpu.copy_smem_to_gmem(row, self.row_slice(self.out[name]))
        plgpu.wait_smem_to_gmem(0)

    def store_row(self, name: str, vector):
        self.scratch["rows"].at[self.w, ROW_OUTPUTS.index(name)][...] = vector

    def to_columns(self, name: str, vector):
        """Numbers of the rows as a ``[64, 64]`` matrix of equal rows, through a row of scratch."""
        self.store_row(name, vector)
        ref = self.scratch["rows"].at[self.w, ROW_OUTPUTS.index(name)]
        return by_column(self.env.arithmetic.load(ref, COLS), (ROW_BLOCK, ROW_BLOCK))

    def load_row(self, name: str):
        ref = self.scratch["rows"].at[self.w, ROW_OUTPUTS.index(name)]
        return self.env.arithmetic.load(ref, ROWS)

    def store_mean(self, mean):
        """Writes the mean key, through the memory of the remainder."""
        tile = self.scratch["remainder"][0].at[self.w]
        tile[...] = mean
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, self.row_tile(self.out["key_mean"]))
        plgpu.wait_smem_to_gmem(0)
