"""Error, time and memory of the Hopper kernels; see README.md beside this file.

    python experiments/benchmarks/hopper.py [--limit SECONDS] [--output FILE]

Everything is compiled first, then compared with the exact result in float64, and only what is right
is timed. The exit status is 1 if something was refused, and 0 if the time ran out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import hopper_tables
import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
import subjects
from hopper_cells import (
    KEY_FIELDS,
    Cell,
    Program,
    input_shapes,
    make_cells,
    make_function,
    make_inputs,
    on_device,
)

import lla

_START = time.monotonic()
_GRACE = 8.0  # seconds beyond the limit after which the process is ended


def say(text: str) -> None:
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--implementation", default="mosaic_gpu", choices=("mosaic_gpu", "xla"))
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--ridges", type=float, nargs="+", default=[10.0, 1.0, 0.1, 0.01])
    members = ("lla", "softmax", "parallax")
    add("--members", nargs="+", choices=members, default=list(members))
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=4096, help="of the speed cells")
    add("--accuracy_length", type=int, default=1024)
    add("--growth_lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    add("--long_length", type=int, default=65536, help="one head; 0 for none")
    add("--tol", type=float, help="of the solve; the kernels' own choice if not given")
    add("--backward_tol", type=float, help="of the adjoint solve")
    add("--matmul_size", type=int, default=8192)
    add("--repeats", type=int, default=7)
    add("--budget", type=float, default=1.0, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=8, help="threads that compile")
    add("--limit", type=float, default=1e9, help="seconds after which it stops with what it has")
    add("--compile_share", type=float, default=0.7, help="part of the limit compiling may take")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/hopper_<device>.json")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Compiling


@dataclasses.dataclass(frozen=True)
class Compiled:
    call: Callable[[Mapping[str, jax.Array]], dict] | None
    memory: dict[str, int]
    seconds: float
    error: str | None = None


def compile_program(program: Program, solver: lla.Solver | None = None) -> Compiled:
    """One program; `solver` is that of `lla` but for the exact reference."""
    start = time.monotonic()
    wide = program.dtype == "float64"
    try:
        with jax.enable_x64(wide):
            shapes = {
                name: jax.ShapeDtypeStruct(
                    shape, jnp.float32 if name == "ridge" and not wide else program.dtype
                )
                for name, shape in input_shapes(program).items()
            }
            function = make_function(program, None if wide else solver)
            compiled = jax.jit(function).lower(shapes).compile()
            found = compiled.memory_analysis()
    except Exception as error:  # one kernel that does not compile must not stop the others
        return Compiled(None, {}, time.monotonic() - start, brief(error))
    memory = {
        "temp_bytes": int(found.temp_size_in_bytes),
        "output_bytes": int(found.output_size_in_bytes),
    }
    return Compiled(compiled, memory, time.monotonic() - start)


def brief(error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0][:300]}"


def compile_all(
    programs: Iterable[Program], workers: int, deadline: float, solver: lla.Solver | None = None
) -> dict:
    """Compiled programs; those that were not begun before `deadline` are missing."""
    executor = concurrent.futures.ThreadPoolExecutor(workers)
    futures = {executor.submit(compile_program, p, solver): p for p in dict.fromkeys(programs)}
    done = {}
    say(f"compiling {len(futures)} programs")

    def collect(waited, timeout):
        for future in concurrent.futures.as_completed(waited, timeout):
            program, result = futures[future], future.result()
            done[program] = result
            name = "-".join(str(part) for part in program if part is not None)
            outcome = f"{result.seconds:.1f} s" + (f", {result.error}" if result.error else "")
            say(f"compiled {len(done)} of {len(futures)}: {name}: {outcome}")

    try:
        collect(futures, max(0.0, deadline - time.monotonic()))
    except concurrent.futures.TimeoutError:
        executor.shutdown(wait=False, cancel_futures=True)
        say("no more time to compile; waiting for what has begun")
        collect([f for f, p in futures.items() if p not in done and not f.cancelled()], None)
    executor.shutdown()
    return done


# ---------------------------------------------------------------------------------------------
# Accuracy


def bound(cell: Cell) -> float:
    """Largest relative error of the output; gradients may have ten times as much."""
    program = cell.program
    if program.implementation == "cudnn" or cell.inputs != "normal":
        return 1e-2
    easy = program.member != "lla" or (program.ridge >= 1 and program.head_dim <= 64)
    return 4e-3 if easy else 1e-2


def exact(program: Program, arrays: Mapping[str, np.ndarray], compiled: Mapping) -> dict:
    """Results of the dense reference in float64 for the rounded inputs."""
    truth = program.truth()
    wide = {
        name: array if name == "ridge" else np.asarray(jnp.asarray(array, program.dtype))
        for name, array in arrays.items()
    }
    if program.member == "lla":
        rows = arrays["query"].shape[:-1]
        wide["ridge"] = np.full(rows, program.ridge)
    wide = {name: array.astype(np.float64) for name, array in wide.items()}
    found = compiled.get(truth) or compile_program(truth)
    with jax.enable_x64(True):
        try:
            if found.call is None:
                raise RuntimeError(found.error)
            results = found.call({name: jnp.asarray(array) for name, array in wide.items()})
            return jax.tree.map(np.asarray, results)
        except Exception as error:
            if jax.default_backend() == "cpu":
                raise
            say(f"exact results on the CPU: {brief(error)}")
        with jax.default_device(jax.devices("cpu")[0]):
            results = jax.jit(make_function(truth))(wide)
            return jax.tree.map(np.asarray, results)


def verdict(cell: Cell, got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> dict:
    """Fields of an accuracy record."""
    errors = subjects.errors(got, want)
    limit = bound(cell)
    bounds = {name: limit if name == "output" else 10 * limit for name in errors}
    difference = np.asarray(got["output"]).astype(np.float64) - want["output"]
    size = np.linalg.norm(want["output"], axis=-1)
    worst = float((np.linalg.norm(difference, axis=-1) / size).max())
    bad = [name for name in errors if not errors[name] <= bounds[name]]
    fields = {
        "errors": {name: e if np.isfinite(e) else None for name, e in errors.items()},
        "bounds": bounds,
        "worst_row": worst if np.isfinite(worst) else None,
        "truth": "reference, float64",
        "status": "refused" if bad else "timed",
    }
    if bad:
        listed = ", ".join(f"{name} {errors[name]:.1e} > {bounds[name]:.1e}" for name in bad)
        fields["reason"] = f"error too large: {listed}"
    return fields


def run_accuracy(options, cells: Sequence[Cell], compiled: Mapping, results) -> None:
    """Errors of `cells` and whether two runs agree in every bit."""
    records, calls, truths = {}, {}, {}
    for cell in cells:
        program, found = cell.program, compiled[cell.program.compiled_as()]
        record = records[cell] = {**cell.fields(), **found.memory}
        try:
            if found.call is None:
                raise RuntimeError(found.error)
            arrays = make_inputs(program, cell.inputs, options.seed)
            inputs = on_device(program, arrays)
            first, second = (jax.tree.map(np.asarray, found.call(inputs)) for _ in range(2))
            case = (program.truth(), program.ridge, cell.inputs)
            if case not in truths:
                truths[case] = exact(program, arrays, compiled)
            iterations = first.pop("iterations", None)
            record |= verdict(cell, first, truths[case])
            record["repeatable"] = all(a.tobytes() == second[n].tobytes() for n, a in first.items())
            if iterations is not None:
                record["mean_iterations"] = float(iterations)
            if record["status"] == "timed":
                calls[cell] = functools.partial(found.call, inputs)
        except Exception as error:
            record |= {"status": "unavailable", "reason": brief(error)}
    finish(options, records, calls, results)


def finish(options, records: Mapping[Cell, dict], calls: Mapping, results) -> None:
    """Times `calls`, completes and writes `records`."""
    timings = measure.time_interleaved(calls, options.repeats, options.budget)
    for cell, timing in timings.items():
        records[cell].update(dataclasses.asdict(timing))
    results.add(list(records.values()))
    for record in records.values():
        where = [str(record[name]) for name in KEY_FIELDS if record[name] is not None]
        say(f"{' '.join(where)}{report.progress_line(record, ())}")


# ---------------------------------------------------------------------------------------------
# Speed


def flops(program: Program) -> float | None:
    """Floating-point operations where they do not depend on a number of iterations."""
    if program.member == "matmul":
        return 2.0 * program.n**3
    if program.member != "softmax":
        return None
    products = 2 if program.which == "forward" else 7  # causal n x n x d products
    return float(products * program.batch * program.heads * program.n**2 * program.head_dim)


def check(cell: Cell, records: Sequence[dict]) -> dict[str, Any]:
    """Errors, bounds and status of a cell that is timed, from the accuracy cell of its kind."""
    program = cell.program
    same = {
        "group": "accuracy", "inputs": "normal", "implementation": program.implementation,
        "member": program.member, "head_dim": program.head_dim, "ridge": program.ridge,
        "ridge_kind": program.ridge_kind,
    }  # fmt: skip
    found = next((r for r in records if all(r[k] == v for k, v in same.items())), None)
    if found is None or found["status"] == "unavailable":
        reason = "its error was not measured" if found is None else found["reason"]
        return {"status": "unavailable", "reason": reason}
    names = list(found["errors"]) if program.which == "forward_backward" else ["output"]
    fields = {
        "errors": {name: found["errors"][name] for name in names},
        "bounds": {name: found["bounds"][name] for name in names},
        "worst_row": found["worst_row"],
        "truth": f"{found['truth']}, n = {found['n']}",
    }
    errors, bounds = fields["errors"], fields["bounds"]
    bad = [n for n in names if errors[n] is None or not errors[n] <= bounds[n]]
    if bad:
        return {**fields, "status": "refused", "reason": found["reason"]}
    return {**fields, "status": "timed"}


def check_matmul(out: jax.Array, inputs: Mapping[str, jax.Array]) -> dict[str, Any]:
    rows = 8
    left, right = (np.asarray(inputs[name]).astype(np.float64) for name in ("query", "key"))
    error = subjects.errors({"output": out[:rows]}, {"output": left[:rows] @ right})["output"]
    status = {"status": "timed"} if error <= 4e-3 else {"status": "refused", "reason": "wrong"}
    bounds = {"output": 4e-3}
    return {"errors": {"output": error}, "bounds": bounds, "truth": "NumPy, float64", **status}


def run_speed(options, cells: Sequence[Cell], compiled: Mapping, results) -> None:
    """Times the cells whose kind is right, in turns."""
    records, calls, iterations = {}, {}, {}
    shared: dict[Any, dict[str, jax.Array]] = {}
    for cell in cells:
        program, found = cell.program, compiled[cell.program.compiled_as()]
        record = records[cell] = {**cell.fields(), **found.memory}
        amount = flops(program)
        if amount is not None:
            record["flops"] = amount
        try:
            if program.member != "matmul":
                record |= check(cell, results.records)
            if found.call is None:
                raise RuntimeError(found.error)
            if record.get("status", "timed") != "timed":
                continue
            sizes = (program.n, program.batch, program.heads, program.head_dim)
            if sizes not in shared:
                widest = program
                if program.member != "matmul":
                    widest = program._replace(member="parallax", which="forward_backward")
                arrays = make_inputs(widest, cell.inputs, options.seed)
                shared[sizes] = on_device(widest, arrays)
            shapes = input_shapes(program)
            inputs = {name: shared[sizes][name] for name in shapes if name != "ridge"}
            if "ridge" in shapes:
                inputs["ridge"] = jnp.full(shapes["ridge"], program.ridge, jnp.float32)
            out = jax.block_until_ready(found.call(inputs))
            if program.member == "matmul":
                record |= check_matmul(out["output"], inputs)
            if "iterations" in out:
                iterations[program._replace(which="")] = float(out["iterations"])
            if not all(bool(jnp.isfinite(array).all()) for array in out.values()):
                record |= {"status": "refused", "reason": "a result is not finite"}
            del out
            if record["status"] == "timed":
                calls[cell] = functools.partial(found.call, inputs)
        except Exception as error:
            for name in ("errors", "bounds", "truth", "worst_row"):
                record.pop(name, None)
            record |= {"status": "unavailable", "reason": brief(error)}
    for cell, record in records.items():
        mean = iterations.get(cell.program._replace(which=""))
        if mean is not None:
            record["mean_iterations"] = mean
    finish(options, records, calls, results)


# ---------------------------------------------------------------------------------------------
# The run


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    unsaid = ("members", "output", "commit", "limit", "compile_share", "workers", "lock")
    settings = {name: value for name, value in vars(options).items() if name not in unsaid}
    header = measure.make_header("hopper", settings)
    header["commit"] = options.commit or header["commit"]
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch"):
        try:
            header["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return header


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output or measure.RESULTS / f"hopper_{measure.device_name()}.json"
    results = measure.Results(output, make_header(options), KEY_FIELDS)
    say(f"{jax.devices()[0].device_kind}, results in {output}")
    cells = [cell for cell in make_cells(options) if not results.finished(**cell.fields())]
    needed = [cell.program.truth() for cell in cells if cell.group == "accuracy"]
    needed += [cell.program for cell in cells]
    end = _START + options.limit
    deadline = time.monotonic() + options.compile_share * (end - time.monotonic())
    solver = lla.Solver(tol=options.tol, backward_tol=options.backward_tol)
    compiled = compile_all(needed, options.workers, deadline, solver)
    with measure.exclusive(options.lock):
        return measure_all(options, cells, compiled, results, end)


def measure_all(options, cells, compiled: Mapping, results, end: float) -> int:
    """Runs all groups until the time `end`; returns the exit status."""
    missing = [cell for cell in cells if cell.program.compiled_as() not in compiled]
    cells = [cell for cell in cells if cell.program.compiled_as() in compiled]
    late = False
    for group, run in (("accuracy", run_accuracy), ("speed", run_speed), ("growth", run_speed)):
        for n, head_dim in dict.fromkeys(
            (0 if c.group == "accuracy" else c.program.n, c.program.head_dim)
            for c in cells
            if c.group == group
        ):
            part = [c for c in cells if c.group == group and c.program.head_dim == head_dim]
            part = [c for c in part if group == "accuracy" or c.program.n == n]
            if time.monotonic() > end:
                late = True
                missing += part
            else:
                run(options, part, compiled, results)
    for cell in missing:
        say(f"no time left for {cell.group} {'-'.join(map(str, cell.program))}")
    if results.records:
        print(hopper_tables.markdown(results.document()), flush=True)
    refused = [record for record in results.records if record["status"] == "refused"]
    return int(bool(refused) and not (late or missing))


def end_at_the_limit(seconds: float) -> None:
    """Ends the process even inside a compilation; what was measured is in the file already."""

    def end():
        say("the limit is reached")
        sys.stdout.flush()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    end_at_the_limit(parse(None).limit + _GRACE)
    sys.exit(main())
