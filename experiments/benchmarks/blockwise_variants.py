"""The blockwise implementation against simpler ways to write it; see README.md beside this file.

    python experiments/benchmarks/blockwise_variants.py [--length N] [--repeats R] [--output FILE]

All variants take the same fixed number of conjugate gradient steps in float32, causal, and are
compared with those steps in float64 before they are timed; the exit status is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
import subjects
from jax import lax

import lla

KEY_FIELDS = ("implementation", "pass", "n", "head_dim")


# ---------------------------------------------------------------------------------------------
# Variants: functions of one head, ``[n, d]`` arrays. None of them has masks other than causal, rows
# without keys, a stopping rule, gradients or statistics.


def _solve(product, target, num_iters):
    """Plain conjugate gradients from zero, for every row."""
    tiny = jnp.finfo(target.dtype).tiny

    def step(_, state):
        x, residual, direction, norm = state
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdims=True)
        length = norm / jnp.maximum(curvature, tiny)
        residual = residual - length * image
        new_norm = (residual * residual).sum(-1, keepdims=True)
        turned = residual + new_norm / jnp.maximum(norm, tiny) * direction
        return x + length * direction, residual, turned, new_norm

    start = (jnp.zeros_like(target), target, target, (target * target).sum(-1, keepdims=True))
    return lax.fori_loop(0, num_iters, step, start)[0]


def _rows(query, key, value, first, ridge, num_iters):
    """Output of the queries from position `first` on, which see a prefix of the given keys."""
    logits = query @ key.T * query.shape[-1] ** -0.5
    positions = first + jnp.arange(query.shape[0])
    visible = jnp.arange(key.shape[0])[None] <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    mean = weights @ key

    def weighted(y):
        return weights * (y @ key.T - (mean * y).sum(-1, keepdims=True))

    def product(y):
        return weighted(y) @ key + ridge * y

    x = _solve(product, mean - query, num_iters)
    return (weights - weighted(x)) @ value


def _dense(query, key, value, ridge, num_iters):
    return _rows(query, key, value, 0, ridge, num_iters)


def _all_keys(rows, query, key, value, ridge, num_iters):
    """Blocks of queries one after the other, each against all keys."""

    def block(first):
        part = lax.dynamic_slice_in_dim(query, first, rows)
        return _rows(part, key, value, first, ridge, num_iters)

    return lax.map(block, jnp.arange(0, query.shape[0], rows)).reshape(value.shape)


def _prefixes(rows, query, key, value, ridge, num_iters):
    """Static segments of queries, each against the keys up to its end."""
    parts = []
    for first in range(0, query.shape[0], rows):
        end = first + rows
        part = _rows(query[first:end], key[:end], value[:end], first, ridge, num_iters)
        parts.append(part)
    return jnp.concatenate(parts)


def _key_tiles(rows, query, key, value, ridge, num_iters):
    """Square tiles with as many trips as the causal mask leaves; every pass recomputes weights."""
    scale = query.shape[-1] ** -0.5

    def block(first):
        part = lax.dynamic_slice_in_dim(query, first, rows)
        positions = first + jnp.arange(rows)

        def over_keys(update, start):
            def body(i, state):
                keys = lax.dynamic_slice_in_dim(key, i * rows, rows)
                logits = part @ keys.T * scale
                visible = i * rows + jnp.arange(rows)[None] <= positions[:, None]
                return update(state, jnp.where(visible, logits, -jnp.inf), keys, i)

            return lax.fori_loop(0, first // rows + 1, body, start)

        def statistics(state, logits, keys, _):
            largest, total, mean = state
            new = jnp.maximum(largest, logits.max(-1, keepdims=True))
            weights, shrink = jnp.exp(logits - new), jnp.exp(largest - new)
            return (
                new, total * shrink + weights.sum(-1, keepdims=True), mean * shrink + weights @ keys
            )  # fmt: skip

        zero = jnp.zeros((rows, 1), query.dtype)
        largest, total, mean = over_keys(statistics, (zero - 1e30, zero, jnp.zeros_like(part)))
        mean, log_sum_exp = mean / total, largest + jnp.log(total)

        def centred(y, keys):
            return y @ keys.T - (mean * y).sum(-1, keepdims=True)

        def product(y):
            def update(total, logits, keys, _):
                return total + (jnp.exp(logits - log_sum_exp) * centred(y, keys)) @ keys

            return over_keys(update, ridge * y)

        x = _solve(product, mean - part, num_iters)

        def output(total, logits, keys, i):
            values = lax.dynamic_slice_in_dim(value, i * rows, rows)
            return total + (jnp.exp(logits - log_sum_exp) * (1 - centred(x, keys))) @ values

        return over_keys(output, jnp.zeros((rows, value.shape[-1]), value.dtype))

    return lax.map(block, jnp.arange(0, query.shape[0], rows)).reshape(value.shape)


def _over_heads(function, ridge, num_iters, one_by_one: bool):
    """The variant as a function of ``[B, T, N, H]`` arrays."""

    def attend(query, key, value, _):
        b, t, n, _ = query.shape
        heads = [jnp.moveaxis(a, 2, 1).reshape(b * n, t, -1) for a in (query, key, value)]

        def single(arrays):
            return function(*arrays, ridge, num_iters)

        out = lax.map(single, tuple(heads)) if one_by_one else jax.vmap(single)(tuple(heads))
        return jnp.moveaxis(out.reshape(b, n, t, -1), 1, 2)

    return attend


def _ours(ridge, num_iters):
    solver = lla.Solver(method="cg", num_iters=num_iters)
    return lambda query, key, value, _: lla.local_linear_attention(
        query, key, value, ridge=ridge, solver=solver, implementation="xla"
    )


def make_subjects(ridge: float, num_iters: int) -> dict[str, subjects.Subject]:
    """All variants by name."""
    one_by_one = {
        **{f"all_keys_{rows}": functools.partial(_all_keys, rows) for rows in (256, 512)},
        **{f"prefixes_{rows}": functools.partial(_prefixes, rows) for rows in (512, 256)},
        "key_tiles_256": functools.partial(_key_tiles, 256),
    }
    functions = {
        "xla": _ours(ridge, num_iters),
        "dense": _over_heads(_dense, ridge, num_iters, False),
    }
    for name, function in one_by_one.items():
        functions[name] = _over_heads(function, ridge, num_iters, True)
    return {name: subjects.Subject("lla", function) for name, function in functions.items()}


def in_float64(function, inputs) -> dict[str, np.ndarray]:
    """What the iterations give without rounding errors."""
    wide = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
    with jax.enable_x64(True):
        arrays = [jnp.asarray(wide[name]) for name in ("query", "key", "value", "ridge")]
        return {"output": np.asarray(jax.jit(function)(*arrays))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--length", type=int, default=2048, help="a multiple of 512")
    add("--head_dim", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--ridge", type=float, default=1.0)
    add("--num_iters", type=int, default=4)
    add("--repeats", type=int, default=30)
    add("--budget", type=float, default=30.0, help="seconds for the repeats of one variant")
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, help="default: results/blockwise_variants_<platform>.json")
    options = parser.parse_args(argv)
    if options.length % 512:
        parser.error(f"--length must be a multiple of 512, got {options.length}.")
    names = ("heads", "ridge", "num_iters", "repeats", "budget", "seed")
    settings = {name: getattr(options, name) for name in names}
    output = options.output or (
        measure.RESULTS / f"blockwise_variants_{measure.device_name()}.json"
    )
    header = measure.make_header("blockwise_variants", {**settings, "dtype": "float32"})
    results = measure.Results(output, header, KEY_FIELDS)
    variants = make_subjects(options.ridge, options.num_iters)
    inputs = subjects.normal_inputs(
        1, options.length, options.heads, options.head_dim, jnp.float32, options.seed
    )
    inputs = subjects.with_ridge(inputs, options.ridge)
    exact = in_float64(variants["all_keys_256"].function, inputs)
    truth = subjects.Truth(exact, f"{options.num_iters} iterations in float64", None)
    cells = {
        name: {
            "implementation": name, "pass": "forward", "n": options.length,
            "head_dim": options.head_dim,
        }
        for name in variants
    }  # fmt: skip
    cells = {name: cell for name, cell in cells.items() if not results.finished(**cell)}
    records = subjects.measure_group(
        cells, variants, inputs, {"lla": truth},
        {name: subjects.compile_call(variants[name], "forward", inputs) for name in cells},
        ridge=options.ridge, repeats=options.repeats, budget=options.budget,
    )  # fmt: skip
    load = round(os.getloadavg()[0], 2)
    results.add([{**record, "load_average": load} for record in records])
    print(report.variants_markdown(results.document()))
    return 1 if any(record["status"] == "refused" for record in results.records) else 0


if __name__ == "__main__":
    sys.exit(main())
