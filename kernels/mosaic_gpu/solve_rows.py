"""The solve of one consumer warpgroup; see `lla.kernels.mosaic_gpu.solve`."""

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
from lla.kernels.mosaic_gpu.query_rows import QueryRows
from lla.kernels.mosaic_gpu.tile import (
    ROW_BLOCK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    by_column,
    by_row,
    full,
    in_parts,
    rounded,
    rounded_parts,
    row_dot,
)

MAX_ROW_ERROR = 4.0
"""The tolerance applies to the mean over rows; no single row may exceed this multiple of it."""

MIN_CURVATURE = 1e-36
"""Rows with a smaller curvature are frozen, because its inverse would overflow in float32.

This happens in the adjoint solve for rows that the loss hardly depends on, for instance through
softmax weights of e^-45.
"""

MAX_ROW_BOUND = 10.0
"""With `CGOptions.bf16x2`, the error bound of no row may exceed this multiple of the tolerance."""

MIN_UNEXPLAINED = 0.01
"""At least this fraction of the variance of the cotangents counts as unexplained by the keys."""

MIN_VARIANCE = 1e-5
"""Lower bound of the variance of the cotangents, relative to the square of `Adjoint.delta`.

Where all values are equal the computed variance is nothing but rounding errors.
"""


@dataclasses.dataclass(frozen=True)
class CGOptions:
    """Options of conjugate gradients.

    Attributes:
      tol: estimated relative error at which to stop; None for exactly `max_iters` iterations.
      max_iters: 0 computes the right-hand side only.
      bf16x2: whether directions and all weights (of the mean key, the adjoint target and the
        scores) have two 16-bit parts. An iteration then takes five products instead of three. For
        systems that are too ill-conditioned for one part.
    """

    tol: float | None
    max_iters: int
    bf16x2: bool = False


# Rows of the scratch buffer that outputs pass through.
ROW_OUTPUTS = (
    "shift_high", "shift", "iterations", "residual", "log_sum_exp", "cotangent_mean",
)  # fmt: skip


# Rows of that buffer that the iterations use as scratch.
VARIANCE, WEIGHTED = "shift_high", "shift"


def any_flag(flags, i, count: int):
    """Whether any warpgroup votes for another iteration after the i-th."""
    slot = lax.rem(i, jnp.int32(2))
    return functools.reduce(lambda a, b: a | b, [flags[slot, w, 0] for w in range(count)])


class _CG(NamedTuple):
    """State of conjugate gradients for 64 rows; the fields from `rz` on are ``[64]``."""

    count: jax.Array
    go: jax.Array
    t: jax.Array  # number of tiles consumed so far
    direction: tuple[jax.Array, ...]  # [64, D], the sum of one or two 16-bit parts
    rz: jax.Array
    energy: jax.Array
    contraction: jax.Array
    free_step: jax.Array  # length of a last step along `direction`, which takes no product


def _sum_of(parts: tuple[jax.Array, ...]) -> jax.Array:
    return functools.reduce(lambda a, b: a + b, [part.astype(jnp.float32) for part in parts])


@dataclasses.dataclass
class SolveRows(QueryRows):
    """The solve of one consumer warpgroup."""

    options: CGOptions
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
        """The warpgroup's slice of the scratch array `name`."""
        array = self.scratch[name] if member is None else self.scratch[name][member]
        return self.env.arithmetic.load(array.at[self.w])

    def global_mean(self):
        """The mean key ``[B, T, N, D]`` in global memory."""
        if "key_mean" in self.out:
            return self.out["key_mean"]
        return self.given["preconditioner" if self.forward else "adjoint"].key_mean

    def centre(self):
        """The mean key that centres the products, ``[64, D]``.

        An error e of the mean adds e eᵀ to the system; shared memory therefore holds two parts.
        """
        if self.env.config.shared_mean:
            tiles = [self.scratch["mean"].at[self.w, part] for part in range(2)]
            return _sum_of(tuple(self.env.arithmetic.load(tile) for tile in tiles))
        tile = self.row_tile(self.global_mean())
        if self.env.arithmetic.interpreted:
            return tile[...]
        return plgpu.load(tile, layout=WGMMA, optimized=False)

    def reload_mean(self):
        """The mean key in float32, loaded through the memory of the residual."""
        mean = self.global_mean()
        tile, barrier = self.scratch["residual"][0].at[self.w], self.scratch["reloaded"].at[self.w]
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
            self.query = scratch["residual"][1].at[self.w, 1]
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
        if not self.options.max_iters:
            self.finish(-target, None, jnp.int32(0), self.zeros(rows=True))
            return
        if self.env.config.shared_mean:
            for part, rounded_mean in enumerate(in_parts(key_mean, self.env.shape.dtype, True)):
                scratch["mean"].at[self.w, part][...] = rounded_mean
        # All warpgroups are done with the values, whose memory the iterates take.
        plgpu.barrier_arrive(scratch["decision"])
        plgpu.barrier_wait(scratch["decision"])
        self.store_row("residual", row_dot(target, target))
        scratch["residual"][0].at[self.w][...] = target
        scratch["iterate"][0].at[self.w][...] = self.zeros()
        state = self.iterate(t, target)
        x = self.load("iterate", 0)
        x = x + by_row(state.free_step, x.shape) * _sum_of(state.direction)
        norm, square = self.load_row("residual"), state.rz
        if self.preconditioned:
            r = self.load("residual", 0)
            square = row_dot(r, r)
        residual = jnp.sqrt(square / jnp.where(norm > 0, norm, 1.0))
        self.finish(-x, self.reload_mean(), state.count, residual)

    @property
    def cotangent(self):
        return self.scratch["residual"][1].at[self.w, 0]

    def statistics(self):
        """Log-sum-exp and mean key by the online softmax; the target is ``k_mean - q``."""
        t, largest, total, mean = self.online_softmax(self.keys, self.query, 0, self.rounded_parts)
        # The sum of the rounded weights serves both. In the log-sum-exp their rounding errors
        # average out over the keys, and an error of it only scales the weights of a row.
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
        """The target from given statistics, without reading any tile."""
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
        with_variance = self.options.bf16x2 and self.options.max_iters > 0

        def step(j, carry, masked, add):
            t, excess, square, rounded_excess, rounded_total = carry
            slot = self.keys.consumer_wait(t)
            self.values.consumer_wait(t)
            keys, values = self.keys.tiles[0].at[slot], self.values.tiles[0].at[slot]

            def use(scores, c):
                weights = self.weights(scores(), j, masked, scale, ids, log_sum_exp)
                self.keys.release_deferred(t, 0)
                c = c()
                c = c - by_row(delta, c.shape)
                weighted = weights * c
                target = *self.rounded_parts(weighted), weighted.sum(axis=1)
                target += ((weighted * c).sum(axis=1) if with_variance else zero,)
                return (*target, rounded(weights, dtype)) if with_mean else target

            parts, parts_sum, exact_sum, exact_square, *rounded_weights = arithmetic.with_products(
                block, use, [(self.query, keys)], [(self.cotangent, values)]
            )
            self.values.consumer_release(slot)
            excess, square = excess + exact_sum, square + exact_square
            rounded_excess = rounded_excess + parts_sum
            products = [[(part, keys) for part in parts]]
            for weights, weights_sum in rounded_weights:
                rounded_total = rounded_total + weights_sum
                products.append([(weights, keys)])
            add(*products)
            self.keys.release_or_defer(slot)
            return t + 1, excess, square, rounded_excess, rounded_total

        zero = self.zeros(rows=True)
        (t, excess, square, rounded_excess, rounded_total), sums = arithmetic.summing(
            (self.env.shape.head_dim,) * (2 if with_mean else 1), self.over_tiles, step,
            (jnp.int32(0), zero, zero, zero, zero),
        )  # fmt: skip
        self.keys.release_deferred(t, 0)
        self.store_row("cotangent_mean", delta + excess)
        if with_variance:
            variance = jnp.maximum(square - excess * excess, MIN_VARIANCE * delta * delta)
            self.store_row(VARIANCE, variance)
        if with_mean:
            some = rounded_total > 0
            mean = sums[1] * by_row(1 / jnp.where(some, rounded_total, 1.0), self.matrix)
            self.store_mean(mean)
        else:
            mean = self.reload_mean()
        return t, sums[0] - by_row(rounded_excess, self.matrix) * mean, mean

    def iterate(self, t, target) -> _CG:
        """Conjugate gradients from zero, with the stopping rule of ``kernels/HOPPER.md``."""
        scale, ids = self.scale_and_ids()
        if self.forward and self.preconditioned:
            log_sum_exp = self.row_vector(self.given["preconditioner"].log_sum_exp)
        elif self.forward:
            log_sum_exp = self.load_row("log_sum_exp")
        else:
            log_sum_exp = self.row_vector(self.given["adjoint"].log_sum_exp)
        ridge = self.row_vector(self.given["ridge"])
        one = full((ROW_BLOCK,), 1, WGMMA_ROW)
        iterates, residuals = (self.scratch[n][0].at[self.w] for n in ("iterate", "residual"))

        def step(state: _CG) -> _CG:
            t, image = self.product(state.t, state.direction, scale, log_sum_exp, ids)
            p = _sum_of(state.direction)
            image = image + by_row(ridge, p.shape) * p
            curvature = row_dot(p, image)
            moving = (curvature > MIN_CURVATURE) & (state.rz > 1e-13 * state.energy)
            inverse = jnp.where(moving, 1 / jnp.where(moving, curvature, one), 0.0)
            r = self.load("residual", 0)
            length = row_dot(r, p) * inverse
            x = self.load("iterate", 0) + by_row(length, p.shape) * p
            iterates[...] = x
            r = r - by_row(length, p.shape) * image
            residuals[...] = r
            z, rz, error_bound = self.precondition(r, ridge)
            energy = state.energy + length * state.rz
            next_p = z + by_row(-row_dot(image, z) * inverse, p.shape) * p

            contraction = rz / jnp.where(state.rz > 0, state.rz, one)
            rate = jnp.minimum(0.95, jnp.maximum(contraction, state.contraction))
            fast = contraction < 0.3
            # The next step length is close to this one, except for the second step without a
            # preconditioner: see "The last step" in kernels/HOPPER.md.
            free = length
            if not self.preconditioned:
                first = jnp.where(state.count == 0, 1.0, 0.0)
                share = jnp.minimum(length * ridge, 0.999)
                free = length * (1 - share) / (1 - share + first * contraction * share)
            free = jnp.where(fast, free, 0.0)
            error = length * rz * jnp.where(fast, rate, one) / (1 - rate)
            unexplained = energy
            if not self.forward and self.options.bf16x2:
                variance = self.load_row(VARIANCE)
                unexplained = variance - energy - ridge * row_dot(x, x)
                unexplained = jnp.maximum(unexplained, MIN_UNEXPLAINED * variance)
            go = self.decide(state.count, error, error_bound, energy, unexplained)
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
        """The preconditioned residual z, ``r . z``, and a bound of the squared error in the A-norm.

        Without a preconditioner z is the residual itself.
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

    def decide(self, count, error, error_bound, energy, unexplained):
        """Whether to go on after iteration `count`; the same for all warpgroups.

        In the adjoint solve, `unexplained` is what the error of a row is measured against for the
        gradient of the keys.

        Rows are reduced through scratch memory of each warpgroup: that of Pallas's reductions
        across warps is shared by all warpgroups.
        """
        more = full((ROW_BLOCK,), 0, WGMMA_ROW, jnp.int32) + (
            count + 1 < self.options.max_iters
        ).astype(jnp.int32)
        if self.options.tol is not None:
            bound = self.options.tol**2
            # Forward, the mean over rows of the relative error; adjoint, the mean error relative to
            # the mean energy.
            excess = error / energy - bound if self.forward else error - bound * energy
            if self.forward and self.options.bf16x2:
                # The estimate misses small eigenvalues that the iteration has not found yet.
                far = error_bound > MAX_ROW_BOUND**2 * bound * energy
                excess = jnp.where(far, 1.0, excess)
            # Rows that are not finite do not count.
            excess = jnp.where(jnp.abs(excess) < 1e30, excess, 0.0)
            columns = self.to_columns("iterations", excess)
            unfinished = columns.sum(axis=1) > 0
            if self.forward:
                # A few bad rows hardly change the mean.
                unfinished = unfinished | (columns.max(axis=1) > (MAX_ROW_ERROR**2 - 1) * bound)
            else:
                # In the gradient of the keys the error of a row is multiplied by its probe, and a
                # few probes can be much longer than the others. It is compared with what the keys
                # leave unexplained of the cotangents, which can be small.
                weight = self.row_vector(self.given["adjoint"].probe_square)
                weighted = weight * (error - bound * unexplained)
                weighted = jnp.where(jnp.abs(weighted) < 1e30, weighted, 0.0)
                columns = self.to_columns(WEIGHTED, weighted)
                unfinished = unfinished | (columns.sum(axis=1) > 0)
            more = jnp.where(unfinished, more, 0)
        flags, decision = self.scratch["flags"], self.scratch["decision"]
        flags.at[lax.rem(count, jnp.int32(2)), self.w][...] = more
        plgpu.barrier_arrive(decision)
        plgpu.barrier_wait(decision)
        return any_flag(flags, count, self.env.config.warpgroups)

    def product(self, t, direction, scale, log_sum_exp, ids):
        """``C_i y_i`` for the directions y, centred before and after the weights are rounded."""
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
        """`array` in one or two 16-bit parts, as the options say."""
        return in_parts(array, self.env.shape.dtype, self.options.bf16x2)

    def rounded_parts(self, array, summed: bool = True):
        """`parts`, and the row sums of what they represent."""
        return rounded_parts(array, self.env.shape.dtype, self.options.bf16x2, summed)

    # -- Results

    def finish(self, negated, mean, count, residual):
        """Writes the negated solution in two parts, and the row outputs."""
        dtype = self.env.shape.dtype
        high = negated.astype(dtype)
        low = (negated - high.astype(jnp.float32)).astype(dtype)
        if mean is not None:
            shift_high = row_dot(mean, high.astype(jnp.float32))
            self.store_row("shift_high", shift_high)
            self.store_row("shift", shift_high + row_dot(mean, low.astype(jnp.float32)))
        self.store_row("iterations", full((ROW_BLOCK,), 0, WGMMA_ROW) + count.astype(jnp.float32))
        self.store_row("residual", residual)
        # The iterates share memory with the tiles of values. Without iterations nothing has waited
        # for the other warpgroups to be done with those.
        pair = self.scratch["residual" if mean is None else "iterate"][1]
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
        """A vector of rows, broadcast along the columns of ``[64, 64]``, through scratch memory."""
        self.store_row(name, vector)
        ref = self.scratch["rows"].at[self.w, ROW_OUTPUTS.index(name)]
        return by_column(self.env.arithmetic.load(ref, WGMMA_COL), (ROW_BLOCK, ROW_BLOCK))

    def load_row(self, name: str):
        ref = self.scratch["rows"].at[self.w, ROW_OUTPUTS.index(name)]
        return self.env.arithmetic.load(ref, WGMMA_ROW)

    def store_mean(self, mean):
        """Writes the mean key, through the memory of the residual."""
        tile = self.scratch["residual"][0].at[self.w]
        tile[...] = mean
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, self.row_tile(self.out["key_mean"]))
        plgpu.wait_smem_to_gmem(0)
