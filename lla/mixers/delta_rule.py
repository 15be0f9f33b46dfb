"""The delta rule, plain and gated: the recurrence of DeltaNet and Gated DeltaNet.

Per token and head, with key k, value v, query q, step size beta and gate a in (0, 1],

    S = a S;  S += beta k (v - S^T k)^T;  o = S^T q                  S: [H, Hv], S = 0 at the start

(DeltaNet, arXiv 2406.06484, has a = 1; Gated DeltaNet, arXiv 2412.06464). For unit keys and beta in
(0, 2) the factor of S has eigenvalues in (-1, 1], so the state stays bounded.

`"recurrent"`, the reference, is a scan over tokens. `"parallel"` computes a chunk of tokens by
matrix products. Let a_ij be the product of the gates after j up to i, a_i0 that of all gates of the
chunk up to i, and S0 the state before the chunk. Unrolled, the recurrence is:

    o_i = a_i0 S0^T q_i + sum_{j <= i} a_ij (q_i.k_j) u_j
    u_i + beta_i sum_{j < i} a_ij (k_i.k_j) u_j = beta_i (v_i - a_i0 S0^T k_i)

The lower triangular system does not depend on S0, so it is solved for all chunks at once, with the
two right-hand sides beta v and beta a_i0 k (the WY representation). This gives U and W. As
u = U - W S0, the state after a chunk is linear in S0, and only the state is left for the scan over
chunks. Gradients are computed in the same way.

For 16-bit sequences operands have 16 bits or TF32, with float32 sums. On a Hopper GPU there are
kernels (`lla.mixers.delta_kernel`), which loop over the chunks and solve for u in the same loop.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lla.mixers import chunks, delta_kernel, hopper, segments
from lla.numerics import compute_dtype

_einsum = partial(jnp.einsum, precision="highest")


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    form: str = "parallel",
    chunk: int = 64,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Outputs of the (gated) delta rule.

    Per token and head ``S = a S; S += beta k (v - S^T k)^T; o = S^T q`` with ``a = exp(log_decay)``
    (DeltaNet, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464).

    Differentiable in all arrays and in `state`, also through the returned state, in reverse
    mode; forward mode needs ``form="recurrent"``.

    Args:
      query, key: ``[B, T, N, H]``. Keys are not normalised here.
      value: ``[B, T, N, Hv]``.
      beta: ``[B, T, N]``, step sizes.
      log_decay: ``[B, T, N]``, logarithm of the gates, finite and <= 0; None for no decay.
      state: ``[B, N, H, Hv]``, the state before the first token, of any dtype; None for zero.
      segment_ids: int ``[B, T]``, of packed sequences: the state is reset before a token whose id
        differs from the one before. The first token continues from `state`. None for one sequence.
      form: ``"parallel"`` or ``"recurrent"``.
      chunk: tokens per chunk of the parallel form.
      return_state: also return the state after the last token.

    Returns:
      ``[B, T, N, Hv]`` in the dtype of `value`, or a pair with the state ``[B, N, H, Hv]``. States
      and gates are float32 (float64 for float64 values); for bfloat16 values the operands of
      products are rounded to 16 bits.

    Raises:
      ValueError: for shapes that do not match, an unknown form, a chunk below 1, or `segment_ids`
        that are not integers.
    """
    check_sequences(query, key, value, beta, log_decay)
    log_decay = segments.gates(log_decay, segment_ids, value)
    chunks.check_form(form, chunk)
    batch, length, heads, dim = key.shape
    dtype = compute_dtype(value.dtype)
    state = chunks.start_state(state, (batch, heads, dim, value.shape[-1]), dtype)
    gates = () if log_decay is None else (log_decay.astype(dtype),)
    sequences = (query, key, value)
    if form == "recurrent":
        sequences = (array.astype(dtype) for array in sequences)
        compute = _recurrent
    else:
        compute = partial(_parallel, chunk=min(chunk, length))
    out, state = compute(state, *sequences, beta.astype(dtype), *gates)
    out = out.astype(value.dtype)
    return (out, state) if return_state else out


def delta_rule_step(
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`; all arrays in the dtype of the state, float32 or float64.

    Differentiable in all of them, in forward and reverse mode.

    Args:
      state: ``[B, N, H, Hv]``.
      query, key: ``[B, N, H]``.
      value: ``[B, N, Hv]``.
      beta, log_decay: ``[B, N]``; None for no decay.

    Returns:
      The new state and the output ``[B, N, Hv]``.
    """
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None, None] * state
    error = value - _einsum("bnhv,bnh->bnv", state, key)
    state = state + _einsum("bnh,bnv->bnhv", key, beta[..., None] * error)
    return state, _einsum("bnhv,bnh->bnv", state, query)


def check_sequences(query, key, value, beta, log_decay) -> None:
    """Raises ValueError unless shapes are [B, T, N, H] twice, [B, T, N, Hv] and [B, T, N]."""
    if key.ndim != 4 or query.shape != key.shape or 0 in key.shape:
        raise ValueError(
            "query and key must both be [B, T, N, H] and not empty, "
            f"got {query.shape} and {key.shape}."
        )
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must be [B, T, N, Hv] with the leading axes of key {key.shape}, "
            f"got {value.shape}."
        )
    for name, gate in (("beta", beta), ("log_decay", log_decay)):
        if gate is not None and gate.shape != key.shape[:3]:
            raise ValueError(f"{name} must have shape {key.shape[:3]}, got {gate.shape}.")


def _recurrent(state, *arrays):
    by_time = tuple(jnp.moveaxis(array, 1, 0) for array in arrays)
    state, out = jax.lax.scan(lambda state, token: delta_rule_step(state, *token), state, by_time)
    return jnp.moveaxis(out, 0, 1), state


def _parallel(state, query, key, value, beta, log_decay=None, *, chunk):
    length, narrow = query.shape[1], chunks.operand_dtype(value.dtype)
    if log_decay is None:
        log_decay = jnp.zeros_like(beta)
    if hopper.serve("delta_rule", key, value, 128):
        return delta_kernel.run(state, query, key, value, beta, log_decay)
    arrays = (array.astype(narrow) for array in (query, key, value))
    arrays = (chunks.split(array, chunk) for array in (*arrays, beta, log_decay))
    out, state = _chunked(state, *arrays)
    return chunks.merge(out, length), state


@jax.custom_vjp
def _chunked(state, q, k, v, beta, log_decay):
    """Chunks ``[M, B, N, C, ...]`` of outputs, and the state after them, ``[B, N, H, Hv]``.

    q, k and v have the dtype of the operands of products; the others are float32 or better.
    """
    return _forward(state, q, k, v, beta, log_decay)[0]


def _forward(state, q, k, v, beta, log_decay):
    narrow, wide = k.dtype, beta.dtype
    product = chunks.Products(narrow, wide)
    sums = chunks.running_sums(log_decay)
    start, end = (f(sums)[..., None] for f in (chunks.start_decays, chunks.end_decays))
    pair = chunks.pair_decays(sums)
    wide_k, wide_v = k.astype(wide), v.astype(wide)

    # beta multiplies rows i; entries strictly below the diagonal couple u_i to earlier u_j.
    scores = product("...ih,...jh->...ij", jnp.concatenate([q, k], -2), k)
    coupling = beta[..., None] * scores[..., k.shape[-2] :, :] * pair
    solver = chunks.unit_lower_inverse(coupling, product.precision)
    right = jnp.concatenate([beta[..., None] * wide_v, beta[..., None] * start * wide_k], -1)
    solved = product("...ij,...jv->...iv", solver, right)
    u, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]

    # The states before every chunk: S = a S + k^T (u - w S), with k decayed to the chunk's end.
    k_end = end * wide_k
    both = product("...ih,...iv->...hv", k_end, solved)
    inflow, removal = both[..., : v.shape[-1]], both[..., v.shape[-1] :]

    def advance(state, block):
        total, inflow, removal = block
        removed = product("bnhg,bngv->bnhv", removal, state)
        return total * state + (inflow - removed), state

    total = start[..., -1:, :]
    last, before = jax.lax.scan(advance, state, (total, inflow, removal))

    u = u - product("...ih,...hv->...iv", w, before)
    read = jnp.concatenate([before, u], -2).astype(narrow)
    weights = jnp.concatenate(
        [start * q.astype(wide), scores[..., : k.shape[-2], :] * pair], -1
    ).astype(narrow)
    out = product("...ij,...jv->...iv", weights, read, narrow)
    return (out, last), (q, k, v, beta, sums, solver, w, read)


def _backward(saved, cotangents):
    q, k, v, beta, sums, solver, w, read = saved
    d_out, d_last = cotangents
    narrow, wide = k.dtype, beta.dtype
    product = chunks.Products(narrow, wide)
    dim, rows = k.shape[-1], k.shape[-2]
    start, end = (f(sums)[..., None] for f in (chunks.start_decays, chunks.end_decays))
    pair = chunks.pair_decays(sums)
    strict = chunks.lower_triangle(pair, -1)
    total = start[..., -1:, :]
    wide_q, wide_k, wide_v = (array.astype(wide) for array in (q, k, v))
    k_end = end * wide_k
    scores = product("...ih,...jh->...ij", jnp.concatenate([q, k], -2), k)
    scores, overlap = scores[..., :rows, :], scores[..., rows:, :]

    # The cotangents of the states after every chunk, from last to first.
    local = product("...ij,...iv->...jv", scores * pair, d_out)
    left = jnp.concatenate([start * wide_q, -w.astype(wide)], -2).astype(narrow)
    right = jnp.concatenate([d_out, local.astype(narrow)], -2)
    reading = product("...ih,...iv->...hv", left, right)
    removal = product("...ih,...ig->...hg", k_end, w)

    def advance(d_state, block):
        total, reading, removal = block
        removed = product("bnhg,bnhv->bngv", removal, d_state)
        return total * d_state + (reading - removed), d_state.astype(narrow)

    d_first, d_after = jax.lax.scan(advance, d_last, (total, reading, removal), reverse=True)

    d_u = local + product("...ih,...hv->...iv", k_end, d_after)
    d_right = product("...ij,...iv->...jv", solver, d_u.astype(narrow))
    # Whatever is multiplied by the state S or by u has a cotangent of rows times S^T or u^T.
    d_weights = product("...iv,...jv->...ij", d_out, read)
    d_solved = product("...iv,...jv->...ij", -d_right.astype(narrow), read)
    d_k_end = product("...iv,...hv->...ih", read[..., dim:, :], d_after)

    d_scores = jnp.where(chunks.lower_triangle(pair), d_weights[..., dim:] * pair, 0)
    d_overlap = jnp.where(strict, d_solved[..., dim:] * pair, 0)
    d_beta = jnp.sum(d_overlap * overlap, -1)
    d_pairs = jnp.concatenate([d_scores, beta[..., None] * d_overlap], -2).astype(narrow)
    by_row = product("...ij,...jh->...ih", d_pairs, k)
    d_q, d_k_row = by_row[..., :rows, :], by_row[..., rows:, :]
    d_k_column = product("...ij,...ih->...jh", d_pairs, jnp.concatenate([q, k], -2))

    from_start = start * d_weights[..., :dim]
    d_incoming = start * d_solved[..., :dim]
    to_end = end * d_k_end
    d_beta = d_beta + jnp.sum(d_incoming * wide_k, -1) + jnp.sum(d_right * wide_v, -1)
    d_incoming = beta[..., None] * d_incoming

    # Of the logarithms: from the start of the chunk to i, from j to its end, from j to i.
    entering = jnp.sum(from_start * wide_q + d_incoming * wide_k, -1)
    leaving = jnp.sum(to_end * wide_k, -1)
    inside = jnp.sum(d_q * wide_q + (d_k_row - d_k_column) * wide_k, -1)
    through = jnp.sum(total * d_after.astype(wide) * read[..., :dim, :].astype(wide), (-2, -1))
    d_log = chunks.spread_cotangents(entering + inside, leaving, through)

    d_q = d_q + from_start
    d_k = d_k_row + d_k_column + d_incoming + to_end
    d_v = beta[..., None] * d_right
    return d_first, *(a.astype(narrow) for a in (d_q, d_k, d_v)), d_beta, d_log


_chunked.defvjp(_forward, _backward)
