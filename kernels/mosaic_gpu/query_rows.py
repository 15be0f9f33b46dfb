"""What the kernels that own 64 query rows a warpgroup have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lla.kernels.mosaic_gpu.launch import Environment, Place, Ring, Turns
from lla.kernels.mosaic_gpu.tile import (
    LOG2E,
    LOWEST,
    MATRIX,
    ONES,
    ROW_BLOCK,
    ROWS,
    TileRange,
    by_row,
    full,
    over_tiles,
)


@dataclasses.dataclass
class QueryRows:
    """The rows of one compute warpgroup.

    Attributes:
      env: static context.
      given, out: refs of operands and outputs in global memory, by name.
      scratch: refs in shared memory and barriers, by name.
      place: where the program instance works.
      tiles: key tiles that its rows see.
      w: index of the warpgroup.
    """

    env: Environment
    given: Any
    out: Any
    scratch: Any
    place: Place
    tiles: TileRange
    w: Any

    @property
    def first(self):
        return self.place.first + self.w * ROW_BLOCK

    @property
    def matrix(self) -> tuple[int, int]:
        return (ROW_BLOCK, self.env.shape.head_dim)

    def zeros(self, *, rows: bool = False):
        return full((ROW_BLOCK,), 0, ROWS) if rows else full(self.matrix, 0, MATRIX)

    def row_vector(self, array):
        """``[B, N, T] -> [64]``."""
        return self.env.arithmetic.load(self.row_slice(array), ROWS)

    def row_tile(self, array):
        """``[B, T, N, D] -> [64, D]``, in global memory."""
        return array.at[self.place.b, pl.ds(self.first, ROW_BLOCK), self.place.head]

    def row_slice(self, array):
        """``[B, N, T] -> [64]``, in global memory."""
        return array.at[self.place.b, self.place.head, pl.ds(self.first, ROW_BLOCK)]

    def masked(self, scores, j, masked: bool, ids):
        """`scores` of query and keys, ``-inf`` where the mask forbids."""
        if not masked:
            return scores
        valid = self.env.valid(
            self.given["masking"], self.place.b, scores.shape, self.first,
            j * self.env.config.block, transposed=False, row_ids=ids,
        )  # fmt: skip
        return jnp.where(valid, scores, -jnp.inf)

    def weights(self, scores, j, masked: bool, scale, ids, log_sum_exp):
        """Softmax weights from a known log-sum-exp; both are in base 2."""
        scores = self.masked(scores, j, masked, ids)
        return jnp.exp2(scores * by_row(scale, scores.shape) - by_row(log_sum_exp, scores.shape))

    def online_weights(self, scores, j, masked: bool, scale, ids, largest):
        """The new running maximum of the logits and the weights relative to it."""
        scores = self.masked(scores, j, masked, ids)
        # The maximum before scaling: scaling and subtraction are then one instruction.
        new = jnp.maximum(largest, scores.max(axis=1) * scale)
        weights = jnp.exp2(scores * by_row(scale, scores.shape) - by_row(new, scores.shape))
        return new, weights

    def scale_and_ids(self):
        ids = self.env.row_ids(self.given["masking"], self.place.b, self.first, transposed=False)
        # Not zero, so that a masked score stays -inf.
        return jnp.maximum(self.row_vector(self.given["scale"]) * LOG2E, 1e-30), ids

    def over_tiles(self, body, carry):
        low_edge = self.env.mask.window is not None
        return over_tiles(self.env.mask, self.tiles, body, carry, low_edge=low_edge)

    def sum_over_tiles(
        self, ring: Ring, first, query, products, weigh, summed: int, carry, count: int = 1
    ):
        """Sums over the tiles of weights times a member of the ring.

        Args:
          ring: whose tiles from number `first` on are read; its first member holds the keys.
          query: first operand of the logits.
          products: a tile's slot to the lists of pairs of the other products that `weigh` reads.
          weigh: ``carry, *weights = weigh(j, masked, carry, scores, *reads)``; `scores` and `reads`
            are functions that wait for the products; each of `count` weights is a tuple of parts.
          summed: index of the member.

        Returns:
          the number of the tile after the last one, the last carry, and the sums. With
          `Config.sum_products` the carry is the sum over the rows of the first weights.
        """
        arithmetic, block = self.env.arithmetic, self.env.config.block
        columns = (self.env.shape.head_dim,) * count
        turns = Turns(self.scratch.get("turns"), self.env.config.warpgroups)
        ones = self.ones()
        if ones is not None:
            columns += (ONES,)

        def step(j, state, masked, add):
            t, carry = state
            slot = ring.wait(t)
            turns.take(self.w)

            def use(scores, *reads):
                turns.end(self.w)

                def first_read():
                    result = scores()
                    ring.done_before(t, first)
                    return result

                return weigh(j, masked, carry, first_read, *reads)

            carry, *weights = arithmetic.with_products(
                block, use, _logits(ring, query, slot), *products(slot)
            )
            sums = [[(part, ring.tiles[summed].at[slot]) for part in parts] for parts in weights]
            if ones is not None:
                sums.append([(part, ones) for part in weights[0]])
            add(*sums)
            ring.done(slot)
            return t + 1, carry

        (t, carry), totals = arithmetic.summing(columns, self.over_tiles, step, (first, carry))
        ring.done_before(t, first)
        if ones is not None:
            *totals, rows = totals
            carry = rows.sum(axis=1) * (1 / ONES)
        return t, carry, *totals

    def ones(self):
        """The warpgroup's tile of ones, None without `Config.sum_products`."""
        if not self.env.config.sum_products:
            return None
        return self.scratch["ones"].at[self.w, pl.ds(0, self.env.config.block)]

    def write_ones(self):
        """Called before the first sum over tiles."""
        if self.env.config.sum_products:
            shape = (ROW_BLOCK, ONES)
            ones = full(shape, 1, MATRIX).astype(self.env.shape.dtype)
            self.scratch["ones"].at[self.w][...] = ones
            plgpu.commit_smem()

    def online_softmax(self, ring: Ring, query, summed: int, round_weights):
        """Softmax over all tiles, of which the weighted sum of a member of the ring is wanted.

        Args:
          ring, query, summed: as for `sum_over_tiles`.
          round_weights: weights, and whether their sums are wanted, to 16-bit parts of them and
            to the sums of their rows.

        Returns:
          the number of tiles, the largest logit, the sum of the weights relative to it, and that of
          the weights times the member.
        """
        arithmetic, block = self.env.arithmetic, self.env.config.block
        scale, ids = self.scale_and_ids()
        ones = self.ones()

        def step(j, carry, masked):
            t, largest, total, *sums = carry
            slot = ring.wait(t)
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
            ring.release(slot)
            return t + 1, new, total, *sums

        lowest = full((ROW_BLOCK,), LOWEST, ROWS)
        start = (jnp.int32(0), lowest, self.zeros(rows=True), self.zeros())
        if ones is None:
            return self.over_tiles(step, start)
        start += (full((ROW_BLOCK, ONES), 0, MATRIX),)
        t, largest, _, mean, rows = self.over_tiles(step, start)
        return t, largest, rows.sum(axis=1) * (1 / ONES), mean


def _logits(ring: Ring, query, slot):
    return [(query, ring.tiles[0].at[slot])]
