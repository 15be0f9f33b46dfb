"""The systems of decoding: conjugate gradients of the kernel against a direct solver.

    python experiments/benchmarks/decoding_solvers.py [--output FILE]

Both get the same sums over a cache (`lla.kernels.mosaic_gpu.decode`), one system for each query
head, and make the output of them: the kernel of `decode_step` with the operator's tolerance, or
Cholesky factors of all systems by the linear algebra that JAX calls on a GPU. Errors are relative
to float64 on the same sums; only what is right is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Sequence

import decoding_tables
import jax
import jax.numpy as jnp
import measure
import numpy as np

from lla.kernels.mosaic_gpu.decode import BLOCK, CacheShape
from lla.kernels.mosaic_gpu.decode_solve import fit

KEY_FIELDS = decoding_tables.SYSTEM
BOUND = 4e-3  # one rounding of the output to bfloat16


@jax.default_matmul_precision("highest")
def make_sums(cache: CacheShape, seen: int, ridge: float, seed: int):
    """Arguments of `fit` for standard normal keys, queries and values and softmax weights.

    Not to be compiled as a whole, or the sums may be those of keys that were not rounded.
    """
    b, n, d = cache.batch, cache.heads, cache.head_dim
    keys = jax.random.split(jax.random.key(seed), 3)
    query = jax.random.normal(keys[0], (b, n, d), cache.dtype)
    key = jax.random.normal(keys[1], (b, seen, n, d), cache.dtype)
    value = jax.random.normal(keys[2], (b, seen, n, d), jnp.float32)
    wide, origin = key.astype(jnp.float32), key[:, :1].astype(jnp.float32)
    logits = jnp.einsum("bnd,bsnd->bsn", query.astype(jnp.float32), wide) * d**-0.5
    weight = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    weighted = weight[..., None] * (wide - origin)
    # Where the kernel that adds up leaves the sum of the weights: in parts, in the first block.
    some = min(d, BLOCK)
    total = jnp.broadcast_to(weight.sum(axis=1)[..., None], (b, n, some)) / some
    total = jnp.pad(total, ((0, 0), (0, 0), (0, d - some)))
    rows = jnp.stack(
        [total, jnp.einsum("bsn,bsnd->bnd", weight, value), weighted.sum(axis=1)], axis=2
    )
    both = jnp.concatenate([wide, value], axis=-1)
    moments = jnp.einsum("bsnd,bsne->bnde", weighted, both)
    first = jnp.zeros((b,), jnp.int32)
    return rows, moments, query, key, first, jnp.full((b, n), ridge, jnp.float32)


def direct(rows, moments, query, key, first, ridge):
    """The same output by Cholesky factors, in the dtype of the sums."""
    dtype, d = moments.dtype, query.shape[-1]
    origin = jnp.take_along_axis(key, first[:, None, None, None], axis=1)[:, 0].astype(dtype)
    weight = rows[..., 0, :].sum(axis=-1)[..., None]
    value, mean = rows[..., 1, :] / weight, rows[..., 2, :] / weight
    both = jnp.concatenate([origin + mean, value], axis=-1)
    covariance = moments / weight[..., None] - mean[..., :, None] * both[..., None, :]
    eye = jnp.eye(d, dtype=dtype)[None, None]
    system = covariance[..., :d] + ridge[..., None, None].astype(dtype) * eye
    target = origin + mean - query.astype(dtype)
    factor = jax.lax.linalg.cholesky(system)
    solve = functools.partial(jax.lax.linalg.triangular_solve, factor, left_side=True, lower=True)
    x = solve(solve(target[..., None]), transpose_a=True)[..., 0]
    return value - jnp.einsum("bnd,bnde->bne", x, covariance[..., d:], precision="highest")


def iterate(cache, tol, max_iters, *sums):
    return fit(cache, *sums, tol=tol, max_iters=max_iters).out


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--batches", type=int, nargs="+", default=[1, 32, 128])
    add("--kv_heads", type=int, default=8)
    add("--ridges", type=float, nargs="+", default=[10.0, 0.1, 0.01])
    add("--seen", type=int, default=512, help="keys that the sums are over")
    add("--tol", type=float, default=5e-4)
    add("--max_iters", type=int, default=512)
    add("--repeats", type=int, default=9)
    add("--budget", type=float, default=0.3, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/decoding_solvers_<device>.json")
    return parser.parse_args(argv)


def run_group(cache: CacheShape, ridge: float, options) -> list[dict]:
    """Both solvers on systems of one kind."""
    sums = make_sums(cache, options.seen, ridge, options.seed)
    with jax.enable_x64(True):
        wide = [a if a.dtype == jnp.int32 else a.astype(jnp.float64) for a in sums]
        want = np.asarray(jax.jit(direct)(*wide))
    iterating = functools.partial(iterate, cache, options.tol, options.max_iters)
    factoring = jax.jit(lambda *sums: direct(*sums).astype(cache.dtype))
    calls = {"cg": jax.jit(iterating), "cholesky": factoring}
    records, timed = {}, {}
    for name, call in calls.items():
        got = np.asarray(call(*sums)).astype(np.float64)
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        records[name] = {
            "implementation": name, "pass": "solve", "dtype": "bfloat16", "batch": cache.batch,
            "kv_heads": cache.kv_heads, "head_dim": cache.head_dim, "ridge": ridge,
            "n": options.seen, "errors": {"output": error}, "bounds": {"output": BOUND},
            "truth": "float64, the same sums", "status": "timed",
        }  # fmt: skip
        if not error <= BOUND:
            records[name] |= {"status": "refused", "reason": f"error {error:.1e}"}
            continue
        timed[name] = functools.partial(call, *sums)
    with measure.exclusive(options.lock):
        timings = measure.time_interleaved(timed, options.repeats, options.budget)
    for name, timing in timings.items():
        records[name] |= dataclasses.asdict(timing)
    return list(records.values())


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output or measure.RESULTS / f"decoding_solvers_{measure.device_name()}.json"
    said = ("seen", "tol", "max_iters", "repeats", "budget", "seed")
    header = measure.make_header(
        "decoding_solvers", {name: getattr(options, name) for name in said}
    )
    header = {**header, "commit": options.commit or header["commit"]}
    results = measure.Results(output, header, KEY_FIELDS)
    for head_dim, batch, ridge in itertools.product(
        options.head_dims, options.batches, options.ridges
    ):
        kind = jnp.dtype(jnp.bfloat16)
        cache = CacheShape(batch, options.seen, options.kv_heads, 1, head_dim, kind, 1)
        cell = dict(batch=batch, kv_heads=options.kv_heads, head_dim=head_dim, ridge=ridge)
        if not results.finished(implementation="cg", **cell):
            results.add(run_group(cache, ridge, options))
    print(decoding_tables.solvers_markdown(results.document()), flush=True)
    return int(any(record["status"] == "refused" for record in results.records))


if __name__ == "__main__":
    sys.exit(main())
