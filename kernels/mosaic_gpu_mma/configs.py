"""Which launch configuration each kernel takes: a formula of head dimension and card.

A thread holds parts of the float32 sums of the output's shape, of the scores of a tile, and of the
operands that stay in registers. The formula takes the largest tile, and then as many operands in
registers, as leave registers for the rest, and prefers what leaves shared memory for a second
program instance on a multiprocessor. Its numbers are those that give what was fastest on an H200:
see ``kernels/PORTABLE.md``.
"""

from __future__ import annotations

import dataclasses

from lla.kernels.mosaic_gpu.tile import ROW_BLOCK
from lla.kernels.mosaic_gpu_mma.launch import SHARED_MEMORY, Config

HEAD_DIMS = (32, 64, 128, 256)
"""Head dimensions of the kernels; smaller ones are padded with zeros, which changes nothing."""

SEQUENCE_MULTIPLE = 64
"""Queries, and keys, are padded to a multiple of this."""

LOOP_REGISTERS = 160
"""Registers of a thread for sums, scores and operands that have to be in registers."""

REGISTERS = 192
"""The same with operands that may be in registers."""

_BLOCKS = (64, 32)
_SMALLEST = (16,)
_SMALL = 4 * 1024  # bytes of shared memory beside tiles, at most


@dataclasses.dataclass(frozen=True)
class Needs:
    """Arrays of a kernel.

    Attributes:
      sums: float32 ``[64, D]`` that are added to in the loop.
      scores: float32 ``[64, block]`` at a time, those that become weights counted twice where
        there are several.
      operands: 16-bit ``[64, D]`` that belong to the rows and may lie in shared memory.
      tiles: 16-bit ``[block, D]`` that are streamed.
      held: 16-bit ``[64, D]`` that have to be in registers.
      stages: tiles in flight, at most.
    """

    sums: int
    scores: int
    operands: int
    tiles: int
    held: int = 0
    stages: int = 2

    def loop_registers(self, head_dim: int, block: int) -> int:
        return self.sums * head_dim // 2 + self.scores * block // 2 + self.held * head_dim // 4

    def registers(self, head_dim: int, block: int) -> int:
        return self.loop_registers(head_dim, block) + self.operands * head_dim // 4

    def shared(self, head_dim: int, block: int, stages: int, resident: bool) -> int:
        """Bytes of shared memory of a program instance."""
        operands = 0 if resident else self.operands * ROW_BLOCK
        return 2 * head_dim * (stages * self.tiles * block + operands) + _SMALL


NEEDS = {
    "solve": Needs(sums=1, scores=2, operands=2, tiles=2, held=1),
    "solve_bf16x2": Needs(sums=1, scores=4, operands=2, tiles=2, held=2),
    "attend": Needs(sums=1, scores=2, operands=2, tiles=2),
    "attend_probed": Needs(sums=2, scores=2, operands=2, tiles=2),
    "attend_bf16x2": Needs(sums=2, scores=4, operands=3, tiles=2),
    "query_gradients": Needs(sums=1, scores=4, operands=4, tiles=2),
    "key_gradients": Needs(sums=2, scores=4, operands=2, tiles=4, stages=3),
    "key_gradients_split": Needs(sums=2, scores=4, operands=2, tiles=6, stages=3),
}


@dataclasses.dataclass(frozen=True)
class Configs:
    """One configuration for each kernel."""

    solve: Config  # of the adjoint system, too
    solve_bf16x2: Config  # with directions and weights in two parts, in some tiles at least
    attend: Config
    attend_probed: Config  # with a given probe
    attend_bf16x2: Config
    query_gradients: Config
    key_gradients: Config
    key_gradients_split: Config  # with directions in two parts

    @property
    def solve_mixed(self) -> Config:
        """Where some tiles have two parts."""
        return self.solve_bf16x2


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
    largest = max(
        (b for b in _BLOCKS if needs.loop_registers(head_dim, b) <= LOOP_REGISTERS),
        default=_BLOCKS[-1],
    )
    blocks = [block for block in _BLOCKS if block <= largest]
    # The smallest tiles are for want of shared memory only.
    steps = [
        (choices, preferred, instances)
        for preferred in (True, False)
        for choices in (blocks, _SMALLEST)
        for instances in (2, 1)
    ]
    for choices, preferred, instances in steps:
        for block in choices:
            resident = (needs.registers(head_dim, block) <= REGISTERS) == preferred
            for stages in range(needs.stages, 1, -1):
                size = needs.shared(head_dim, block, stages, resident)
                if instances * size <= memory:
                    return Config(
                        block=block, stages=stages, resident_operand=resident,
                        capability=capability,
                    )  # fmt: skip
    raise ValueError(
        f"{name} with head dimension {head_dim} does not fit into {memory} bytes of shared memory."
    )
