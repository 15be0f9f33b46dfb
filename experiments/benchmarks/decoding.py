"""Time, traffic and memory of a decoding step; see pages/decoding.md.

    python experiments/benchmarks/decoding.py [--limit SECONDS] [--output FILE]

A call decodes `steps` tokens in one compiled loop at the end of a cache of a given length, and each
query depends on the output before it. Everything is compiled first. The last output is compared
with the exact result in float64, and what is wrong is not timed. The exit status is 1 if something
was refused, and 0 if the time ran out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lla
from lla.experiments.benchmarks.compilation import Compiled, compile_all, try_compile
from lla.experiments.benchmarks.formatting import progress_line, provenance
from lla.experiments.benchmarks.results import add_options, open_results
from lla.experiments.benchmarks.timing import (
    device_lock,
    error_line,
    exit_after,
    log,
    time_interleaved,
)
from lla.runs import figures, styles, tables

KEY_FIELDS = ("implementation", "dtype", "batch", "kv_heads", "group", "head_dim", "n")
SETTINGS = ("dtype", "steps", "copied", "repeats", "budget", "seed")
BOUND = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}  # relative error of the last output
CAPTION = "Time of a decoding step against the length of the cache"
# Implementations in figures, which have styles of these names.
DRAWN = ("softmax", "cudnn", "parallax", "lla_10", "lla_0.1")
COPY = "copy"
CUDNN = "cudnn"


class Case(NamedTuple):
    """What is decoded: an implementation, dtype and sizes."""

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
        """Bytes of the keys and values, which one step has to read."""
        numbers = 2 * self.batch * self.n * self.kv_heads * self.head_dim
        return numbers * jnp.dtype(self.dtype).itemsize


def attend(case: Case, query, probe, key, value, cache):
    """One step: the output ``[batch, 1, heads, head_dim]``, and the cache with one more token."""
    if case.implementation == "softmax":
        return lla.softmax_decode_step(query, key, value, cache)
    if case.implementation == "parallax":
        return lla.parallax_decode_step(query, probe, key, value, cache)
    if case.implementation == CUDNN:
        cache = cache.append(key, value)
        out = jax.nn.dot_product_attention(
            query, cache.key, cache.value, key_value_seq_lengths=cache.lengths,
            query_seq_lengths=jnp.ones_like(cache.lengths), implementation="cudnn",
        )  # fmt: skip
        return out, cache
    ridge = float(case.implementation.removeprefix("lla_"))
    return lla.decode_step(query, key, value, cache, ridge=ridge)


def exact(case: Case, query, probe, cache):
    """The last output in float64."""
    arrays = dict(query=query, key=cache.key, value=cache.value)
    options = dict(is_causal=False, key_value_seq_lengths=cache.lengths, implementation="reference")
    if case.implementation in ("softmax", CUDNN):
        return lla.softmax_attention(**arrays, **options)
    if case.implementation == "parallax":
        return lla.parallax_attention(**arrays, probe=probe, **options)
    ridge = float(case.implementation.removeprefix("lla_"))
    return lla.local_linear_attention(**arrays, ridge=ridge, **options)


def make_loop(case: Case, steps: int):
    """``loop(cache, tokens) -> (cache, last query, last output)``; the cache is full at the end."""

    def loop(cache, tokens):
        cache = dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, case.n - steps))

        def step(carry, token):
            cache, last, _ = carry
            query = token["query"] + last * jnp.asarray(2.0**-6, last.dtype)
            out, cache = attend(case, query, token["probe"], token["key"], token["value"], cache)
            return (cache, out, query), None

        zeros = jnp.zeros_like(tokens["query"][0])
        (cache, out, query), _ = lax.scan(step, (cache, zeros, zeros), tokens)
        return cache, query, out

    return loop


def make_inputs(case: Case, steps: int, seed: int) -> tuple[lla.KVCache, dict[str, jax.Array]]:
    """A full cache, and the tokens that replace its last ones."""
    sizes = (case.batch, case.n, case.kv_heads, case.head_dim)
    one = (steps, case.batch, 1)
    shapes = {
        "query": (*one, case.heads, case.head_dim),
        "probe": (*one, case.heads, case.head_dim),
        "key": (*one, case.kv_heads, case.head_dim),
        "value": (*one, case.kv_heads, case.head_dim),
    }
    keys = iter(jax.random.split(jax.random.key(seed), 2 + len(shapes)))
    cache = lla.KVCache(
        jax.random.normal(next(keys), sizes, case.dtype),
        jax.random.normal(next(keys), sizes, case.dtype),
        jnp.full(case.batch, case.n, jnp.int32),
    )
    tokens = {name: jax.random.normal(next(keys), s, case.dtype) for name, s in shapes.items()}
    return cache, tokens | {"probe": tokens["probe"] / 8}


def compile_case(case: Case, steps: int) -> Compiled:
    """Compiles the loop without inputs."""

    def build():
        shapes = jax.eval_shape(lambda: make_inputs(case, steps, 0))
        return jax.jit(make_loop(case, steps), donate_argnums=0).lower(*shapes).compile()

    return try_compile(build)


class Run:
    """A compiled loop with its cache, which every call donates and gets back."""

    def __init__(self, compiled, cache, tokens):
        self.compiled, self.cache, self.tokens = compiled, cache, tokens

    def __call__(self):
        self.cache, query, out = self.compiled(self.cache, self.tokens)
        return query, out


def check(case: Case, run: Run) -> dict[str, Any]:
    """Status, error and bound of the last output, from the first sequences of the batch."""
    query, out = jax.block_until_ready(run())
    some = min(case.batch, 2)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a[:some], jnp.float64) for a in (query, run.tokens["probe"][-1])]
        cache = jax.tree.map(lambda a: a[:some], run.cache)
        cache = dataclasses.replace(
            cache, key=cache.key.astype(jnp.float64), value=cache.value.astype(jnp.float64)
        )
        want = np.asarray(jax.jit(exact, static_argnums=0)(case, *wide, cache))
    got = np.asarray(out[:some]).astype(np.float64)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    judged = {
        "errors": {"output": error if np.isfinite(error) else None},
        "bounds": {"output": BOUND[case.dtype]},
        "truth": f"reference in float64, {some} sequences",
    }
    if not error <= BOUND[case.dtype]:
        return {**judged, "status": "refused", "reason": f"error {error:.1e}"}
    return {**judged, "status": "timed"}


def copy_bandwidth(size: int, repeats: int) -> dict[str, Any]:
    """The record of copying an array of `size` bytes, with bytes read and written per second."""
    array = jnp.zeros((size // 4,), jnp.float32)
    copied = jax.jit(lambda a: a + 1)
    jax.block_until_ready(copied(array))
    timing = time_interleaved({COPY: lambda: copied(array)}, repeats, 5.0)[COPY]
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
    add_options(parser, "seed workers limit lock commit output", repeats=9, budget=0.5)
    return parser.parse_args(argv)


def make_cases(options: argparse.Namespace) -> list[list[Case]]:
    """All cases; those of equal sizes, which are timed in turns, are in one list."""
    return [
        [
            Case(name, options.dtype, batch, options.kv_heads, group, head_dim, n)
            for name in options.implementations
        ]
        for head_dim in options.head_dims
        for group in options.groups
        for batch in options.batches
        for n in options.lengths
    ]


def run_group(cases: Sequence[Case], compiled: Mapping[Case, Any], options) -> list[dict]:
    """Checks and times cases of equal sizes."""
    records, runs = {}, {}
    for case in cases:
        found = compiled[case]
        record = {**case.fields(), **found.memory, "compile_s": round(found.seconds, 2)}
        record["cache_bytes"] = case.cache_bytes
        if found.error is not None:
            records[case] = record | {"status": "unavailable", "reason": found.error}
            continue
        try:
            run = Run(found.call, *make_inputs(case, options.steps, options.seed))
            records[case] = record | check(case, run)
        except Exception as error:  # one failure must not stop the others
            records[case] = record | {"status": "unavailable", "reason": error_line(error)}
            continue
        if records[case]["status"] == "timed":
            runs[case] = run
    timings = time_interleaved(runs, options.repeats, options.budget)
    for case, timing in timings.items():
        seconds = dataclasses.asdict(timing)
        for name in ("time_min_s", "time_median_s"):
            seconds[name] /= options.steps
        records[case] |= seconds
    return list(records.values())


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    results = open_results("decoding", options, SETTINGS, KEY_FIELDS)
    groups = make_cases(options)
    cases = [c for group in groups for c in group if not results.has(c.fields())]
    compiled = compile_all(cases, lambda case: compile_case(case, options.steps), options.workers)
    with device_lock(options.lock):
        copy = Case(COPY, "float32", 0, 0, 0, 0, options.copied // 4)
        if not results.has(copy._asdict()):
            results.add([copy_bandwidth(options.copied, options.repeats)])
        for group in groups:
            new = [case for case in group if case in compiled]
            if new:
                results.add(run_group(new, compiled, options))
                for record in results.records[-len(new) :]:
                    log(progress_line(record, KEY_FIELDS))
    print(markdown(results.document()), flush=True)
    return int(any(record["status"] == "refused" for record in results.records))


# ---------------------------------------------------------------------------------------------
# Tables and figure


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    return f"{provenance(document)}\n\n{result_tables(document['records'])}"


def copy_speed(records: Sequence[Mapping]) -> float | None:
    """Bytes that a copy reads and writes in a second; None if it was not measured."""
    found = [record["bytes_per_s"] for record in records if record["pass"] == "copy"]
    return max(found) if found else None


def result_tables(records: Sequence[Mapping]) -> str:
    """A table for each size of the model, with a row for each batch, length and implementation."""
    speed = copy_speed(records)
    steps = [record for record in records if record["pass"] == "decode"]
    fields = ("dtype", "kv_heads", "group", "head_dim")
    parts = [] if speed is None else [f"A copy reads and writes {speed / 1e12:.2f} TB/s."]
    for size in dict.fromkeys(tuple(record[name] for name in fields) for record in steps):
        here = [r for r in steps if tuple(r[name] for name in fields) == size]
        dtype, kv_heads, group, head_dim = size
        parts.append(
            f"**{dtype}, head_dim {head_dim}**, {kv_heads} key heads, {kv_heads * group} query "
            "heads: time of a step, its ratio to softmax attention, the bytes of the cache over "
            "that time (as a part of the copy), relative error of the output, and memory beside "
            "cache and tokens.\n\n" + _table(here, speed)
        )
    missing = [
        f"- {r['implementation']}, head_dim {r['head_dim']}, batch {r['batch']}, {r['n']} tokens: "
        f"{r['status']}: {r['reason']}"
        for r in steps
        if r["status"] != "timed"
    ]
    return "\n\n".join([*parts, "\n".join(missing)] if missing else parts)


def _table(records: Sequence[Mapping], speed: float | None) -> str:
    places = ("batch", "n")
    timed = [record for record in records if record["status"] == "timed"]
    rows = []
    for batch, n in dict.fromkeys(tuple(record[name] for name in places) for record in timed):
        here = [r for r in timed if (r["batch"], r["n"]) == (batch, n)]
        floor = next((r["time_median_s"] for r in here if r["implementation"] == "softmax"), None)
        for record in here:
            seconds = record["time_median_s"]
            rate = record["cache_bytes"] / seconds
            part = "" if speed is None else f" ({rate / speed:.0%})"
            rows.append(
                [
                    str(batch),
                    str(n),
                    record["implementation"].replace("lla_", "lla, ridge "),
                    f"{seconds * 1e6:.4g}",
                    "" if floor is None else f"{seconds / floor:.2f}",
                    f"{rate / 1e12:.3g}{part}",
                    f"{record['errors']['output']:.1e}",
                    f"{record['temp_bytes'] / 2**20:.3g}",
                ]
            )
    head = ["batch", "tokens", "attention", "µs", "/ softmax", "TB/s", "error", "MiB"]
    return tables.markdown(head, rows)


def _drawn(records: Sequence[Mapping]) -> list[Mapping]:
    return [
        r for r in records if r["pass"] == "decode" and r["status"] == "timed" and r["group"] == 1
    ]


def panels(records: Sequence[Mapping]) -> list[list[tuple[int, int]]]:
    """Head dimension and batch of each panel of the figure, row by row; at most two a row."""
    steps = _drawn(records)
    rows = []
    for head_dim in sorted({r["head_dim"] for r in steps}):
        batches = sorted({r["batch"] for r in steps if r["head_dim"] == head_dim})
        rows.append([(head_dim, batch) for batch in batches[:2]])
    return rows


def draw(records: Sequence[Mapping]):
    """The figure: time of a step against the length of the cache."""
    steps, rows = _drawn(records), panels(records)
    columns = max(map(len, rows), default=1)
    figure, axes = figures.new(max(1, len(rows)), columns, height=0.8 + 1.9 * max(1, len(rows)))
    for row, places in zip(rows, axes, strict=False):
        for axis in places[len(row) :]:
            axis.set_axis_off()
        for (head_dim, batch), axis in zip(row, places, strict=False):
            axis.set_yscale("log")
            panel = [r for r in steps if (r["head_dim"], r["batch"]) == (head_dim, batch)]
            for name in DRAWN:
                here = sorted(
                    (r for r in panel if r["implementation"] == name), key=lambda r: r["n"]
                )
                if here:
                    median = [1e6 * r["time_median_s"] for r in here]
                    bars = [1e6 * (r["time_median_s"] - r["time_min_s"]) for r in here]
                    lengths = [r["n"] for r in here]
                    style = styles.style(name)
                    figures.marks(axis, style, lengths, median, bars, [0.0] * len(bars))
            axis.set(xlabel="tokens in the cache", ylabel="time, µs")
            axis.set_title(f"batch {batch}, d = {head_dim}")
            figures.length_axis(axis, [r["n"] for r in panel])
            figures.log_axis(axis)
    figures.legend(figure, axes.flat)
    return figure


if __name__ == "__main__":
    exit_after(parse(None).limit)
    sys.exit(main())
