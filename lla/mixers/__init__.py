"""Attention mechanisms and their baselines as modules ``[B, T, width] -> [B, T, width]``, by name.

Example::

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from lla import mixers
    >>> mixer = mixers.create("gla", 64, 4, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((2, 10, 64))).shape
    (2, 10, 64)

``lla/mixers/README.md`` lists them with their formulas.
"""

from lla.mixers.protocol import Mixer
from lla.mixers.registry import create, length_option, names, options, uses_positions

__all__ = ["Mixer", "create", "length_option", "names", "options", "uses_positions"]
