"""The delta rule by Hopper kernels, with a custom VJP.

The kernels are in `lla.kernels.mosaic_gpu.delta`.
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
    beta: jax.Array,
    log_decay: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs ``[B, T, N, Hv]`` and the last state ``[B, N, H, Hv]``.

    Args:
      state, beta, log_decay: float32, as in `lla.mixers.delta_rule.delta_rule`.
      query, key, value: rounded to bfloat16.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    _, length, heads, dim = key.shape
    key_dim = -(-dim // hopper.SIZE) * hopper.SIZE
    blocks = hopper.Blocks(length, heads, dim, value.shape[-1], key_dim)
    query, key, value = (array.astype(jnp.bfloat16) for array in (query, key, value))
    arrays = match_varying(
        blocks.states(state),
        blocks.keys(query),
        blocks.keys(key),
        blocks.values(value),
        blocks.tokens(beta),
        blocks.tokens(log_decay),
    )
    out, state = _run(interpret, *arrays)
    return blocks.restore_values(out), blocks.restore_states(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(interpret, state, query, key, value, beta, log_decay):
    from lla.kernels.mosaic_gpu import delta

    gates = _gates(beta, log_decay)
    out, last, _ = delta.forward(query, key, value, gates, state, save=False, interpret=interpret)
    return out, last


def _forward(interpret, state, query, key, value, beta, log_decay):
    from lla.kernels.mosaic_gpu import delta

    gates = _gates(beta, log_decay)
    out, last, saved = delta.forward(
        query, key, value, gates, state, save=True, interpret=interpret
    )
    return (out, last), (query, key, value, gates, saved)


def _backward(interpret, residuals, cotangents):
    from lla.kernels.mosaic_gpu import delta

    query, key, value, gates, saved = residuals
    d_out, d_last = cotangents
    found = delta.backward(
        query, key, value, gates, saved, d_out.astype(jnp.bfloat16), d_last, interpret=interpret
    )
    d_beta, d_log = _by_token(found["beta"]), hopper.log_decay_cotangents(found, gates.total)
    return found["state"], found["query"], found["key"], found["value"], d_beta, d_log


_run.defvjp(_forward, _backward)


def _by_token(array):
    """``[B, N, T] -> [B, T, N]`` or back."""
    return jnp.swapaxes(array, 1, 2)


def _gates(beta, log_decay):
    """`lla.kernels.mosaic_gpu.delta.Gates` from ``[B, T, N]``."""
    from lla.kernels.mosaic_gpu import delta

    return delta.Gates(_by_token(beta), *hopper.gates(_by_token(log_decay)))
