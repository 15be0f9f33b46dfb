"""MesaNet: at every token the ridge regression of all values on all keys so far."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers.chunks import check_form, form_of_piece
from lla.mixers.mesa import MesaState, make_solver, mesa
from lla.mixers.parts import (
    GatedNorm,
    HeadNorm,
    NoDecay,
    Project,
    State,
    head_size,
    init_state,
    l2_normalize,
    merge_heads,
    project,
    whole,
)
from lla.numerics import compute_dtype


class MesaNet(nnx.Module):
    """MesaNet (von Oswald et al., arXiv 2506.05233).

    ``x [B, T, width] -> [B, T, width]``, causal. With W for projections (those of g and beta with
    biases), per head,

        H = g H + beta k k^T;  G = g G + beta k v^T;  o = G^T (H + Lambda)^-1 q
        q, k = l2(silu(W x));  v = W x;  g, beta = sigmoid(W x + b);  y = W rmsnorm(o)
        Lambda = softplus(r) + ridge_min, a number for each channel of a key, 1 at the start

    Departures [ours]: no short convolution on q and k unless `short_conv` says so (published with
    4 taps); conjugate gradients are preconditioned and stop at a tolerance, and their gradients are
    implicit (see `lla.mixers.mesa`); kernels start LeCun normal.

    Parameters: ``query``, ``key``, ``value``, ``beta``, ``decay``, ``norm``, ``out`` and, with an
    output gate, ``gate``; ``ridge`` (r above), float32 ``[num_heads, head_dim]``, is kept out of
    weight decay.

    Args:
      width: of the tokens.
      num_heads: heads N.
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
        check_form(form, chunk)
        make_solver(solver, max_iters, tol)  # raises where `mesa` would, but at construction
        if not 0 < ridge_min < 1:
            raise ValueError(f"ridge_min must be in (0, 1), got {ridge_min}.")
        self.form = form
        self.chunk = chunk
        self.solver = solver
        self.max_iters = max_iters
        self.tol = tol
        self.ridge_min = ridge_min
        self.output_gate = output_gate
        dim = head_size(width, num_heads, head_dim)
        value_dim = head_size(
            width, num_heads, dim if value_dim is None else value_dim, "value_dim"
        )
        self.memory = ((num_heads, dim, dim), (num_heads, dim, value_dim))
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # SiLU follows with or without a convolution, so it is applied below.
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

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """``[B, T, width] -> [B, T, width]``; see `lla.mixers.Mixer`."""
        sequences = self.sequences(x, whole(self, segment_ids))
        out = mesa(*sequences, segment_ids=segment_ids, form=self.form, **self._options())
        return self.finish(x, out)

    def init_state(self, batch: int, max_length: int, dtype: Any = None) -> State:
        """The state of `decode` before the first token; see `lla.mixers.Mixer`."""
        del max_length
        state = init_state(self, batch, *self.memory, dtype=dtype)
        return state._replace(memory=MesaState(*state.memory))

    def decode(
        self,
        x: jax.Array,
        state: State,
        new_lengths: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """The next tokens ``[B, T, width]`` of the sequences of `state`; see `lla.mixers.Mixer`."""
        state, piece = state.begin(self, x, new_lengths, segment_ids)
        query, key, value, beta, log_decay = self.sequences(piece.x, piece.project)
        predicted, memory = mesa(
            query,
            key,
            value,
            piece.keep(beta),
            piece.keep(log_decay),
            state=state.memory,
            segment_ids=piece.runs,
            form=form_of_piece(self.form, x.shape[1]),
            return_state=True,
            **self._options(),
        )
        return self.finish(piece.x, predicted), state.advance(memory, piece)

    def _options(self):
        return dict(
            ridge=self.channel_ridge(),
            solver=self.solver,
            max_iters=self.max_iters,
            tol=self.tol,
            chunk=self.chunk,
        )

    def sequences(self, x: jax.Array, apply: Project | None = None) -> tuple[jax.Array, ...]:
        """Arguments of `mesa` for `x`: query, key, value, beta and log_decay.

        The last two are float32 or better. `apply` calls a projection by its name; None for those
        of whole sequences.
        """
        apply = whole(self) if apply is None else apply
        query, key = (l2_normalize(jax.nn.silu(apply(name, x))) for name in ("query", "key"))
        score, forget = self.beta(x), self.decay(x)
        dtype = compute_dtype(score.dtype)
        beta = jax.nn.sigmoid(score.astype(dtype))
        return query, key, apply("value", x), beta, jax.nn.log_sigmoid(forget.astype(dtype))

    def channel_ridge(self) -> jax.Array:
        """Lambda, ``[N, H]``."""
        return jax.nn.softplus(self.ridge[...]) + self.ridge_min

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Norm, gate and output projection of ``out [B, T, N, Hv]``, the prediction at `x`."""
        return self.out(self.norm(out, self.gate(x)) if self.output_gate else self.norm(out))
