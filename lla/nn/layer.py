"""The layer: projections, QK-norm, ridge and the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx

from lla.nn.new_tokens import NewTokens, apply_projection, convolution_states
from lla.nn.ridge import Ridge, RidgeType
from lla.nn.rope import rotate
from lla.numerics import compute_dtype, nan_where
from lla.ops import segments
from lla.ops.api import local_linear_attention, parallax_attention, softmax_attention
from lla.ops.backend import Implementation
from lla.ops.cache import KVCache
from lla.ops.context import make_context, token_positions
from lla.ops.decode import decode_step, parallax_decode_step, softmax_decode_step
from lla.ops.problem import Mechanism
from lla.ops.solver import Solver, Stats

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class HeadNorm(nnx.Module):
    """RMS normalisation over the last axis of ``[..., H]`` with a learned scale ``[H]``.

    Computed in float32 or better, returned in the dtype of the input.
    """

    def __init__(self, head_dim: int, *, param_dtype=jnp.float32, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((head_dim,), param_dtype))

    def __call__(self, heads: jax.Array) -> jax.Array:
        x = heads.astype(compute_dtype(heads.dtype))
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        x = x * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)
        return x.astype(heads.dtype)


class AttentionState(NamedTuple):
    """The state of decoding with attention; the batch axes are the leading axes of every array.

    Attributes:
      cache: keys, normalised and rotated, and values.
      convolutions: by the name of a projection, the last inputs of its short convolution.
      segment: int32 ``[*B]``, the segment id of the last token; 0 where none was given.
    """

    cache: KVCache
    convolutions: dict[str, jax.Array]
    segment: jax.Array


class CallOptions(TypedDict, total=False):
    """The keyword arguments of a call of the layer, except `return_stats`, for its overloads."""

    mask: jax.Array | None
    bias: jax.Array | None
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None
    query_seq_lengths: jax.Array | None
    key_value_seq_lengths: jax.Array | None
    query_offset: int | jax.Array | None
    positions: jax.Array | None


def _last_segment(cache: KVCache, lengths: jax.Array) -> KVCache:
    """The last `lengths` tokens of `cache`; a sequence that overflowed stays marked as such."""
    first = cache.lengths - lengths
    return KVCache(
        key=segments.moved_to_front(cache.key, first, lengths),
        value=segments.moved_to_front(cache.value, first, lengths),
        lengths=jnp.where(cache.overflowed, cache.lengths, lengths),
    )


class LocalLinearAttention(nnx.Module):
    """Multi-head local linear attention with its projections.

    ``x [*B, T, in_features] -> [*B, T, out_features]``; any number of leading axes. Queries and
    keys are RMS-normalised per head unless ``qk_norm=False``, which also bounds the condition
    number of the systems that the operator solves, and so its cost and error.

    Example::

        >>> import jax.numpy as jnp, lla.nn
        >>> from flax import nnx
        >>> layer = lla.nn.LocalLinearAttention(
        ...     num_heads=4, in_features=64, ridge=1.0, ridge_type="per_head", rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)

    `decode` continues sequences by one or more tokens at a time, from the state that `init_state`
    returns for empty sequences.

    Parameters: ``query``, ``key``, ``value`` and ``out`` (Flax `LinearGeneral`, kernels
    ``[in_features, heads, head_dim]`` and ``[num_heads, value_dim, out_features]``, which can be
    sharded by head), ``query_norm`` and ``key_norm``, ``ridge`` if it is learned, ``probe`` for
    ``mechanism="parallax"``. `lla.nn.weight_decay_mask` keeps the ridge out of weight decay.

    Args:
      num_heads: query heads ``N``.
      in_features: width of the input.
      num_kv_heads: key and value heads ``K``, a divisor of ``N``; None means ``N``.
      head_dim: width of a query or key head; None means ``in_features // num_heads``.
      value_dim: width of a value head; None means `head_dim`.
      out_features: width of the output; None means `in_features`.
      in_kv_features: width of a second input to attend to; None means `in_features`.
      mechanism: ``"lla"``; ``"parallax"``, whose probe is a projection of the token that starts at
        zero, which is softmax attention; or ``"softmax"``.
      ridge: the ridge, or its initial value if it is learned, in units of squared keys; QK-norm
        makes the mean square of their coordinates 1. None means 1, and is the only value for
        mechanisms without a ridge.
      ridge_type: ``"fixed"``; ``"per_head"``: ``ridge_min + softplus(b)``; ``"per_token"``:
        ``ridge_min + softplus(w . x + b)`` with a ``w`` for each head. Both start at `ridge`.
      ridge_min: lower bound of a learned ridge.
      scale: factor of the logits; None means ``1 / sqrt(head_dim)``.
      is_causal: whether a token sees only itself and what precedes it.
      local_window_size: an int or ``(left, right)``, as in `lla.local_linear_attention`.
      qk_norm: whether to normalise queries and keys.
      rope_theta: base of rotary position embeddings (usually 10000), applied after QK-norm to
        query, key and probe; None for no position embeddings.
      use_bias: whether the query, key, value and probe projections have biases.
      use_out_bias: whether the output projection has one.
      dtype: dtype of projections and attention; None infers it from input and parameters.
      param_dtype: dtype of the parameters, except those of the ridge, which are float32.
      precision: of the projections; the operator chooses that of its own products.
      kernel_init, bias_init: initialisers of the projections.
      out_kernel_init: of the output kernel; None means `kernel_init`.
      kernel_metadata, out_kernel_metadata: metadata of those kernels' `nnx.Param`, such as
        sharding.
      solver, implementation, context_axis, context_balance: as in `lla.local_linear_attention`.
        Where a sequence is split over devices, rotary embeddings know the positions of each.
      rngs: Flax random streams; uses ``params``.

    Raises:
      ValueError: for inconsistent sizes or options.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        out_features: int | None = None,
        in_kv_features: int | None = None,
        mechanism: Mechanism = "lla",
        ridge: float | None = None,
        ridge_type: RidgeType = "fixed",
        ridge_min: float = 0.01,
        scale: float | None = None,
        is_causal: bool = True,
        local_window_size: int | tuple[int, int] | None = None,
        qk_norm: bool = True,
        rope_theta: float | None = None,
        use_bias: bool = False,
        use_out_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        out_kernel_init: nnx.Initializer | None = None,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        out_kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        solver: Solver | None = None,
        implementation: Implementation = None,
        context_axis: str | None = None,
        context_balance: bool = False,
        rngs: nnx.Rngs,
    ):
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(
                    f"in_features ({in_features}) must be a multiple of num_heads ({num_heads}) "
                    "unless head_dim is given."
                )
            head_dim = in_features // num_heads
        for name, size in (("head_dim", head_dim), ("value_dim", value_dim)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})."
            )
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"rope_theta needs an even head_dim, got {head_dim}.")
        if mechanism not in ("lla", "parallax", "softmax"):
            raise ValueError(f"mechanism must be 'lla', 'parallax' or 'softmax': {mechanism!r}.")
        if mechanism != "lla" and (ridge, ridge_type, solver) != (None, "fixed", None):
            raise ValueError(f"mechanism {mechanism!r} has no ridge and no solver.")

        self.num_heads = num_heads
        self.in_features = in_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.mechanism = mechanism
        self.scale = scale
        self.is_causal = is_causal
        self.local_window_size = local_window_size
        self.rope_theta = rope_theta
        self.solver = solver
        self.implementation = implementation
        self.split = make_context(context_axis, context_balance)
        self.cached_heads = (num_kv_heads, head_dim, head_dim if value_dim is None else value_dim)
        self.cached_dtype = jnp.dtype(param_dtype if dtype is None else dtype)

        def project(features, heads, dim, init=kernel_init):
            return nnx.LinearGeneral(
                features,
                (heads, dim),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=init,
                bias_init=bias_init,
                kernel_metadata=kernel_metadata,
                rngs=rngs,
            )

        value_dim = head_dim if value_dim is None else value_dim
        self.query = project(in_features, num_heads, head_dim)
        self.key = project(self.in_kv_features, num_kv_heads, head_dim)
        self.value = project(self.in_kv_features, num_kv_heads, value_dim)
        self.qk_norm = qk_norm
        if qk_norm:
            self.query_norm = HeadNorm(head_dim, param_dtype=param_dtype)
            self.key_norm = HeadNorm(head_dim, param_dtype=param_dtype)
        if mechanism == "lla":
            self.ridge = Ridge(
                num_heads,
                in_features,
                ridge=1.0 if ridge is None else ridge,
                ridge_type=ridge_type,
                ridge_min=ridge_min,
            )
        if mechanism == "parallax":
            self.probe = project(in_features, num_heads, head_dim, nnx.initializers.zeros_init())
        self.out = nnx.LinearGeneral(
            (num_heads, value_dim),
            in_features if out_features is None else out_features,
            axis=(-2, -1),
            use_bias=use_out_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init if out_kernel_init is None else out_kernel_init,
            bias_init=bias_init,
            kernel_metadata=out_kernel_metadata,
            rngs=rngs,
        )

    @overload
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        return_stats: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        return_stats: Literal[True],
        **options: Unpack[CallOptions],
    ) -> tuple[jax.Array, Stats]: ...

    @overload
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        return_stats: bool,
        **options: Unpack[CallOptions],
    ) -> jax.Array | tuple[jax.Array, Stats]: ...

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        query_offset: int | jax.Array | None = None,
        positions: jax.Array | None = None,
        return_stats: bool = False,
    ) -> jax.Array | tuple[jax.Array, Stats]:
        """Attends from `x` to itself, or to `context`.

        Args:
          x: ``[*B, T, in_features]``.
          context: ``[*B, S, in_kv_features]``, where keys and values come from; None means `x`.
          mask: bool, broadcastable to ``[*B, num_heads, T, S]``, True where attention is allowed,
            in addition to `is_causal` and the window.
          bias: float, broadcastable to ``[*B, num_heads, T, S]``, added to the logits, as in
            `lla.local_linear_attention`; `decode` has none.
          segment_ids: int ``[*B, T]`` (with a context the pair of ``[*B, T]`` and ``[*B, S]``):
            attention only within equal ids, for packed sequences.
          query_seq_lengths: int ``[*B]``: tokens of `x` at or beyond it attend to nothing.
          key_value_seq_lengths: int ``[*B]``: keys at or beyond it are masked.
          query_offset: int or int ``[*B]``, position of the first token of `x` in the context.
          positions: int ``[*B, T]``, positions of `x` for the rotary embedding; not with a context.
            None for 0, 1, ...
          return_stats: also return the operator's `lla.Stats`.

        Returns:
          ``[*B, T, out_features]``, or a pair with `lla.Stats`. A token that sees no key gets the
          output projection of zeros.

        Raises:
          ValueError: for inputs of the wrong width, or a causal layer with a context of another
            length but no `query_offset`, so that the positions of `x` are unknown.
        """
        if x.ndim < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape [*B, T, {self.in_features}], got {x.shape}.")
        if context is None:
            if self.in_kv_features != self.in_features:
                raise ValueError(f"this layer needs a context of width {self.in_kv_features}.")
            context = x
            if query_offset is not None:
                raise ValueError("query_offset is the position of x in a context: pass that too.")
            if segment_ids is not None and not isinstance(segment_ids, tuple):
                segment_ids = (segment_ids, segment_ids)
        elif positions is not None:
            raise ValueError("positions are those of x and its keys: there must be no context.")
        elif context.ndim != x.ndim or context.shape[-1] != self.in_kv_features:
            raise ValueError(
                f"context must have shape [*B, S, {self.in_kv_features}] with the leading axes of "
                f"x {x.shape}, got {context.shape}."
            )
        if self.is_causal and query_offset is None and x.shape[-2] != context.shape[-2]:
            raise ValueError(
                f"x {x.shape} and context {context.shape} differ in length: a causal layer needs "
                "query_offset, the position of x in the context; for cross attention build the "
                "layer with is_causal=False."
            )
        # Short convolutions stay within segments where keys and values come from x itself.
        packed = segment_ids[0] if segment_ids is not None and context is x else None
        query, key, value = self.heads(
            x, context, query_offset=query_offset, positions=positions, segment_ids=packed
        )
        options = dict(
            scale=self.scale,
            is_causal=self.is_causal,
            query_offset=query_offset,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            segment_ids=segment_ids,
            local_window_size=self.local_window_size,
            mask=mask,
            bias=bias,
            implementation=self.implementation,
            return_stats=True,
        )
        if self.split is not None:
            options |= dict(context_axis=self.split.axis, context_balance=self.split.balanced)
        if self.mechanism == "lla":
            attended, stats = local_linear_attention(
                query, key, value, ridge=self.ridge(x), solver=self.solver, **options
            )
        elif self.mechanism == "parallax":
            probe = self._rotate(self.probe(x), query_offset, positions)
            attended, stats = parallax_attention(query, probe, key, value, **options)
        else:
            attended, stats = softmax_attention(query, key, value, **options)
        out = self.out(attended)
        return (out, stats) if return_stats else out

    def init_state(
        self, batch: int | tuple[int, ...], max_length: int, dtype: Any = None
    ) -> AttentionState:
        """The state of `decode` before the first token.

        Args:
          batch: number of sequences, or the leading axes ``*B`` as a tuple.
          max_length: capacity of the cache in tokens per sequence.
          dtype: of the cached keys and values and of attention; None means `dtype` of the layer, or
            `param_dtype` if that is None.

        Raises:
          ValueError: `max_length` is below 1, or the layer cannot decode.
        """
        self._check_decodes()
        dtype = self.cached_dtype if dtype is None else jnp.dtype(dtype)
        return AttentionState(
            KVCache.create(batch, max_length, *self.cached_heads, dtype),
            convolution_states(self, batch, dtype),
            jnp.zeros(batch, jnp.int32),
        )

    def decode(
        self,
        x: jax.Array,
        state: AttentionState,
        new_lengths: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, AttentionState]:
        """The outputs of the next T tokens, as if the layer were called on the whole sequence.

        Args:
          x: ``[*B, T, in_features]``; T = 1 is a step of decoding.
          state: from `init_state` or from the call before. Donate it to a compiled step.
          new_lengths: int ``[*B]``, in 0 ... T: how many of the T tokens of a sequence exist. The
            others are padding: they do not change the state, and their outputs have no meaning.
            None for all.
          segment_ids: int ``[*B, T]``, of packed sequences: a token attends within its segment. The
            first token continues the segment in the cache if it has the id of the last token before
            it. Rotary positions count from 0 in every segment. The cache needs room for all T
            tokens after those it holds; afterwards it holds the last segment only. None: all tokens
            continue the segment in the cache.

        Returns:
          ``[*B, T, out_features]`` and the new state. `lla.KVCache` says what happens beyond
          `max_length`.

        Raises:
          ValueError: for arguments of the wrong shape, more tokens than there is room for (where
            lengths are known), or a layer that is not causal or needs a context.
        """
        self._check_decodes()
        if x.ndim < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape [*B, T, {self.in_features}], got {x.shape}.")
        tokens = NewTokens(self, x, state.convolutions, new_lengths, segment_ids, state.segment)
        cache = state.cache
        if segment_ids is not None:
            cache = dataclasses.replace(cache, lengths=tokens.reset(cache.lengths))
        positions = tokens.positions(cache.lengths)
        query, key, value = (tokens.project(name) for name in ("query", "key", "value"))
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (self._rotate(heads, None, positions) for heads in (query, key))
        dtype = query.dtype
        query, key, value = (heads.astype(cache.key.dtype) for heads in (query, key, value))
        options = dict(
            scale=self.scale,
            local_window_size=self.local_window_size,
            implementation=self.implementation,
        )
        probe = None
        if self.mechanism == "parallax":
            probe = self._rotate(self.probe(tokens.x), None, positions).astype(query.dtype)
        if segment_ids is not None:
            grown = cache.append(key, value, new_lengths)
            attended = self._attend_packed(query, probe, grown, cache.lengths, tokens, options)
            cache = _last_segment(grown, tokens.lengths_after(cache.lengths))
        elif self.mechanism == "lla":
            attended, cache = decode_step(
                query, key, value, cache, new_lengths=new_lengths, ridge=self.ridge(tokens.x),
                solver=self.solver, **options,
            )  # fmt: skip
        elif self.mechanism == "parallax":
            attended, cache = parallax_decode_step(
                query, probe, key, value, cache, new_lengths=new_lengths, **options
            )
        else:
            attended, cache = softmax_decode_step(
                query, key, value, cache, new_lengths=new_lengths, **options
            )
        state = AttentionState(cache, tokens.convolutions, tokens.segment)
        return self.out(attended.astype(dtype)), state

    def _attend_packed(self, query, probe, cache, before, tokens, options):
        """Attention of `tokens`, which `cache` holds after `before` others, within segments."""
        room = cache.max_length
        options = options | dict(
            is_causal=True,
            query_offset=before,
            key_value_seq_lengths=jnp.minimum(cache.lengths, room),
            segment_ids=(tokens.segment_ids, segments.slots(tokens.segment_ids, before, room)),
        )
        key, value = cache.key, cache.value
        if self.mechanism == "lla":
            out = local_linear_attention(
                query, key, value, ridge=self.ridge(tokens.x), solver=self.solver, **options
            )
        elif self.mechanism == "parallax":
            out = parallax_attention(query, probe, key, value, **options)
        else:
            out = softmax_attention(query, key, value, **options)
        full = cache.overflowed[..., None, None]
        return nan_where(jnp.broadcast_to(full, out.shape[:-1]), out)

    def _check_decodes(self):
        if not self.is_causal or self.in_kv_features != self.in_features:
            raise ValueError(
                "decoding needs a causal layer whose keys and values come from its own input: "
                f"is_causal is {self.is_causal}, in_features {self.in_features} and in_kv_features "
                f"{self.in_kv_features}."
            )

    def heads(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        query_offset: int | jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query ``[*B, T, N, H]``, key ``[*B, S, K, H]`` and value ``[*B, S, K, Hv]``.

        Projected, normalised and rotated: the arguments of the operator.
        """
        context = x if context is None else context
        query = apply_projection(self.query, x, segment_ids)
        key, value = (apply_projection(m, context, segment_ids) for m in (self.key, self.value))
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = self._rotate(query, query_offset, positions)
        return query, self._rotate(key, None, positions), value

    def _rotate(self, heads, offset, positions=None):
        if self.rope_theta is None:
            return heads
        if positions is not None:
            return rotate(heads, positions, self.rope_theta)
        positions = token_positions(self.split, heads.shape[-3])
        if offset is not None:
            offset = jnp.asarray(offset, jnp.int32)[..., None]
            shape = jnp.broadcast_shapes(offset.shape, (1,) * (offset.ndim - 1) + positions.shape)
            positions = jnp.broadcast_to(offset, shape) + jnp.broadcast_to(positions, shape)
        return rotate(heads, positions, self.rope_theta)
