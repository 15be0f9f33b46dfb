"""Pallas Mosaic GPU kernels for Hopper: the solve, the output and both backward passes.

`lla.ops.mosaic_gpu` puts them together behind the operator; the design is in
``kernels/README.md``. They need JAX 0.11 or later.
"""
