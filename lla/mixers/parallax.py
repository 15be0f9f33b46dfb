"""Parallax: softmax attention corrected along a learned probe."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.mixers.softmax import add_short_convolutions, logit_scale, window
from lla.nn import LocalLinearAttention


class Parallax(LocalLinearAttention):
    """Parallax (arXiv 2605.29157): ``o_i = sum_j p_ij (1 - (k_j - k_mean_i).r_i) v_j``.

    p are softmax weights, k_mean their mean key, and the probe ``r = W_R x`` is a projection of the
    token, zero at the start, which makes this softmax attention there. The class is
    `lla.nn.LocalLinearAttention` with another constructor. The dense reference is
    ``implementation="reference"``.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, qk_norm, scale, relative_scale,
        local_window_size, short_conv, implementation: as in `lla.mixers.softmax.Softmax`.
      rope_theta: base of rotary position embedding of query, key and probe; None for none.
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
            mechanism="parallax",
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
