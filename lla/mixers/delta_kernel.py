"""The delta rule with the kernels for Hopper: when they serve, padding, and one custom_vjp.

The kernels are in `lla.kernels.mosaic_gpu.delta`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lla.compat import match_varying
from lla.mixers import chunks
from lla.ops import mosaic_gpu

_SIZE = 64  # tokens of a chunk, and coordinates of a head


def serves(query: jax.Array, value: jax.Array) -> bool:
    """Whether the kernels compute sequences like these on this machine.

    They need a Hopper GPU, bfloat16, keys of at most 64 coordinates and a chunk of tokens. Values
    of any width are cut into blocks of 64.
    """
    return (
        value.dtype == jnp.bfloat16
        and query.shape[1] >= _SIZE
        and query.shape[-1] <= _SIZE
        and mosaic_gpu.refuse_machine() is None
    )


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
      query, key, value: are rounded to bfloat16.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    _, length, heads, dim = key.shape
    value_dim = value.shape[-1]
    blocks = -(-value_dim // _SIZE)

    def tokens(array):
        """The time padded with zeros, which leave the state as it is, and in blocks of values."""
        pad = [(0, 0), (0, -length % _SIZE)] + [(0, 0)] * (array.ndim - 2)
        return jnp.repeat(jnp.pad(array, pad), blocks, 2) if blocks > 1 else jnp.pad(array, pad)

    def columns(array, size):
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])])

    query, key = (columns(tokens(a.astype(jnp.bfloat16)), _SIZE) for a in (query, key))
    value = columns(value.astype(jnp.bfloat16), blocks * _SIZE)
    value = value.reshape(*value.shape[:2], heads * blocks, _SIZE)
    value = jnp.pad(value, [(0, 0), (0, -length % _SIZE), (0, 0), (0, 0)])
    batch = state.shape[0]
    state = columns(jnp.pad(state, [(0, 0), (0, 0), (0, _SIZE - dim), (0, 0)]), blocks * _SIZE)
    state = state.reshape(batch, heads, _SIZE, blocks, _SIZE)
    state = jnp.moveaxis(state, 3, 2).reshape(batch, heads * blocks, _SIZE, _SIZE)
    arrays = match_varying(state, query, key, value, tokens(beta), tokens(log_decay))
    out, state = _run(interpret, *arrays)
    out = out[:, :length].reshape(batch, length, heads, blocks * _SIZE)[..., :value_dim]
    state = state.reshape(batch, heads, blocks, _SIZE, _SIZE)
    state = jnp.moveaxis(state, 2, 3).reshape(batch, heads, _SIZE, blocks * _SIZE)
    return out, state[:, :, :dim, :value_dim]


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
    by_chunk = (*gates.total.shape, _SIZE)
    entering, leaving, inside, through = (
        found[name].reshape(by_chunk) for name in ("entering", "leaving", "inside", "through")
    )
    through = gates.total * through.sum(-1)
    d_log = chunks.spread_cotangents(entering + inside, leaving, through)
    d_beta, d_log = (_by_token(a.reshape(gates.beta.shape)) for a in (found["beta"], d_log))
    return found["state"], found["query"], found["key"], found["value"], d_beta, d_log


_run.defvjp(_forward, _backward)


def _by_token(array):
    """``[B, N, T] -> [B, T, N]`` or back."""
    return jnp.swapaxes(array, 1, 2)


def _gates(beta, log_decay):
    """`lla.kernels.mosaic_gpu.delta.Gates` from ``[B, T, N]``."""
    from lla.kernels.mosaic_gpu import delta

    beta, log_decay = _by_token(beta), _by_token(log_decay)
    sums = chunks.running_sums(log_decay.reshape(*beta.shape[:2], -1, _SIZE))
    start, end = chunks.start_decays(sums), chunks.end_decays(sums)
    upper, lower, starts, ends = (a.reshape(beta.shape) for a in (*sums, start, end))
    return delta.Gates(beta, upper, lower, starts, ends, start[..., -1])
