"""Mixers by name."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from lla.registry import Registry

_MIXERS = Registry(
    "mixer",
    {
        "softmax": "lla.mixers.softmax:Softmax",
        "linear": "lla.mixers.linear:LinearAttention",
        "retnet": "lla.mixers.retnet:RetNet",
        "gla": "lla.mixers.gla:GatedLinearAttention",
        "mamba": "lla.mixers.mamba:Mamba",
        "mamba2": "lla.mixers.mamba2:Mamba2",
        "deltanet": "lla.mixers.deltanet:DeltaNet",
        "gated_deltanet": "lla.mixers.gated_deltanet:GatedDeltaNet",
        "mesanet": "lla.mixers.mesanet:MesaNet",
        "hyena": "lla.mixers.hyena:Hyena",
        "parallax": "lla.mixers.parallax:Parallax",
        "lla": "lla.mixers.lla:LLA",
    },
    methods=("__call__", "init_state", "decode"),
    reserved=("width", "num_heads", "dtype", "param_dtype", "rngs"),
    group="lla.mixers",
)


def names() -> tuple[str, ...]:
    """Names that `create` accepts."""
    return _MIXERS.names()


def register(name: str, mixer: type[nnx.Module]) -> None:
    """Adds a mixer under a name, for `create`, for models and for configs.

    Configs made afterwards have its options under ``config.mixers.NAME``. A package can do without
    this call: an entry point of the group ``lla.mixers`` registers a mixer wherever the package is
    installed.

    Example::

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from lla import mixers
        >>> from lla.mixers.linear import LinearAttention
        >>> class Short(LinearAttention):
        ...     def __init__(self, width, num_heads, *, taps: int = 4, **options):
        ...         super().__init__(width, num_heads, short_conv=taps, **options)
        >>> mixers.register("short", Short)
        >>> mixers.create("short", 8, 2, taps=2, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8))).shape
        (1, 3, 8)

    Args:
      name: a Python identifier that is not in use.
      mixer: a module as `lla.mixers.Mixer` describes it, with the constructor ``(width, num_heads,
        *, OPTIONS, dtype=None, param_dtype=jnp.float32, rngs)``. Options have defaults that are
        numbers, strings, bools, tuples or None.

    Raises:
      ValueError: the name is in use or no identifier.
      TypeError: the class lacks a method, or the default of an option.
    """
    _MIXERS.register(name, mixer)


def options(name: str) -> dict[str, Any]:
    """Options of the mixer `name` with their default values: numbers, strings, bools or None."""
    return _MIXERS.options(name)


def option_types(name: str) -> dict[str, Any]:
    """The declared types of the options of the mixer `name`."""
    return _MIXERS.option_types(name)


def meanings(name: str) -> dict[str, str]:
    """The meanings of the options of the mixer `name`."""
    return _MIXERS.meanings(name)


def summary(name: str) -> str:
    """What the mixer `name` is, in a line."""
    return _MIXERS.summary(name)


def uses_positions(name: str) -> bool:
    """Whether the mixer `name`, with its default options, needs position embeddings.

    True for those whose output does not depend on the order of the earlier tokens; the class says
    so by an attribute ``uses_positions = True``.
    """
    return getattr(_MIXERS.lookup(name), "uses_positions", False)


def length_option(name: str) -> str | None:
    """The option of the mixer `name` that a model sets to its longest sequence if it is None.

    The class says so by an attribute ``length_option``; None for most mixers.
    """
    return getattr(_MIXERS.lookup(name), "length_option", None)


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
      width: of the tokens, in and out.
      num_heads: number of heads.
      rngs: Flax random streams; uses ``params``.
      dtype: of the computation; None infers it from inputs and parameters. States, decays and
        norms are float32 or better in any case.
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
    mixer = _MIXERS.check_options(name, given)
    for size_name, size in (("width", width), ("num_heads", num_heads)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{size_name} must be a positive int, got {size!r}.")
    return mixer(width, num_heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **given)
