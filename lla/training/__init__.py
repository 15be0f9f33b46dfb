"""Training of sequence models on tasks: settings, the trainer, the loop, sweeps."""

from lla.training.loop import NonFiniteError, fit, train
from lla.training.settings import Settings, Sweep, defaults, resolve
from lla.training.trainer import RefusedError, Runs, Trainer, TrainState

__all__ = [
    "NonFiniteError",
    "RefusedError",
    "Runs",
    "Settings",
    "Sweep",
    "TrainState",
    "Trainer",
    "defaults",
    "fit",
    "resolve",
    "train",
]
