"""The one place where trained tasks have names."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

from lla.tasks.in_context_regression import InContextRegression
from lla.tasks.mad import MAD
from lla.tasks.mqar import MQAR
from lla.tasks.state_tracking import StateTracking
from lla.tasks.task import Task
from lla.typed import conform

_TASKS: dict[str, type] = {
    "in_context_regression": InContextRegression,
    "mad": MAD,
    "mqar": MQAR,
    "state_tracking": StateTracking,
}


def names() -> tuple[str, ...]:
    """Names that `create` accepts."""
    return tuple(_TASKS)


def options(name: str) -> dict[str, Any]:
    """Options of the task `name` with their default values."""
    return {field.name: field.default for field in dataclasses.fields(_lookup(name))}


def option_types(name: str) -> dict[str, Any]:
    """What types the options of the task `name` are declared with."""
    declared = typing.get_type_hints(_lookup(name))
    return {option: declared[option] for option in options(name)}


def create(name: str, **given: Any) -> Task:
    """Builds a task.

    Args:
      name: one of `names()`.
      **given: its options; `options(name)` lists them with their defaults, the docstring of the
        class explains them.

    Raises:
      ValueError: an unknown name or option (the nearest valid one is named), or an option of
        another type or outside its range.
    """
    task, declared = _lookup(name), option_types(name)
    valid = [field.name for field in dataclasses.fields(task)]
    for option in given:
        if option not in valid:
            raise ValueError(_unknown(f"option of task {name!r}", option, valid))
    return task(**{key: conform(entry, declared[key], key) for key, entry in given.items()})


def _lookup(name: str) -> type:
    if name not in _TASKS:
        raise ValueError(_unknown("task", name, names()))
    return _TASKS[name]


def _unknown(kind: str, word: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.0)
    return f"unknown {kind}: {word!r}; did you mean {near[0]!r}? Valid: {', '.join(valid)}."
