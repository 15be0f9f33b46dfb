"""Pallas kernels for TPUs; their design is described in ``kernels/TPU.md``.

They have been interpreted, lowered and compiled ahead of time, but never run on hardware.
"""
