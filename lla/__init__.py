"""lla: exact, fast local linear attention for JAX.

The subpackages `lla.nn`, `lla.mixers`, `lla.models`, `lla.tasks`, `lla.training` and
`lla.estimators` are imported when they are first used: Flax, Optax and Orbax take longer to import
than JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lla.generate import Generated, generate
from lla.ops.api import explain, local_linear_attention, parallax_attention, softmax_attention
from lla.ops.cache import KVCache
from lla.ops.decode import decode_step, parallax_decode_step, softmax_decode_step
from lla.ops.differentiation import RESIDUAL_NAMES
from lla.ops.solver import Solver, Stats
from lla.version import __version__

if TYPE_CHECKING:
    from lla import estimators as estimators
    from lla import mixers as mixers
    from lla import models as models
    from lla import nn as nn
    from lla import tasks as tasks
    from lla import training as training

_SUBPACKAGES = ("estimators", "mixers", "models", "nn", "tasks", "training")

__all__ = [
    "RESIDUAL_NAMES",
    "Generated",
    "KVCache",
    "Solver",
    "Stats",
    "__version__",
    "decode_step",
    "explain",
    "generate",
    "local_linear_attention",
    "parallax_attention",
    "parallax_decode_step",
    "softmax_attention",
    "softmax_decode_step",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lla.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
