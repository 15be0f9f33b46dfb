"""The recurrent kernels that compile_ahead.py compiles, with their arguments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lla.kernels.mosaic_gpu import delta, linear, mesa, retention, scan

BATCH, LENGTH, HEADS = 2, 256, 2


def _narrow(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _wide(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kernels():
    """Name, function and arguments of every recurrent kernel."""
    b, t, n, count = BATCH, LENGTH, HEADS, LENGTH // 64
    value, rows, totals = _narrow(b, t, n, 64), _wide(b, n, t), _wide(b, n, count)
    for dim in (64, 128):
        key, state = _narrow(b, t, n, dim), _wide(b, n, dim, 64)
        states = _narrow(b, n, count, dim, 64)
        gates = delta.Gates(*[rows] * 5, totals)
        saved = delta.Saved(states, _narrow(b, n, count, 64, 64), value)
        forward = functools.partial(delta.forward, save=True)
        yield f"delta_forward_{dim}", forward, (key, key, value, gates, state)
        arguments = (key, key, value, gates, saved, value, state)
        yield f"delta_backward_{dim}", delta.backward, arguments

        key = _narrow(b, t, 1, dim)
        gates = retention.Gates(*[rows] * 4, totals)
        forward = functools.partial(retention.forward, save=True)
        yield f"retention_forward_{dim}", forward, (key, key, value, gates, state)
        arguments = (key, key, value, gates, states, value, state)
        yield f"retention_backward_{dim}", retention.backward, arguments
    for dim in (32, 64):
        key, gates, state = _narrow(b, t, n, dim), _wide(b, t, n, dim), _wide(b, n, 64, dim)
        forward = functools.partial(linear.forward, save=True)
        yield f"linear_forward_{dim}", forward, (key, key, value, gates, state)
        arguments = (key, key, value, gates, _narrow(b, n, count, 64, dim), value, state)
        yield f"linear_backward_{dim}", linear.backward, arguments
    chunks, row, square = b * n * count, _wide(b * n * count, 64), _wide(b * n * count, 64, 64)
    key, ridge = _narrow(chunks, 64, 64), _wide(n, 64)
    solve = functools.partial(mesa.solve, max_iters=30, tol=1e-4)
    yield "mesa", solve, (square, key, row, (row, row), row, ridge, square, square)
    x, delta_t, rates, c = _narrow(b, t, 128), _wide(b, t, 128), _wide(128, 16), _wide(b, t, 16)
    forward = functools.partial(scan.forward, save=True)
    state = _wide(b, 128, 16)
    yield "scan_forward", forward, (x, delta_t, rates, c, c, state)
    arguments = (x, delta_t, rates, c, c, _wide(b, t // 16, 128, 16), x, state)
    yield "scan_backward", scan.backward, arguments
