"""Estimators with weights that depend on the distance to the query: softmax and LLA."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lla.estimators.checks import check_positive, check_sequences


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Softmax attention: a local constant fit (Nadaraya-Watson).

    Attributes:
      relative_scale: `scale = relative_scale / sqrt(H)`; the inverse bandwidth.
      sequences_at_once: sequences per call of the operator; bounds memory, not the result.
    """

    relative_scale: float = 1.0
    sequences_at_once: int = 8

    def __post_init__(self):
        check_positive(relative_scale=self.relative_scale, sequences_at_once=self.sequences_at_once)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[B, T, H], [B, T, H], [B, T, Hv] -> [B, T, Hv]; see `lla.estimators`."""
        from lla import softmax_attention

        check_sequences(queries, keys, values)
        scale = self.relative_scale / math.sqrt(queries.shape[-1])

        def attend(query, key, value):
            return softmax_attention(query, key, value, scale=scale, is_causal=True)

        return _in_groups(attend, self.sequences_at_once, queries, keys, values)


@dataclasses.dataclass(frozen=True)
class LocalLinear:
    """Local Linear Attention: a local linear fit with the weights of softmax attention.

    Attributes:
      relative_scale: `scale = relative_scale / sqrt(H)`; the inverse bandwidth.
      relative_ridge: `ridge = relative_ridge * H`, in the operator's own (relative) units. The
        factor H keeps it fixed against the covariance of keys with `|k|^2 = H`, whose trace is H
        times that of unit keys.
      solver: "auto", "cg" or "direct", see `lla.Solver`.
      sequences_at_once: sequences per call of the operator; bounds memory, not the result.
    """

    relative_scale: float = 1.0
    relative_ridge: float = 1e-3
    solver: str = "auto"
    sequences_at_once: int = 8

    def __post_init__(self):
        check_positive(
            relative_scale=self.relative_scale,
            relative_ridge=self.relative_ridge,
            sequences_at_once=self.sequences_at_once,
        )

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[B, T, H], [B, T, H], [B, T, Hv] -> [B, T, Hv]; see `lla.estimators`."""
        import lla

        check_sequences(queries, keys, values)
        dim = queries.shape[-1]

        def attend(query, key, value):
            return lla.local_linear_attention(
                query,
                key,
                value,
                ridge=self.relative_ridge * dim,
                scale=self.relative_scale / math.sqrt(dim),
                is_causal=True,
                solver=lla.Solver(method=self.solver),
            )

        return _in_groups(attend, self.sequences_at_once, queries, keys, values)


def _in_groups(attend, group: int, *arrays: jax.Array) -> jax.Array:
    """Applies `attend` (layout [batch, length, 1 head, dim]) to `group` sequences at a time."""
    with_head = tuple(jnp.expand_dims(array, 2) for array in arrays)
    batch = arrays[0].shape[0]
    if batch <= group:
        return attend(*with_head)[:, :, 0]
    even = batch // group * group
    grouped = tuple(a[:even].reshape(even // group, group, *a.shape[1:]) for a in with_head)
    out = jax.lax.map(lambda group: attend(*group), grouped)
    out = out.reshape(even, *out.shape[2:])
    if even < batch:
        out = jnp.concatenate([out, attend(*(a[even:] for a in with_head))])
    return out[:, :, 0]
