"""Linear attention."""

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

_FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
}


class LinearAttention(RecurrentMixer):
    """Linear attention (arXiv 2006.16236): ``S += f(k) v^T; o = S^T f(q) / sqrt(head_dim)``.

    Differences from the paper: by default f is the identity and outputs are not divided by the sum
    of the weights, as in later linear recurrent networks. Instead every head of the output is
    RMS-normalised, as in arXiv 2210.10340, because its magnitude would grow with the
    length. ``feature_map="elu", normalize=True, out_norm=False`` is the form of 2006.16236.

    Parameters: ``query``, ``key``, ``value``, ``out``; ``out_norm``, ``query_norm`` and
    ``key_norm`` by option.

    Args:
      width: of the tokens.
      num_heads: number of heads.
      head_dim: width of a query or key head; None for ``width // num_heads``.
      value_dim: width of a value head; None for ``width // num_heads``.
      feature_map: ``"identity"``, ``"elu"`` (elu + 1) or ``"relu"``.
      normalize: whether ``o`` is divided by ``sum_j f(k_j).f(q) / sqrt(head_dim) + 1e-6``, which
        needs a positive feature map.
      out_norm: whether heads are RMS-normalised with a learned scale before the output projection.
      qk_norm: whether queries and keys are RMS-normalised before the feature map.
      rope_theta: base of rotary position embeddings, after the feature map; None for none. Not with
        `normalize`, as rotated features are not positive.
      short_conv: taps of causal convolutions with SiLU on queries, keys and values; 0 for none.
      form, chunk: as in `lla.mixers.linear_recurrence`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: sizes or options outside their range.
    """

    uses_positions = True
    recurrence = linear_recurrence

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: str = "identity",
        normalize: bool = False,
        out_norm: bool = True,
        qk_norm: bool = False,
        rope_theta: float | None = None,
        short_conv: int = 0,
        form: str = "parallel",
        chunk: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_dim = parts.head_size(width, num_heads, head_dim)
        value_dim = parts.head_size(width, num_heads, value_dim, "value_dim")
        super().__init__((num_heads, head_dim, value_dim + normalize), form, chunk)
        if feature_map not in _FEATURE_MAPS:
            raise ValueError(
                f"feature_map must be one of {', '.join(_FEATURE_MAPS)}, got {feature_map!r}."
            )
        if normalize and (feature_map == "identity" or rope_theta is not None):
            raise ValueError(
                "normalize needs positive features: not feature_map 'identity', and no rope_theta; "
                f"got {feature_map!r} and {rope_theta}."
            )
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"rope_theta needs an even head_dim, got {head_dim}.")
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = dict(short_conv=short_conv, **options)
        self.query = parts.project(width, (num_heads, head_dim), **project)
        self.key = parts.project(width, (num_heads, head_dim), **project)
        self.value = parts.project(width, (num_heads, value_dim), **project)
        if qk_norm:
            self.query_norm = parts.HeadNorm(head_dim, param_dtype=param_dtype)
            self.key_norm = parts.HeadNorm(head_dim, param_dtype=param_dtype)
        if out_norm:
            self.out_norm = parts.HeadNorm(value_dim, param_dtype=param_dtype)
        self.out = parts.merge_heads(num_heads, value_dim, width, **options)
        self.has_out_norm, self.qk_norm = out_norm, qk_norm
        self.scale = head_dim**-0.5
        self.feature_map, self.normalize, self.rope_theta = feature_map, normalize, rope_theta

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """Arguments of `lla.mixers.linear_recurrence`, and the dtype of the projections."""
        query, key, value = (tokens.project(name) for name in ("query", "key", "value"))
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        dtype = value.dtype
        query, key = (a.astype(compute_dtype(dtype)) for a in (query, key))
        query, key = (_FEATURE_MAPS[self.feature_map](a) for a in (query, key))
        if self.rope_theta is not None:
            query, key = (rotate(a, positions, self.rope_theta) for a in (query, key))
        if self.normalize:
            # A further value of 1 sums up the weights.
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        return dict(query=query.astype(dtype), key=key.astype(dtype), value=value), dtype

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """Scale, norms and output projection of ``out [B, T, N, Hv]``."""
        out = self.scale * out.astype(compute_dtype(out.dtype))
        if self.normalize:
            out = out[..., :-1] / (out[..., -1:] + 1e-6)
        if self.has_out_norm:
            out = self.out_norm(out)
        return self.out(out.astype(extra))
