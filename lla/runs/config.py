"""Conversion between the config of a command line and the frozen dataclasses of the library."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from lla.typed import conform

T = TypeVar("T")


def from_config(cls: type[T], config: Mapping[str, Any], path: str = "config") -> T:
    """Builds the dataclass `cls` from a mapping, such as an `ml_collections.ConfigDict`.

    A field that is a dataclass is built from a nested mapping. Other mappings become plain dicts,
    and lists become tuples, so that no object of the config library remains.

    Args:
      cls: a dataclass.
      config: its fields.
      path: the name of `config` in error messages.

    Raises:
      ValueError: a key that `cls` does not have (the message names the nearest valid one), a
        missing field without a default, or a value that does not have the declared type.
    """
    return _build(cls, config, path)


def to_config(settings: Mapping[str, Any]) -> ConfigDict:
    """A config with the same nested keys, each of which a command line can override.

    Where the default is a number or None, any literal is accepted, so that `--config.option=3` and
    `--config.option=None` work whatever the default is. `from_config` and `check_types` check the
    type of the value.
    """
    config = ConfigDict()
    for key, entry in settings.items():
        if isinstance(entry, Mapping):
            config[key] = to_config(entry)
        elif entry is None or (isinstance(entry, (int, float)) and not isinstance(entry, bool)):
            config[key] = config_dict.FieldReference(entry, field_type=object)
        else:
            config[key] = entry
    return config


def plain(entry: Any) -> Any:
    """The same with nested mappings as dicts and sequences as tuples."""
    if isinstance(entry, Mapping) or hasattr(entry, "items"):
        return {key: plain(inner) for key, inner in entry.items()}
    if isinstance(entry, (list, tuple)):
        return tuple(plain(inner) for inner in entry)
    return entry


def check_keys(path: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raises ValueError for the first key that is not valid; the message names the nearest one.

    `path` is the section of the config that the keys belong to.
    """
    valid = list(valid)
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
            hint = f"; did you mean {path}.{near[0]}?" if near else ":"
            raise ValueError(f"{path}.{key} does not exist{hint} Valid: {', '.join(valid)}.")


def check_variant(variant: str, valid: Iterable[str]) -> None:
    """Raises ValueError for a variant that a config does not have; the nearest one is named."""
    valid = list(valid)
    if variant not in valid:
        named = [name for name in valid if name]
        near = difflib.get_close_matches(variant, named, n=1, cutoff=0.0)
        hint = (
            f"; did you mean {near[0]!r}? Valid: {', '.join(named)}." if near else "; it has none."
        )
        raise ValueError(f"unknown variant {variant!r}{hint}")


def check_types(path: str, given: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `given`, converted to the types that `declared` has for their keys.

    Raises:
      ValueError: a value of another type. The message names it by `path` and its key.
    """
    return {
        key: conform(plain(entry), declared.get(key, Any), f"{path}.{key}")
        for key, entry in given.items()
    }


def _build(cls, config, path):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    declared = typing.get_type_hints(cls)
    given = {}
    if not hasattr(config, "items"):
        raise ValueError(f"{path} is a section, got {config!r}.")
    check_keys(path, config, fields)
    for key, entry in config.items():
        if dataclasses.is_dataclass(declared[key]):
            given[key] = _build(declared[key], entry, f"{path}.{key}")
        else:
            given |= check_types(path, {key: entry}, declared)
    missing = [
        name
        for name, field in fields.items()
        if name not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    return cls(**given)
