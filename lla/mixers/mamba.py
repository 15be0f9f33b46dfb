"""Mamba: a selective diagonal state space model for every channel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.mixers.recurrent import RecurrentMixer, Tokens
from lla.mixers.selective_scan import selective_scan
from lla.numerics import compute_dtype


class Mamba(RecurrentMixer):
    """Mamba, S6 (arXiv 2312.00752): ``h = exp(Delta A) h + Delta B u; y = C.h + D u``.

    ``u = silu(W x)`` has `expand` times the width of x, and each of its channels has a state h of
    `state_size` numbers. ``Delta = softplus(W2 W1 u + dt_bias)`` is per channel, B and C are
    projections of u shared by all channels, and ``A = -exp(A_log)``. The output is
    ``W_out (y * silu(z))``, where z is another projection of x. Channels are independent: there
    are no heads, and `num_heads` has no effect.

    Departure: without a short convolution (the default; the paper has four taps) SiLU follows the
    projection itself.

    Initialisation: ``A_log = log(1..state_size)`` for every channel, D = 1, ``softplus(dt_bias)``
    log-uniform in [0.001, 0.1], the second factor of Delta uniform in ``±rank^(-1/2)``.

    Parameters: ``inputs``, ``gate``, ``step`` (``down``, ``up``), ``dt_bias``, ``B``, ``C``,
    ``A_log``, ``D``, ``out``; `NoDecay`: ``dt_bias``, ``A_log`` and ``D``, which are float32.

    Args:
      width: of the tokens.
      num_heads: has no effect.
      expand: number of channels, as a multiple of `width`.
      state_size: size of the state of a channel.
      step_rank: rank of the projection to Delta; None for ``ceil(width / 16)``.
      short_conv: taps of a causal convolution, with a bias, between projection and SiLU; 0 for
        none.
      form, chunk: as in `lla.mixers.selective_scan`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: sizes or options outside their range.
    """

    recurrence = selective_scan
    masked = ("delta",)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        expand: float = 2.0,
        state_size: int = 16,
        step_rank: int | None = None,
        short_conv: int = 0,
        form: str = "parallel",
        chunk: int = 32,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del num_heads
        if state_size < 1:
            raise ValueError(f"state_size must be at least 1, got {state_size}.")
        channels = parts.expanded_head_size(width, 1, expand, "expand")
        rank = math.ceil(width / 16) if step_rank is None else step_rank
        if rank < 1:
            raise ValueError(f"step_rank must be at least 1, got {step_rank}.")
        super().__init__((channels, state_size), form, chunk)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.inputs = parts.project(
            width, channels, short_conv=short_conv, conv_bias=True, activation=False, **options
        )
        self.gate = parts.project(width, channels, **options)
        uniform = parts.symmetric_uniform(rank**-0.5)
        self.step = parts.LowRank(
            channels, rank, channels, use_bias=False, up_init=uniform, **options
        )
        self.dt_bias = parts.NoDecay(parts.step_bias(rngs.params(), (channels,)))
        self.B = parts.project(channels, state_size, **options)
        self.C = parts.project(channels, state_size, **options)
        rates = jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.float32))
        self.A_log = parts.NoDecay(jnp.tile(rates, (channels, 1)))
        self.D = parts.NoDecay(jnp.ones((channels,), jnp.float32))
        self.out = parts.project(channels, width, **options)

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """Arguments of `lla.mixers.selective_scan`, and u."""
        u = jax.nn.silu(tokens.project("inputs"))
        step, b, c = self.step(u), self.B(u), self.C(u)
        dtype = compute_dtype(u.dtype)
        delta = jax.nn.softplus(step.astype(dtype) + _row(self.dt_bias, dtype))
        a = -jnp.exp(self.A_log[...].astype(dtype))
        return dict(x=u, delta=delta, a=a, b=b, c=c), u

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """Skip connection, gate and output projection of ``out [B, T, D]``."""
        u, gate = extra, self.gate(x)
        dtype = compute_dtype(u.dtype)
        y = out.astype(dtype) + _row(self.D, dtype) * u.astype(dtype)
        return self.out((y * jax.nn.silu(gate.astype(dtype))).astype(u.dtype))


def _row(parameter, dtype):
    """``[D] -> [1, 1, D]``."""
    return parameter[...].astype(dtype)[None, None]
