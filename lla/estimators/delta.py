"""Estimators with a matrix state and a rank-one update: linear attention and the delta rule.

Their recurrence, and the two ways to compute it, are in `lla.estimators.recurrence`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lla.estimators.checks import check_decay, check_form, check_positive, check_sequences, known
from lla.estimators.recurrence import compute


@dataclasses.dataclass(frozen=True)
class LinearAttention:
    """Linear attention: one gradient step from zero on the mean squared error of all pairs.

    `o_t = relative_rate / H * mean_{j <= t} v_j (k_j.q_t)`. The published layer has a sum and
    learns the gain in its projections. Without parameters a sum would grow with t, hence the mean
    and an explicit gain [ours]. With the factor 1/H it is the mean over L2-normalised keys and
    queries if `|k|^2 = H`.

    Attributes:
      relative_rate: gain, H times the step size of that gradient step.
      form, chunk: how to compute it, see `lla.estimators.recurrence`.
    """

    relative_rate: float = 1.0
    form: str = "chunked"
    chunk: int = 64

    def __post_init__(self):
        check_positive(relative_rate=self.relative_rate, chunk=self.chunk)
        check_form(self.form)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[B, T, H], [B, T, H], [B, T, Hv] -> [B, T, Hv]; see `lla.estimators`."""
        return _linear(queries, keys, values, 1.0, self.relative_rate, self.form, self.chunk)


@dataclasses.dataclass(frozen=True)
class GatedLinearAttention:
    """Linear attention that forgets: GLA with one fixed gate instead of a learned one.

    As `LinearAttention`, but the mean has weights `decay^(t-j)`.

    Attributes:
      decay: gate per token, in (0, 1].
      relative_rate: gain, as in `LinearAttention`.
      form, chunk: how to compute it, see `lla.estimators.recurrence`.
    """

    decay: float = 0.98
    relative_rate: float = 1.0
    form: str = "chunked"
    chunk: int = 64

    def __post_init__(self):
        check_decay(self.decay)
        check_positive(relative_rate=self.relative_rate, chunk=self.chunk)
        check_form(self.form)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[B, T, H], [B, T, H], [B, T, Hv] -> [B, T, Hv]; see `lla.estimators`."""
        return _linear(queries, keys, values, self.decay, self.relative_rate, self.form, self.chunk)


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """DeltaNet: online gradient descent on the squared error of the newest pair.

    The step is normalised by `|k|^2` (normalised least mean squares). If all keys and queries have
    the same norm, this is the published layer on L2-normalised keys and queries; otherwise it keeps
    the amplitude, which a regression needs [ours].

    Attributes:
      beta: step size in (0, 2); 1 fits the newest pair exactly.
      form, chunk: how to compute it, see `lla.estimators.recurrence`.
    """

    beta: float = 1.0
    form: str = "chunked"
    chunk: int = 64

    def __post_init__(self):
        check_positive(chunk=self.chunk)
        _check_beta(self.beta)
        check_form(self.form)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[B, T, H], [B, T, H], [B, T, Hv] -> [B, T, Hv]; see `lla.estimators`."""
        return _delta(queries, keys, values, 1.0, self.beta, self.form, self.chunk)


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet:
    """DeltaNet whose state decays before each update, with one fixed gate.

    Attributes:
      decay: gate per token, in (0, 1].
      beta: step size in (0, 2), as in `DeltaNet`.
      form, chunk: how to compute it, see `lla.estimators.recurrence`.
    """

    decay: float = 0.995
    beta: float = 1.0
    form: str = "chunked"
    chunk: int = 64

    def __post_init__(self):
        check_decay(self.decay)
        check_positive(chunk=self.chunk)
        _check_beta(self.beta)
        check_form(self.form)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[B, T, H], [B, T, H], [B, T, Hv] -> [B, T, Hv]; see `lla.estimators`."""
        return _delta(queries, keys, values, self.decay, self.beta, self.form, self.chunk)


def _check_beta(beta: float) -> None:
    if known(beta) and not 0 < beta < 2:
        raise ValueError(f"beta must be in (0, 2); got {beta}.")


def _linear(queries, keys, values, decay, relative_rate, form, chunk):
    check_sequences(queries, keys, values)
    out = compute(queries, keys, values, None, decay, form=form, chunk=chunk)
    age = jnp.arange(queries.shape[1], dtype=queries.dtype)
    weight = jnp.cumsum(decay**age)
    return out * (relative_rate / queries.shape[-1] / weight)[None, :, None]


def _delta(queries, keys, values, decay, beta, form, chunk):
    check_sequences(queries, keys, values)
    # A zero key has no information about the map: its step is zero rather than 0/0.
    square = jnp.sum(keys * keys, axis=-1)
    step = jnp.where(square > 0, beta / jnp.where(square > 0, square, 1.0), 0.0)
    return compute(queries, keys, values, step, decay, form=form, chunk=chunk)
