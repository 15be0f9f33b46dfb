"""DeltaNet: a matrix state corrected by its error on the newest pair."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers.chunks import check_form, form_of_piece
from lla.mixers.delta_rule import delta_rule
from lla.mixers.parts import (
    HeadNorm,
    Project,
    Recurrence,
    State,
    head_size,
    l2_normalize,
    merge_heads,
    project,
    whole,
)
from lla.numerics import compute_dtype


class DeltaNet(Recurrence):
    """DeltaNet (Yang et al., arXiv 2406.06484): ``S += beta k (v - S^T k)^T; o = S^T q``.

    ``x [B, T, width] -> [B, T, width]``, causal. With W for projections, per head,

        q, k = l2(silu(W x));  v = silu(W x);  beta = sigmoid(W x);  y = W rmsnorm(o)

    Departures [ours]: no short convolution on q, k and v unless `short_conv` says so (published
    with 4 taps); kernels start LeCun normal; no factor 1/sqrt(head_dim), which the norm of the
    output would undo.

    Parameters: ``query``, ``key``, ``value``, ``beta``, ``norm`` and ``out``.

    Args:
      width: of the tokens.
      num_heads: heads N.
      head_dim: width H of a query or key head; None means ``width // num_heads``.
      value_dim: width Hv of a value head; None means `head_dim`.
      short_conv: taps of a causal convolution on q, k and v; 0 for none.
      allow_neg_eigval: beta in (0, 2) instead of (0, 1), which lets the state's transition have
        negative eigenvalues (Grazzi et al., arXiv 2411.12537).
      form, chunk: how to compute the recurrence, see `lla.mixers.delta_rule`.
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
        allow_neg_eigval: bool = False,
        form: str = "parallel",
        chunk: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_form(form, chunk)
        self.form = form
        self.chunk = chunk
        self.largest_beta = 2.0 if allow_neg_eigval else 1.0
        dim = head_size(width, num_heads, head_dim)
        value_dim = head_size(
            width, num_heads, dim if value_dim is None else value_dim, "value_dim"
        )
        self.memory = (num_heads, dim, value_dim)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # SiLU follows with or without a convolution, so it is applied below.
        conv = dict(short_conv=short_conv, activation=False)
        self.query = project(width, (num_heads, dim), **conv, **options)
        self.key = project(width, (num_heads, dim), **conv, **options)
        self.value = project(width, (num_heads, value_dim), **conv, **options)
        self.beta = project(width, num_heads, **options)
        self.norm = HeadNorm(value_dim, param_dtype=param_dtype)
        self.out = merge_heads(num_heads, value_dim, width, **options)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """``[B, T, width] -> [B, T, width]``; see `lla.mixers.Mixer`."""
        sequences = self.sequences(x, whole(self, segment_ids))
        out = delta_rule(*sequences, segment_ids=segment_ids, form=self.form, chunk=self.chunk)
        return self.out(self.norm(out))

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
        query, key, value, beta = self.sequences(piece.x, piece.project)
        out, memory = delta_rule(
            query,
            key,
            value,
            piece.keep(beta),
            state=state.memory,
            segment_ids=piece.runs,
            form=form_of_piece(self.form, x.shape[1]),
            chunk=self.chunk,
            return_state=True,
        )
        return self.out(self.norm(out)), state.advance(memory, piece)

    def sequences(self, x: jax.Array, apply: Project | None = None) -> tuple[jax.Array, ...]:
        """Arguments of `delta_rule` for `x`: query, key, value and beta (float32 or better).

        `apply` calls a projection by its name; None for those of whole sequences.
        """
        apply = whole(self) if apply is None else apply
        query, key = (l2_normalize(jax.nn.silu(apply(name, x))) for name in ("query", "key"))
        score = self.beta(x)
        beta = self.largest_beta * jax.nn.sigmoid(score.astype(compute_dtype(score.dtype)))
        return query, key, jax.nn.silu(apply("value", x)), beta
