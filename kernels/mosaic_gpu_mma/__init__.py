"""Kernels for NVIDIA GPUs since Ampere: products by mma.sync, one source for all of them.

Import what is needed from the modules: they need JAX 0.11.2 or later, and 0.12 before Hopper.
"""
