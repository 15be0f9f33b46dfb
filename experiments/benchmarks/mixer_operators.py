"""The recurrences of the layers, and their errors on this device, on fresh inputs.

Used by mixer_updates.py.
"""

import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np

from lla.mixers.delta_rule import delta_rule
from lla.mixers.linear_recurrence import linear_recurrence
from lla.mixers.mesa import mesa
from lla.mixers.selective_scan import selective_scan


def operators(heads: int, n: int, dim: int) -> dict[str, tuple]:
    """The recurrences of the layers: name -> (function of arrays and form, arrays)."""
    rng = np.random.default_rng(secrets.randbits(31))
    shape = (2, n, heads, dim)

    def unit():
        x = rng.standard_normal(shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    value, beta = rng.standard_normal(shape), rng.uniform(0, 1, shape[:3])
    per_head = -(rng.uniform(0, 1, shape[:3]) ** 6) * 5
    per_coordinate = -(rng.uniform(0, 1, shape) ** 6) * 5
    wide = (2, n, heads * dim)
    scan = (
        rng.standard_normal(wide),
        10 ** rng.uniform(-3, -1, wide),
        np.tile(-np.arange(1.0, 17), (wide[-1], 1)),
        *rng.standard_normal((2, 2, n, 16)),
    )
    query, key = unit(), unit()

    def wider(array):
        """Half as many heads, each twice as wide and with the same norm."""
        return array.reshape(2, n, -1, 2 * dim) / 2**0.5

    ridge = np.ones((heads, dim))

    def solve(*arrays, form):
        solver = "exact" if form == "recurrent" else "cg"
        *arrays, ridge = arrays
        return mesa(*arrays, ridge=ridge, form=form, solver=solver)

    return {
        "delta_rule": (delta_rule, (query, key, value, beta)),
        "gated": (delta_rule, (query, key, value, beta, per_head)),
        "gated_wide": (
            delta_rule,
            (*map(wider, (query, key, value)), beta[:, :, ::2], per_head[:, :, ::2]),
        ),
        "per_head": (
            linear_recurrence,
            (query, key, value, per_head),
        ),
        "per_head_wide": (
            linear_recurrence,
            (*map(wider, (query, key, value)), per_head[:, :, ::2]),
        ),
        "per_coordinate": (
            linear_recurrence,
            (query, key, value, per_coordinate),
        ),
        "mesa": (solve, (query, key, value, beta, per_head, ridge)),
        "selective_scan": (selective_scan, scan),
    }


# The arguments that a 16-bit model passes in 16 bits; gates stay in float32.
_NARROW = {"selective_scan": (0, 3, 4)}


def check(name: str, heads: int, n: int, dim: int) -> dict[str, list[float]]:
    """Relative errors of the output and of every gradient, in float32 and with 16-bit sequences.

    The truth is the recurrent form in float32 on the same numbers; "rounded_once" is that rounded
    to 16 bits where the 16-bit form is.
    """
    function, arrays = operators(heads, n, dim)[name]
    narrow = _NARROW.get(name, (0, 1, 2))
    arrays = [
        jnp.asarray(a, jnp.bfloat16 if i in narrow else jnp.float32) for i, a in enumerate(arrays)
    ]
    wide = [a.astype(jnp.float32) for a in arrays]
    rng = np.random.default_rng(secrets.randbits(31))
    out_shape = (arrays[0] if name == "selective_scan" else arrays[2]).shape
    weight = jnp.asarray(rng.standard_normal(out_shape), jnp.bfloat16)

    def run(arrays, weight, form):
        out, pullback = jax.vjp(functools.partial(function, form=form), *arrays)
        return out, *pullback(weight.astype(out.dtype))

    run = jax.jit(run, static_argnames="form")
    with jax.default_matmul_precision("highest"):
        truth = run(wide, weight, "recurrent")
        same = run(wide, weight, "parallel")
    half = run(arrays, weight, "parallel")

    def off(found):
        pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in found]
        return [float(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2e}") for a, b in pairs]

    once = [(t.astype(h.dtype), t) for t, h in zip(truth, half, strict=True)]
    return {
        "float32": off(zip(same, truth, strict=True)),
        "bfloat16": off(zip(half, truth, strict=True)),
        "rounded_once": off(once),
    }
