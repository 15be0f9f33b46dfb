"""Gated linear attention: a decay for every coordinate of the key, computed from the token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.mixers.linear_recurrence import linear_recurrence
from lla.mixers.recurrent import RecurrentMixer, Tokens
from lla.numerics import compute_dtype


class GatedLinearAttention(RecurrentMixer):
    """GLA (arXiv 2312.06635): ``S = Diag(a) S + k v^T; o = S^T q / sqrt(head_dim)``.

    ``a = sigmoid(W2 W1 x + b)^(1 / gate_temperature)``, of rank 16; heads of the output are
    normalised and gated by ``silu(W x + c)``.

    Departure: the norm of the output is RMS norm, as in the authors' code; the paper writes layer
    norm.

    Parameters: ``query``, ``key``, ``value``, ``decay`` (``down``, ``up``), ``gate``, ``norm``,
    ``out``. The biases b and c start at zero, so that a starts at about ``2^(-1/16) = 0.96``.

    Args:
      width: of the tokens.
      num_heads: number of heads.
      expand_k: total width of the query heads, as a multiple of `width`.
      expand_v: total width of the value heads, as a multiple of `width`.
      gate_rank: rank of the projection to the decays.
      gate_temperature: a larger one means slower decay.
      short_conv: taps of causal convolutions with SiLU on queries, keys and values; 0 for none.
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
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        short_conv: int = 0,
        form: str = "parallel",
        chunk: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not gate_temperature > 0:
            raise ValueError(f"gate_temperature must be > 0, got {gate_temperature}.")
        head_dim = parts.expanded_head_size(width, num_heads, expand_k, "expand_k")
        value_dim = parts.expanded_head_size(width, num_heads, expand_v, "expand_v")
        super().__init__((num_heads, head_dim, value_dim), form, chunk)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = dict(short_conv=short_conv, **options)
        self.query = parts.project(width, (num_heads, head_dim), **project)
        self.key = parts.project(width, (num_heads, head_dim), **project)
        self.value = parts.project(width, (num_heads, value_dim), **project)
        self.decay = parts.LowRank(width, gate_rank, (num_heads, head_dim), **options)
        self.gate = parts.project(width, (num_heads, value_dim), use_bias=True, **options)
        self.norm = parts.GatedNorm(value_dim, param_dtype=param_dtype)
        self.out = parts.merge_heads(num_heads, value_dim, width, **options)
        self.scale = head_dim**-0.5
        self.gate_temperature = gate_temperature

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """Arguments of `lla.mixers.linear_recurrence`."""
        arguments = {name: tokens.project(name) for name in ("query", "key", "value")}
        score = self.decay(tokens.x)
        log_decay = jax.nn.log_sigmoid(score.astype(compute_dtype(score.dtype)))
        return arguments | {"log_decay": log_decay / self.gate_temperature}, None

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """Scale, norm, gate and output projection of ``out [B, T, N, Hv]``."""
        out = out.astype(compute_dtype(out.dtype)) * self.scale
        return self.out(self.norm(out, self.gate(x)))
