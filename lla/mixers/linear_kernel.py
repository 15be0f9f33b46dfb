"""Linear attention with a decay per coordinate by Hopper kernels, with a custom VJP.

The kernels are in `lla.kernels.mosaic_gpu.linear`.
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
      state, log_decay: float32, as in `lla.mixers.linear_recurrence.linear_recurrence`, with a gate
        per coordinate.
      query, key, value: rounded to bfloat16.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    _, length, heads, dim = key.shape
    key_dim = hopper.SIZE // 2 if dim <= hopper.SIZE // 2 else hopper.SIZE
    blocks = hopper.Blocks(length, heads, dim, value.shape[-1], key_dim)
    query, key, value = (array.astype(jnp.bfloat16) for array in (query, key, value))
    arrays = match_varying(
        jnp.swapaxes(blocks.states(state), -1, -2),
        blocks.keys(query),
        blocks.keys(key),
        blocks.values(value),
        blocks.keys(log_decay),
    )
    out, state = _run(interpret, *arrays)
    return blocks.restore_values(out), blocks.restore_states(jnp.swapaxes(state, -1, -2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(interpret, state, query, key, value, log_decay):
    from lla.kernels.mosaic_gpu import linear

    found = linear.forward(query, key, value, log_decay, state, save=False, interpret=interpret)
    return found[:2]


def _forward(interpret, state, query, key, value, log_decay):
    from lla.kernels.mosaic_gpu import linear

    out, last, states = linear.forward(
        query, key, value, log_decay, state, save=True, interpret=interpret
    )
    return (out, last), (query, key, value, log_decay, states)


def _backward(interpret, residuals, cotangents):
    from lla.kernels.mosaic_gpu import linear

    d_out, d_last = cotangents
    found = linear.backward(*residuals, d_out.astype(jnp.bfloat16), d_last, interpret=interpret)
    return tuple(found[name] for name in ("state", "query", "key", "value", "log_decay"))


_run.defvjp(_forward, _backward)
