"""Accuracy of every mechanism on this device, and the time of its layer and of training updates.

    python experiments/benchmarks/mixer_updates.py [--only NAMES] [--limit SECONDS] [--output FILE]

For one mechanism after another: the layer in float32 and in 16 bits, outputs and gradients, against
its recurrent form in float32 on fresh inputs; then the time of the layer, of an update of a model
of 29 million parameters, and of an update of eight small models at once, as the grid of multi-query
associative recall trains them. Everything is compiled ahead, in threads. The file is rewritten
after every cell, and a cell that fails or takes too long does not stop the others. With
``--profile`` the kernels of the layer and of the updates are listed with their times.
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
from collections.abc import Sequence
from typing import Any

import hopper
import jax
import jax.numpy as jnp
import measure
import mixer_operators
import mixers
import numpy as np
from flax import nnx

import lla
from lla import training
from lla.mixers import hopper as mixer_kernels
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
CELLS = ("forward", "forward_backward", "update", "runs")
# Forms of the layer that are compared: dtype, and whether it is the reference.
TRUTH = ("float32", True)
FORMS = (TRUTH, ("float32", False), ("bfloat16", True), ("bfloat16", False))
# Largest relative errors of the output and of gradients. Behind 16-bit projections, which both
# forms share; the column of the recurrent form in 16 bits tells what of the error is theirs.
BOUNDS = {"float32": (1e-4, 1e-3), "bfloat16": (3e-2, 6e-2)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is compiled: a layer, a training program, or a form of the layer to compare."""

    mixer: str
    which: str  # one of CELLS, or "check"
    form: tuple[str, bool] = ("bfloat16", False)

    def name(self) -> str:
        return f"{self.mixer} {self.which} {self.form[0]}{' reference' if self.form[1] else ''}"


def layer(cell: Cell, sizes: tuple[int, int, int], n: int):
    """A jitted ``(params, x, cotangent) -> results``, its abstract arguments, and `init`."""
    batch, width, heads = sizes
    dtype, reference = cell.form
    options = mixers.reference_options(cell.mixer) if reference else {}
    if cell.mixer in ("mesanet",) and cell.which != "check":
        options = {"tol": 1e-4}  # as the experiments that train it
    program = mixers.Program(cell.mixer, dtype, "forward", batch, n, width, heads, 0)
    build = functools.partial(mixers.build, program, **options)
    graph, params = nnx.split(nnx.eval_shape(build), nnx.Param)

    def forward(params, x):
        return nnx.merge(graph, params)(x)

    def run(params, x, cotangent):
        if cell.which == "forward":
            return {"output": forward(params, x)}
        out, pullback = jax.vjp(forward, params, x)
        gradients = pullback(cotangent)
        return {"output": out, "parameters": gradients[0], "input": gradients[1]}

    x = jax.ShapeDtypeStruct((batch, n, width), dtype)
    return jax.jit(run), (params, x, x)


def config(options: argparse.Namespace, cell: Cell) -> tuple[dict, training.Runs | None]:
    """The training program of `cell`: a model of 29 million parameters, or eight small ones."""
    found = training.defaults("mqar")
    found["model"].update(dtype="bfloat16", tie_embeddings=True)
    found["model"]["mixer"]["name"] = cell.mixer
    found["mixers"]["mesanet"]["tol"] = 1e-4
    found["training"].update(steps=10_000)
    if cell.which == "update":
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
    """``call(steps)`` trains; the state stays on the device."""

    def __init__(self, options: argparse.Namespace, cell: Cell):
        settings, runs = config(options, cell)
        mesh = make_mesh(Sharding(1, 1), jax.devices()[:1])
        self.program = training.Program(training.resolve(settings), mesh, runs)
        self.compiled = self.program.compile(("init", "advance"))["advance"]
        self.state = None

    def __call__(self, steps: int):
        if self.state is None:
            self.state = self.program.init()
        self.state, found = self.program.advance(self.state, np.int32(steps))
        return found

    def failed(self) -> bool:
        return bool((np.asarray(self.state.failed_at) >= 0).any())


def compile_cell(options: argparse.Namespace, cell: Cell) -> tuple[Any, Any, float]:
    """The call, the compiled program, and seconds; raises what the compiler raises."""
    begin = time.monotonic()
    if cell.which in ("update", "runs"):
        call = Update(options, cell)
        compiled = call.compiled
    else:
        check = cell.which == "check"
        sizes = (2 if check else options.batch, options.width, options.heads)
        n = options.checked if check else options.length
        function, arguments = layer(cell, sizes, n)
        # Projections in float32 are exact where forms are compared, in TF32 nowhere.
        exact = "highest" if cell.form[0] == "float32" else None
        with jax.default_matmul_precision(exact):
            call = compiled = function.lower(*arguments).compile()
    seconds = time.monotonic() - begin
    hopper.say(f"compiled {cell.name()}: {seconds:.1f} s")
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
    """The parameter whose gradient is furthest off, relative to its own size."""
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
    """Errors of the forms of one layer; inputs are drawn anew in every run."""
    rng = np.random.default_rng(options.check_seed)
    shape = (2, options.checked, options.width)
    # Both dtypes start from the same numbers, which 16 bits hold.
    x, cotangent = (
        np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16), np.float32)
        for _ in range(2)
    )
    program = mixers.Program(name, "float32", "forward", 2, shape[1], *shape[2:], options.heads, 0)
    params = mixers.parameters(program)
    results = {}
    for form in FORMS:
        call = wait(Cell(name, "check", form))[0]
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
            # Where the recurrent form has the same error, the projections make it.
            shared = 1.5 * found["bfloat16_recurrent"][name] if dtype == "bfloat16" else 0.0
            if not error <= max(shared, out if name == "output" else gradients):
                return f"{dtype}: error {error:.1e} of {name}"
    return None


def count_kernels(compiled) -> dict[str, int]:
    """Instructions of the compiled program that are kernels, of every computation once."""
    text = compiled.as_text()
    names = re.findall(r"^\s*(?:ROOT )?%\S+ = \S+.*? (fusion|custom-call|while)\(", text, re.M)
    return dict(collections.Counter(names))


def profile(call, times: int) -> list[tuple[str, float, float]]:
    """(kernel, launches, microseconds) of one call, longest first."""
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


def measure_cell(options, cell: Cell, wait, deadline: float) -> dict[str, Any]:
    """Times of one cell; raises what goes wrong."""
    call, compiled, seconds = wait(cell)
    update = cell.which in ("update", "runs")
    steps = {"update": 4, "runs": 20}.get(cell.which, 1)
    if update:
        run = functools.partial(call, steps)
        short = functools.partial(call, 1)
    else:
        program = mixers.Program(
            cell.mixer, "float32", "forward", 1, 16, options.width, options.heads, 0
        )
        params = mixers.parameters(program)
        keys = jax.random.split(jax.random.key(options.check_seed), 2)
        shape = (options.batch, options.length, options.width)
        x, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        run = short = functools.partial(call, params, x, cotangent)
    jax.block_until_ready(run())
    budget = min(options.budget, max(0.5, deadline - time.monotonic()))
    timing = measure.time_interleaved({"": run}, options.repeats, budget)[""]
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
        except Exception as error:  # a profile is an extra
            hopper.say(f"no profile: {type(error).__name__} {hopper.brief(error)}")
            kernels = []
        record["kernel_us"] = round(sum(row[2] for row in kernels), 1)
        record["kernel_launches"] = round(sum(row[1] for row in kernels))
        record["kernels"] = kernels[: options.profile]
        if update:
            call.state = None
    return record


def fields(options: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """What identifies the record of `cell`."""
    small = cell.which == "runs"
    heads, width = (1, 64) if small else (options.heads, options.width)
    return {
        "implementation": cell.mixer,
        "pass": cell.which,
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
    add("--repeats", type=int, default=5)
    add("--budget", type=float, default=1.5, help="seconds for the repeats of one cell")
    add("--only", nargs="+", choices=lla.mixers.names(), default=NAMES)
    add("--cells", nargs="+", choices=CELLS, default=CELLS)
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="threads that compile")
    add("--cell-limit", type=float, default=60.0, help="seconds that a cell may take at most")
    add("--limit", type=float, default=200.0, help="seconds after which the process ends")
    add("--profile", type=int, default=0, help="kernels to list per cell; 0 for no profile")
    add("--operators", nargs="*", help="whose errors to measure; all by default")
    add("--no-check", dest="check", action="store_false", help="do not compare layers")
    add("--commit", help="recorded where the repository's history is absent")
    add("--check-seed", type=int, default=None, help="of the inputs; None for fresh ones")
    add("--output", type=pathlib.Path, help="default: results/mixer_updates_<device>.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    with mixer_kernels.unmeasured_kernels():  # kernels that no GPU has run are measured here, too
        return _run(parse(argv))


def _run(options: argparse.Namespace) -> int:
    begin = time.monotonic()
    if options.check_seed is None:
        options.check_seed = secrets.randbits(31)
    output = options.output or measure.RESULTS / f"mixer_updates_{measure.device_name()}.json"
    unsaid = ("only", "cells", "workers", "limit", "cell_limit", "commit", "output", "profile")
    settings = {name: value for name, value in vars(options).items() if name not in unsaid}
    header = measure.make_header("mixer_updates", settings)
    header["commit"] = options.commit or header["commit"] or "unknown"
    results = measure.Results(output, header, KEY_FIELDS)
    results.records = []  # every run measures all that it is asked for
    hopper.say(f"{jax.devices()[0].device_kind}, results in {output}")

    executor = concurrent.futures.ThreadPoolExecutor(options.workers)
    chosen = mixer_operators.operators(1, 4, 4) if options.operators is None else options.operators
    sizes = (options.heads, options.checked, options.width // options.heads)
    checks = {name: executor.submit(mixer_operators.check, name, *sizes) for name in chosen}
    futures = {}
    for name in options.only:
        cells = [Cell(name, "check", form) for form in FORMS] if options.check else []
        for cell in [*cells, *(Cell(name, which) for which in options.cells)]:
            futures[cell] = executor.submit(compile_cell, options, cell)
    for name, future in checks.items():
        try:
            found = future.result(2 * options.cell_limit)
        except Exception as error:
            found = {"reason": f"{type(error).__name__} {hopper.brief(error)}"}
        results.header.setdefault("operators", {})[name] = found
        hopper.say(f"operator {name}: output and gradients")
        for form, numbers in found.items():
            hopper.say(f"    {form:14s} {numbers}")

    # Compilers that try kernels would disturb what is measured, and show in profiles.
    concurrent.futures.wait(futures.values(), 0.7 * options.limit - (time.monotonic() - begin))
    failures = 0
    softmax: dict[str, float] = {}
    for name in options.only:
        deadline = time.monotonic() + options.cell_limit

        def wait(cell, deadline=deadline):
            return futures[cell].result(max(0.0, deadline - time.monotonic()))

        try:
            found = check(options, name, wait) if options.check else {}
            reason = judge(found) if found else "not compared with the recurrent form"
        except Exception as error:  # one mechanism must not stop the others
            found, reason = {}, f"{type(error).__name__} {hopper.brief(error)}"
        hopper.say(f"{name}: {reason or 'errors within bounds'}")
        for form, pairs in found.items():
            numbers = {k: f"{v:.1e}" for k, v in pairs.items() if k != "worst"}
            hopper.say(f"  {form}: {numbers}, worst {pairs['worst'][0]} {pairs['worst'][1]:.1e}")
        for which in options.cells:
            cell = Cell(name, which)
            deadline = time.monotonic() + options.cell_limit
            record = {**fields(options, cell), "errors": found, "bounds": BOUNDS}
            record["truth"] = f"recurrent form, float32, {options.checked} tokens"
            try:
                waiting = functools.partial(wait, deadline=deadline)
                record |= measure_cell(options, cell, waiting, deadline)
                record["status"] = "timed"
                if reason:
                    record["warning"] = reason
                if name == "softmax":
                    softmax[which] = record["time_median_s"]
                if which in softmax:
                    record["times_softmax"] = round(record["time_median_s"] / softmax[which], 3)
            except Exception as error:
                failures += 1
                record |= {"status": "unavailable", "reason": hopper.brief(error)}
            results.add([record])
            hopper.say(_line(record, time.monotonic() - begin))
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


if __name__ == "__main__":
    hopper.end_at_the_limit(parse(None).limit)
    code = main()
    sys.stdout.flush()
    os._exit(code)  # compilations that nobody waits for must not hold the process
