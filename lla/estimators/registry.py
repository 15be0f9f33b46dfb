"""Estimators by name."""

from collections.abc import Callable
from typing import Any

import jax

from lla.registry import Registry

Estimator = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_ESTIMATORS = Registry(
    "estimator",
    {
        "lla": "lla.estimators.attention:LocalLinear",
        "softmax": "lla.estimators.attention:Softmax",
        "mesanet": "lla.estimators.mesanet:MesaNet",
        "linear_attention": "lla.estimators.delta:LinearAttention",
        "gated_linear_attention": "lla.estimators.delta:GatedLinearAttention",
        "deltanet": "lla.estimators.delta:DeltaNet",
        "gated_deltanet": "lla.estimators.delta:GatedDeltaNet",
    },
    methods=("__call__",),
)


def names() -> tuple[str, ...]:
    """Names that `create` accepts."""
    return _ESTIMATORS.names()


def register(name: str, estimator: type) -> None:
    """Adds an estimator under a name that is not in use.

    Args:
      name: a Python identifier.
      estimator: a frozen dataclass whose instances are called as `create` describes; its fields
        are the options, each with a default.

    Raises:
      ValueError: the name is in use or no identifier.
      TypeError: an option without a default.
    """
    _ESTIMATORS.register(name, estimator)


def options(name: str) -> dict[str, Any]:
    """Options of the estimator `name` with their default values."""
    return _ESTIMATORS.options(name)


def create(name: str, **given: Any) -> Estimator:
    """Builds an estimator.

    Args:
      name: one of `names()`.
      **given: its options; `options(name)` lists them with their defaults, the docstring of the
        class explains them. Numbers may be traced values; these are not checked.

    Returns:
      A hashable callable `(queries [B, T, H], keys [B, T, H], values [B, T, Hv]) -> [B, T, Hv]`,
      safe under `jax.jit`.

    Raises:
      ValueError: an unknown name or option (the nearest valid one is named), or an option outside
        its range.
    """
    return _ESTIMATORS.check_options(name, given)(**given)
