"""Data: synthetic tasks as pure functions of (seed, step) or (seed, config), and real series.

Tasks that models are trained on are chosen by name:

>>> from lla import tasks
>>> task = tasks.create("mqar", length=128, pairs=8)
>>> batch = task.batch(seed=0, step=0, size=32)
>>> batch["inputs"].shape
(32, 128)

`lla.tasks.test_time_regression` and `lla.tasks.series` are for predictors without trained
parameters; they have functions of their own.
"""

from lla.tasks.registry import create, names, options, register
from lla.tasks.task import Task

__all__ = ["Task", "create", "names", "options", "register"]
