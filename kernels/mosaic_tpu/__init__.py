"""Pallas kernels for TPUs; their design is in ``kernels/TPU.md``.

Interpreted, lowered and compiled ahead of time, never run on hardware.
"""
