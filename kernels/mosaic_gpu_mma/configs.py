"""Which launch configuration each kernel takes, by head dimension and compute capability."""

from __future__ import annotations

import dataclasses

from lla.kernels.mosaic_gpu_mma.launch import Config

HEAD_DIMS = (32, 64, 128)
"""Head dimensions of the kernels; smaller ones are padded with zeros, which changes nothing."""

ROWS = 128
"""Queries, and keys, are padded to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Configs:
    """One configuration for each kernel."""

    solve: Config
    solve_precise: Config
    attend: Config
    attend_precise: Config
    query_gradients: Config
    key_gradients: Config
    key_gradients_split: Config


def choose(head_dim: int, capability: tuple[int, int]) -> Configs:
    """The configurations for a padded head dimension on a device of some compute capability."""

    def config(**options):
        return Config(capability=capability, **options)

    wide = head_dim > 64
    return Configs(
        solve=config(block=32 if wide else 64, resident_operand=not wide),
        solve_precise=config(block=32, resident_operand=not wide),
        attend=config(block=32 if wide else 64, resident_operand=not wide),
        attend_precise=config(block=32, resident_operand=not wide),
        query_gradients=config(block=32 if wide else 64, resident_operand=False),
        key_gradients=config(block=32 if wide else 64, resident_operand=False),
        key_gradients_split=config(block=32, resident_operand=False),
    )
