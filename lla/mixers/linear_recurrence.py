"""Linear attention with decay: the recurrence of linear attention, RetNet, GLA and Mamba-2.

Per token and head, with key k, value v, query q and gates a in (0, 1],

    S = Diag(a) S + k v^T;  o = S^T q                               S: [H, Hv], S = 0 at the start

The gates are one number per head (RetNet, arXiv 2307.08621; Mamba-2, arXiv 2405.21060), one per
coordinate of the key (GLA, arXiv 2312.06635), or absent (linear attention, arXiv 2006.16236).

`"recurrent"`, the reference, is a scan over tokens. `"parallel"` computes a chunk of tokens by
matrix products. With a_ij the product of the gates after j up to i, a_i0 that of all gates of the
chunk up to i, and S0 the state before the chunk:

    o_i = S0^T (a_i0 q_i) + sum_{j <= i} (q_i . Diag(a_ij) k_j) v_j

With one gate per head, a_ij is a factor of q_i . k_j. With a gate per coordinate, splitting a_ij
into a_i0 / a_j0 would give a single product, but 1 / a_j0 overflows. Instead a chunk is divided
into blocks of 16 tokens. Within a block all a_ij are formed; between blocks a_ij is the product of
three factors, each at most 1: from j to the end of its block, over the blocks in between, and from
the start of the block of i to i. No positive number is ever exponentiated, and no exponent is the
difference of plain running sums (see `chunks.Sums`).

On a Hopper GPU bfloat16 sequences have kernels (`lla.mixers.linear_kernel` for gates per
coordinate, `lla.mixers.retention_kernel` for the others).
"""

from functools import partial

import jax
import jax.numpy as jnp

from lla.mixers import chunks, hopper, linear_kernel, retention_kernel, segments
from lla.numerics import compute_dtype

_einsum = partial(jnp.einsum, precision="highest")

# Tokens of a block, within which gates per coordinate are formed for all pairs.
_BLOCK = 16


def linear_recurrence(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    form: str = "parallel",
    chunk: int = 64,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Outputs of linear attention with decay.

    Per token and head ``S = Diag(a) S + k v^T; o = S^T q`` with ``a = exp(log_decay)``: linear
    attention (arXiv 2006.16236), RetNet (arXiv 2307.08621), GLA (arXiv 2312.06635), SSD of Mamba-2
    (arXiv 2405.21060).

    Differentiable in all arrays and in `state`, also through the returned state. Where a
    kernel runs, in reverse mode only; ``form="recurrent"`` has both modes.

    Args:
      query, key: ``[B, T, N, H]``, or ``[B, T, 1, H]`` if all heads share them. They are not
        scaled.
      value: ``[B, T, N, Hv]``.
      log_decay: logarithm of the gates, finite and <= 0: ``[B, T, N]``, or ``[B, T, N, H]`` for a
        gate per head and coordinate of the key; None for no decay.
      state: ``[B, N, H, Hv]``, the state before the first token, of any dtype; None for zero.
      segment_ids: int ``[B, T]``, of packed sequences: the state is reset before a token whose id
        differs from the one before. The first token continues from `state`. None for one sequence.
      form: ``"parallel"`` or ``"recurrent"``.
      chunk: tokens per chunk of the parallel form; with gates per coordinate rounded up to a
        multiple of 16.
      return_state: also return the state after the last token.

    Returns:
      ``[B, T, N, Hv]`` in the dtype of `value`, or a pair with the state ``[B, N, H, Hv]``. States
      and gates are float32 (float64 for float64 values); for 16-bit values the operands of products
      are rounded to TF32 or 16 bits on a GPU.

    Raises:
      ValueError: for shapes that do not match, an unknown form, a chunk below 1, or `segment_ids`
        that are not integers.
    """
    chunks.check_form(form, chunk)
    if key.ndim != 4 or query.shape != key.shape or 0 in key.shape:
        raise ValueError(
            "query and key must both be [B, T, N, H] and not empty, "
            f"got {query.shape} and {key.shape}."
        )
    fits = value.ndim == 4 and value.shape[:2] == key.shape[:2]
    if not fits or key.shape[2] not in (1, value.shape[2]):
        raise ValueError(
            f"value must be [B, T, N, Hv] with the leading axes of key {key.shape}, or several "
            f"heads for one, got {value.shape}."
        )
    batch, length, heads = value.shape[:3]
    dim = key.shape[3]
    if log_decay is not None and log_decay.shape not in (
        (batch, length, heads),
        (batch, length, heads, dim),
    ):
        raise ValueError(
            f"log_decay must have shape {(batch, length, heads)} or "
            f"{(batch, length, heads, dim)}, got {log_decay.shape}."
        )
    einsum = chunks.products(value.dtype)
    dtype = compute_dtype(value.dtype)
    state = chunks.start_state(state, (batch, heads, dim, value.shape[-1]), dtype)
    log_decay = segments.gates(log_decay, segment_ids, value)
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), dtype)
    log_decay = log_decay.astype(dtype)
    per_head = log_decay.ndim == 3
    kernel, largest = ("retention", 128) if per_head else ("linear", hopper.SIZE)
    if per_head and key.shape[2] == 1:
        kernel = "retention_shared"
    if form == "parallel" and hopper.serve(kernel, key, value, largest):
        kernels = retention_kernel
        if not per_head:
            kernels, query, key = linear_kernel, *(_to_heads(a, heads) for a in (query, key))
        out, state = kernels.run(state, query, key, value, log_decay)
        return (out, state) if return_state else out
    query, key = (_to_heads(array, heads) for array in (query, key))
    arrays = (*(array.astype(dtype) for array in (query, key, value)), log_decay)
    if form == "recurrent":
        compute = _recurrent
    else:
        compute = partial(_parallel, chunk=min(chunk, length), einsum=einsum)
    out, state = compute(state, *arrays)
    out = out.astype(value.dtype)
    return (out, state) if return_state else out


def _to_heads(array, heads: int):
    """``[B, T, N or 1, H] -> [B, T, N, H]``."""
    return jnp.broadcast_to(array, (*array.shape[:2], heads, array.shape[3]))


def linear_recurrence_step(
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_recurrence`; all arrays in the dtype of the state, float32 or float64.

    Differentiable in all of them, in forward and reverse mode.

    Args:
      state: ``[B, N, H, Hv]``.
      query, key: ``[B, N, H]``.
      value: ``[B, N, Hv]``.
      log_decay: ``[B, N]`` or ``[B, N, H]``.

    Returns:
      The new state and the output ``[B, N, Hv]``.
    """
    decay = jnp.exp(log_decay)
    decay = decay[..., None, None] if log_decay.ndim == 2 else decay[..., None]
    state = decay * state + key[..., None] * value[..., None, :]
    return state, _einsum("bnhv,bnh->bnv", state, query)


def _recurrent(state, *arrays):
    by_time = tuple(jnp.moveaxis(array, 1, 0) for array in arrays)
    state, out = jax.lax.scan(
        lambda state, token: linear_recurrence_step(state, *token), state, by_time
    )
    return jnp.moveaxis(out, 0, 1), state


def _parallel(state, query, key, value, log_decay, *, chunk, einsum):
    length = query.shape[1]
    per_head = log_decay.ndim == 3
    if not per_head:
        chunk = -(-chunk // _BLOCK) * _BLOCK if chunk > _BLOCK else chunk
    q, k, v, log_decay = (chunks.split(a, chunk) for a in (query, key, value, log_decay))

    def advance(state, block):
        q, k, v, scores, total = block
        out = einsum("bnih,bnhv->bniv", q, state) + einsum("bnij,bnjv->bniv", scores, v)
        state = total[..., None] * state + einsum("bnih,bniv->bnhv", k, v)
        return state, out

    if per_head:
        q, k, scores, total = _gates_per_head(q, k, log_decay, einsum)
        state, out = jax.lax.scan(advance, state, (q, k, v, scores, total))
    else:
        # The gates between pairs of tokens take 16 times the memory of the keys: they are formed
        # for one chunk at a time, in the backward pass as well.
        @jax.checkpoint
        def gate_and_advance(state, block):
            q, k, v, log_decay = block
            q, k, scores, total = _gates_per_coordinate(q, k, log_decay, einsum)
            return advance(state, (q, k, v, scores, total))

        state, out = jax.lax.scan(gate_and_advance, state, (q, k, v, log_decay))
    return chunks.merge(out, length), state


def _gates_per_head(q, k, log_decay, einsum):
    """Of a chunk: q decayed from S0, k decayed to the end, scores, and the decay of S0.

    ``[..., C, H]``, ``[..., C, H]``, ``[..., C, C]``, ``[..., 1]``.
    """
    decays = chunks.decays(log_decay)
    scores = einsum("...ih,...jh->...ij", q, k) * decays.pair
    return (
        decays.start[..., None] * q,
        decays.end[..., None] * k,
        scores,
        decays.start[..., -1:],
    )


def _gates_per_coordinate(q, k, log_decay, einsum):
    """The same from log_decay ``[..., C, H]``; the decay of S0 is ``[..., H]``."""
    *leading, chunk, dim = q.shape
    block = min(_BLOCK, chunk)
    count = chunk // block
    q, k, log_decay = (a.reshape(*leading, count, block, dim) for a in (q, k, log_decay))

    # Within blocks: [..., I, H, i, j] for pairs, [..., I, i, H] to either end.
    inner = chunks.decays(jnp.swapaxes(log_decay, -1, -2))
    near_keys = inner.pair * jnp.swapaxes(k, -1, -2)[..., None, :]
    near = einsum("...ih,...hij->...ij", q, near_keys)
    q = jnp.swapaxes(inner.start, -1, -2) * q
    k = jnp.swapaxes(inner.end, -1, -2) * k

    # Over whole blocks, after an empty one: over[..., H, I, J] is the decay over blocks J, ...,
    # I - 1. Column J + 1 excludes block J, and is 0 unless I > J.
    totals = jnp.swapaxes(log_decay.sum(-2), -1, -2)
    over = chunks.decays(jnp.pad(totals, [(0, 0)] * (totals.ndim - 1) + [(1, 0)])).pair
    far_keys = einsum("...hIJ,...Jjh->...IJjh", over[..., :-1, 1:], k)
    far = einsum("...Iih,...IJjh->...IiJj", q, far_keys)

    same = jnp.eye(count, dtype=q.dtype).reshape(*(1,) * len(leading), count, 1, count, 1)
    scores = (far + same * near[..., :, :, None, :]).reshape(*leading, chunk, chunk)
    q = q * jnp.swapaxes(over[..., :-1, 0], -1, -2)[..., None, :]
    k = k * jnp.swapaxes(over[..., -1, 1:], -1, -2)[..., None, :]
    q, k = (a.reshape(*leading, chunk, dim) for a in (q, k))
    return q, k, scores, over[..., -1, 0]
