"""Tile mathematics: the formulas of the operator on one tile of queries and a range of keys.

Pure functions on arrays, shared by the back ends. Shapes, with any leading axes ``...``:
``R`` query rows, ``L`` keys, ``H`` head dimension, ``Hv`` value dimension;

    q, x, u, key_mean  [..., R, H]     k  [..., L, H]     v  [..., L, Hv]
    p (softmax weights), logits, valid [..., R, L]        ridge, scale, lse  [..., R]

Keys and queries may be given relative to any common origin: the regression depends on differences
only, and the logits change by a constant per row, which cancels in the softmax.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Static part of a mask; the part that varies by sequence is a `SequenceMask`."""

    is_causal: bool
    window: tuple[int, int] | None
    segments: bool


class SequenceMask(NamedTuple):
    """Offset and length of one sequence, int32 scalars."""

    offset: jax.Array  # position of query 0 among the keys
    length: jax.Array  # number of keys that exist


def product(a, b, precision):
    """``a @ b`` accumulated in the dtype of the operands."""
    return jnp.matmul(a, b, precision=precision)


def product_nt(a, b, precision):
    """``a @ b^T`` over the last axes: ``[..., R, H], [..., L, H] -> [..., R, L]``."""
    return _contract(a, b, -1, precision)


def product_tn(a, b, precision):
    """``a^T @ b`` over the rows: ``[..., R, L], [..., R, H] -> [..., L, H]``."""
    return _contract(a, b, -2, precision)


def _contract(a, b, axis, precision):
    """Contracts `axis` of both, without a transposed copy, which compilers may make in loops."""
    leading = tuple(range(a.ndim - 2))
    contracted = ((a.ndim + axis,), (b.ndim + axis,))
    return lax.dot_general(a, b, (contracted, (leading, leading)), precision=precision)


def row_dot(a, b):
    """Inner products of rows: ``[..., R, H] -> [..., R, 1]``."""
    return (a * b).sum(-1, keepdims=True)


NOTHING = -1e38
"""Logit of a masked key, and log-sum-exp of a row whose keys are all masked.

Finite, so that no NaN arises from it; the weight of such a logit is exactly zero.
"""


def sees_nothing(lse):
    """Whether a log-sum-exp is that of a row whose keys are all masked."""
    return lse < 0.1 * NOTHING


def weigh(p, array):
    """``p * array``, but exactly zero where p is zero, even if the array is infinite or NaN there.

    Products with keys that a row does not see may overflow.
    """
    return jnp.where(p == 0, jnp.zeros_like(array), p * array)


def softmax_weights(logits, valid):
    """Masked softmax; a row whose keys are all masked gets weights 0 and log-sum-exp `NOTHING`."""
    logits = jnp.where(valid, logits, NOTHING)
    largest = logits.max(-1, keepdims=True)
    some = ~(largest <= NOTHING)  # True for NaN, which has to propagate
    shift = jnp.where(some, largest, jnp.zeros_like(largest))
    weights = jnp.exp(logits - shift)
    total = weights.sum(-1, keepdims=True)
    divisor = jnp.where(some, total, jnp.ones_like(total))
    lse = jnp.where(some, shift + jnp.log(divisor), NOTHING)[..., 0]
    weights = weights * (1 / divisor)
    return weights, lse


def saved_weights(logits, valid, lse):
    """The weights of `softmax_weights`, from a saved log-sum-exp."""
    shift = jnp.where(sees_nothing(lse), jnp.zeros_like(lse), lse)[..., None]
    return jnp.where(valid, jnp.exp(logits - shift), jnp.zeros_like(logits))


def centred_scores(k, key_mean, x, precision):
    """``t_ij = (k_j - key_mean_i) . x_i``."""
    return product_nt(x, k, precision) - row_dot(key_mean, x)


def system_product(p, k, key_mean, ridge, y, precision):
    """``A_i y_i = sum_j p_ij ((k_j - key_mean_i) . y_i) k_j + ridge_i y_i``, without cancellation.

    The scores are centred before they are weighted, which keeps this accurate when the keys share
    an offset. Centring the second factor as well would change nothing: the weighted centred scores
    of a row sum to zero.
    """
    scores = weigh(p, centred_scores(k, key_mean, y, precision))
    return product(scores, k, precision) + ridge[..., None] * y


def system_curvature(p, k, key_mean, ridge, y, precision):
    """``y_i . A_i y_i = sum_j p_ij t_ij^2 + ridge_i |y_i|^2``, ``[..., R, 1]``."""
    scores = centred_scores(k, key_mean, y, precision)
    squares = weigh(p, scores * scores).sum(-1, keepdims=True)
    return squares + ridge[..., None] * row_dot(y, y)


def probed_output(p, k, v, key_mean, x, precision):
    """``o_i = sum_j p_ij (1 - t_ij) v_j``; with ``x = None`` plain softmax attention."""
    if x is not None:
        p = weigh(p, 1 - centred_scores(k, key_mean, x, precision))
    return product(p, v, precision)


def adjoint_target(p, k, centred_c, precision):
    """Right-hand side ``h_i = sum_j p_ij (c_ij - c_mean_i) k_j`` of the adjoint system."""
    return product(weigh(p, centred_c), k, precision)


def logit_gradient(p, a, e):
    """Gradient with respect to the logits, ``p (a e - sum_j p a e)``.

    The subtracted mean equals ``-ridge u.x`` for an exact solve and ``-x.h`` for a given probe, so
    that one formula serves the whole family, and a row's gradient sums to zero to rounding.
    """
    weighted = weigh(p, a * e)
    return weighted - weigh(p, jnp.broadcast_to(weighted.sum(-1, keepdims=True), p.shape))


def segment_origin(k, valid, bounded: bool = False):
    """Mean of the keys that the first row sees, ``[..., 1, H]``: an origin that respects causality.

    It depends only on what the first row sees, so shifting by it leaks nothing from later
    positions, not even through rounding. The keys must be finite.

    Args:
      k, valid: as above.
      bounded: set where other rows may not see everything that the first one sees. Coordinates
        above 256 in size (in float32) are then set to zero: shifting by 256 costs a key of size 1
        an error of 1.5e-5, and hidden keys must not cost more.
    """
    seen = valid[..., :1, :].astype(k.dtype)
    count = jnp.maximum(seen.sum(-1, keepdims=True), 1)
    origin = product(seen / count, k, lax.Precision.HIGHEST)
    if bounded:
        largest = 2.0**-15 / float(jnp.finfo(k.dtype).eps)
        origin = jnp.where(jnp.abs(origin) <= largest, origin, jnp.zeros_like(origin))
    return origin
