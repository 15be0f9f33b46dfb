"""Linear attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.mixers.chunks import check_form, form_of_piece
from lla.mixers.linear_recurrence import linear_recurrence
from lla.nn.rope import rotate
from lla.numerics import compute_dtype

_FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
}


class LinearAttention(parts.Recurrence):
    """Linear attention (arXiv 2006.16236): ``S += f(k) v^T; o = S^T f(q) / sqrt(head_dim)``.

    Departures: by default f is the identity and the sum of the weights is not divided by, as in
    later linear recurrent networks; instead, as in arXiv 2210.10340, every head of the output is
    RMS-normalised, because its size would grow with the length. ``feature_map="elu",
    normalize=True, out_norm=False`` is the form of 2006.16236.

    Parameters: ``query``, ``key``, ``value``, ``out``; ``out_norm``, ``query_norm`` and
    ``key_norm`` where they are asked for.

    Args:
      width, num_heads: of the input and output, and heads.
      head_dim: width of a query or key head; None for ``width // num_heads``.
      value_dim: width of a value head; None for ``width // num_heads``.
      feature_map: ``"identity"``, ``"elu"`` (elu + 1) or ``"relu"``.
      normalize: whether ``o`` is divided by ``sum_j f(k_j).f(q) / sqrt(head_dim)``, which needs a
        feature map that is positive; 1e-6 is added to it.
      out_norm: whether heads are RMS-normalised with a learned scale before the output projection.
      qk_norm: whether queries and keys are RMS-normalised, before the feature map.
      rope_theta: base of rotary position embedding, after the feature map; None for none. Not
        with `normalize`, as rotated features are not positive.
      short_conv: taps of causal convolutions with SiLU on queries, keys and values; 0 for none.
      form, chunk: as in `lla.mixers.linear_recurrence`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: sizes or options outside their range.
    """

    uses_positions = True

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
        check_form(form, chunk)
        head_dim = parts.head_size(width, num_heads, head_dim)
        value_dim = parts.head_size(width, num_heads, value_dim, "value_dim")
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
        self.memory = (num_heads, head_dim, value_dim + normalize)
        self.scale = head_dim**-0.5
        self.feature_map, self.normalize, self.rope_theta = feature_map, normalize, rope_theta
        self.form, self.chunk = form, chunk

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """``[B, T, width] -> [B, T, width]``; see `lla.mixers.Mixer`."""
        positions = parts.positions(x, segment_ids)
        *sequences, dtype = self._sequences(x, parts.whole(self, segment_ids), positions)
        options = dict(segment_ids=segment_ids, form=self.form, chunk=self.chunk)
        out = linear_recurrence(*sequences, **options)
        return self._finish(out, dtype)

    def decode(
        self,
        x: jax.Array,
        state: parts.State,
        new_lengths: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, parts.State]:
        """The next tokens ``[B, T, width]`` of the sequences of `state`; see `lla.mixers.Mixer`."""
        state, piece = state.begin(self, x, new_lengths, segment_ids)
        positions = piece.positions(state.lengths)
        query, key, value, dtype = self._sequences(piece.x, piece.project, positions)
        out, memory = linear_recurrence(
            query,
            piece.keep(key),
            value,
            state=state.memory,
            segment_ids=piece.runs,
            form=form_of_piece(self.form, x.shape[1]),
            chunk=self.chunk,
            return_state=True,
        )
        return self._finish(out, dtype), state.advance(memory, piece)

    def _sequences(self, x, apply, positions):
        """Arguments of `linear_recurrence`, and the dtype of the projections.

        `apply` calls a projection by its name.
        """
        query, key, value = (apply(name, x) for name in ("query", "key", "value"))
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        dtype = value.dtype
        query, key = (a.astype(compute_dtype(dtype)) for a in (query, key))
        query, key = (_FEATURE_MAPS[self.feature_map](a) for a in (query, key))
        if self.rope_theta is not None:
            query, key = (rotate(a, positions, self.rope_theta) for a in (query, key))
        query, key = query.astype(dtype), key.astype(dtype)
        if self.normalize:
            # A value of 1 beside the others collects the sum of the weights.
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        return query, key, value, dtype

    def _finish(self, out, dtype):
        """Scale, norms and output projection of ``out [B, T, N, Hv]``, as read by the tokens."""
        out = self.scale * out.astype(compute_dtype(out.dtype))
        if self.normalize:
            out = out[..., :-1] / (out[..., -1:] + 1e-6)
        if self.has_out_norm:
            out = self.out_norm(out)
        return self.out(out.astype(dtype))
