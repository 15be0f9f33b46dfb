"""Parameters, time and memory of every mixer; see pages/mixers.md.

    python experiments/benchmarks/mixers.py [--only NAMES] [--limit SECONDS] [--output FILE]

Everything is compiled first, in threads. Then, for one dtype after another, every mixer is compared
with its reference form, and those that agree are timed in turns. An exception in one mixer is
recorded and does not stop the others. The exit status is 1 if a mixer was not timed, and 0 if the
limit ended the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lla
from lla.experiments.benchmarks import truth
from lla.experiments.benchmarks.compilation import Compiled, compile_all, try_compile
from lla.experiments.benchmarks.formatting import (
    PASSES,
    cell_text,
    mebibytes,
    progress_line,
    provenance,
    ratio,
)
from lla.experiments.benchmarks.results import add_options, open_results
from lla.experiments.benchmarks.timing import (
    GuardedCall,
    device_lock,
    error_line,
    exit_after,
    log,
    time_interleaved,
)
from lla.ops.backend import preference
from lla.runs import tables

KEY_FIELDS = ("implementation", "dtype", "pass", "batch", "n", "width", "heads")
REFERENCE = "reference"
CHECKED = 256  # tokens compared with the reference form, which may need memory of n^2 d
# Largest relative errors of the output and of gradients. Both forms run in the same dtype and
# differ in the order of sums and in rounding: by about 1e-5 in float32 and 1e-2 in 16 bits. On a
# GPU float32 projections are in TF32, which sometimes rounds almost equal numbers to different
# ones, 1e-3 apart. A mistake in a decay, a mask or the state between chunks is far above the
# bounds.
BOUNDS = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 1e-1)}


class Program(NamedTuple):
    """A pass of a mixer, or its reference form with gradients, to be compiled."""

    mixer: str
    dtype: str
    which: str  # one of truth.PASSES, or REFERENCE
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


def reference_options(name: str) -> dict[str, Any]:
    """Options of the form that counts as exact."""
    if "form" not in lla.mixers.options(name):
        return {"implementation": "reference"}
    # The default of MesaNet solves by iterations.
    return {"form": "recurrent", **({"solver": "exact"} if name == "mesanet" else {})}


def build(program: Program, **options: Any) -> nnx.Module:
    """The mixer, with float32 parameters that all have an effect."""
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
    """The graph, and the shapes of the parameters and of the input ``[batch, n, width]``."""
    options = reference_options(program.mixer) if program.which == REFERENCE else {}
    mixer = nnx.eval_shape(functools.partial(build, program, **options))
    shape = (program.batch, program.n, program.width)
    return *nnx.split(mixer, nnx.Param), jax.ShapeDtypeStruct(shape, program.dtype)


def served_by(program: Program) -> dict[str, str]:
    """The implementation that a mixer on our operator gets by default; empty for other mixers."""
    if "implementation" not in lla.mixers.options(program.mixer):
        return {}
    graph, params, x = abstract(program)
    heads = jax.eval_shape(lambda params, x: nnx.merge(graph, params).heads(x), params, x)
    reasons = lla.explain(*heads)
    by_default = (n for n in preference() if reasons[n] is None and f"{n}:default" not in reasons)
    return {"served_by": next(by_default)}


def layer_pass(graph, which: str):
    """``(params, x, cotangent) -> {"output": ..., "parameters": ..., "input": ...}``, jitted.

    A forward pass returns the output alone and takes no cotangent.
    """

    def forward(params, x):
        return nnx.merge(graph, params)(x)

    def run(params, x, cotangent=None):
        if which == "forward":
            return {"output": forward(params, x)}
        out, pullback = jax.vjp(forward, params, x)
        gradients = pullback(cotangent)
        return {"output": out, "parameters": gradients[0], "input": gradients[1]}

    return jax.jit(run)


def compile_program(program: Program) -> Compiled:
    """Compiles `layer_pass` for a program. The seconds include tracing and lowering."""

    def build():
        graph, params, x = abstract(program)
        arguments = (params, x) if program.which == "forward" else (params, x, x)
        return layer_pass(graph, program.which).lower(*arguments).compile()

    return try_compile(build)


def collect(results: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    """The first `n` tokens of the first sequence and all gradients of parameters, in float64."""
    out = {}
    for name, tree in results.items():
        arrays = [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]
        whole = name == "parameters"
        out[name] = np.concatenate([a.ravel() for a in arrays]) if whole else arrays[0][0, :n]
    return out


def check(programs: Mapping[str, Program], compiled: Mapping, x, cotangent) -> dict[str, tuple]:
    """For each pass of a mixer its record, and the call to be timed, or None.

    Mixers are causal. So the reference form on the first tokens checks the programs that are timed:
    their output there, and their gradients for a cotangent that is zero elsewhere.
    """
    reference, program = programs[REFERENCE], programs["forward"]
    n, outcome = reference.n, {}

    @functools.cache
    def prepare():
        params = parameters(program._replace(dtype="float32"))
        found = compiled[reference]
        if found.call is None:
            raise RuntimeError(found.error)
        return params, collect(found.call(params, x[:1, :n], cotangent[:1, :n]), n)

    for which in truth.PASSES:
        found, call = compiled[programs[which]], None
        record = {**programs[which].fields(), **found.memory, "compile_s": round(found.seconds, 2)}
        try:
            params, want = prepare()
            record["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
            record |= served_by(program)
            first = jnp.zeros_like(cotangent).at[:1, :n].set(cotangent[:1, :n])
            if found.call is None:
                raise RuntimeError(found.error)
            more = () if which == "forward" else (first,)
            got = collect(found.call(params, x, *more), n)
            judged = truth.verdict(got, want, truth.limits_for(want, *BOUNDS[program.dtype]))
            given = (params, x) if which == "forward" else (params, x, cotangent)
            results = jax.block_until_ready(found.call(*given))
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(results)):
                judged |= {"status": "refused", "reason": "a result is not finite"}
            record |= {**judged, "truth": f"reference form, {program.dtype}, {n} tokens"}
            if record["status"] == "timed":
                run = functools.partial(_spread, found.call)
                call = GuardedCall(run, given, jax.block_until_ready)
        except Exception as error:
            record |= {"status": "unavailable", "reason": error_line(error)}
        outcome[which] = record, call
    return outcome


def _spread(function, arguments):
    return function(*arguments)


def time_records(options, records: Mapping[str, dict], calls: Mapping[str, Any], results) -> None:
    """Times `calls` in turns and writes the completed `records`; both are by mixer."""
    for name, timing in time_interleaved(calls, options.repeats, options.budget).items():
        if calls[name].reason is None:
            records[name] |= dataclasses.asdict(timing)
        else:
            records[name] |= {"status": "unavailable", "reason": calls[name].reason}
    busy = round(os.getloadavg()[0], 2)
    results.add([{**record, "load_average": busy} for record in records.values()])
    for record in records.values():
        log(progress_line(record, KEY_FIELDS))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = lla.mixers.names()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=tuple(BOUNDS), default=["float32"], help="of computations")
    for name, size in {"batch": 1, "length": 1024, "width": 256, "heads": 4}.items():
        add(f"--{name}", type=int, default=size)
    add_options(parser, "seed limit lock commit output resume", repeats=15, budget=5.0, workers=8)
    add("--only", nargs="+", choices=names, default=names, help="the others are left out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    unsaid = {"dtypes", "only", "workers", "limit", "lock", "commit", "output", "resume"}
    settings = [name for name in vars(options) if name not in unsaid]
    folders = ("lla/mixers", "lla/nn")
    results = open_results("mixers", options, settings, KEY_FIELDS, folders=folders)
    sizes = (options.batch, options.length, options.width, options.heads, options.seed)
    checked = (1, min(CHECKED, options.length), *sizes[2:])
    jobs = []
    for dtype in options.dtypes:
        for name in options.only:
            job = {which: Program(name, dtype, which, *sizes) for which in truth.PASSES}
            if not all(results.has(program.fields(), ["timed"]) for program in job.values()):
                jobs.append({REFERENCE: Program(name, dtype, REFERENCE, *checked), **job})
    programs = [program for job in jobs for program in job.values()]
    deadline = time.monotonic() + 0.7 * options.limit
    compiled = compile_all(programs, compile_program, options.workers, deadline)
    rng = np.random.default_rng(options.seed)
    normal = rng.standard_normal((2, *sizes[:3]), np.float32)
    with device_lock(options.lock):
        for dtype in options.dtypes:
            x, cotangent = (jnp.asarray(array, dtype) for array in normal)
            checks = {
                job["forward"].mixer: check(job, compiled, x, cotangent)
                for job in jobs
                if job["forward"].dtype == dtype and compiled.keys() >= set(job.values())
            }
            for which in truth.PASSES:
                records = {name: found[which][0] for name, found in checks.items()}
                calls = {name: f[which][1] for name, f in checks.items() if f[which][1]}
                time_records(options, records, calls, results)
    print(markdown(results.document()), flush=True)
    missing = [
        p for p in programs if p.which != REFERENCE and not results.has(p.fields(), ["timed"])
    ]
    log(f"not timed: {', '.join(program.name() for program in missing) or 'nothing'}")
    return int(bool(missing))


# ---------------------------------------------------------------------------------------------
# Tables


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    return f"{provenance(document)}\n\n{result_tables(document['records'])}"


def result_tables(records: Sequence[Mapping]) -> str:
    """A table for each dtype and size, and the reasons why mixers were not timed."""
    fields = ("dtype", "batch", "n", "width", "heads")
    parts = []
    for size in dict.fromkeys(tuple(record[name] for name in fields) for record in records):
        here = [r for r in records if tuple(r[name] for name in fields) == size]
        dtype, batch, n, width, heads = size
        parts.append(
            f"**{dtype}**, batch {batch}, {n} tokens, width {width}, {heads} heads: median "
            "(fastest) ms; relative error of the output, or of the worse of the gradients of "
            "input and parameters; the time relative to softmax attention.\n\n" + _table(here)
        )
    lines = [
        f"- {r['implementation']}, {r['dtype']}, {PASSES[r['pass']]}: {r['status']}: {r['reason']}"
        for r in records
        if r["status"] != "timed"
    ]
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def _table(records: Sequence[Mapping]) -> str:
    cells = {(record["implementation"], record["pass"]): record for record in records}
    rows = []
    for name in dict.fromkeys(record["implementation"] for record in records):
        found = {which: cells.get((name, which)) for which in PASSES}
        some = next(record for record in found.values() if record)
        label = f"{name} ({some['served_by']})" if "served_by" in some else name
        row = [label, str(some.get("parameters", ""))]
        for which, record in found.items():
            row += [cell_text(record), ratio(record, cells.get(("softmax", which)))]
            row.append(mebibytes(record))
        rows.append([*row, "; ".join(f"{r['compile_s']:.1f}" for r in found.values() if r)])
    columns = [name for title in PASSES.values() for name in (title, "/ softmax", "MiB")]
    return tables.markdown(["mixer", "parameters", *columns, "compiled in s"], rows)


if __name__ == "__main__":
    exit_after(parse(None).limit)
    sys.exit(main())
