"""Mamba-2: a state space model whose decay is one number per head and token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.mixers.linear_recurrence import linear_recurrence
from lla.mixers.recurrent import RecurrentMixer, Tokens
from lla.numerics import compute_dtype


class Mamba2(RecurrentMixer):
    """Mamba-2, SSD (arXiv 2405.21060): ``S = a S + Delta B u^T; y = S^T C + D u`` per head.

    ``u = silu(W x)`` has `expand` times the width of x, split into heads; ``B = silu(W_B x)`` and
    ``C = silu(W_C x)`` have `state_size` coordinates and are shared by all heads;
    ``Delta = softplus(W_D x + dt_bias)`` and ``a = exp(-Delta exp(A_log))`` are per head. The
    output is ``W_out norm(y * silu(z))``, where z is another projection of x and the RMS norm is
    over all heads together.

    Departures: `num_heads` sets the number of heads (the paper has heads of 64 channels); without
    short convolutions (the default; the paper has four taps on u, B and C) SiLU follows the
    projections themselves.

    Initialisation: A uniform in [1, 16], D = 1, ``softplus(dt_bias)`` log-uniform in [0.001, 0.1].

    Parameters: ``inputs``, ``gate``, ``B``, ``C``, ``step``, ``dt_bias``, ``A_log``, ``D``,
    ``norm``, ``out``; `NoDecay`: ``dt_bias``, ``A_log`` and ``D``, which are float32.

    Args:
      width: of the tokens.
      num_heads: number of heads.
      expand: total width of the heads, as a multiple of `width`.
      state_size: coordinates of B and C.
      short_conv: taps of causal convolutions, with biases, between projections and SiLU; 0 for
        none.
      form, chunk: as in `lla.mixers.linear_recurrence`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: sizes or options outside their range.
    """

    recurrence = linear_recurrence

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        expand: float = 2.0,
        state_size: int = 128,
        short_conv: int = 0,
        form: str = "parallel",
        chunk: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if state_size < 1:
            raise ValueError(f"state_size must be at least 1, got {state_size}.")
        head_dim = parts.expanded_head_size(width, num_heads, expand, "expand")
        super().__init__((num_heads, state_size, head_dim), form, chunk)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = dict(short_conv=short_conv, conv_bias=True, activation=False, **options)
        self.inputs = parts.project(width, (num_heads, head_dim), **project)
        self.B = parts.project(width, state_size, **project)
        self.C = parts.project(width, state_size, **project)
        self.step = parts.project(width, num_heads, **options)
        self.gate = parts.project(width, (num_heads, head_dim), **options)
        self.dt_bias = parts.NoDecay(parts.step_bias(rngs.params(), (num_heads,)))
        rates = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = parts.NoDecay(jnp.log(rates))
        self.D = parts.NoDecay(jnp.ones((num_heads,), jnp.float32))
        self.norm = parts.GatedNorm(num_heads * head_dim, gate_first=True, param_dtype=param_dtype)
        self.out = parts.merge_heads(num_heads, head_dim, width, **options)

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """Arguments of `lla.mixers.linear_recurrence`, and u."""
        u, b, c = (jax.nn.silu(tokens.project(name)) for name in ("inputs", "B", "C"))
        step = self.step(tokens.x)
        dtype = compute_dtype(u.dtype)
        step = jax.nn.softplus(step.astype(dtype) + self.dt_bias[...].astype(dtype)[None, None])
        rate = jnp.exp(self.A_log[...].astype(dtype))[None, None]
        value = (step[..., None] * u.astype(dtype)).astype(u.dtype)
        query, key = c[:, :, None], b[:, :, None]  # of all heads
        return dict(query=query, key=key, value=value, log_decay=-step * rate), u

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """Skip connection, gate, norm and output projection of ``out [B, T, N, Hv]``."""
        u, gate = extra, self.gate(x)
        dtype = compute_dtype(u.dtype)
        skip = self.D[...].astype(dtype)[None, None, :, None] * u.astype(dtype)
        flat = (*x.shape[:2], -1)
        y = self.norm((out.astype(dtype) + skip).reshape(flat), gate.reshape(flat))
        return self.out(y.reshape(u.shape))
