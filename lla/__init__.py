"""lla: exact, fast local linear attention for JAX."""

from lla.generate import Generated, generate
from lla.ops.api import explain, local_linear_attention, parallax_attention, softmax_attention
from lla.ops.cache import KVCache
from lla.ops.decode import decode_step, parallax_decode_step, softmax_decode_step
from lla.ops.differentiation import RESIDUAL_NAMES
from lla.ops.solver import Solver, Stats
from lla.version import __version__

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
