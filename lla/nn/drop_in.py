"""The operator as a drop-in for Flax's dot-product attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lla.ops.api import local_linear_attention
from lla.ops.backend import Implementation
from lla.ops.solver import Solver

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def attention_fn(
    *,
    ridge: float | jax.Array,
    scale: float | None = None,
    is_causal: bool | None = None,
    rope: Callable[[jax.Array, jax.Array | None], jax.Array] | None = None,
    solver: Solver | None = None,
    implementation: Implementation = None,
) -> Callable[..., jax.Array]:
    """Local linear attention as ``attention_fn=`` of Flax's attention layers.

    **Not causal by default**, unlike `lla.local_linear_attention`, because Flax's own function is
    not. For causal attention pass a mask, pass ``is_causal=True`` to the call of an NNX layer, or
    set ``is_causal=True`` here, which is the way for a Linen layer without masks. A call with as
    many queries as keys, without a mask and without `is_causal` from either side, warns;
    ``is_causal=False`` here means attention in both directions and turns the warning off. NNX
    layers always pass `is_causal`, False by default.

    For `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`. Turn on their
    ``normalize_qk``: without it the operator needs more iterations or a larger ridge. The
    autoregressive cache of the layers (``decode=True``) works by the mask that they build, with
    ``is_causal=False``.

    Example::

        >>> import jax.numpy as jnp, lla.nn
        >>> from flax import nnx
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=4, in_features=64, normalize_qk=True, decode=False,
        ...     attention_fn=lla.nn.attention_fn(ridge=1.0), rngs=nnx.Rngs(0),
        ... )
        >>> layer(jnp.ones((2, 10, 64)), is_causal=True).shape
        (2, 10, 64)

    Arguments that the layers pass:

    - ``mask``: of any dtype (Flax builds float masks), nonzero where attention is allowed. A query
      that attends to nothing gets zeros, where Flax averages all values.
    - ``bias``: a bias of the logits, as in `lla.local_linear_attention`, cast to the dtype that the
      logits have, float32 or better. -inf hides; a row of -inf alone gives zeros, where Flax gives
      NaN.
    - ``dtype``: query, key and value are cast to it, or to their common dtype if it is None.
    - ``precision``: any name of `jax.lax.Precision` and any pair of names. Float32 and float64
      always use ``"highest"``. For 16-bit inputs it changes nothing: their products are exact in
      float32, and the error of the output is at most twice that of rounding it once. Dot
      algorithms (`jax.lax.DotAlgorithmPreset`) are not supported.
    - ``input_positions`` (of later versions of Flax): passed on to `rope`, and an error without it.
    - ``force_fp32_for_softmax``: always the case.
    - ``is_causal`` with unequal lengths, active dropout, ``sow_weights=True`` and custom einsums
      are not supported. The weights of this operator are not a probability distribution, so dropout
      of weights is not a known regulariser.

    Args:
      ridge: positive float, or an array broadcastable to ``[*B, T, N]``; see
        `lla.local_linear_attention`. It is a constant of the layer: for a learned ridge use
        `lla.nn.LocalLinearAttention`.
      scale: factor of the logits; None means ``1 / sqrt(head_dim)``, as in Flax.
      is_causal: True makes every call causal; False and None leave it to the call, with the warning
        above for None.
      rope: rotary position embedding of query and key, such as `flax.nnx.RoPE` in versions of Flax
        that have it: a function of ``[..., T, H]`` and the positions ``[T]``, None for 0, 1, ...,
        that returns ``[..., T, H]``. Needs equal lengths of query and key.
      solver, implementation: as in `lla.local_linear_attention`.

    Returns:
      A function of query ``[*B, T, N, H]``, key ``[*B, S, K, H]``, value ``[*B, S, K, Hv]`` and the
      keyword arguments of Flax's layers, which returns ``[*B, T, N, Hv]``. It raises ValueError for
      unequal lengths with ``is_causal`` or `rope` and for a dtype other than float16, bfloat16,
      float32 and float64, and NotImplementedError for what else it does not support.
    """
    every_call = is_causal

    # Linen passes only arguments that it finds in the signature, and silently drops the others:
    # all that it knows are listed.
    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool | None = None,
        input_positions: jax.Array | None = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> jax.Array:
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        if dropout_rate > 0 and not deterministic:
            raise _refusal(f"dropout of attention weights (dropout_rate={dropout_rate})")
        if module is not None:
            raise _refusal("sowing of attention weights (sow_weights=True), which it never forms")
        if (einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum) != (None,) * 3:
            raise _refusal("replaced einsums (qk_attn_weights_einsum and the like)")

        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        _check_dtype(jnp.dtype(dtype), query, key, value)
        _check_precision(precision)
        length, equal = query.shape[-3], query.shape[-3] == key.shape[-3]
        if is_causal is None and every_call is None and mask is None and equal and length > 1:
            warnings.warn(
                f"attention_fn attends in all directions: {length} queries and as many keys came "
                "without a mask. Make it lla.nn.attention_fn(..., is_causal=True), or pass a mask, "
                "for a causal model; is_causal=False says that all directions are meant.",
                UserWarning,
                stacklevel=2,
            )
        is_causal = bool(is_causal or every_call)
        unknown = f"got query {query.shape} and key {key.shape}: the position of the queries among "
        unknown += "the keys is unknown"
        if is_causal and not equal:
            raise ValueError(
                f"is_causal=True needs equal lengths, {unknown}. Pass a mask instead (a layer with "
                "decode=True does)."
            )
        if rope is not None:
            if not equal:
                raise ValueError(f"rope needs equal lengths, {unknown}.")
            query, key = (_rotate(rope, array, input_positions) for array in (query, key))
        elif input_positions is not None:
            raise _refusal(
                f"input_positions {input_positions.shape} without a rotary embedding: give one to "
                "lla.nn.attention_fn, such as rope=flax.nnx.RoPE()"
            )
        query, key, value = (jnp.asarray(a, dtype) for a in (query, key, value))
        return local_linear_attention(
            query,
            key,
            value,
            ridge=ridge,
            scale=scale,
            is_causal=is_causal,
            mask=None if mask is None else jnp.asarray(mask).astype(bool),
            bias=bias,
            solver=solver,
            implementation=implementation,
        )

    return attend


def _refusal(what: str) -> NotImplementedError:
    return NotImplementedError(f"local linear attention does not support {what}.")


def _rotate(rope, heads, positions):
    """`rope` on every head of ``[*B, T, N, H]``; positions ``[T]`` or ``[*B, T]``, or None."""
    if positions is None:
        return jax.vmap(lambda head: rope(head, None), -2, -2)(heads)
    if positions.shape[-1] != heads.shape[-3]:
        raise ValueError(
            f"input_positions must have shape [*B, T] or [T], got {positions.shape} for heads "
            f"{heads.shape} [*B, T, N, H]."
        )
    rotate = jax.vmap(rope, (-2, None), -2)
    # One sequence at a time: not every rope accepts positions that differ between sequences.
    for _ in heads.shape[:-3]:
        rotate = jax.vmap(rotate)
    return rotate(heads, jnp.broadcast_to(positions, heads.shape[:-2]))


def _check_dtype(dtype: jnp.dtype, query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if dtype.name in _DTYPES:
        return
    message = f"the dtype of attention must be one of {', '.join(_DTYPES)}, got {dtype.name} from "
    message += f"query {query.dtype}, key {key.dtype} and value {value.dtype}."
    if jnp.issubdtype(dtype, jnp.complexfloating):
        message += (
            " Pass real and imaginary parts one after the other along the head dimension: the "
            "products of query and key are the real parts of the complex ones then."
        )
    raise ValueError(message)


def _check_precision(precision: Any) -> None:
    names = precision if isinstance(precision, tuple) else (precision,)
    for name in names:
        if name is None or isinstance(name, jax.lax.Precision):
            continue
        try:
            jax.lax.Precision(name.lower() if isinstance(name, str) else name)
        except ValueError:
            raise _refusal(
                f"precision={precision!r}: it chooses the precision of its products itself"
            ) from None
