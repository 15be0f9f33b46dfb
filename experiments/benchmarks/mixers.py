"""Parameters, time and memory of every mixer; see README.md beside this file.

    python experiments/benchmarks/mixers.py [--only NAMES] [--limit SECONDS] [--output FILE]

Everything is compiled first, in threads. Then, for one dtype after another, every mixer is compared
with its reference form, and those that agree are timed in turns. An exception in one mixer is
recorded as its reason and does not stop the others. The exit status is 1 if a mixer was not timed,
and 0 where the limit ends the process.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import hopper
import jax
import jax.numpy as jnp
import measure
import mixers_tables
import numpy as np
import peers
import report
import subjects
from flax import nnx

import lla
from lla.ops.backend import preference

KEY_FIELDS = ("implementation", "dtype", "pass", "batch", "n", "width", "heads")
REFERENCE = "reference"
CHECKED = 256  # tokens compared with the reference, some of which take memory of n^2 d
# Largest relative errors of the output and of gradients. Both forms run in the same dtype and
# differ in the order of sums and in what they round: up to about 1e-5 in float32 and 1e-2 in 16
# bits. On a GPU float32 projections are in TF32, which now and then rounds almost equal numbers to
# different ones, 1e-3 apart. What is wrong in a decay, a mask or the state between two chunks is
# far above the bounds.
BOUNDS = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 1e-1)}


class Program(NamedTuple):
    """What is compiled: a pass of a mixer, or output and gradients of its reference form."""

    mixer: str
    dtype: str
    which: str  # one of subjects.PASSES, or REFERENCE
    batch: int
    n: int
    width: int
    heads: int
    seed: int

    def fields(self) -> dict[str, Any]:
        """The fields that identify its record, and the head dimension."""
        sizes = {name: getattr(self, name) for name in ("dtype", "batch", "n", "width", "heads")}
        cell = {"implementation": self.mixer, "pass": self.which, **sizes}
        return {**cell, "head_dim": self.width // self.heads}

    def name(self) -> str:
        return "-".join(map(str, self))


def key(record: Mapping[str, Any]) -> tuple:
    return tuple(record[name] for name in KEY_FIELDS)


def reference_options(name: str) -> dict[str, Any]:
    """Options of the form that is taken for exact."""
    if "form" not in lla.mixers.options(name):
        return {"implementation": "reference"}
    # The default of MesaNet solves by iterations.
    return {"form": "recurrent", **({"solver": "exact"} if name == "mesanet" else {})}


def build(program: Program, **options: Any) -> nnx.Module:
    """The mixer with float32 parameters, none of which is idle."""
    sizes, rngs = (program.width, program.heads), nnx.Rngs(program.seed)
    mixer = lla.mixers.create(program.mixer, *sizes, dtype=program.dtype, rngs=rngs, **options)
    if program.mixer == "parallax":  # its probe starts at zero, where it is softmax attention
        kernel = mixer.probe.kernel
        kernel[...] = jax.random.normal(rngs.params(), kernel.shape) / program.width**0.5
    return mixer


@functools.cache
def parameters(program: Program) -> nnx.State:
    return nnx.split(build(program), nnx.Param)[1]


def abstract(program: Program) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """Graph, shapes of the parameters, and the input ``[batch, n, width]``, without computing."""
    options = reference_options(program.mixer) if program.which == REFERENCE else {}
    mixer = nnx.eval_shape(functools.partial(build, program, **options))
    shape = (program.batch, program.n, program.width)
    return *nnx.split(mixer, nnx.Param), jax.ShapeDtypeStruct(shape, program.dtype)


def served_by(program: Program) -> dict[str, str]:
    """Which implementation of the operator a mixer on it gets; nothing for the others."""
    if "implementation" not in lla.mixers.options(program.mixer):
        return {}
    graph, params, x = abstract(program)
    heads = jax.eval_shape(lambda params, x: nnx.merge(graph, params).heads(x), params, x)
    reasons = lla.explain(*heads)
    return {"served_by": next(name for name in preference() if reasons[name] is None)}


def compile_program(program: Program) -> hopper.Compiled:
    """``call((params, x, cotangent)) -> {"output": ..., "parameters": ..., "input": ...}``.

    A forward pass returns the output alone, and what did not compile raises. The seconds include
    tracing and lowering.
    """
    start, reason = time.monotonic(), None
    try:
        graph, params, x = abstract(program)

        def forward(params, x):
            return nnx.merge(graph, params)(x)

        def run(params, x, cotangent=None):
            if cotangent is None:
                return {"output": forward(params, x)}
            out, pullback = jax.vjp(forward, params, x)
            gradients = pullback(cotangent)
            return {"output": out, "parameters": gradients[0], "input": gradients[1]}

        arguments = (params, x) if program.which == "forward" else (params, x, x)
        compiled = jax.jit(run).lower(*arguments).compile()
        found = compiled.memory_analysis()
        memory = {
            "temp_bytes": int(found.temp_size_in_bytes),
            "output_bytes": int(found.output_size_in_bytes),
        }
    except Exception as error:  # one mixer must not stop the others
        memory, reason = {}, error

    def call(given):
        if reason is not None:
            raise reason
        return compiled(*given[: len(arguments)])

    seconds, error = time.monotonic() - start, None if reason is None else hopper.brief(reason)
    hopper.say(f"compiled {program.name()}: {seconds:.1f} s{f', {error}' if error else ''}")
    return hopper.Compiled(call, memory, seconds, error)


def compile_all(programs: Sequence[Program], workers: int, seconds: float) -> dict:
    """Compiled programs; those that were not begun within `seconds` are missing."""
    hopper.say(f"compiling {len(programs)} programs")
    executor = concurrent.futures.ThreadPoolExecutor(workers)
    futures = {program: executor.submit(compile_program, program) for program in programs}
    concurrent.futures.wait(futures.values(), seconds)
    executor.shutdown(cancel_futures=True)  # waits for what has begun
    return {program: f.result() for program, f in futures.items() if not f.cancelled()}


def collect(results: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    """float64: the first `n` tokens of the first sequence, and all gradients of parameters."""
    out = {}
    for name, tree in results.items():
        arrays = [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]
        whole = name == "parameters"
        out[name] = np.concatenate([a.ravel() for a in arrays]) if whole else arrays[0][0, :n]
    return out


def check(programs: Mapping[str, Program], compiled: Mapping, x, cotangent) -> dict[str, tuple]:
    """For every pass of one mixer its record, and the call to time or None.

    As mixers are causal, the reference of some first tokens checks the programs that are timed:
    their output there, and their gradients under a cotangent that is zero elsewhere.
    """
    reference, program = programs[REFERENCE], programs["forward"]
    n, outcome = reference.n, {}

    @functools.cache
    def prepare():
        params = parameters(program._replace(dtype="float32"))
        want = compiled[reference].call((params, x[:1, :n], cotangent[:1, :n]))
        return params, collect(want, n)

    for which in subjects.PASSES:
        found, call = compiled[programs[which]], None
        record = {**programs[which].fields(), **found.memory, "compile_s": round(found.seconds, 2)}
        try:
            params, want = prepare()
            record["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
            record |= served_by(program)
            first = jnp.zeros_like(cotangent).at[:1, :n].set(cotangent[:1, :n])
            got = collect(found.call((params, x, first)), n)
            judged = peers.verdict(got, want, BOUNDS[program.dtype])
            results = jax.block_until_ready(found.call((params, x, cotangent)))
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(results)):
                judged |= {"status": "refused", "reason": "a result is not finite"}
            record |= {**judged, "truth": f"reference form, {program.dtype}, {n} tokens"}
            if record["status"] == "timed":
                call = peers.Call(found.call, (params, x, cotangent), jax.block_until_ready)
        except Exception as error:
            record |= {"status": "unavailable", "reason": hopper.brief(error)}
        outcome[which] = record, call
    return outcome


def time_records(options, records: Mapping[str, dict], calls: Mapping[str, Any], results) -> None:
    """Times `calls` in turns and writes `records` over earlier ones; both are by mixer."""
    for name, timing in measure.time_interleaved(calls, options.repeats, options.budget).items():
        if calls[name].reason is None:
            records[name] |= dataclasses.asdict(timing)
        else:
            records[name] |= {"status": "unavailable", "reason": calls[name].reason}
    keys = {key(record) for record in records.values()}
    results.records = [record for record in results.records if key(record) not in keys]
    load = round(os.getloadavg()[0], 2)
    results.add([{**record, "load_average": load} for record in records.values()])
    for record in records.values():
        hopper.say(report.progress_line(record, KEY_FIELDS))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = lla.mixers.names()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=tuple(BOUNDS), default=["float32"], help="of computations")
    for name, size in {"batch": 1, "length": 1024, "width": 256, "heads": 4}.items():
        add(f"--{name}", type=int, default=size)
    add("--repeats", type=int, default=15)
    add("--budget", type=float, default=5.0, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--only", nargs="+", choices=names, default=names, help="the others are left out")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that compile")
    add("--limit", type=float, default=1e9, help="seconds after which it stops with what it has")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/mixers_<device>.json")
    add("--resume", action="store_true", help="keep finished cells, whatever code they measured")
    return parser.parse_args(argv)


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    unsaid = ("dtypes", "only", "workers", "limit", "lock", "commit", "output", "resume")
    settings = {name: value for name, value in vars(options).items() if name not in unsaid}
    header = measure.make_header("mixers", settings)
    header["commit"] = options.commit or header["commit"]
    digest = hashlib.sha256(header["source_digest"].encode())
    for folder in ("lla/mixers", "lla/nn"):
        for path in sorted((measure.ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return {**header, "source_digest": digest.hexdigest()[:16]}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output or measure.RESULTS / f"mixers_{measure.device_name()}.json"
    results = measure.Results(output, make_header(options), KEY_FIELDS, options.resume)
    finished = {key(record) for record in results.records if record["status"] == "timed"}
    hopper.say(f"{jax.devices()[0].device_kind}, results in {output}")
    sizes = (options.batch, options.length, options.width, options.heads, options.seed)
    checked = (1, min(CHECKED, options.length), *sizes[2:])
    jobs = []
    for dtype in options.dtypes:
        for name in options.only:
            job = {which: Program(name, dtype, which, *sizes) for which in subjects.PASSES}
            if not {key(program.fields()) for program in job.values()} <= finished:
                jobs.append({REFERENCE: Program(name, dtype, REFERENCE, *checked), **job})
    programs = [program for job in jobs for program in job.values()]
    compiled = compile_all(programs, options.workers, 0.7 * options.limit)
    rng = np.random.default_rng(options.seed)
    normal = rng.standard_normal((2, *sizes[:3]), np.float32)
    with measure.exclusive(options.lock):
        for dtype in options.dtypes:
            x, cotangent = (jnp.asarray(array, dtype) for array in normal)
            checks = {
                job["forward"].mixer: check(job, compiled, x, cotangent)
                for job in jobs
                if job["forward"].dtype == dtype and compiled.keys() >= set(job.values())
            }
            for which in subjects.PASSES:
                records = {name: found[which][0] for name, found in checks.items()}
                calls = {name: f[which][1] for name, f in checks.items() if f[which][1]}
                time_records(options, records, calls, results)
    print(mixers_tables.markdown(results.document()), flush=True)
    timed = {key(record) for record in results.records if record["status"] == "timed"}
    missing = [p for p in programs if p.which != REFERENCE and key(p.fields()) not in timed]
    hopper.say(f"not timed: {', '.join(program.name() for program in missing) or 'nothing'}")
    return int(bool(missing))


if __name__ == "__main__":
    hopper.end_at_the_limit(parse(None).limit)
    sys.exit(main())
