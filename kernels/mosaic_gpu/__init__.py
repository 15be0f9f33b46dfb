"""Pallas Mosaic GPU kernels for Hopper: attention, decoding, and recurrences.

`lla.ops.mosaic_gpu` puts those of attention together behind the operator and `lla.ops.decode_gpu`
those of decoding; `lla.mixers` has the recurrences. The design is in ``kernels/README.md``. They
need JAX 0.11 or later.
"""
