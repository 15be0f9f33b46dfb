"""Checks of values from configs against the types that a signature or dataclass declares."""

import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

LARGEST_SEED = 2**32 - 1  # random keys are made from 32 bits
_NAMES = {
    bool: ("True or False", "booleans"),
    int: ("an integer", "integers"),
    float: ("a finite number", "finite numbers"),
    str: ("a string", "strings"),
    type(None): ("None", "None"),
}


def conform(value: Any, declared: Any, name: str) -> Any:
    """`value` as the type `declared`.

    Integers become floats where a float is declared, lists become tuples, and NumPy numbers become
    Python numbers. Nothing else is converted: neither a bool to a number nor a float to an integer.
    Floats must be finite, since JSON has no others. Types that are not listed below, such as `Any`,
    accept everything.

    Args:
      value: the value to check.
      declared: bool, int, float, str, None, a `Literal`, a tuple, a mapping or a union of these.
      name: of the value in error messages.

    Raises:
      ValueError: the value has another type; the message says what is valid.
    """
    fits, converted = _match(value, declared)
    if not fits:
        raise ValueError(f"{name} must be {describe(declared)}, got {value!r}.")
    return converted


def check_range(low: float, high: float = math.inf, **given: Any) -> None:
    """Raises ValueError for the first number, or tuple with a number, outside `low` ... `high`."""
    for name, value in given.items():
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                limits = f">= {low}" + ("" if high == math.inf else f" and <= {high}")
                raise ValueError(f"{name} must be {limits}, got {value!r}.")


def describe(declared: Any) -> str:
    """A type in words, such as "an integer or None"."""
    if declared is None:
        declared = type(None)
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return _either([repr(option) for option in inner])
    if origin in (Union, types.UnionType):
        return _either([describe(kind) for kind in inner])
    if _is_tuple(declared):
        if not inner:
            return "a tuple"
        if inner[-1] is Ellipsis:
            plural = _NAMES.get(inner[0], (None, None))[1]
            return f"a tuple of {plural}" if plural else f"a tuple, each entry {describe(inner[0])}"
        return f"a tuple ({', '.join(describe(kind) for kind in inner)})"
    if _is_mapping(declared):
        return "a section of names and values"
    return _NAMES.get(declared, (str(declared),))[0]


def _match(value, declared):
    """Whether `value` fits `declared`, and its converted form."""
    if declared is None:
        declared = type(None)
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        # 1 == True, but they are not the same option.
        return any(value == option and type(value) is type(option) for option in inner), value
    if origin in (Union, types.UnionType):
        return _match_any(value, inner)
    if _is_tuple(declared):
        return _match_tuple(value, inner)
    if _is_mapping(declared):
        return isinstance(value, Mapping), value
    if declared is bool:
        return isinstance(value, bool), value
    if declared in (int, float):
        kind = numbers.Integral if declared is int else numbers.Real
        fits = isinstance(value, kind) and not isinstance(value, bool) and _finite(value)
        return fits, declared(value) if fits else value
    if declared in (str, type(None)):
        return isinstance(value, declared), value
    return True, value


def _match_any(value, kinds):
    # An integer stays an integer where both are valid.
    if isinstance(value, numbers.Integral) and int in kinds:
        kinds = (int, *kinds)
    for kind in kinds:
        fits, converted = _match(value, kind)
        if fits:
            return True, converted
    return False, value


def _match_tuple(value, inner):
    if not isinstance(value, (tuple, list)):
        return False, value
    if not inner:
        return True, tuple(value)
    kinds = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
    if len(kinds) != len(value):
        return False, value
    matched = [_match(entry, kind) for entry, kind in zip(value, kinds, strict=True)]
    return all(fits for fits, _ in matched), tuple(converted for _, converted in matched)


def _finite(value):
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_tuple(declared):
    return declared is tuple or typing.get_origin(declared) is tuple


def _is_mapping(declared):
    kind = typing.get_origin(declared) or declared
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _either(words):
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
