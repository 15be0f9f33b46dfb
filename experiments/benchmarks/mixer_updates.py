"""Accuracy of every mechanism on this device, and the time of its layer and of training updates.

    python experiments/benchmarks/mixer_updates.py [--only NAMES] [--limit SECONDS] [--output FILE]

For one mechanism after another: the layer in float32 and in 16 bits, outputs and gradients, against
its recurrent form in float32 on fresh inputs; then the time of the layer, of an update of a model
of 29 million parameters, and of an update of eight small models at once, as the grid of multi-query
associative recall trains them. Everything is compiled ahead, in threads. The file is rewritten
after every job, and a job that fails or takes too long does not stop the others. ``--profile``
lists the kernels of the layer and of the updates with their times.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import gzip
import json
import os
import pathlib
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lla
from lla import training
from lla.experiments.benchmarks import mixer_operators, mixers
from lla.experiments.benchmarks.formatting import provenance
from lla.experiments.benchmarks.results import add_options, open_results
from lla.experiments.benchmarks.timing import error_line, exit_after, log, time_interleaved
from lla.mixers import hopper as hopper_kernels
from lla.runs import tables
from lla.training.settings import Sharding
from lla.training.sharding import make_mesh

KEY_FIELDS = ("implementation", "pass", "dtype", "batch", "n", "width", "heads", "runs")
NAMES = (
    "softmax",
    "gated_deltanet",
    "deltanet",
    "gla",
    "mesanet",
    "mamba2",
    "mamba",
    "linear",
    "retnet",
)
MEASURED = ("forward", "forward_backward", "update", "runs")
# Forms of the layer that are compared: dtype, and whether it is the reference.
TRUTH = ("float32", True)
FORMS = (TRUTH, ("float32", False), ("bfloat16", True), ("bfloat16", False))
# Largest relative errors of the output and of gradients. In 16 bits they include the error of the
# projections, which the recurrent form in 16 bits shows alone.
BOUNDS = {"float32": (1e-4, 1e-3), "bfloat16": (3e-2, 6e-2)}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile: a pass of a layer, a training program, or a form to compare."""

    mixer: str
    which: str  # one of MEASURED, or "check"
    form: tuple[str, bool] = ("bfloat16", False)

    def name(self) -> str:
        return f"{self.mixer} {self.which} {self.form[0]}{' reference' if self.form[1] else ''}"


def layer(job: Job, sizes: tuple[int, int, int], n: int):
    """A jitted pass of the layer, and its abstract arguments."""
    batch, width, heads = sizes
    dtype, reference = job.form
    options = mixers.reference_options(job.mixer) if reference else {}
    if job.mixer == "mesanet" and job.which != "check":
        options = {"tol": 1e-4}  # as in the experiments that train it
    program = mixers.Program(job.mixer, dtype, "forward", batch, n, width, heads, 0)
    build = functools.partial(mixers.build, program, **options)
    graph, params = nnx.split(nnx.eval_shape(build), nnx.Param)
    x = jax.ShapeDtypeStruct((batch, n, width), dtype)
    return mixers.layer_pass(graph, job.which), (params, x, x)


def config(options: argparse.Namespace, job: Job) -> tuple[dict, training.Runs | None]:
    """The training program of `job`: a model of 29 million parameters, or eight small ones."""
    found = training.defaults("mqar")
    found["model"].update(dtype="bfloat16", tie_embeddings=True)
    found["model"]["mixer"]["name"] = job.mixer
    found["mixers"]["mesanet"]["tol"] = 1e-4
    found["training"].update(steps=10_000)
    if job.which == "update":
        found["model"].update(width=options.width, num_heads=options.heads)
        found["model"].update(depth=options.depth, mlp_ratio=4.0)
        found["task"].update(vocab_size=8192, length=options.length, pairs=64)
        found["task"].update(train_examples=1000, test_examples=100)
        found["training"].update(batch_size=options.batch)
        return found, None
    found["model"].update(width=64, num_heads=1, depth=2)
    found["task"].update(vocab_size=8192, length=128, pairs=8)
    found["training"].update(batch_size=options.runs_batch)
    return found, training.Runs((0, 1), (3e-4, 1e-3, 3e-3, 1e-2))


class Update:
    """A training program; a call runs some steps, and the state stays on the device."""

    def __init__(self, options: argparse.Namespace, job: Job):
        settings, runs = config(options, job)
        mesh = make_mesh(Sharding(1, 1), jax.devices()[:1])
        self.program = training.Trainer(training.resolve(settings), mesh, runs)
        self.compiled = self.program.compile(("init", "advance"))["advance"]
        self.state = None

    def __call__(self, steps: int):
        if self.state is None:
            self.state = self.program.init()
        self.state, found = self.program.advance(self.state, np.int32(steps))
        return found

    def failed(self) -> bool:
        return bool((np.asarray(self.state.failed_at) >= 0).any())


def compile_job(options: argparse.Namespace, job: Job) -> tuple[Any, Any, float]:
    """The call, the compiled program, and seconds; raises what the compiler raises."""
    begin = time.monotonic()
    if job.which in ("update", "runs"):
        call = Update(options, job)
        compiled = call.compiled
    else:
        check = job.which == "check"
        sizes = (2 if check else options.batch, options.width, options.heads)
        n = options.checked if check else options.length
        function, arguments = layer(job, sizes, n)
        # In float32, projections are exact, not in TF32.
        exact = "highest" if job.form[0] == "float32" else None
        with jax.default_matmul_precision(exact):
            call = compiled = function.lower(*arguments).compile()
    seconds = time.monotonic() - begin
    log(f"compiled {job.name()}: {seconds:.1f} s")
    return call, compiled, seconds


def errors(results: dict, truth: dict) -> dict[str, float]:
    """Relative errors of the output, all gradients of parameters together, and of the input."""

    def flat(tree):
        leaves = [np.asarray(leaf).astype(np.float64).ravel() for leaf in jax.tree.leaves(tree)]
        return np.concatenate(leaves)

    out = {}
    for name, tree in truth.items():
        got, want = flat(results[name]), flat(tree)
        out[name] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return out


def worst_leaf(results: dict, truth: dict) -> tuple[str, float]:
    """The parameter whose gradient has the largest relative error, and that error."""
    found = ("", 0.0)
    got = jax.tree.leaves(results["parameters"])
    for (path, want), leaf in zip(
        jax.tree_util.tree_leaves_with_path(truth["parameters"]), got, strict=True
    ):
        want = np.asarray(want, np.float64)
        error = float(np.linalg.norm(np.asarray(leaf, np.float64) - want) / np.linalg.norm(want))
        if not error <= found[1]:
            found = (jax.tree_util.keystr(path), error)
    return found


def check(options: argparse.Namespace, name: str, wait) -> dict[str, Any]:
    """Errors of the forms of a layer, on inputs that are new in every run."""
    rng = np.random.default_rng(options.check_seed)
    shape = (2, options.checked, options.width)
    # The same numbers for both dtypes: 16 bits can represent them.
    x, cotangent = (
        np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16), np.float32)
        for _ in range(2)
    )
    program = mixers.Program(name, "float32", "forward", 2, shape[1], *shape[2:], options.heads, 0)
    params = mixers.parameters(program)
    results = {}
    for form in FORMS:
        call = wait(Job(name, "check", form))[0]
        given = (jnp.asarray(array, form[0]) for array in (x, cotangent))
        results[form] = jax.tree.map(np.asarray, call(params, *given))
    found = {}
    for form in FORMS[1:]:
        label = f"{form[0]}{'_recurrent' if form[1] else ''}"
        found[label] = errors(results[form], results[TRUTH])
        found[label]["worst"] = worst_leaf(results[form], results[TRUTH])
    return found


def judge(found: dict[str, Any]) -> str | None:
    """Why the errors are too large, or None."""
    for dtype, (out, gradients) in BOUNDS.items():
        for name, error in found[dtype].items():
            if name == "worst":
                continue
            # An error that the recurrent form has, too, is that of the projections.
            shared = 1.5 * found["bfloat16_recurrent"][name] if dtype == "bfloat16" else 0.0
            if not error <= max(shared, out if name == "output" else gradients):
                return f"{dtype}: error {error:.1e} of {name}"
    return None


def count_kernels(compiled) -> dict[str, int]:
    """How many instructions of the compiled program are kernels, by kind."""
    text = compiled.as_text()
    names = re.findall(r"^\s*(?:ROOT )?%\S+ = \S+.*? (fusion|custom-call|while)\(", text, re.M)
    return dict(collections.Counter(names))


def profile(call, times: int) -> list[tuple[str, float, float]]:
    """(kernel, launches, microseconds) of one call, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, create_perfetto_trace=True)
        out = None
        for _ in range(times):
            out = call()
        jax.block_until_ready(out)
        jax.profiler.stop_trace()
        path = next(pathlib.Path(folder).rglob("perfetto_trace.json.gz"))
        with gzip.open(path) as file:
            events = json.load(file)
    events = events["traceEvents"] if isinstance(events, dict) else events
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and "Stream" in e["args"]["name"]
    }
    total: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in events:
        place = (event.get("pid"), event.get("tid"))
        if event.get("ph") == "X" and "GPU" in names.get(place[0], "") and place in streams:
            total[event["name"]][0] += 1 / times
            total[event["name"]][1] += event["dur"] / times
    rows = [(name, round(count, 2), round(us, 1)) for name, (count, us) in total.items()]
    return sorted(rows, key=lambda row: -row[2])


def measure_job(options, job: Job, wait, deadline: float) -> dict[str, Any]:
    """Times one job; raises any exception in it."""
    call, compiled, seconds = wait(job)
    update = job.which in ("update", "runs")
    steps = {"update": 4, "runs": 20}.get(job.which, 1)
    if update:
        run = functools.partial(call, steps)
        short = functools.partial(call, 1)
    else:
        program = mixers.Program(
            job.mixer, "float32", "forward", 1, 16, options.width, options.heads, 0
        )
        params = mixers.parameters(program)
        keys = jax.random.split(jax.random.key(options.check_seed), 2)
        shape = (options.batch, options.length, options.width)
        x, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        run = short = functools.partial(call, params, x, cotangent)
    jax.block_until_ready(run())
    budget = min(options.budget, max(0.5, deadline - time.monotonic()))
    timing = time_interleaved({"": run}, options.repeats, budget)[""]
    memory = compiled.memory_analysis()
    record = {
        "time_min_s": timing.time_min_s / steps,
        "time_median_s": timing.time_median_s / steps,
        "repeats": timing.repeats,
        "compile_s": round(seconds, 1),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "instructions": count_kernels(compiled),
    }
    if update:
        if call.failed():
            raise FloatingPointError("an update was not finite")
        runs = int(np.prod(call.program.shape)) if call.program.shape else 1
        tokens = call.program.batch_size * call.program.settings.task.options["length"] * runs
        record["tokens_per_s"] = tokens / record["time_median_s"]
        call.state = None
    if options.profile and jax.default_backend() != "cpu":
        try:
            kernels = profile(short, 2)
        except Exception as error:  # the times matter more than the profile
            log(f"no profile: {type(error).__name__} {error_line(error)}")
            kernels = []
        record["kernel_us"] = round(sum(row[2] for row in kernels), 1)
        record["kernel_launches"] = round(sum(row[1] for row in kernels))
        record["kernels"] = kernels[: options.profile]
        if update:
            call.state = None
    return record


def fields(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What identifies the record of `job`."""
    small = job.which == "runs"
    heads, width = (1, 64) if small else (options.heads, options.width)
    return {
        "implementation": job.mixer,
        "pass": job.which,
        "dtype": "bfloat16",
        "batch": options.runs_batch if small else options.batch,
        "n": 128 if small else options.length,
        "width": width,
        "heads": heads,
        "head_dim": width // heads,
        "runs": 8 if small else 1,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    sizes = {"batch": 64, "length": 1024, "width": 512, "heads": 8, "depth": 8}
    for name, size in sizes.items():
        add(f"--{name}", type=int, default=size)
    add("--runs-batch", type=int, default=512, help="sequences of a batch of the small models")
    add("--checked", type=int, default=512, help="tokens of the sequences that are compared")
    add_options(parser, "workers commit output", repeats=5, budget=1.5, limit=200.0)
    add("--only", nargs="+", choices=lla.mixers.names(), default=NAMES)
    add("--cells", nargs="+", choices=MEASURED, default=MEASURED)
    add("--cell-limit", type=float, default=60.0, help="seconds that a job may take at most")
    add("--profile", type=int, default=0, help="kernels to list per job; 0 for no profile")
    add("--operators", nargs="*", help="whose errors to measure; all by default")
    add("--no-check", dest="check", action="store_false", help="do not compare layers")
    add("--check-seed", type=int, default=None, help="of the inputs; None for fresh ones")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    with hopper_kernels.unmeasured_kernels():  # also measures kernels that no GPU has run yet
        return _run(parse(argv))


def _run(options: argparse.Namespace) -> int:
    begin = time.monotonic()
    if options.check_seed is None:
        options.check_seed = secrets.randbits(31)
    unsaid = ("only", "cells", "workers", "limit", "cell_limit", "commit", "output", "profile")
    settings = [name for name in vars(options) if name not in unsaid]
    results = open_results("mixer_updates", options, settings, KEY_FIELDS)
    results.records = []  # a run measures everything again

    executor = concurrent.futures.ThreadPoolExecutor(options.workers)
    chosen = mixer_operators.operators(1, 4, 4) if options.operators is None else options.operators
    sizes = (options.heads, options.checked, options.width // options.heads)
    checks = {name: executor.submit(mixer_operators.check, name, *sizes) for name in chosen}
    futures = {}
    for name in options.only:
        jobs = [Job(name, "check", form) for form in FORMS] if options.check else []
        for job in [*jobs, *(Job(name, which) for which in options.cells)]:
            futures[job] = executor.submit(compile_job, options, job)
    for name, future in checks.items():
        try:
            found = future.result(2 * options.cell_limit)
        except Exception as error:
            found = {"reason": f"{type(error).__name__} {error_line(error)}"}
        results.header.setdefault("operators", {})[name] = found
        log(f"operator {name}: output and gradients")
        for form, numbers in found.items():
            log(f"    {form:14s} {numbers}")

    # Autotuning during compilation would disturb the times and show up in profiles.
    concurrent.futures.wait(futures.values(), 0.7 * options.limit - (time.monotonic() - begin))
    failures = 0
    softmax: dict[str, float] = {}
    for name in options.only:
        deadline = time.monotonic() + options.cell_limit

        def wait(job, deadline=deadline):
            return futures[job].result(max(0.0, deadline - time.monotonic()))

        try:
            found = check(options, name, wait) if options.check else {}
            reason = judge(found) if found else "not compared with the recurrent form"
        except Exception as error:  # one mechanism must not stop the others
            found, reason = {}, f"{type(error).__name__} {error_line(error)}"
        log(f"{name}: {reason or 'errors within bounds'}")
        for form, pairs in found.items():
            numbers = {k: f"{v:.1e}" for k, v in pairs.items() if k != "worst"}
            log(f"  {form}: {numbers}, worst {pairs['worst'][0]} {pairs['worst'][1]:.1e}")
        for which in options.cells:
            job = Job(name, which)
            deadline = time.monotonic() + options.cell_limit
            record = {**fields(options, job), "errors": found, "bounds": BOUNDS}
            record["truth"] = f"recurrent form, float32, {options.checked} tokens"
            try:
                waiting = functools.partial(wait, deadline=deadline)
                record |= measure_job(options, job, waiting, deadline)
                record["status"] = "timed"
                if reason:
                    record["warning"] = reason
                if name == "softmax":
                    softmax[which] = record["time_median_s"]
                if which in softmax:
                    record["times_softmax"] = round(record["time_median_s"] / softmax[which], 3)
            except Exception as error:
                failures += 1
                record |= {"status": "unavailable", "reason": error_line(error)}
            results.add([record])
            log(_line(record, time.monotonic() - begin))
    executor.shutdown(wait=False, cancel_futures=True)
    return int(failures > 0)


def _line(record: dict[str, Any], elapsed: float) -> str:
    start = f"[{elapsed:5.0f} s] {record['implementation']:15s} {record['pass']:16s}"
    if record["status"] != "timed":
        return f"{start} {record['reason']}"
    text = f"{start} {1e3 * record['time_median_s']:8.3f} ms"
    if "tokens_per_s" in record:
        text += f" {record['tokens_per_s'] / 1e3:7.0f} k tokens/s"
    if "times_softmax" in record:
        text += f" {record['times_softmax']:5.2f} x softmax"
    text += f" {record['temp_bytes'] / 2**20:7.0f} MiB {record['instructions']}"
    if "kernel_us" in record:
        text += f" {record['kernel_launches']} launches {record['kernel_us'] / 1e3:.2f} ms"
        for name, count, us in record["kernels"]:
            text += f"\n        {us:9.1f} us {count:7.2f} x {name[:90]}"
    return text


# ---------------------------------------------------------------------------------------------
# Tables


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    columns = {
        "forward": "layer, forward",
        "forward_backward": "layer, forward + backward",
        "update": "update of 29M parameters",
        "runs": "update of 8 small models",
    }
    records = [record for record in document["records"] if record["status"] == "timed"]
    columns = {k: v for k, v in columns.items() if any(r["pass"] == k for r in records)}
    rows = []
    for name in dict.fromkeys(record["implementation"] for record in records):
        found = {r["pass"]: r for r in records if r["implementation"] == name}
        row = [name]
        for which in columns:
            record = found.get(which)
            row += [_time(record)]
            if which == "update":
                row += [f"{record['tokens_per_s'] / 1e3:.0f}" if record else ""]
        compared = [r["errors"]["bfloat16"] for r in found.values() if r["errors"]]
        errors = [f"{e['output']:.1e}, {e['parameters']:.1e}" for e in compared[:1]]
        rows.append([*row, *(errors or ["not compared"])])
    heads = []
    for which, title in columns.items():
        heads += [title, "thousand tokens / s"] if which == "update" else [title]
    parts = [
        provenance(document),
        "Median ms, and in brackets the time over that of softmax attention; errors of the layer "
        "in bfloat16, projections included: output, all gradients of parameters together.",
        tables.markdown(["mixer", *heads, "errors"], rows),
    ]
    if found := document["header"].get("operators"):
        names = list(next(iter(found.values())))
        lines = [
            [name, *(f"{max(errors[form]):.1e}" for form in names)]
            for name, errors in found.items()
        ]
        parts += [
            "Recurrences alone: the worst relative error of output and gradients.",
            tables.markdown(["recurrence", *names], lines),
        ]
    return "\n\n".join(parts)


def _time(record: Mapping | None) -> str:
    if record is None:
        return ""
    ratio = record.get("times_softmax")
    text = f"{record['time_median_s'] * 1e3:.2f}"
    return text if ratio is None else f"{text} ({ratio:.2f})"


if __name__ == "__main__":
    exit_after(parse(None).limit)
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for compilations that are not needed any more
