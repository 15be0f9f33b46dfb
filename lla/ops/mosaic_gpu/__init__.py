"""The back end of Pallas kernels for GPUs."""

from lla.ops.mosaic_gpu.hopper import refuse_machine

__all__ = ["refuse_machine"]
