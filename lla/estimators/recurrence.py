"""The recurrence of linear attention and the delta rule, in two exact forms.

With `decay` g in (0, 1] and, per position, key k, value v and (delta rule) a step size beta:

    linear   S = g S + k v^T                          o = S^T q
    delta    S = g S;  S += beta k (v - S^T k)^T      o = S^T q

`recurrent`, the reference, is a scan over positions. `chunked` computes `chunk` positions by matrix
products: within a chunk that starts from S0,

    o_i = g^i S0^T q_i + sum_{j <= i} g^(i-j) (q_i.k_j) u_j          (i counted from 1)

where u_j = v_j for the linear rule, and for the delta rule u solves the triangular system

    u_i + beta_i sum_{j < i} g^(i-j) (k_i.k_j) u_j = beta_i (v_i - g^i S0^T k_i),

which is the recurrence, unrolled.
"""

from functools import partial

import jax
import jax.numpy as jnp

_einsum = partial(jnp.einsum, precision="highest")


def compute(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    step: jax.Array | None,
    decay: float,
    *,
    form: str,
    chunk: int,
) -> jax.Array:
    """Outputs o [B, T, Hv] of the recurrence.

    Args:
      queries, keys: [B, T, H].
      values: [B, T, Hv].
      step: [B, T] selects the delta rule, None the linear one.
      decay: g.
      form: "chunked" or "recurrent".
      chunk: positions per chunk.
    """
    if form == "recurrent":
        return _recurrent(queries, keys, values, step, decay)
    return _chunked(queries, keys, values, step, decay, chunk)


def _recurrent(queries, keys, values, step, decay):
    batch, _, dim = keys.shape
    state = jnp.zeros((batch, dim, values.shape[-1]), keys.dtype)

    def advance(state, pair):
        query, key, value, *size = pair
        state = decay * state
        if size:
            value = size[0][:, None] * (value - _einsum("bhv,bh->bv", state, key))
        state = state + _einsum("bh,bv->bhv", key, value)
        return state, _einsum("bhv,bh->bv", state, query)

    by_time = (queries, keys, values) + (() if step is None else (step,))
    by_time = tuple(jnp.swapaxes(array, 0, 1) for array in by_time)
    _, out = jax.lax.scan(advance, state, by_time)
    return jnp.swapaxes(out, 0, 1)


def _chunked(queries, keys, values, step, decay, chunk):
    batch, length, dim = keys.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    position = jnp.arange(1, chunk + 1, dtype=keys.dtype)
    fade = decay**position  # weight of the incoming state at each position
    gap = position[:, None] - position[None, :]
    # Exponents are clipped before the power: decay^(-63) overflows for small decays.
    weights = jnp.where(gap >= 0, decay ** jnp.maximum(gap, 0.0), 0.0)
    strictly = jnp.where(gap > 0, weights, 0.0)

    def advance(state, block):
        query, key, value, *size = block
        if size:
            coupling = _einsum("bih,bjh->bij", key, key) * strictly[None]
            system = jnp.eye(chunk, dtype=key.dtype)[None] + size[0][:, :, None] * coupling
            surprise = value - fade[None, :, None] * _einsum("bhv,bih->biv", state, key)
            value = jax.lax.linalg.triangular_solve(
                system, size[0][:, :, None] * surprise, left_side=True, lower=True
            )
        scores = _einsum("bih,bjh->bij", query, key) * weights[None]
        out = fade[None, :, None] * _einsum("bhv,bih->biv", state, query)
        out = out + _einsum("bij,bjv->biv", scores, value)
        state = fade[-1] * state + _einsum("bih,biv->bhv", weights[-1][None, :, None] * key, value)
        return state, out

    blocks = tuple(
        to_chunks(array, chunks, chunk)
        for array in (queries, keys, values) + (() if step is None else (step,))
    )
    state = jnp.zeros((batch, dim, values.shape[-1]), keys.dtype)
    _, out = jax.lax.scan(advance, state, blocks)
    return jnp.moveaxis(out, 0, 1).reshape(batch, chunks * chunk, -1)[:, :length]


def to_chunks(array: jax.Array, chunks: int, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, chunk, ...], padded with zeros at the end."""
    batch, length = array.shape[:2]
    pad = [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, pad).reshape(batch, chunks, chunk, *array.shape[2:])
    return jnp.moveaxis(array, 1, 0)
