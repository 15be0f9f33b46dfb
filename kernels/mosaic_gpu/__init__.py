"""Pallas Mosaic GPU kernels for Hopper: attention, decoding, and recurrences.

`lla.ops.mosaic_gpu` puts those of attention and decoding together behind the operator, `lla.mixers`
has the recurrences. The design is in ``kernels/README.md``. They need JAX 0.11 or later.
"""
