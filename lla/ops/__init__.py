"""The operator: public functions, one back end per folder, and the table that chooses."""

from lla.ops.backend import BACKENDS, Backend, Decoder, register_backend
from lla.ops.problem import Problem
from lla.ops.solver import Stats

__all__ = ["BACKENDS", "Backend", "Decoder", "Problem", "Stats", "register_backend"]
