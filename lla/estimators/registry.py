"""The one place where estimators have names."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lla.estimators.attention import LocalLinear, Softmax
from lla.estimators.delta import DeltaNet, GatedDeltaNet, GatedLinearAttention, LinearAttention
from lla.estimators.mesanet import MesaNet

Estimator = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_ESTIMATORS: dict[str, type] = {
    "lla": LocalLinear,
    "softmax": Softmax,
    "mesanet": MesaNet,
    "linear_attention": LinearAttention,
    "gated_linear_attention": GatedLinearAttention,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
}


def names() -> tuple[str, ...]:
    """Names that `create` accepts."""
    return tuple(_ESTIMATORS)


def options(name: str) -> dict[str, Any]:
    """Options of the estimator `name` with their default values."""
    return {field.name: field.default for field in dataclasses.fields(_lookup(name))}


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
    estimator = _lookup(name)
    valid = [field.name for field in dataclasses.fields(estimator)]
    for option in given:
        if option not in valid:
            raise ValueError(_unknown(f"option of estimator {name!r}", option, valid))
    return estimator(**given)


def _lookup(name: str) -> type:
    if name not in _ESTIMATORS:
        raise ValueError(_unknown("estimator", name, names()))
    return _ESTIMATORS[name]


def _unknown(kind: str, word: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.0)
    return f"unknown {kind}: {word!r}; did you mean {near[0]!r}? Valid: {', '.join(valid)}."
