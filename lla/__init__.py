"""lla: exact, fast local linear attention for JAX."""

from lla.ops.api import explain, local_linear_attention, parallax_attention, softmax_attention
from lla.ops.options import Solver, Stats
from lla.ops.xla import RESIDUAL_NAMES
from lla.version import __version__

__all__ = [
    "RESIDUAL_NAMES",
    "Solver",
    "Stats",
    "__version__",
    "explain",
    "local_linear_attention",
    "parallax_attention",
    "softmax_attention",
]
