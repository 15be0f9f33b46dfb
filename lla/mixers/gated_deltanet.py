"""Gated DeltaNet: the delta rule on a decaying state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers.delta_rule import delta_rule
from lla.mixers.parts import (
    GatedNorm,
    HeadNorm,
    NoDecay,
    head_size,
    l2_normalize,
    merge_heads,
    project,
    step_bias,
)
from lla.mixers.recurrent import RecurrentMixer, Tokens
from lla.numerics import compute_dtype


class GatedDeltaNet(RecurrentMixer):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464).

    ``x [B, T, width] -> [B, T, width]``, causal. With W for projections, per head,

        S = a S;  S += beta k (v - S^T k)^T;  o = S^T q
        q, k = l2(silu(W x));  v = silu(W x);  beta = sigmoid(W x)
        a = exp(-exp(A_log) softplus(W x + dt_bias));  y = W (rmsnorm(o) * silu(W x))

    The gate a starts as in Mamba-2: exp(A_log) uniform in (1, 16), softplus(dt_bias) log-uniform in
    (0.001, 0.1).

    Departures [ours]: no short convolution on q, k and v by default (published with 4 taps); value
    heads as wide as key heads (published twice as wide: ``value_dim``), for states of the same size
    as in other mixers; LeCun normal kernels; no factor 1/sqrt(head_dim), which the norm of the
    output would cancel.

    Parameters: ``query``, ``key``, ``value``, ``beta``, ``decay``, ``gate``, ``norm`` and ``out``;
    ``A_log`` and ``dt_bias``, float32 ``[num_heads]``, have no weight decay.

    Args:
      width: of the tokens.
      num_heads: number of heads N.
      head_dim: width H of a query or key head; None means ``width // num_heads``.
      value_dim: width Hv of a value head; None means `head_dim`.
      short_conv: taps of a causal convolution on q, k and v; 0 for none.
      allow_neg_eigval: beta in (0, 2) rather than (0, 1), which allows negative eigenvalues of the
        state transition (Grazzi et al., arXiv 2411.12537).
      output_gate: whether the output has the gate ``silu(W x)``.
      form, chunk: how to compute the recurrence, see `lla.mixers.delta_rule`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: for inconsistent sizes or options.
    """

    recurrence = delta_rule
    masked = ("beta", "log_decay")

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        short_conv: int = 0,
        allow_neg_eigval: bool = False,
        output_gate: bool = True,
        form: str = "parallel",
        chunk: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dim = head_size(width, num_heads, head_dim)
        value_dim = head_size(
            width, num_heads, dim if value_dim is None else value_dim, "value_dim"
        )
        super().__init__((num_heads, dim, value_dim), form, chunk)
        self.largest_beta = 2.0 if allow_neg_eigval else 1.0
        self.output_gate = output_gate
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # `prepare` applies SiLU, with or without a convolution.
        conv = dict(short_conv=short_conv, activation=False)
        self.query = project(width, (num_heads, dim), **conv, **options)
        self.key = project(width, (num_heads, dim), **conv, **options)
        self.value = project(width, (num_heads, value_dim), **conv, **options)
        self.beta = project(width, num_heads, **options)
        self.decay = project(width, num_heads, **options)
        rate = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = NoDecay(jnp.log(rate))
        self.dt_bias = NoDecay(step_bias(rngs.params(), (num_heads,)))
        if output_gate:
            self.gate = project(width, (num_heads, value_dim), **options)
            self.norm = GatedNorm(value_dim, param_dtype=param_dtype)
        else:
            self.norm = HeadNorm(value_dim, param_dtype=param_dtype)
        self.out = merge_heads(num_heads, value_dim, width, **options)

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """Arguments of `lla.mixers.delta_rule`; beta and log_decay are float32 or better."""
        query, key = (l2_normalize(jax.nn.silu(tokens.project(name))) for name in ("query", "key"))
        score, step = self.beta(tokens.x), self.decay(tokens.x)
        dtype = compute_dtype(score.dtype)
        beta = self.largest_beta * jax.nn.sigmoid(score.astype(dtype))
        step = jax.nn.softplus(step.astype(dtype) + self.dt_bias[...].astype(dtype)[None, None])
        log_decay = -jnp.exp(self.A_log[...].astype(dtype))[None, None] * step
        value = jax.nn.silu(tokens.project("value"))
        return dict(query=query, key=key, value=value, beta=beta, log_decay=log_decay), None

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """Norm, gate and output projection of ``out [B, T, N, Hv]``."""
        return self.out(self.norm(out, self.gate(x)) if self.output_gate else self.norm(out))
