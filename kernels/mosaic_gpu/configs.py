"""Which launch configuration each kernel takes, by head dimension."""

from __future__ import annotations

import dataclasses

from lla.kernels.mosaic_gpu.launch import Config

HEAD_DIMS = (32, 64, 128)
"""Head dimensions of the kernels; smaller ones are padded with zeros, which changes nothing."""

DIRECT_DIM = 32
"""The head dimension, after padding, of the kernels that solve directly."""

ROWS = 128
"""Queries, and keys, are padded to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Configs:
    """One configuration for each kernel."""

    solve: Config
    solve_precise: Config  # with directions and weights in two parts
    solve_mixed: Config  # in two parts in some tiles
    attend: Config
    attend_precise: Config  # with weights in two parts, in some tiles at least
    query_gradients: Config
    key_gradients: Config
    key_gradients_split: Config  # with directions in two parts
    # Of the direct method: the solve in two parts with a preconditioner, and the sums for it.
    solve_direct: Config | None = None
    moments: Config | None = None


_THREE = {"warpgroups": 3, "registers": (160, 24)}
_IN_TURN = {"sum_products": True, "turns": True}

_TABLE = {
    32: Configs(
        solve=Config(**_THREE, **_IN_TURN, stages=4, hold_sums=False),
        solve_precise=Config(**_THREE, stages=4, hold_sums=False),
        solve_mixed=Config(**_THREE, **_IN_TURN, stages=4, hold_sums=False),
        attend=Config(**_THREE, stages=4, sum_products=True),
        attend_precise=Config(**_THREE, stages=4, hold_sums=False),
        query_gradients=Config(**_THREE, stages=4, hold_sums=False),
        key_gradients=Config(stages=4, hold_sums=False),
        key_gradients_split=Config(stages=4, hold_sums=False),
        solve_direct=Config(stages=6, hold_sums=False),
        moments=Config(**_THREE, block=32, stages=8),
    ),
    64: Configs(
        solve=Config(**_IN_TURN, stages=4),
        solve_precise=Config(stages=6, hold_sums=False),
        solve_mixed=Config(stages=4, sum_products=True, hold_sums=False),
        attend=Config(**_THREE, stages=4),
        attend_precise=Config(stages=3, hold_sums=False),
        query_gradients=Config(stages=4, hold_sums=False),
        key_gradients=Config(stages=3, hold_sums=False),
        key_gradients_split=Config(stages=3, hold_sums=False),
    ),
    128: Configs(
        solve=Config(**_IN_TURN, stages=3, shared_mean=False, hold_sums=False),
        # Of 64 keys the sums and scores of two parts do not fit into the registers.
        solve_precise=Config(block=32, stages=4, shared_mean=False, hold_sums=False),
        solve_mixed=Config(**_IN_TURN, stages=3, shared_mean=False, hold_sums=False),
        attend=Config(stages=3, hold_sums=False),
        attend_precise=Config(block=32, stages=4, hold_sums=False),
        query_gradients=Config(stages=2, hold_sums=False),
        key_gradients=Config(block=32, stages=2, hold_sums=False),
        key_gradients_split=Config(block=32, stages=2, hold_sums=False),
    ),
}


def choose(head_dim: int) -> Configs:
    """The configurations for a padded head dimension."""
    return _TABLE[head_dim]
