"""Which launch configuration each kernel takes: a formula of head dimension and card.

A thread holds parts of the float32 sums of the output's shape, of the scores of a tile, and of the
operands that stay in registers. The formula takes the largest tile for which they fit, and then as
many tiles in flight as leave room for two program instances on a multiprocessor, the number that
their registers allow.
"""

from __future__ import annotations

import dataclasses

from lla.kernels.mosaic_gpu.tile import ROW_BLOCK
from lla.kernels.mosaic_gpu_mma.launch import SHARED_MEMORY, Config

HEAD_DIMS = (32, 64, 128, 256)
"""Head dimensions of the kernels; smaller ones are padded with zeros, which changes nothing."""

ROWS = 64
"""Queries, and keys, are padded to a multiple of this."""

REGISTERS = 224
"""Of the 255 registers of a thread, those that the arrays below may take."""

WORKING = 64
"""Registers beside the arrays: right operands, addresses, rows."""

_STAGES = (3, 2)
_BLOCKS = (64, 32, 16)
_SMALL = 8 * 1024  # bytes of shared memory beside tiles, at most


@dataclasses.dataclass(frozen=True)
class Needs:
    """Arrays of a kernel.

    Attributes:
      sums: float32 ``[64, D]`` that are added to in the loop.
      scores: float32 ``[64, block]`` at a time.
      operands: 16-bit ``[64, D]`` that belong to the rows and may lie in shared memory.
      held: 16-bit ``[64, D]`` that have to be in registers.
      tiles: 16-bit ``[block, D]`` that are streamed.
    """

    sums: int
    scores: int
    operands: int
    tiles: int
    held: int = 0

    def registers(self, head_dim: int, block: int, resident: bool) -> int:
        operands = self.held + (self.operands if resident else 0)
        return self.sums * head_dim // 2 + self.scores * block // 2 + operands * head_dim // 4

    def shared(self, head_dim: int, block: int, stages: int, resident: bool) -> int:
        operands = 0 if resident else self.operands * ROW_BLOCK
        return 2 * head_dim * (stages * self.tiles * block + operands) + _SMALL


NEEDS = {
    "solve": Needs(sums=1, scores=2, operands=2, tiles=2, held=1),
    "solve_precise": Needs(sums=1, scores=2, operands=2, tiles=2, held=2),
    "attend": Needs(sums=1, scores=2, operands=2, tiles=2),
    "attend_precise": Needs(sums=2, scores=2, operands=3, tiles=2),
    "query_gradients": Needs(sums=1, scores=3, operands=4, tiles=2),
    "key_gradients": Needs(sums=2, scores=3, operands=2, tiles=4),
    "key_gradients_split": Needs(sums=2, scores=3, operands=2, tiles=6),
}


@dataclasses.dataclass(frozen=True)
class Configs:
    """One configuration for each kernel."""

    solve: Config  # of the adjoint system, too
    solve_precise: Config  # with directions and weights in two parts, in some tiles at least
    attend: Config
    attend_precise: Config
    query_gradients: Config
    key_gradients: Config
    key_gradients_split: Config  # with directions in two parts


def choose(head_dim: int, capability: tuple[int, int]) -> Configs:
    """The configurations for a padded head dimension on a card of some compute capability.

    Raises:
      ValueError: a kernel does not fit into shared memory.
    """
    return Configs(**{name: config(name, head_dim, capability) for name in NEEDS})


def fits(head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether all kernels fit into the shared memory of a card."""
    try:
        choose(head_dim, capability)
    except ValueError:
        return False
    return True


def config(name: str, head_dim: int, capability: tuple[int, int]) -> Config:
    """The configuration of one kernel."""
    needs, memory = NEEDS[name], SHARED_MEMORY[capability]
    blocks = [block for block in _BLOCKS if _in_registers(needs, head_dim, block, False)]
    # Nothing fits: the registers that are missing are spilled.
    for block in blocks or _BLOCKS[1:]:
        resident = _in_registers(needs, head_dim, block, True)
        for instances in (2, 1):
            for stages in _STAGES:
                for choice in dict.fromkeys((resident, True)):
                    if instances * needs.shared(head_dim, block, stages, choice) <= memory:
                        return Config(
                            block=block, stages=stages, resident_operand=choice,
                            capability=capability,
                        )  # fmt: skip
    raise ValueError(
        f"{name} with head dimension {head_dim} does not fit into {memory} bytes of shared memory."
    )


def _in_registers(needs: Needs, head_dim: int, block: int, resident: bool) -> bool:
    return needs.registers(head_dim, block, resident) + WORKING <= REGISTERS
