"""The direct solver: the systems of all rows of a tile, formed and inverted."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lla import numerics
from lla.kernels.tiles import product

_KEY_CHUNK = 256


def _feature_blocks(h: int) -> list[slice]:
    """Cuts the head dimension so that only block pairs on or below the diagonal are formed."""
    parts = 1 if h < 16 else 2 if h < 32 else 4
    bounds = np.linspace(0, h, parts + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]


def covariances(p, k, key_mean, precision):
    """Covariances ``C_i = sum_j p_ij (k_j - mean_i)(k_j - mean_i)^T`` of the keys of every row.

    Args:
      p: ``[..., R, L]``; k: ``[..., L, H]``; key_mean: ``[..., R, H]``.

    Returns:
      ``[..., R, H, H]``. Memory beside it: the products of a chunk of keys.
    """
    *leading, r, length = p.shape
    blocks = _feature_blocks(k.shape[-1])
    pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[: i + 1]]
    chunk = min(_KEY_CHUNK, length)
    largest = float(jnp.finfo(k.dtype).max)

    def accumulate(index, sums):
        # The last chunk may overlap the one before it: what was counted gets weight zero.
        first = index * chunk
        start = jnp.minimum(first, length - chunk)
        weights = lax.dynamic_slice_in_dim(p, start, chunk, axis=p.ndim - 1)
        fresh = start + jnp.arange(chunk, dtype=jnp.int32) >= first
        fresh = jnp.broadcast_to(fresh, weights.shape)
        weights = jnp.where(fresh, weights, jnp.zeros_like(weights))
        keys = lax.dynamic_slice_in_dim(k, start, chunk, axis=k.ndim - 2)
        out = []
        for (a, b), total in zip(pairs, sums, strict=True):
            products = keys[..., a][..., :, None] * keys[..., b][..., None, :]
            # Those of a key that a row does not see have a weight of zero there if they are finite.
            products = jnp.clip(products, -largest, largest)
            products = products.reshape(*leading, chunk, -1)
            out.append(total + product(weights, products, precision))
        return tuple(out)

    def size(s):
        return s.stop - s.start

    like = p[..., :1] * key_mean[..., :1] * 0
    sums = tuple(jnp.repeat(like, size(a) * size(b), axis=-1) for a, b in pairs)
    sums = lax.fori_loop(0, -(-length // chunk), accumulate, sums)
    full = {}
    for (a, b), total in zip(pairs, sums, strict=True):
        mean_products = key_mean[..., a][..., :, None] * key_mean[..., b][..., None, :]
        block = total.reshape(*leading, r, size(a), size(b)) - mean_products
        full[a.start, b.start] = block
        full[b.start, a.start] = jnp.swapaxes(block, -1, -2)
    rows = [jnp.concatenate([full[a.start, b.start] for b in blocks], axis=-1) for a in blocks]
    return jnp.concatenate(rows, axis=-2)


def inverse_systems(p, k, key_mean, ridge, precision):
    """Approximate inverses ``[..., R, H, H]`` of ``C_i + ridge_i I``, and bool ``[..., R]``.

    False marks a row whose system rounding has made indefinite: its inverse is the identity, which
    leaves plain conjugate gradients.
    """
    system = covariances(p, k, key_mean, precision)
    identity = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), system.shape)
    return numerics.spd_inverse(system + ridge[..., None, None] * identity, precision)


def apply_inverse(inverse: jax.Array, r: jax.Array) -> jax.Array:
    """Row by row matrix times vector: ``[..., R, H, H], [..., R, H] -> [..., R, H]``."""
    return (inverse * r[..., None, :]).sum(-1)
