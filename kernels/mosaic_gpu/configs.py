"""The launch configuration of each kernel, by head dimension."""

from __future__ import annotations

import dataclasses

from lla.kernels.mosaic_gpu.launch import Config

HEAD_DIMS = (32, 64, 128)
"""Head dimensions of the kernels; others are padded with zeros to the next one."""

DIRECT_DIM = 32
"""The (padded) head dimension of the kernels of the direct solver."""

SEQUENCE_MULTIPLE = 128
"""The numbers of queries and of keys are padded to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Configs:
    """One configuration for each kernel."""

    solve: Config
    solve_bf16x2: Config  # directions and weights in two 16-bit parts
    solve_mixed: Config  # in two parts in some tiles only
    attend: Config
    attend_bf16x2: Config  # weights in two parts, in all tiles or in some
    query_gradients: Config
    key_gradients: Config
    key_gradients_split: Config  # directions in two parts
    # Direct solver: the preconditioned solve, and the second moments for the preconditioner.
    solve_direct: Config | None = None
    moments: Config | None = None


_THREE = {"warpgroups": 3, "registers": (160, 24)}
_PINGPONG = {"sum_products": True, "pingpong": True}

_TABLE = {
    32: Configs(
        solve=Config(**_THREE, **_PINGPONG, stages=4, hold_sums=False),
        solve_bf16x2=Config(**_THREE, stages=4, hold_sums=False),
        solve_mixed=Config(**_THREE, **_PINGPONG, stages=4, hold_sums=False),
        attend=Config(**_THREE, stages=4, sum_products=True),
        attend_bf16x2=Config(**_THREE, stages=4, hold_sums=False),
        query_gradients=Config(**_THREE, stages=4, hold_sums=False),
        key_gradients=Config(stages=4, hold_sums=False),
        key_gradients_split=Config(stages=4, hold_sums=False),
        solve_direct=Config(stages=6, hold_sums=False),
        moments=Config(**_THREE, block=32, stages=8),
    ),
    64: Configs(
        solve=Config(**_PINGPONG, stages=4),
        solve_bf16x2=Config(stages=6, hold_sums=False),
        solve_mixed=Config(stages=4, sum_products=True, hold_sums=False),
        attend=Config(**_THREE, stages=4),
        attend_bf16x2=Config(stages=3, hold_sums=False),
        query_gradients=Config(stages=4, hold_sums=False),
        key_gradients=Config(stages=3, hold_sums=False),
        key_gradients_split=Config(stages=3, hold_sums=False),
    ),
    128: Configs(
        solve=Config(**_PINGPONG, stages=3, shared_mean=False, hold_sums=False),
        # The accumulators and scores of two parts and 64 keys do not fit into registers.
        solve_bf16x2=Config(block=32, stages=4, shared_mean=False, hold_sums=False),
        solve_mixed=Config(**_PINGPONG, stages=3, shared_mean=False, hold_sums=False),
        attend=Config(stages=3, hold_sums=False),
        attend_bf16x2=Config(block=32, stages=4, hold_sums=False),
        query_gradients=Config(stages=2, hold_sums=False),
        key_gradients=Config(block=32, stages=2, hold_sums=False),
        key_gradients_split=Config(block=32, stages=2, hold_sums=False),
    ),
}


def choose(head_dim: int) -> Configs:
    """The configurations for a padded head dimension."""
    return _TABLE[head_dim]
