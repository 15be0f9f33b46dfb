"""Trained tasks by name."""

from typing import Any

from lla.registry import Registry
from lla.tasks.task import Task
from lla.typed import conform

_TASKS = Registry(
    "task",
    {
        "in_context_regression": "lla.tasks.in_context_regression:InContextRegression",
        "mad": "lla.tasks.mad:MAD",
        "mqar": "lla.tasks.mqar:MQAR",
        "state_tracking": "lla.tasks.state_tracking:StateTracking",
        "text": "lla.tasks.text:Text",
    },
    methods=("batch", "loss", "metrics", "splits", "primary_metric", "metric_mode"),
    group="lla.tasks",
)


def names() -> tuple[str, ...]:
    """Names that `create` accepts."""
    return _TASKS.names()


def register(name: str, task: type) -> None:
    """Adds a task under a name, for `create` and for ``lla.training.defaults(name)``.

    A package can do without this call: an entry point of the group ``lla.tasks`` registers a task
    wherever the package is installed.

    Args:
      name: a Python identifier that is not in use.
      task: a frozen dataclass as `lla.tasks.Task` describes it. Its fields are the options; they
        have defaults that are numbers, strings, bools, tuples or None.

    Raises:
      ValueError: the name is in use or no identifier.
      TypeError: the class lacks a method or attribute, or the default of an option.
    """
    _TASKS.register(name, task)


def options(name: str) -> dict[str, Any]:
    """Options of the task `name` with their default values."""
    return _TASKS.options(name)


def option_types(name: str) -> dict[str, Any]:
    """The declared types of the options of the task `name`."""
    return _TASKS.option_types(name)


def meanings(name: str) -> dict[str, str]:
    """The meanings of the options of the task `name`."""
    return _TASKS.meanings(name)


def summary(name: str) -> str:
    """What the task `name` is, in a line."""
    return _TASKS.summary(name)


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
    task, declared = _TASKS.check_options(name, given), option_types(name)
    return task(**{key: conform(entry, declared[key], key) for key, entry in given.items()})
