"""Linear attention with a decay per head by Hopper kernels, with a custom VJP.

The kernels are in `lla.kernels.mosaic_gpu.retention`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lla.compat import match_varying
from lla.mixers import hopper


def run(
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs ``[B, T, N, Hv]`` and the last state ``[B, N, H, Hv]``.

    Args:
      state: float32 ``[B, N, H, Hv]``.
      query, key: ``[B, T, N, H]`` or ``[B, T, 1, H]``, rounded to bfloat16; H is at most 128.
      value: ``[B, T, N, Hv]``, rounded to bfloat16.
      log_decay: float32 ``[B, T, N]``.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    _, length, kv_heads, dim = key.shape
    heads = value.shape[2]
    key_dim = -(-dim // hopper.SIZE) * hopper.SIZE
    blocks = hopper.Blocks(length, heads, dim, value.shape[-1], key_dim)
    query, key, value = (array.astype(jnp.bfloat16) for array in (query, key, value))
    arrays = match_varying(
        blocks.states(state),
        blocks.keys(query, repeat=kv_heads > 1),
        blocks.keys(key, repeat=kv_heads > 1),
        blocks.values(value),
        blocks.tokens(log_decay),
    )
    out, state = _run(interpret, *arrays)
    return blocks.restore_values(out), blocks.restore_states(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(interpret, state, query, key, value, log_decay):
    from lla.kernels.mosaic_gpu import retention

    gates = _gates(log_decay)
    found = retention.forward(query, key, value, gates, state, save=False, interpret=interpret)
    return found[:2]


def _forward(interpret, state, query, key, value, log_decay):
    from lla.kernels.mosaic_gpu import retention

    gates = _gates(log_decay)
    out, last, states = retention.forward(
        query, key, value, gates, state, save=True, interpret=interpret
    )
    return (out, last), (query, key, value, gates, states)


def _backward(interpret, residuals, cotangents):
    from lla.kernels.mosaic_gpu import retention

    query, _, _, gates, _ = residuals
    d_out, d_last = cotangents
    found = retention.backward(*residuals, d_out.astype(jnp.bfloat16), d_last, interpret=interpret)
    d_log = hopper.log_decay_cotangents(found, gates.total)
    d_query, d_key = found["query"], found["key"]
    if query.shape[2] == 1:  # shared by all heads
        d_query, d_key = (
            a.astype(jnp.float32).sum(2, keepdims=True).astype(a.dtype) for a in (d_query, d_key)
        )
    return found["state"], d_query, d_key, found["value"], d_log


_run.defvjp(_forward, _backward)


def _gates(log_decay):
    """`lla.kernels.mosaic_gpu.retention.Gates` from ``[B, T, N]``."""
    from lla.kernels.mosaic_gpu import retention

    return retention.Gates(*hopper.gates(jnp.swapaxes(log_decay, 1, 2)))
