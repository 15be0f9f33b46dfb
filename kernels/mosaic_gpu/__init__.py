"""Pallas Mosaic GPU kernels for Hopper: attention, decoding and linear recurrences.

`lla.ops` builds the operator from the attention and decoding kernels, `lla.mixers` the recurrent
mixers from the others. Their design is in ``kernels/HOPPER.md`` and ``kernels/DECODING.md``. They
need JAX 0.11 or later.
"""
