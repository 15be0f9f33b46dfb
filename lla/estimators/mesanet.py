"""MesaNet: exact ridge regression on the prefix at every position."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from lla.estimators.checks import check_decay, check_form, check_positive, check_sequences
from lla.estimators.recurrence import compute, to_chunks

_einsum = partial(jnp.einsum, precision="highest")


@dataclasses.dataclass(frozen=True)
class MesaNet:
    """Ridge regression of all pairs so far, optionally forgetting at a fixed rate.

    H = decay H + k k^T,  G = decay G + k v^T,  o = G^T (H + Lambda)^-1 q, with
    `Lambda = relative_ridge * H_dim` times the identity. The published layer has learned gates and
    uses conjugate gradients. Here every position is solved by a Cholesky factorisation, which is
    accurate in float32: H + Lambda is formed by sums of squares only, and no inverse is updated
    from one position to the next.

    `recurrent` is a scan over positions with the state (H, G) and one factorisation per position.
    `chunked`, the default, does not form G within a chunk: with x_i = (H_i + Lambda)^-1 q_i, the
    output is linear attention with the queries x.

    Attributes:
      decay: gate per token, in (0, 1]; 1 means no decay.
      relative_ridge: `Lambda = relative_ridge * H`, H the head dimension. For maps of variance
        1/H per entry and noise of variance s^2, `relative_ridge = s^2` is the Bayes estimator.
      form: "chunked" or "recurrent".
      chunk: positions for which H is held in memory at once, [B, chunk, H, H].
    """

    decay: float = 1.0
    relative_ridge: float = 1e-2
    form: str = "chunked"
    chunk: int = 16

    def __post_init__(self):
        check_decay(self.decay)
        check_positive(relative_ridge=self.relative_ridge, chunk=self.chunk)
        check_form(self.form)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[B, T, H], [B, T, H], [B, T, Hv] -> [B, T, Hv]; see `lla.estimators`."""
        check_sequences(queries, keys, values)
        ridge = self.relative_ridge * queries.shape[-1]
        if self.form == "recurrent":
            return _recurrent(queries, keys, values, self.decay, ridge)
        return _chunked(queries, keys, values, self.decay, ridge, self.chunk)


def _solve(second_moment: jax.Array, ridge: float, queries: jax.Array) -> jax.Array:
    """(second_moment + ridge I)^-1 queries for [..., H, H] and [..., H]."""
    eye = ridge * jnp.eye(queries.shape[-1], dtype=queries.dtype)
    factor = jnp.linalg.cholesky(second_moment + jnp.expand_dims(eye, range(queries.ndim - 1)))
    half = jax.lax.linalg.triangular_solve(factor, queries[..., None], left_side=True, lower=True)
    whole = jax.lax.linalg.triangular_solve(
        factor, half, left_side=True, lower=True, transpose_a=True
    )
    return whole[..., 0]


def _recurrent(queries, keys, values, decay, ridge):
    batch, _, dim = keys.shape

    def advance(state, pair):
        moment, target = state
        query, key, value = pair
        moment = decay * moment + key[:, :, None] * key[:, None, :]
        target = decay * target + key[:, :, None] * value[:, None, :]
        out = _einsum("bhv,bh->bv", target, _solve(moment, ridge, query))
        return (moment, target), out

    start = (
        jnp.zeros((batch, dim, dim), keys.dtype),
        jnp.zeros((batch, dim, values.shape[-1]), keys.dtype),
    )
    by_time = tuple(jnp.swapaxes(array, 0, 1) for array in (queries, keys, values))
    _, out = jax.lax.scan(advance, start, by_time)
    return jnp.swapaxes(out, 0, 1)


def _chunked(queries, keys, values, decay, ridge, chunk):
    batch, length, dim = keys.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)

    position = jnp.arange(1, chunk + 1, dtype=keys.dtype)
    fade = decay**position  # weight of the incoming H at each position
    gap = position[:, None] - position[None, :]
    weights = jnp.where(gap >= 0, decay ** jnp.maximum(gap, 0.0), 0.0)

    def advance(moment, block):
        query, key = block
        pairs = key[:, :, :, None] * key[:, :, None, :]
        moments = fade[None, :, None, None] * moment[:, None]
        moments = moments + _einsum("ij,bjxy->bixy", weights, pairs)
        return moments[:, -1], _solve(moments, ridge, query)

    blocks = (to_chunks(queries, chunks, chunk), to_chunks(keys, chunks, chunk))
    _, solved = jax.lax.scan(advance, jnp.zeros((batch, dim, dim), keys.dtype), blocks)
    solved = jnp.moveaxis(solved, 0, 1).reshape(batch, chunks * chunk, dim)[:, :length]
    return compute(solved, keys, values, None, decay, form="chunked", chunk=64)
