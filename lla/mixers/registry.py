"""The one place where mixers have names."""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx

# Name: module in this package, and its class. A module is imported when its mixer is asked for.
_MIXERS: dict[str, str] = {
    "softmax": "softmax:Softmax",
    "linear": "linear:LinearAttention",
    "retnet": "retnet:RetNet",
    "gla": "gla:GatedLinearAttention",
    "mamba": "mamba:Mamba",
    "mamba2": "mamba2:Mamba2",
    "deltanet": "deltanet:DeltaNet",
    "gated_deltanet": "gated_deltanet:GatedDeltaNet",
    "mesanet": "mesanet:MesaNet",
    "hyena": "hyena:Hyena",
    "parallax": "parallax:Parallax",
    "lla": "lla:LLA",
}
_NOT_OPTIONS = ("dtype", "param_dtype", "rngs")


def names() -> tuple[str, ...]:
    """Names that `create` accepts."""
    return tuple(_MIXERS)


def options(name: str) -> dict[str, Any]:
    """Options of the mixer `name` with their default values: numbers, strings, bools or None."""
    parameters = inspect.signature(_lookup(name).__init__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in _NOT_OPTIONS
    }


def option_types(name: str) -> dict[str, Any]:
    """What types the options of the mixer `name` are declared with."""
    declared = typing.get_type_hints(_lookup(name).__init__)
    return {option: declared.get(option, Any) for option in options(name)}


def uses_positions(name: str) -> bool:
    """Whether the mixer `name`, with its default options, needs position embeddings.

    True for those whose output does not depend on the order of the earlier tokens; the class says
    so by an attribute ``uses_positions = True``.
    """
    return getattr(_lookup(name), "uses_positions", False)


def length_option(name: str) -> str | None:
    """The option of the mixer `name` whose None a model replaces by its longest sequence, if any.

    The class says so by an attribute ``length_option``.
    """
    return getattr(_lookup(name), "length_option", None)


def create(
    name: str,
    width: int,
    num_heads: int,
    *,
    rngs: nnx.Rngs,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    **given: Any,
) -> nnx.Module:
    """Builds a mixer.

    Args:
      name: one of `names()`.
      width: of the tokens that enter and leave.
      num_heads: heads.
      rngs: Flax random streams; uses ``params``.
      dtype: of the computation; None infers it from inputs and parameters. States, decays and
        norms are float32 or better anyway.
      param_dtype: of the parameters.
      **given: options of the mixer; `options(name)` lists them with their defaults, the docstring
        of the class explains them.

    Returns:
      A causal module ``x [B, T, width] -> [B, T, width]``, which can decode: see
      `lla.mixers.Mixer`.

    Raises:
      ValueError: an unknown name or option (the nearest valid one is named), or a size or option
        outside its range.
    """
    mixer = _lookup(name)
    valid = options(name)
    for option in given:
        if option not in valid:
            raise ValueError(_unknown(f"option of mixer {name!r}", option, valid))
    for size_name, size in (("width", width), ("num_heads", num_heads)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{size_name} must be a positive int, got {size!r}.")
    return mixer(width, num_heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **given)


def _lookup(name: str) -> type[nnx.Module]:
    if name not in _MIXERS:
        raise ValueError(_unknown("mixer", name, names()))
    module, attribute = _MIXERS[name].split(":")
    return getattr(importlib.import_module(f"lla.mixers.{module}"), attribute)


def _unknown(kind: str, word: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.0)
    return f"unknown {kind}: {word!r}; did you mean {near[0]!r}? Valid: {', '.join(valid)}."
