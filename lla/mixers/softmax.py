"""Softmax attention, and the base class of the mixers around `lla.nn.LocalLinearAttention`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.nn import LocalLinearAttention
from lla.ops import segments


class Attention(LocalLinearAttention):
    """`lla.nn.LocalLinearAttention` with the segments of `lla.mixers.Mixer`."""

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        segment_ids: Any = None,
        **options: Any,
    ) -> Any:
        """Attends from `x` to itself, or to `context`.

        Args:
          x, context, **options: as in `lla.nn.LocalLinearAttention`.
          segment_ids: int ``[*B, T]``: a token attends within its segment, a run of equal ids in
            which positions count from 0. (In the operator and `lla.nn.LocalLinearAttention` equal
            ids are one segment, whatever lies in between.) With a context as there.

        Returns, Raises: as there.
        """
        if segment_ids is not None and context is None:
            starts = segments.starts(segment_ids, x.shape[:-1])
            segment_ids = segments.runs(starts)
            options["positions"] = segments.positions(starts)
        return super().__call__(x, context, segment_ids=segment_ids, **options)


class Softmax(Attention):
    """Softmax attention (arXiv 1706.03762): ``o_i = sum_j p_ij v_j``, ``p = softmax(scale q.k)``.

    `lla.nn.LocalLinearAttention` with another constructor and the same parameters. The dense
    reference is ``implementation="reference"``.

    Args:
      width: of the tokens.
      num_heads: number of query heads.
      num_kv_heads: key and value heads, a divisor of `num_heads`; None for `num_heads`.
      head_dim: width of a query or key head; None for ``width // num_heads``.
      value_dim: width of a value head; None for `head_dim`.
      qk_norm: whether queries and keys are RMS-normalised with a learned scale.
      rope_theta: base of rotary position embeddings; None for none.
      scale: factor of the logits; None for ``1 / sqrt(head_dim)``.
      relative_scale: the scale in units of ``1 / sqrt(head_dim)``; excludes `scale`.
      local_window_size: an int or ``(left, right)``, see `lla.softmax_attention`; None for all
        earlier tokens.
      short_conv: taps of causal convolutions on queries, keys and values, without an activation; 0
        for none.
      implementation: see `lla.softmax_attention`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: sizes or options outside their range.
    """

    uses_positions = True
    _mechanism = "softmax"

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        qk_norm: bool = True,
        rope_theta: float | None = None,
        scale: float | None = None,
        relative_scale: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        short_conv: int = 0,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_dim = parts.head_size(width, num_heads, head_dim)
        super().__init__(
            num_heads,
            width,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            mechanism=self._mechanism,
            qk_norm=qk_norm,
            rope_theta=rope_theta,
            scale=logit_scale(scale, relative_scale, head_dim),
            local_window_size=window(local_window_size),
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        add_short_convolutions(self, short_conv, param_dtype=param_dtype, rngs=rngs)


def logit_scale(scale: float | None, relative_scale: float | None, head_dim: int) -> float | None:
    """The scale of the logits from the two options."""
    if relative_scale is None:
        return scale
    if scale is not None:
        raise ValueError(
            f"scale and relative_scale exclude each other, got {scale} and {relative_scale}."
        )
    return relative_scale / head_dim**0.5


def window(size: Any) -> int | tuple[int, int] | None:
    """The window for the operator; configs turn tuples into lists."""
    return tuple(size) if isinstance(size, list) else size


def add_short_convolutions(
    layer: LocalLinearAttention, size: int, *, param_dtype: Any, rngs: nnx.Rngs
) -> None:
    """Adds a `ShortConvolution` of `size` taps to query, key and value; none for a size of 0.

    They come before QK-norm and rotation. They have no activation, which would give all coordinates
    of a key the same sign.
    """
    if size == 0:
        return
    for name in ("query", "key", "value"):
        projection = getattr(layer, name)
        convolution = parts.ShortConvolution(
            projection.out_features, size, activation=False, param_dtype=param_dtype, rngs=rngs
        )
        setattr(layer, name, parts.Projected(projection, convolution))
