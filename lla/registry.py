"""Names for classes: mixers, tasks and estimators are looked up, listed and added in one way."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from lla import docstrings

_PLAIN = (bool, int, float, str, tuple, type(None))  # what a config can hold


class Registry:
    """Classes by name; a class is imported when it is first used.

    Classes come from three places: this package, `register`, and the entry points of installed
    packages. An entry point of the group ``lla.mixers`` or ``lla.tasks`` names a class and needs
    neither an import nor a call. It cannot replace a name of this package::

        [project.entry-points."lla.mixers"]
        toy = "my_package.toy:Toy"

    Args:
      kind: what the classes are, for error messages: "mixer".
      classes: name -> "module:Class".
      methods: what every class must have.
      reserved: arguments of the constructor that are no options.
      group: of the entry points; None reads none.
    """

    def __init__(
        self,
        kind: str,
        classes: Mapping[str, str],
        *,
        methods: Iterable[str],
        reserved: Iterable[str] = (),
        group: str | None = None,
    ):
        self.kind = kind
        self._classes: dict[str, str | type] = dict(classes)
        self._methods, self._reserved, self._group = tuple(methods), frozenset(reserved), group

    def names(self) -> tuple[str, ...]:
        """All names; those of this package first."""
        return tuple(self._classes | self._installed)

    def register(self, name: str, cls: type) -> None:
        """Adds a class.

        Args:
          name: a Python identifier, since it is part of config flags.
          cls: its options are the arguments of its constructor; each has a default that a config
            can hold: a number, string, bool, tuple or None.

        Raises:
          ValueError: the name is taken or no identifier.
          TypeError: the class lacks a method or attribute, or the default of an option.
        """
        if not name.isidentifier():
            raise ValueError(f"the name of a {self.kind} must be an identifier, got {name!r}.")
        if name in self.names():
            raise ValueError(f"there is already a {self.kind} {name!r}.")
        self._check(name, cls)
        self._classes[name] = cls

    def lookup(self, name: str) -> type:
        """The class.

        Raises:
          ValueError: an unknown name; the nearest valid one is named.
        """
        if name not in self.names():
            raise ValueError(unknown(self.kind, name, self.names()))
        found = self._classes.get(name)
        if found is None:
            found = self._installed[name].load()
            self._check(name, found)
        elif isinstance(found, str):
            module, attribute = found.split(":")
            found = getattr(importlib.import_module(module), attribute)
        self._classes[name] = found
        return found

    def options(self, name: str) -> dict[str, Any]:
        """The options of a class and their defaults."""
        return {key: parameter.default for key, parameter in self._parameters(self.lookup(name))}

    def option_types(self, name: str) -> dict[str, Any]:
        """The declared types of the options of a class."""
        cls = self.lookup(name)
        declared = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
        return {option: declared.get(option, Any) for option in self.options(name)}

    def meanings(self, name: str) -> dict[str, str]:
        """The meanings of the options of a class, as its docstring has them."""
        known = docstrings.meanings(self.lookup(name))
        return {option: known.get(option, "") for option in self.options(name)}

    def summary(self, name: str) -> str:
        """What a class is: the first line of its docstring."""
        return docstrings.first_line(self.lookup(name))

    def check_options(self, name: str, given: Iterable[str]) -> type:
        """The class, once it is sure that it has these options.

        Raises:
          ValueError: an unknown name or option; the nearest valid one is named.
        """
        valid = self.options(name)
        for option in given:
            if option not in valid:
                raise ValueError(unknown(f"option of {self.kind} {name!r}", option, valid))
        return self.lookup(name)

    @functools.cached_property
    def _installed(self) -> dict[str, importlib.metadata.EntryPoint]:
        if self._group is None:
            return {}
        return {entry.name: entry for entry in importlib.metadata.entry_points(group=self._group)}

    def _parameters(self, cls):
        _, *parameters = inspect.signature(cls.__init__).parameters.items()  # without self
        variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        return [
            (name, entry)
            for name, entry in parameters
            if name not in self._reserved and entry.kind not in variadic
        ]

    def _check(self, name, cls):
        missing = [method for method in self._methods if not hasattr(cls, method)]
        if missing:
            raise TypeError(f"{self.kind} {name!r}: {cls.__name__} lacks {', '.join(missing)}.")
        for option, parameter in self._parameters(cls):
            if not isinstance(parameter.default, _PLAIN):
                raise TypeError(
                    f"{self.kind} {name!r}: option {option!r} of {cls.__name__} needs a default "
                    f"that a config can hold, got {parameter.default!r}."
                )


def unknown(kind: str, word: str, valid: Iterable[str]) -> str:
    """The text of an error about an unknown word."""
    valid = list(valid)
    near = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}? Valid: {', '.join(valid)}." if near else "there are none."
    return f"unknown {kind}: {word!r}; {hint}"
