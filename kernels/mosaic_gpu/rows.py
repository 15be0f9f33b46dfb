"""What the kernels that own 64 query rows a warpgroup have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp

from lla.kernels.mosaic_gpu.launch import Environment, Place
from lla.kernels.mosaic_gpu.tile import (
    LOG2E,
    MATRIX,
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
