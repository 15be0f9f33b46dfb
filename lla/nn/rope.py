"""Rotary position embeddings of query and key heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(heads: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates the pairs ``(i, i + H / 2)`` of every head by ``position * theta^(-2 i / H)``.

    Dot products of rotated queries and keys depend only on the difference of their positions.

    Args:
      heads: ``[*B, T, N, H]``, ``H`` even.
      positions: int, ``[T]`` or ``[*B, T]``.
      theta: base of the geometric sequence of frequencies.

    Returns:
      ``[*B, T, N, H]`` in the dtype of `heads`; angles are float32.

    Source: Su et al., "RoFormer", arXiv 2104.09864.
    """
    *leading, length, _, dim = heads.shape
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    frequency = jnp.float32(theta) ** -exponent
    positions = jnp.broadcast_to(positions, (*leading, length)).astype(jnp.float32)
    shape = (*leading, length, 1, dim // 2)
    angle = jnp.broadcast_to(positions[..., None, None], shape) * jnp.broadcast_to(frequency, shape)
    half = (*heads.shape[:-1], dim // 2)
    cos, sin = (jnp.broadcast_to(f(angle), half) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
