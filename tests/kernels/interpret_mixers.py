"""Runs one case of the recurrent kernels for Hopper in the GPU interpreter.

    python -m tests.kernels.interpret_mixers CASE [--races] [--mapped]

Prints one line of JSON: relative errors of the outputs and of all gradients against the recurrent
form in float32 on the same inputs, and (with ``--races``) the number of kernels with a race. With
``--mapped`` the kernels run under `jax.vmap`, with a second set of inputs beside the first.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os

os.environ["NPROC"] = "16"  # see interpret.py
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from lla.mixers import delta_kernel, linear_kernel, retention_kernel, scan_kernel
from lla.mixers.delta_rule import delta_rule
from lla.mixers.linear_recurrence import linear_recurrence
from lla.mixers.selective_scan import selective_scan
from tests.kernels.interpret import record_race_detectors
from tests.ops.harness import relative_error

BATCH = 1

# As an attribute of `lla.mixers`, `mesa` is the function.
mesa = importlib.import_module("lla.mixers.mesa")


def attention(rng, length, heads, dim, value_dim):
    """A state, and bfloat16 queries, keys (of unit length) and values."""
    query, key = rng.standard_normal((2, BATCH, length, heads, dim))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    value = rng.standard_normal((BATCH, length, heads, value_dim))
    state = 0.3 * rng.standard_normal((BATCH, heads, dim, value_dim))
    narrow = (jnp.asarray(x, jnp.bfloat16) for x in (query, key, value))
    return jnp.asarray(state, jnp.float32), *narrow


def gates(rng, shape, strongest=3.0):
    return jnp.asarray(-(rng.uniform(0, 1, shape) ** 4) * strongest, jnp.float32)


def delta_case(rng, interpret, *, length=130, heads=2, dim=64, value_dim=64):
    state, query, *rest = attention(rng, length, heads, dim, value_dim)
    beta = jnp.asarray(rng.uniform(0, 1.5, query.shape[:3]), jnp.float32)
    arrays = (state, query, *rest, beta, gates(rng, beta.shape))

    def reference(state, *arrays):
        return delta_rule(*arrays, state=state, form="recurrent", return_state=True)

    return functools.partial(delta_kernel.run, interpret=interpret), reference, arrays


def linear_case(rng, interpret, *, length=130, heads=2, dim=32, value_dim=64, strong=False):
    state, query, *rest = attention(rng, length, heads, dim, value_dim)
    log_decay = gates(rng, query.shape)
    if strong:  # decays of e^-1000 next to weak ones
        log_decay = log_decay.at[:, 20:26, :, ::3].set(-1000.0).at[:, 70, 0].set(-1000.0)
    arrays = (state, query, *rest, log_decay)

    def reference(state, *arrays):
        return linear_recurrence(*arrays, state=state, form="recurrent", return_state=True)

    return functools.partial(linear_kernel.run, interpret=interpret), reference, arrays


def retention_case(rng, interpret, *, length=130, heads=2, dim=64, value_dim=64, shared=False):
    state, query, key, value = attention(rng, length, heads, dim, value_dim)
    if shared:
        query, key = query[:, :, :1], key[:, :, :1]
    arrays = (state, query, key, value, gates(rng, value.shape[:3]))

    def reference(state, *arrays):
        return linear_recurrence(*arrays, state=state, form="recurrent", return_state=True)

    return functools.partial(retention_kernel.run, interpret=interpret), reference, arrays


def mesa_case(rng, interpret):
    state, query, key, value = attention(rng, 130, 2, 64, 64)
    beta = jnp.asarray(rng.uniform(0, 1, query.shape[:3]), jnp.float32)
    ridge = jnp.asarray(rng.uniform(0.5, 1.5, query.shape[2:]), jnp.float32)
    arrays = (query, key, value, beta, gates(rng, beta.shape), ridge)
    del state

    def run(*arrays, form):
        *sequences, ridge = arrays
        out, state = mesa.mesa(*sequences, ridge=ridge, form=form, return_state=True)
        return out, jnp.concatenate(state, -1)

    mesa._kernels_serve = lambda *_: True
    mesa._KernelOptions.__new__.__defaults__ = (interpret,)
    return functools.partial(run, form="parallel"), functools.partial(run, form="recurrent"), arrays


def scan_case(rng, interpret):
    channels = 128
    x = jnp.asarray(rng.standard_normal((BATCH, 37, channels)), jnp.bfloat16)
    delta = 10 ** rng.uniform(-3, 0.5, x.shape)
    rates = -rng.uniform(0.5, 1, (channels, 16)) * np.arange(1, 17)
    b, c = rng.standard_normal((2, BATCH, 37, 16))
    state = rng.standard_normal((BATCH, channels, 16))
    state, rates, delta, b, c = (jnp.asarray(a, jnp.float32) for a in (state, rates, delta, b, c))

    def reference(state, rates, x, *rest):
        delta, b, c = rest
        return selective_scan(
            x, delta, rates, b, c, state=state, form="recurrent", return_state=True
        )

    run = functools.partial(scan_kernel.run, interpret=interpret)
    return run, reference, (state, rates, x, delta, b, c)


CASES = {
    "delta": delta_case,
    "delta_blocks": functools.partial(delta_case, heads=1, dim=48, value_dim=84),
    "delta_128": functools.partial(delta_case, heads=1, dim=128),
    "linear": linear_case,
    "linear_strong": functools.partial(linear_case, dim=64, strong=True),
    "linear_blocks": functools.partial(linear_case, heads=1, dim=20, value_dim=84),
    "retention": retention_case,
    "retention_shared": functools.partial(retention_case, dim=128, value_dim=84, shared=True),
    "retention_128": functools.partial(retention_case, dim=128, value_dim=128),
    "mesa": mesa_case,
    "scan": scan_case,
}


def run(name: str, races: bool, mapped: bool) -> dict:
    states = record_race_detectors()
    interpret = plgpu.InterpretGPUParams(detect_races=races)
    cases = [CASES[name](np.random.default_rng(seed), interpret) for seed in range(1 + mapped)]
    kernels, reference, _ = cases[0]

    def results(function, *arrays):
        outputs, pullback = jax.vjp(function, *arrays)
        drawn = np.random.default_rng(1)
        cotangents = [jnp.asarray(drawn.standard_normal(o.shape), jnp.bfloat16) for o in outputs]
        gradients = pullback(
            tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True))
        )
        return *outputs, *gradients

    def stacked(function, dtype=None):
        arrays = [jnp.stack(arrays) for arrays in zip(*(case[2] for case in cases), strict=True)]
        if dtype is not None:
            arrays = [array.astype(dtype) for array in arrays]
        one = functools.partial(results, function)
        found = (
            jax.vmap(one)(*arrays) if mapped else [a[None] for a in one(*(a[0] for a in arrays))]
        )
        return [np.asarray(array, np.float64) for array in found]

    found, wanted = stacked(kernels), stacked(reference, jnp.float32)
    errors = [
        max(relative_error(*run) for run in zip(*pair, strict=True))
        for pair in zip(found, wanted, strict=True)
    ]
    return {
        "errors": errors,
        "kernels": len(states),
        "races": sum(bool(state.races_found) for state in states),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--races", action="store_true")
    parser.add_argument("--mapped", action="store_true")
    given = parser.parse_args()
    print(json.dumps(run(given.case, given.races, given.mapped)))
