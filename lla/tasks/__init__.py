"""Data: synthetic tasks as pure functions of (seed, step) or (seed, config), and real series.

Tasks for training models have names:

>>> from lla import tasks
>>> task = tasks.create("mqar", length=128, pairs=8)
>>> batch = task.batch(seed=0, step=0, size=32)
>>> batch["inputs"].shape
(32, 128)

`lla.tasks.test_time_regression` and `lla.tasks.series` are for predictors without trained
parameters, and have their own functions.
"""

from lla.tasks.registry import create, names, options, register
from lla.tasks.task import Task

__all__ = ["Task", "create", "names", "options", "register"]
