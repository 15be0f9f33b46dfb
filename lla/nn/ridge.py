"""The ridge of a layer: fixed, learned per head, or computed from the token."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

RidgeType = Literal["fixed", "per_head", "per_token"]


class Ridge(nnx.Module):
    """``ridge_min + softplus(w . x + b + offset)``, or a constant.

    The parameters start at zero, and the constant `offset` makes the initial ridge equal to `ridge`
    for every head and token, up to float32 rounding. A parameter of zero therefore means the
    initial ridge, not ``ridge_min + log(2)``. Parameters and results are float32 whatever the dtype
    of the layer, because the ridge enters a linear solve.

    Attributes:
      bias: float32 ``[num_heads]``, for ``"per_head"`` and ``"per_token"``.
      kernel: float32 ``[in_features, num_heads]``, for ``"per_token"``.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        ridge: float,
        ridge_type: RidgeType,
        ridge_min: float,
    ):
        if ridge_type not in ("fixed", "per_head", "per_token"):
            raise ValueError(
                f"ridge_type must be 'fixed', 'per_head' or 'per_token', got {ridge_type!r}."
            )
        if not (math.isfinite(ridge) and ridge > 0):
            raise ValueError(f"ridge must be positive and finite, got {ridge}.")
        self.ridge_type = ridge_type
        self.initial = float(ridge)
        if ridge_type == "fixed":
            return
        if not 0 < ridge_min < ridge:
            raise ValueError(
                "a learned ridge must start above ridge_min, and ridge_min must be positive; got "
                f"ridge={ridge}, ridge_min={ridge_min}."
            )
        self.minimum = float(ridge_min)
        self.offset = _inverse_softplus(self.initial - self.minimum)
        self.bias = nnx.Param(jnp.zeros((num_heads,), jnp.float32))
        if ridge_type == "per_token":
            self.kernel = nnx.Param(jnp.zeros((in_features, num_heads), jnp.float32))

    def __call__(self, x: jax.Array) -> float | jax.Array:
        """Ridge of the tokens `x` ``[*B, T, in_features]``.

        Returns:
          A float (``"fixed"``), float32 ``[num_heads]`` (``"per_head"``) or float32
          ``[*B, T, num_heads]`` (``"per_token"``).
        """
        if self.ridge_type == "fixed":
            return self.initial
        score = self.bias[...] + self.offset
        if self.ridge_type == "per_token":
            projected = jnp.matmul(x.astype(jnp.float32), self.kernel[...])
            score = projected + jnp.broadcast_to(score, projected.shape)
        return self.minimum + jax.nn.softplus(score)


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))


class NoDecay(nnx.Param):
    """A parameter without weight decay, such as a rate, a step size or a threshold.

    It is part of `nnx.state(model, nnx.Param)`; `weight_decay_mask` is False for it.
    """


# Names of these parameters in trees of bare arrays, which have no types.
_SPARED = frozenset({"ridge", "A_log", "D", "dt_bias", "frequency"})


def weight_decay_mask(params: Any) -> Any:
    """The mask of parameters with weight decay: all but ridges, rates and step sizes.

    Decay would pull a learned ridge back to its initial value; and as a per-token kernel is a
    matrix, the usual rule to decay everything with two axes does not exclude it. Excluded are
    parameters of the type `lla.mixers.parts.NoDecay`, where `params` holds Flax variables, as
    ``nnx.state(model, nnx.Param)`` does; and, in every tree, those under the names ``ridge`` (of a
    layer), ``A_log``, ``D``, ``dt_bias`` and ``frequency`` (of the mixers). A tree of bare arrays,
    such as ``nnx.to_pure_dict`` returns, has only names. Use it as
    ``optax.adamw(..., mask=lla.nn.weight_decay_mask)``, combined with a rule of your own for norms
    and biases.

    Args:
      params: a pytree of parameters, for example ``nnx.state(model, nnx.Param)``.

    Returns:
      The same tree with a bool in place of each array.
    """

    def decays(path, leaf):
        spared = isinstance(leaf, NoDecay) or any(_name(entry) in _SPARED for entry in path)
        return jax.tree.map(lambda _: not spared, leaf)

    return jax.tree_util.tree_map_with_path(
        decays, params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def _name(entry) -> Any:
    return getattr(entry, "key", getattr(entry, "name", None))
