"""The operator in the place of Flax's dot-product attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lla.ops.api import local_linear_attention
from lla.ops.dispatch import Implementation
from lla.ops.options import Solver

# What a caller may ask of products that are at least as precise as stated.
_DEFAULT_PRECISIONS = (None, "default", jax.lax.Precision.DEFAULT)
_FLOAT32_PRECISIONS = ("high", "highest", "float32", jax.lax.Precision.HIGH,
                       jax.lax.Precision.HIGHEST)  # fmt: skip


def attention_fn(
    *,
    ridge: float | jax.Array,
    scale: float | None = None,
    is_causal: bool = False,
    solver: Solver | None = None,
    implementation: Implementation = None,
) -> Callable[..., jax.Array]:
    """Local linear attention as ``attention_fn=`` of Flax's attention layers.

    For `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`. Turn on their
    ``normalize_qk``: without it the operator needs more work, or a larger ridge. Like Flax's own
    function it attends in all directions unless told otherwise: by a mask, by ``is_causal=True``
    in the call of the NNX layer, or here. The autoregressive cache of the layers (``decode=True``)
    works through the mask they build, with ``is_causal=False``.

    Example::

        >>> import jax.numpy as jnp, lla.nn
        >>> from flax import nnx
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=4, in_features=64, normalize_qk=True, decode=False,
        ...     attention_fn=lla.nn.attention_fn(ridge=1.0), rngs=nnx.Rngs(0),
        ... )
        >>> layer(jnp.ones((2, 10, 64)), is_causal=True).shape
        (2, 10, 64)

    What the layers pass is treated as follows.

    - ``mask``: of any dtype (Flax builds float masks), nonzero where attention is allowed. A query
      that may attend to nothing gets zeros, where Flax would average all values.
    - ``dtype``: query, key and value are cast to it, or to their common dtype if it is None.
    - ``precision``: None and ``"default"`` always; up to ``"highest"`` for float32, whose
      products are always that precise; anything else is refused.
    - ``force_fp32_for_softmax``: always the case.
    - ``is_causal`` with unequal lengths, active dropout, ``bias``, weights to be sown
      (``sow_weights=True``) and replaced einsums are refused. The weights of this operator are
      not a probability distribution, so dropping some of them is not a known regulariser.

    Args:
      ridge: positive float, or an array broadcastable to ``[*B, T, N]``; see
        `lla.local_linear_attention`. It is a constant of the layer: for a learned ridge use
        `lla.nn.LocalLinearAttention`.
      scale: factor of the logits; None means ``1 / sqrt(head_dim)``, as in Flax.
      is_causal: whether every call is causal; for the Linen layer, which has no such argument.
      solver, implementation: as in `lla.local_linear_attention`.

    Returns:
      A function of query ``[*B, T, N, H]``, key ``[*B, S, K, H]``, value ``[*B, S, K, Hv]`` and the
      keyword arguments of Flax's layers, which returns ``[*B, T, N, Hv]``. It raises ValueError for
      unequal lengths with ``is_causal`` and NotImplementedError for whatever else it refuses.
    """
    always_causal = is_causal

    # Linen hands over only the arguments it finds by name, so each one it knows is listed: an
    # argument left out would be dropped in silence.
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
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> jax.Array:
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        if dropout_rate > 0 and not deterministic:
            raise _refusal(f"dropout of attention weights (dropout_rate={dropout_rate})")
        if bias is not None:
            raise _refusal(f"a bias of the logits (bias {bias.shape})")
        if module is not None:
            raise _refusal("sowing of attention weights (sow_weights=True), which it never forms")
        if (einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum) != (None,) * 3:
            raise _refusal("replaced einsums (qk_attn_weights_einsum and the like)")

        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        query, key, value = (jnp.asarray(a, dtype) for a in (query, key, value))
        _check_precision(precision, query.dtype)
        is_causal = is_causal or always_causal
        if is_causal and query.shape[-3] != key.shape[-3]:
            raise ValueError(
                f"is_causal=True needs equal lengths, got query {query.shape} and key {key.shape}: "
                "the position of the queries among the keys is unknown. Pass a mask instead (a "
                "layer with decode=True does)."
            )
        return local_linear_attention(
            query,
            key,
            value,
            ridge=ridge,
            scale=scale,
            is_causal=is_causal,
            mask=None if mask is None else jnp.asarray(mask).astype(bool),
            solver=solver,
            implementation=implementation,
        )

    return attend


def _refusal(what: str) -> NotImplementedError:
    return NotImplementedError(f"local linear attention does not support {what}.")


def _check_precision(precision: Any, dtype: jnp.dtype) -> None:
    if isinstance(precision, str):
        precision = precision.lower()
    if precision in _DEFAULT_PRECISIONS:
        return
    if precision in _FLOAT32_PRECISIONS and dtype.itemsize >= 4:
        return
    raise _refusal(
        f"precision={precision!r} for {dtype} inputs: it chooses the precision of its products "
        "itself (float32 inputs are multiplied at the highest)"
    )
