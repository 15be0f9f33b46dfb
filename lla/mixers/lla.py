"""Local linear attention."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from lla.mixers import parts
from lla.mixers.softmax import Attention, add_short_convolutions, logit_scale, window
from lla.ops.solver import Solver


class LLA(Attention):
    """Local linear attention (arXiv 2510.01450): a ridge regression around every query.

    ``o_i = b`` with b, W that minimise ``sum_j p_ij |v_j - b - W (k_j - q_i)|^2 + ridge_i |W|^2``,
    p the softmax weights of ``scale q.k``. `lla.nn.LocalLinearAttention` with another constructor,
    whose options are plain values. The dense reference is ``implementation="reference"``.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, qk_norm, rope_theta, scale,
        relative_scale, local_window_size, short_conv: as in `lla.mixers.softmax.Softmax`.
      ridge: the ridge, or its initial value if it is learned, in units of squared keys.
      ridge_type: ``"fixed"``, ``"per_head"`` or ``"per_token"``, see `lla.nn.LocalLinearAttention`.
      ridge_min: lower bound of a learned ridge.
      solver: ``"auto"``, ``"cg"`` or ``"direct"``: `lla.Solver.method`.
      solver_tol, solver_backward_tol, solver_max_iters, solver_num_iters: the other fields of
        `lla.Solver`; None for its defaults.
      implementation: see `lla.local_linear_attention`.
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
        ridge: float = 1.0,
        ridge_type: str = "fixed",
        ridge_min: float = 0.01,
        solver: str = "auto",
        solver_tol: float | None = None,
        solver_backward_tol: float | None = None,
        solver_max_iters: int | None = None,
        solver_num_iters: int | None = None,
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
            ridge=ridge,
            ridge_type=ridge_type,
            ridge_min=ridge_min,
            qk_norm=qk_norm,
            rope_theta=rope_theta,
            scale=logit_scale(scale, relative_scale, head_dim),
            local_window_size=window(local_window_size),
            solver=Solver(
                method=solver,
                tol=solver_tol,
                backward_tol=solver_backward_tol,
                max_iters=solver_max_iters,
                num_iters=solver_num_iters,
            ),
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        add_short_convolutions(self, short_conv, param_dtype=param_dtype, rngs=rngs)
