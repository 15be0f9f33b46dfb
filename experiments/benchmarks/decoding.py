"""Time, traffic and memory of a decoding step; see README.md beside this file.

    python experiments/benchmarks/decoding.py [--limit SECONDS] [--output FILE]

A cell decodes `steps` tokens in one compiled loop, each query depending on the output before it, at
the end of a cache of a given length. Everything is compiled first; the last output is compared with
the exact result in float64, and only what is right is timed. The exit status is 1 if something was
refused, and 0 if the time ran out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import decoding_tables
import hopper
import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
from jax import lax

import lla

KEY_FIELDS = ("implementation", "dtype", "batch", "kv_heads", "group", "head_dim", "n")
BOUND = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}  # relative error of the last output
COPY = "copy"
CUDNN = "cudnn"


class Cell(NamedTuple):
    implementation: str  # "lla_<ridge>", "parallax", "softmax" or "cudnn"
    dtype: str
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    n: int

    def fields(self) -> dict[str, Any]:
        return {**self._asdict(), "pass": "decode"}

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that one step reads at least."""
        numbers = 2 * self.batch * self.n * self.kv_heads * self.head_dim
        return numbers * jnp.dtype(self.dtype).itemsize


def attend(cell: Cell, query, probe, key, value, cache):
    """One step: the output ``[batch, 1, heads, head_dim]`` and the cache with one token more."""
    if cell.implementation == "softmax":
        return lla.softmax_decode_step(query, key, value, cache)
    if cell.implementation == "parallax":
        return lla.parallax_decode_step(query, probe, key, value, cache)
    if cell.implementation == CUDNN:
        cache = cache.append(key, value)
        out = jax.nn.dot_product_attention(
            query, cache.key, cache.value, key_value_seq_lengths=cache.lengths,
            query_seq_lengths=jnp.ones_like(cache.lengths), implementation="cudnn",
        )  # fmt: skip
        return out, cache
    ridge = float(cell.implementation.removeprefix("lla_"))
    return lla.decode_step(query, key, value, cache, ridge=ridge)


def exact(cell: Cell, query, probe, cache):
    """The last output in float64."""
    arrays = dict(query=query, key=cache.key, value=cache.value)
    options = dict(is_causal=False, key_value_seq_lengths=cache.lengths, implementation="reference")
    if cell.implementation in ("softmax", CUDNN):
        return lla.softmax_attention(**arrays, **options)
    if cell.implementation == "parallax":
        return lla.parallax_attention(**arrays, probe=probe, **options)
    ridge = float(cell.implementation.removeprefix("lla_"))
    return lla.local_linear_attention(**arrays, ridge=ridge, **options)


def make_loop(cell: Cell, steps: int):
    """``loop(cache, tokens) -> (cache, last query, last output)``, the cache one length again."""

    def loop(cache, tokens):
        cache = dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, cell.n - steps))

        def step(carry, token):
            cache, last, _ = carry
            query = token["query"] + last * jnp.asarray(2.0**-6, last.dtype)
            out, cache = attend(cell, query, token["probe"], token["key"], token["value"], cache)
            return (cache, out, query), None

        zeros = jnp.zeros_like(tokens["query"][0])
        (cache, out, query), _ = lax.scan(step, (cache, zeros, zeros), tokens)
        return cache, query, out

    return loop


def make_inputs(cell: Cell, steps: int, seed: int) -> tuple[lla.KVCache, dict[str, jax.Array]]:
    """A full cache, and the tokens that replace its last ones."""
    sizes = (cell.batch, cell.n, cell.kv_heads, cell.head_dim)
    one = (steps, cell.batch, 1)
    shapes = {
        "query": (*one, cell.heads, cell.head_dim),
        "probe": (*one, cell.heads, cell.head_dim),
        "key": (*one, cell.kv_heads, cell.head_dim),
        "value": (*one, cell.kv_heads, cell.head_dim),
    }
    keys = iter(jax.random.split(jax.random.key(seed), 2 + len(shapes)))
    cache = lla.KVCache(
        jax.random.normal(next(keys), sizes, cell.dtype),
        jax.random.normal(next(keys), sizes, cell.dtype),
        jnp.full(cell.batch, cell.n, jnp.int32),
    )
    tokens = {name: jax.random.normal(next(keys), s, cell.dtype) for name, s in shapes.items()}
    return cache, tokens | {"probe": tokens["probe"] / 8}


def compile_cell(cell: Cell, steps: int) -> hopper.Compiled:
    start = time.monotonic()
    try:
        shapes = jax.eval_shape(lambda: make_inputs(cell, steps, 0))
        compiled = jax.jit(make_loop(cell, steps), donate_argnums=0).lower(*shapes).compile()
        found = compiled.memory_analysis()
        memory = {"temp_bytes": int(found.temp_size_in_bytes)}
    except Exception as error:  # one cell must not stop the others
        reason = hopper.brief(error)
        hopper.say(f"{cell}: {reason}")
        return hopper.Compiled(None, {}, time.monotonic() - start, reason)
    return hopper.Compiled(compiled, memory, time.monotonic() - start)


class Run:
    """A compiled loop with its cache, which every call takes and gives back."""

    def __init__(self, compiled, cache, tokens):
        self.compiled, self.cache, self.tokens = compiled, cache, tokens

    def __call__(self):
        self.cache, query, out = self.compiled(self.cache, self.tokens)
        return query, out


def check(cell: Cell, run: Run) -> dict[str, Any]:
    """Status, error and bound of the last output, from the first sequences of the batch."""
    query, out = jax.block_until_ready(run())
    some = min(cell.batch, 2)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a[:some], jnp.float64) for a in (query, run.tokens["probe"][-1])]
        cache = jax.tree.map(lambda a: a[:some], run.cache)
        cache = dataclasses.replace(
            cache, key=cache.key.astype(jnp.float64), value=cache.value.astype(jnp.float64)
        )
        want = np.asarray(jax.jit(exact, static_argnums=0)(cell, *wide, cache))
    got = np.asarray(out[:some]).astype(np.float64)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    judged = {
        "errors": {"output": error if np.isfinite(error) else None},
        "bounds": {"output": BOUND[cell.dtype]},
        "truth": f"reference in float64, {some} sequences",
    }
    if not error <= BOUND[cell.dtype]:
        return {**judged, "status": "refused", "reason": f"error {error:.1e}"}
    return {**judged, "status": "timed"}


def copy_bandwidth(size: int, repeats: int) -> dict[str, Any]:
    """Bytes read and written in a second by the copy of an array of `size` bytes."""
    array = jnp.zeros((size // 4,), jnp.float32)
    copied = jax.jit(lambda a: a + 1)
    jax.block_until_ready(copied(array))
    timing = measure.time_interleaved({COPY: lambda: copied(array)}, repeats, 5.0)[COPY]
    record = {"implementation": COPY, "pass": "copy", "dtype": "float32", "n": size // 4}
    record |= {name: 0 for name in KEY_FIELDS if name not in record} | dataclasses.asdict(timing)
    record |= {"status": "timed", "errors": {}, "bounds": {}, "truth": "none"}
    return record | {"bytes_per_s": 2 * size / timing.time_min_s}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ["softmax", CUDNN, "parallax", "lla_10", "lla_1", "lla_0.1", "lla_0.01"]
    add("--implementations", nargs="+", default=names)
    add("--dtype", default="bfloat16", choices=tuple(BOUND))
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--lengths", type=int, nargs="+", default=[4096, 16384], help="of the cache")
    add("--batches", type=int, nargs="+", default=[1, 32])
    add("--kv_heads", type=int, default=8)
    add("--groups", type=int, nargs="+", default=[1], help="query heads that share a key head")
    add("--steps", type=int, default=16, help="tokens that one call decodes")
    add("--copied", type=int, default=1 << 31, help="bytes of the array that is copied")
    add("--repeats", type=int, default=9)
    add("--budget", type=float, default=0.5, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="threads that compile")
    add("--limit", type=float, default=1e9, help="seconds after which it stops with what it has")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/decoding_<device>.json")
    return parser.parse_args(argv)


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    said = ("dtype", "steps", "copied", "repeats", "budget", "seed")
    header = measure.make_header("decoding", {name: getattr(options, name) for name in said})
    return {**header, "commit": options.commit or header["commit"]}


def make_cells(options: argparse.Namespace) -> list[list[Cell]]:
    """Cells with equal sizes, which are timed in turns, are together."""
    return [
        [
            Cell(name, options.dtype, batch, options.kv_heads, group, head_dim, n)
            for name in options.implementations
        ]
        for head_dim in options.head_dims
        for group in options.groups
        for batch in options.batches
        for n in options.lengths
    ]


def run_group(cells: Sequence[Cell], compiled: Mapping[Cell, Any], options) -> list[dict]:
    """Checks and times cells of equal sizes."""
    records, runs = {}, {}
    for cell in cells:
        found = compiled[cell]
        record = {**cell.fields(), **found.memory, "compile_s": round(found.seconds, 2)}
        record["cache_bytes"] = cell.cache_bytes
        if found.error is not None:
            records[cell] = record | {"status": "unavailable", "reason": found.error}
            continue
        try:
            run = Run(found.call, *make_inputs(cell, options.steps, options.seed))
            records[cell] = record | check(cell, run)
        except Exception as error:  # one that does not run must not stop the others
            records[cell] = record | {"status": "unavailable", "reason": hopper.brief(error)}
            continue
        if records[cell]["status"] == "timed":
            runs[cell] = run
    timings = measure.time_interleaved(runs, options.repeats, options.budget)
    for cell, timing in timings.items():
        seconds = dataclasses.asdict(timing)
        for name in ("time_min_s", "time_median_s"):
            seconds[name] /= options.steps
        records[cell] |= seconds
    return list(records.values())


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output or measure.RESULTS / f"decoding_{measure.device_name()}.json"
    results = measure.Results(output, make_header(options), KEY_FIELDS)
    hopper.say(f"{jax.devices()[0].device_kind}, results in {output}")
    groups = make_cells(options)
    cells = [c for group in groups for c in group if not results.finished(**c.fields())]
    hopper.say(f"compiling {len(cells)} programs")
    with concurrent.futures.ThreadPoolExecutor(options.workers) as executor:
        found = executor.map(lambda cell: compile_cell(cell, options.steps), cells)
        compiled = dict(zip(cells, found, strict=True))
    with measure.exclusive(options.lock):
        if not results.finished(**Cell(COPY, "float32", 0, 0, 0, 0, options.copied // 4)._asdict()):
            results.add([copy_bandwidth(options.copied, options.repeats)])
        for group in groups:
            new = [cell for cell in group if cell in compiled]
            if new:
                results.add(run_group(new, compiled, options))
                for record in results.records[-len(new) :]:
                    hopper.say(report.progress_line(record, KEY_FIELDS))
    print(decoding_tables.markdown(results.document()), flush=True)
    return int(any(record["status"] == "refused" for record in results.records))


if __name__ == "__main__":
    hopper.end_at_the_limit(parse(None).limit)
    sys.exit(main())
