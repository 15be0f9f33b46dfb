"""From a command line's config to the frozen dataclass that the library works with."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
    """Builds the dataclass `cls` from a mapping, an `ml_collections.ConfigDict` for one.

    Fields that are dataclasses themselves are built from nested mappings; other mappings become
    plain dicts and lists become tuples, so that nothing of the config library travels further.

    Raises:
      ValueError: a key that `cls` does not have (the nearest valid one is named), or a field
        without a default that is missing.
    """
    return _build(cls, config, "config")


def _build(cls, config, path):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {}
    for key, entry in config.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{path}.{key} does not exist; did you mean {path}.{near}? "
                f"Valid: {', '.join(fields)}."
            )
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            given[key] = _build(kind, entry, f"{path}.{key}")
        else:
            given[key] = _plain(entry)
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


def _plain(entry):
    if isinstance(entry, Mapping) or hasattr(entry, "items"):
        return {key: _plain(inner) for key, inner in entry.items()}
    if isinstance(entry, (list, tuple)):
        return tuple(_plain(inner) for inner in entry)
    return entry
