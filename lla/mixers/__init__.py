"""Attention mechanisms and their baselines as modules ``[B, T, width] -> [B, T, width]``, by name.

Example::

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from lla import mixers
    >>> mixer = mixers.create("gla", 64, 4, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((2, 10, 64))).shape
    (2, 10, 64)

Their recurrences are public functions without parameters: `delta_rule` (DeltaNet, Gated DeltaNet),
`linear_recurrence` (linear attention, RetNet, GLA, Mamba-2's SSD), `mesa` (MesaNet),
`selective_scan` (Mamba) and `long_convolution` (Hyena). They take and return a state, and reset it
between packed sequences. The functions ``..._step`` compute a single token.

`register` adds mixers of other packages. ``lla/mixers/README.md`` lists mixers and recurrences with
their formulas.
"""

from lla.mixers.delta_rule import delta_rule, delta_rule_step
from lla.mixers.linear_recurrence import linear_recurrence, linear_recurrence_step
from lla.mixers.long_convolution import long_convolution, long_convolution_step
from lla.mixers.mesa import MesaState, make_solver, mesa, mesa_step
from lla.mixers.protocol import Mixer
from lla.mixers.registry import create, length_option, names, options, register, uses_positions
from lla.mixers.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "MesaState",
    "Mixer",
    "create",
    "delta_rule",
    "delta_rule_step",
    "length_option",
    "linear_recurrence",
    "linear_recurrence_step",
    "long_convolution",
    "long_convolution_step",
    "make_solver",
    "mesa",
    "mesa_step",
    "names",
    "options",
    "register",
    "selective_scan",
    "selective_scan_step",
    "uses_positions",
]
