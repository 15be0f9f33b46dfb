"""The delta rule, plain and gated: the recurrence behind DeltaNet and Gated DeltaNet.

Per token and head, with key k, value v, query q, step size beta and gate a in (0, 1],

    S = a S;  S += beta k (v - S^T k)^T;  o = S^T q                  S: [H, Hv], S = 0 at the start

(DeltaNet, arXiv 2406.06484, has a = 1; Gated DeltaNet, arXiv 2412.06464). For unit keys and beta in
(0, 2) the factor of S has eigenvalues in (-1, 1], so the state stays bounded.

`"recurrent"` is a scan over tokens and the reference. `"parallel"` treats a chunk of tokens with
matrix products. Writing the state out, with a_ij the product of the gates after j up to i and a_i0
that of all gates of the chunk up to i, S0 the state before the chunk:

    o_i = a_i0 S0^T q_i + sum_{j <= i} a_ij (q_i.k_j) u_j
    u_i + beta_i sum_{j < i} a_ij (k_i.k_j) u_j = beta_i (v_i - a_i0 S0^T k_i)

The lower triangular system does not contain S0, so all chunks solve it at once for the two
right-hand sides beta v and beta a_i0 k (the WY representation); what remains for the scan over
chunks is u = U - W S0.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lla.mixers import chunks
from lla.ops.problem import compute_dtype

_einsum = partial(jnp.einsum, precision="highest")


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    form: str = "parallel",
    chunk: int = 64,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Outputs of the (gated) delta rule.

    Args:
      query, key: ``[B, T, N, H]``. Keys are taken as they are: normalise them before.
      value: ``[B, T, N, Hv]``.
      beta: ``[B, T, N]``, step sizes.
      log_decay: ``[B, T, N]``, logarithm of the gates, finite and <= 0; None for no decay.
      state: ``[B, N, H, Hv]``, the state before the first token; None for zero.
      form: ``"parallel"`` or ``"recurrent"``.
      chunk: tokens per chunk of the parallel form.
      return_state: also return the state after the last token.

    Returns:
      ``[B, T, N, Hv]`` in the dtype of `value`, or a pair with the state ``[B, N, H, Hv]``. States,
      gates and everything between are float32 (float64 for float64 values).

    Raises:
      ValueError: for shapes that do not fit, an unknown form, or a chunk below 1.
    """
    check_sequences(query, key, value, beta, log_decay)
    chunks.check_form(form, chunk)
    batch, length, heads, dim = key.shape
    dtype = compute_dtype(value.dtype)
    state = chunks.start_state(state, (batch, heads, dim, value.shape[-1]), dtype)
    gates = () if log_decay is None else (log_decay,)
    arrays = tuple(array.astype(dtype) for array in (query, key, value, beta, *gates))
    if form == "recurrent":
        compute = _recurrent
    else:
        einsum = chunks.products(value.dtype)
        compute = partial(_parallel, chunk=min(chunk, length), einsum=einsum)
    out, state = compute(state, *arrays)
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
    """One token of the recurrence; all arrays in the dtype of the state.

    Args:
      state: ``[B, N, H, Hv]``.
      query, key: ``[B, N, H]``.
      value: ``[B, N, Hv]``.
      beta, log_decay: ``[B, N]``.

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


def _parallel(state, query, key, value, beta, log_decay=None, *, chunk, einsum):
    length = query.shape[1]
    if log_decay is None:
        log_decay = jnp.zeros_like(beta)
    q, k, v, beta, log_decay = (
        chunks.split(array, chunk) for array in (query, key, value, beta, log_decay)
    )
    decays = chunks.decays(log_decay)

    # beta multiplies rows i; what is strictly below the diagonal couples u_i to earlier u_j.
    coupling = beta[..., None] * einsum("...ih,...jh->...ij", k, k) * decays.pair
    solver = chunks.unit_lower_inverse(coupling, einsum.keywords["precision"]) * beta[..., None, :]
    u = einsum("...ij,...jv->...iv", solver, v)
    w = einsum("...ij,...jh->...ih", solver, decays.start[..., None] * k)
    scores = einsum("...ih,...jh->...ij", q, k) * decays.pair

    def advance(state, block):
        q, k, u, w, scores, total = block
        u = u - einsum("bnih,bnhv->bniv", w, state)
        out = einsum("bnih,bnhv->bniv", q, state) + einsum("bnij,bnjv->bniv", scores, u)
        state = total[..., None, None] * state + einsum("bnih,bniv->bnhv", k, u)
        return state, out

    blocks = (
        decays.start[..., None] * q,
        decays.end[..., None] * k,
        u,
        w,
        scores,
        decays.start[..., -1],
    )
    state, out = jax.lax.scan(advance, state, blocks)
    return chunks.merge(out, length), state
