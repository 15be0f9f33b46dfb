"""Training of sequence models on tasks: settings, compiled steps, the loop, sweeps."""

from lla.training.loop import NonFiniteError, fit, train
from lla.training.trainer import Program, RefusedError, Runs, TrainState
from lla.training.settings import Settings, Sweep, defaults, resolve

__all__ = [
    "NonFiniteError",
    "Program",
    "RefusedError",
    "Runs",
    "Settings",
    "Sweep",
    "TrainState",
    "defaults",
    "fit",
    "resolve",
    "train",
]
