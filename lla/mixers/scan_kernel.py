"""The selective scan by Hopper kernels, with a custom VJP.

The kernels are in `lla.kernels.mosaic_gpu.scan`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lla.compat import match_varying
from lla.mixers import hopper
from lla.ops import mosaic_gpu

_TOKENS, _CHANNELS, _STATES = 16, 64, 16


def serves(x: jax.Array, rates: jax.Array) -> bool:
    """Whether the kernels run for a scan of ``x [B, T, D]`` with ``rates [D, N]`` here.

    They need a Hopper GPU, bfloat16, a multiple of 64 channels, states of size 16, and at least 16
    tokens.
    """
    return (
        x.dtype == jnp.bfloat16
        and x.shape[1] >= _TOKENS
        and x.shape[2] % _CHANNELS == 0
        and rates.shape[1] == _STATES
        and hopper.allowed("selective_scan", _STATES)
        and mosaic_gpu.refuse_machine() is None
    )


def run(state, rates, x, delta, b, c, *, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """y ``[B, T, D]`` in bfloat16, and the last state ``[B, D, N]``.

    Args:
      state, rates, delta, b, c: float32, as in `lla.mixers.selective_scan.selective_scan`.
      x: bfloat16.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    length = x.shape[1]
    # Steps of zero after the end do not change the state.
    pad = [(0, 0), (0, -length % _TOKENS), (0, 0)]
    sequences = (jnp.pad(array, pad) for array in (x, delta, b, c))
    y, state = _run(interpret, *match_varying(state, rates, *sequences))
    return y[:, :length], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(interpret, state, rates, x, delta, b, c):
    from lla.kernels.mosaic_gpu import scan

    return scan.forward(x, delta, rates, b, c, state, save=False, interpret=interpret)[:2]


def _forward(interpret, state, rates, x, delta, b, c):
    from lla.kernels.mosaic_gpu import scan

    y, last, states = scan.forward(x, delta, rates, b, c, state, save=True, interpret=interpret)
    return (y, last), (x, delta, rates, b, c, states)


def _backward(interpret, residuals, cotangents):
    from lla.kernels.mosaic_gpu import scan

    d_y, d_last = cotangents
    found = scan.backward(*residuals, d_y.astype(jnp.bfloat16), d_last, interpret=interpret)
    return tuple(found[name] for name in ("state", "rates", "x", "delta", "b", "c"))


_run.defvjp(_forward, _backward)
