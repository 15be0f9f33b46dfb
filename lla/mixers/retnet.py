"""RetNet: linear attention with a fixed decay for each head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.mixers.linear_recurrence import linear_recurrence
from lla.mixers.recurrent import RecurrentMixer, Tokens
from lla.nn.rope import rotate
from lla.numerics import compute_dtype


class RetNet(RecurrentMixer):
    """Multi-scale retention (arXiv 2307.08621): ``S = g_h S + k v^T; o = S^T q / sqrt(head_dim)``.

    The decay of head h = 0, 1, ... is ``g_h = 1 - 2^(-5-h)``; queries and keys are rotated; heads
    of the output are normalised (group norm, without parameters as in the published code) and
    gated by ``silu(W x)``. Values are twice as wide as the input.

    Departures: the frequencies of the rotation are those of RoFormer (arXiv 2104.09864), which stop
    one step before 1 / rope_theta. The paper divides scores by two factors for 16-bit arithmetic;
    they are left out, as the group norm cancels them up to its epsilon and states are float32 here.

    Parameters: ``query``, ``key``, ``value``, ``gate``, ``out``.

    Args:
      width: of the tokens.
      num_heads: number of heads.
      head_dim: width of a query or key head; None for ``width // num_heads``.
      value_dim: width of a value head; None for ``2 width / num_heads``.
      rope_theta: base of the rotation; None for none.
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
        head_dim: int | None = None,
        value_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        short_conv: int = 0,
        form: str = "parallel",
        chunk: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_dim = parts.head_size(width, num_heads, head_dim)
        value_dim = parts.head_size(2 * width, num_heads, value_dim, "value_dim")
        super().__init__((num_heads, head_dim, value_dim), form, chunk)
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"rope_theta needs an even head_dim, got {head_dim}.")
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = dict(short_conv=short_conv, **options)
        self.query = parts.project(width, (num_heads, head_dim), **project)
        self.key = parts.project(width, (num_heads, head_dim), **project)
        self.value = parts.project(width, (num_heads, value_dim), **project)
        self.gate = parts.project(width, (num_heads, value_dim), **options)
        self.out = parts.merge_heads(num_heads, value_dim, width, **options)
        self.num_heads = num_heads
        self.scale = head_dim**-0.5
        self.rope_theta = rope_theta

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """Arguments of `lla.mixers.linear_recurrence`; the gate and the dtype of the values."""
        query, key, value, gate = (tokens.project(n) for n in ("query", "key", "value", "gate"))
        dtype, wide = value.dtype, compute_dtype(value.dtype)
        if self.rope_theta is not None:
            query, key = (
                rotate(a.astype(wide), positions, self.rope_theta).astype(dtype)
                for a in (query, key)
            )
        log_decay = jnp.log1p(-(2.0 ** -(5 + jnp.arange(self.num_heads, dtype=wide))))
        log_decay = jnp.broadcast_to(log_decay, query.shape[:-1])
        arguments = dict(query=query, key=key, value=value, log_decay=log_decay)
        return arguments, (gate.astype(wide), dtype)

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """Scale, norm, gate and output projection of ``out [B, T, N, Hv]``."""
        gate, dtype = extra
        out = _standardise(self.scale * out.astype(gate.dtype)) * jax.nn.silu(gate)
        return self.out(out.astype(dtype))


def _standardise(x, epsilon=1e-5):
    """Mean 0 and variance 1 over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
