"""Base class of the kernels in which a warpgroup owns 64 query rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lla.kernels.mosaic_gpu.launch import Environment, Pingpong, ProgramIndex, Ring
from lla.kernels.mosaic_gpu.tile import (
    LOG2E,
    LOWEST,
    ONES,
    ROW_BLOCK,
    WGMMA,
    WGMMA_ROW,
    TileRange,
    by_row,
    full,
    over_tiles,
)


@dataclasses.dataclass
class QueryRows:
    """The rows of one consumer warpgroup.

    Attributes:
      env: static context.
      given, out: refs of operands and outputs in global memory, by name.
      scratch: refs in shared memory and barriers, by name.
      program: what the program instance works on.
      tiles: the key tiles that its rows see.
      w: index of the warpgroup.
    """

    env: Environment
    given: Any
    out: Any
    scratch: Any
    program: ProgramIndex
    tiles: TileRange
    w: Any

    @property
    def first(self):
        return self.program.first + self.w * ROW_BLOCK

    @property
    def matrix(self) -> tuple[int, int]:
        return (ROW_BLOCK, self.env.shape.head_dim)

    def zeros(self, *, rows: bool = False):
        return full((ROW_BLOCK,), 0, WGMMA_ROW) if rows else full(self.matrix, 0, WGMMA)

    def row_vector(self, array):
        """``[B, N, T] -> [64]``."""
        return self.env.arithmetic.load(self.row_slice(array), WGMMA_ROW)

    def row_tile(self, array):
        """``[B, T, N, D] -> [64, D]``, in global memory."""
        return array.at[self.program.b, pl.ds(self.first, ROW_BLOCK), self.program.head]

    def row_slice(self, array):
        """``[B, N, T] -> [64]``, in global memory."""
        return array.at[self.program.b, self.program.head, pl.ds(self.first, ROW_BLOCK)]

    def masked(self, scores, j, masked: bool, ids):
        """`scores`, with ``-inf`` where the mask hides a key."""
        if not masked:
            return scores
        valid = self.env.valid(
            self.given["masking"], self.program.b, scores.shape, self.first,
            j * self.env.config.block, transposed=False, row_ids=ids,
        )  # fmt: skip
        return jnp.where(valid, scores, -jnp.inf)

    def weights(self, scores, j, masked: bool, scale, ids, log_sum_exp):
        """Softmax weights from a known log-sum-exp, in base 2."""
        scores = self.masked(scores, j, masked, ids)
        return jnp.exp2(scores * by_row(scale, scores.shape) - by_row(log_sum_exp, scores.shape))

    def online_weights(self, scores, j, masked: bool, scale, ids, largest):
        """The new running maximum of the logits, and the weights relative to it."""
        scores = self.masked(scores, j, masked, ids)
        # Taking the maximum before scaling fuses the scaling with the subtraction.
        new = jnp.maximum(largest, scores.max(axis=1) * scale)
        weights = jnp.exp2(scores * by_row(scale, scores.shape) - by_row(new, scores.shape))
        return new, weights

    def scale_and_ids(self):
        ids = self.env.row_ids(self.given["masking"], self.program.b, self.first, transposed=False)
        # Positive, so that a masked score stays -inf.
        return jnp.maximum(self.row_vector(self.given["scale"]) * LOG2E, 1e-30), ids

    def over_tiles(self, body, carry):
        low_edge = self.env.mask.window is not None
        return over_tiles(self.env.mask, self.tiles, body, carry, low_edge=low_edge)

    def sum_over_tiles(
        self, ring: Ring, first, query, products, weigh, summed: int, carry, count: int = 1
    ):
        """Sums weights times an operand (keys or values) over the tiles.

        Args:
          ring: the tiles to read, from number `first` on; its first operand is the keys.
          query: left operand of the logits.
          products: maps a tile's slot to the other products that `weigh` needs, as lists of pairs.
          weigh: ``carry, *weights = weigh(j, masked, carry, scores, *reads)``. `scores` and `reads`
            are functions that wait for their products. There are `count` weights, each a tuple of
            16-bit parts.
          summed: index of the operand in the ring.

        Returns:
          the number after that of the last tile, the last carry, and the sums. With
          `Config.sum_products` the carry is the row sum of the first weights.
        """
        arithmetic, block = self.env.arithmetic, self.env.config.block
        columns = (self.env.shape.head_dim,) * count
        pingpong = Pingpong(self.scratch.get("scheduler"), self.env.config.warpgroups)
        ones = self.ones()
        if ones is not None:
            columns += (ONES,)

        def step(j, state, masked, add):
            t, carry = state
            slot = ring.consumer_wait(t)
            pingpong.acquire(self.w)

            def use(scores, *reads):
                pingpong.release(self.w)

                def first_read():
                    result = scores()
                    ring.release_deferred(t, first)
                    return result

                return weigh(j, masked, carry, first_read, *reads)

            carry, *weights = arithmetic.with_products(
                block, use, _logits(ring, query, slot), *products(slot)
            )
            sums = [[(part, ring.tiles[summed].at[slot]) for part in parts] for parts in weights]
            if ones is not None:
                sums.append([(part, ones) for part in weights[0]])
            add(*sums)
            ring.release_or_defer(slot)
            return t + 1, carry

        (t, carry), totals = arithmetic.summing(columns, self.over_tiles, step, (first, carry))
        ring.release_deferred(t, first)
        if ones is not None:
            *totals, rows = totals
            carry = rows.sum(axis=1) * (1 / ONES)
        return t, carry, *totals

    def ones(self):
        """The warpgroup's tile of ones; None without `Config.sum_products`."""
        if not self.env.config.sum_products:
            return None
        return self.scratch["ones"].at[self.w, pl.ds(0, self.env.config.block)]

    def write_ones(self):
        """Called before the first sum over tiles."""
        if self.env.config.sum_products:
            shape = (ROW_BLOCK, ONES)
            ones = full(shape, 1, WGMMA).astype(self.env.shape.dtype)
            self.scratch["ones"].at[self.w][...] = ones
            plgpu.commit_smem()

    def online_softmax(self, ring: Ring, query, summed: int, round_weights):
        """The unnormalised softmax-weighted sum of an operand of the ring, over all tiles.

        Args:
          ring, query, summed: as for `sum_over_tiles`.
          round_weights: maps weights, and whether to sum them, to their 16-bit parts and their row
            sums (None if not summed).

        Returns:
          the number of tiles, the largest logit, the sum of the weights relative to it, and the
          weighted sum of the operand.
        """
        arithmetic, block = self.env.arithmetic, self.env.config.block
        scale, ids = self.scale_and_ids()
        ones = self.ones()

        def step(j, carry, masked):
            t, largest, total, *sums = carry
            slot = ring.consumer_wait(t)
            (scores,) = arithmetic.products(block, _logits(ring, query, slot))
            new, weights = self.online_weights(scores, j, masked, scale, ids, largest)
            shrink = jnp.exp2(largest - new)
            parts, weights_sum = round_weights(weights, ones is None)
            if ones is None:
                total = total * shrink + weights_sum
            factors = [ring.tiles[summed].at[slot], *([] if ones is None else [ones])]
            sums = [sum_ * by_row(shrink, sum_.shape) for sum_ in sums]
            products = [[(part, factor) for part in parts] for factor in factors]
            sums = arithmetic.accumulate(tuple(sums), *products)
            ring.consumer_release(slot)
            return t + 1, new, total, *sums

        lowest = full((ROW_BLOCK,), LOWEST, WGMMA_ROW)
        start = (jnp.int32(0), lowest, self.zeros(rows=True), self.zeros())
        if ones is None:
            return self.over_tiles(step, start)
        start += (full((ROW_BLOCK, ONES), 0, WGMMA),)
        t, largest, _, mean, rows = self.over_tiles(step, start)
        return t, largest, rows.sum(axis=1) * (1 / ONES), mean


def _logits(ring: Ring, query, slot):
    return [(query, ring.tiles[0].at[slot])]
