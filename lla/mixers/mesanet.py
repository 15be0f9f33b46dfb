"""MesaNet: for every token, ridge regression of all values on all keys so far."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers.mesa import MesaState, make_solver, mesa
from lla.mixers.parts import (
    GatedNorm,
    HeadNorm,
    NoDecay,
    head_size,
    l2_normalize,
    merge_heads,
    project,
)
from lla.mixers.recurrent import RecurrentMixer, Tokens
from lla.numerics import compute_dtype


class MesaNet(RecurrentMixer):
    """MesaNet (von Oswald et al., arXiv 2506.05233).

    ``x [B, T, width] -> [B, T, width]``, causal. With W for projections (those of g and beta with
    biases), per head,

        H = g H + beta k k^T;  G = g G + beta k v^T;  o = G^T (H + Lambda)^-1 q
        q, k = l2(silu(W x));  v = W x;  g, beta = sigmoid(W x + b);  y = W rmsnorm(o)
        Lambda = softplus(r) + ridge_min, for each channel of a key, initially 1

    Departures [ours]: no short convolution on q and k by default (published with 4 taps); conjugate
    gradients with a preconditioner and a tolerance, and implicit differentiation (see
    `lla.mixers.mesa`); LeCun normal kernels.

    Parameters: ``query``, ``key``, ``value``, ``beta``, ``decay``, ``norm``, ``out`` and, with an
    output gate, ``gate``; ``ridge`` (r above), float32 ``[num_heads, head_dim]``, has no weight
    decay.

    Args:
      width: of the tokens.
      num_heads: number of heads N.
      head_dim: width H of a query or key head; None means ``width // num_heads``.
      value_dim: width Hv of a value head; None means `head_dim`.
      short_conv: taps of a causal convolution on q and k; 0 for none.
      output_gate: whether the normalised output is multiplied by ``silu(W x)``.
      ridge_min: lower bound of Lambda, in (0, 1).
      solver, max_iters, tol: how to solve for (H + Lambda)^-1 q, see `lla.mixers.mesa`.
      form, chunk: how to compute the recurrence, see `lla.mixers.mesa`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: for inconsistent sizes or options.
    """

    recurrence = mesa
    masked = ("beta", "log_decay")

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        short_conv: int = 0,
        output_gate: bool = False,
        ridge_min: float = 0.25,
        solver: str = "cg",
        max_iters: int = 30,
        tol: float = 1e-6,
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
        shapes = MesaState((num_heads, dim, dim), (num_heads, dim, value_dim))
        super().__init__(shapes, form, chunk)
        make_solver(solver, max_iters, tol)  # checks the options
        if not 0 < ridge_min < 1:
            raise ValueError(f"ridge_min must be in (0, 1), got {ridge_min}.")
        self.solver = solver
        self.max_iters = max_iters
        self.tol = tol
        self.ridge_min = ridge_min
        self.output_gate = output_gate
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # `prepare` applies SiLU, with or without a convolution.
        conv = dict(short_conv=short_conv, activation=False)
        self.query = project(width, (num_heads, dim), **conv, **options)
        self.key = project(width, (num_heads, dim), **conv, **options)
        self.value = project(width, (num_heads, value_dim), **options)
        self.beta = project(width, num_heads, use_bias=True, **options)
        self.decay = project(width, num_heads, use_bias=True, **options)
        start = math.log(math.expm1(1 - ridge_min))  # softplus(start) + ridge_min = 1
        self.ridge = NoDecay(jnp.full((num_heads, dim), start, jnp.float32))
        if output_gate:
            self.gate = project(width, (num_heads, value_dim), **options)
            self.norm = GatedNorm(value_dim, param_dtype=param_dtype)
        else:
            self.norm = HeadNorm(value_dim, param_dtype=param_dtype)
        self.out = merge_heads(num_heads, value_dim, width, **options)

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """Arguments of `lla.mixers.mesa`; beta and log_decay are float32 or better."""
        query, key = (l2_normalize(jax.nn.silu(tokens.project(name))) for name in ("query", "key"))
        score, forget = self.beta(tokens.x), self.decay(tokens.x)
        dtype = compute_dtype(score.dtype)
        beta, log_decay = (
            jax.nn.sigmoid(score.astype(dtype)),
            jax.nn.log_sigmoid(forget.astype(dtype)),
        )
        value = tokens.project("value")
        return dict(query=query, key=key, value=value, beta=beta, log_decay=log_decay), None

    def recurrence_options(self) -> dict[str, Any]:
        """The ridge, and how to solve."""
        return dict(
            ridge=self.channel_ridge(),
            solver=self.solver,
            max_iters=self.max_iters,
            tol=self.tol,
            chunk=self.chunk,
        )

    def channel_ridge(self) -> jax.Array:
        """Lambda, ``[N, H]``."""
        return jax.nn.softplus(self.ridge[...]) + self.ridge_min

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """Norm, gate and output projection of ``out [B, T, N, Hv]``, the predictions."""
        return self.out(self.norm(out, self.gate(x)) if self.output_gate else self.norm(out))
