"""Error, time and memory of the Hopper kernels; see pages/hopper.md.

    python experiments/benchmarks/hopper.py [--limit SECONDS] [--output FILE]

Everything is compiled first and then compared with the exact result in float64. Only what is right
is timed. The exit status is 1 if something was refused, and 0 if the time ran out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.experiments.benchmarks import hopper_tables, truth
from lla.experiments.benchmarks.compilation import Compiled, compile_all, try_compile
from lla.experiments.benchmarks.formatting import progress_line
from lla.experiments.benchmarks.hopper_programs import (
    KEY_FIELDS,
    Case,
    Program,
    input_shapes,
    make_cases,
    make_function,
    make_inputs,
    on_device,
)
from lla.experiments.benchmarks.results import add_options, open_results
from lla.experiments.benchmarks.timing import (
    GRACE,
    START,
    device_lock,
    error_line,
    exit_after,
    log,
    time_interleaved,
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--implementation", default="mosaic_gpu", choices=("mosaic_gpu", "xla"))
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--ridges", type=float, nargs="+", default=[10.0, 1.0, 0.1, 0.01])
    mechanisms = ("lla", "softmax", "parallax")
    add("--mechanisms", nargs="+", choices=mechanisms, default=list(mechanisms))
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=4096, help="of the speed cases")
    add("--accuracy_length", type=int, default=1024)
    add("--growth_lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    add("--long_length", type=int, default=65536, help="one head; 0 for none")
    add("--tol", type=float, help="of the solve; the kernels' own choice if not given")
    add("--backward_tol", type=float, help="of the adjoint solve")
    add("--matmul_size", type=int, default=8192)
    add_options(parser, "seed limit lock commit output", repeats=7, budget=1.0, workers=8)
    add("--compile_share", type=float, default=0.7, help="part of the limit compiling may take")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Compiling


def compile_program(program: Program, solver: lla.Solver | None = None) -> Compiled:
    """Compiles one program; `solver` is that of `lla`, except in float64."""
    wide = program.dtype == "float64"

    def build():
        with jax.enable_x64(wide):
            shapes = {
                name: jax.ShapeDtypeStruct(
                    shape, jnp.float32 if name == "ridge" and not wide else program.dtype
                )
                for name, shape in input_shapes(program).items()
            }
            function = make_function(program, None if wide else solver)
            return jax.jit(function).lower(shapes).compile()

    return try_compile(build)


# ---------------------------------------------------------------------------------------------
# Accuracy


def bound(case: Case) -> float:
    """The largest relative error of the output; gradients may have ten times as much."""
    program = case.program
    if program.implementation == "cudnn" or case.inputs != "normal":
        return 1e-2
    easy = program.mechanism != "lla" or (program.ridge >= 1 and program.head_dim <= 64)
    return 4e-3 if easy else 1e-2


def exact(program: Program, arrays: Mapping[str, np.ndarray], compiled: Mapping) -> dict:
    """Results of the dense reference in float64, for the inputs as rounded to 16 bits."""
    dense = program.truth()
    wide = {
        name: array if name == "ridge" else np.asarray(jnp.asarray(array, program.dtype))
        for name, array in arrays.items()
    }
    if program.mechanism == "lla":
        rows = arrays["query"].shape[:-1]
        wide["ridge"] = np.full(rows, program.ridge)
    wide = {name: array.astype(np.float64) for name, array in wide.items()}
    found = compiled.get(dense) or compile_program(dense)
    with jax.enable_x64(True):
        try:
            if found.call is None:
                raise RuntimeError(found.error)
            results = found.call({name: jnp.asarray(array) for name, array in wide.items()})
            return jax.tree.map(np.asarray, results)
        except Exception as error:
            if jax.default_backend() == "cpu":
                raise
            log(f"exact results on the CPU: {error_line(error)}")
        with jax.default_device(jax.devices("cpu")[0]):
            results = jax.jit(make_function(dense))(wide)
            return jax.tree.map(np.asarray, results)


def verdict(case: Case, got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> dict:
    """Errors, bounds and status of a case of the group "accuracy"."""
    limit = bound(case)
    judged = truth.verdict(got, want, truth.limits_for(want, limit, 10 * limit))
    worst = truth.worst_row(got["output"], want["output"])
    return {**judged, "worst_row": worst, "truth": "reference, float64"}


def run_accuracy(options, cases: Sequence[Case], compiled: Mapping, results) -> None:
    """Measures errors, and whether two runs agree in every bit."""
    records, calls, truths = {}, {}, {}
    for case in cases:
        program, found = case.program, compiled[case.program.compiled_as()]
        record = records[case] = {**case.fields(), **found.memory}
        try:
            if found.call is None:
                raise RuntimeError(found.error)
            arrays = make_inputs(program, case.inputs, options.seed)
            inputs = on_device(program, arrays)
            first, second = (jax.tree.map(np.asarray, found.call(inputs)) for _ in range(2))
            key = (program.truth(), program.ridge, case.inputs)
            if key not in truths:
                truths[key] = exact(program, arrays, compiled)
            iterations = first.pop("iterations", None)
            record |= verdict(case, first, truths[key])
            record["repeatable"] = all(a.tobytes() == second[n].tobytes() for n, a in first.items())
            if iterations is not None:
                record["mean_iterations"] = float(iterations)
            if record["status"] == "timed":
                calls[case] = functools.partial(found.call, inputs)
        except Exception as error:
            record |= {"status": "unavailable", "reason": error_line(error)}
    finish(options, records, calls, results)


def finish(options, records: Mapping[Case, dict], calls: Mapping, results) -> None:
    """Times `calls`, and writes the completed `records`."""
    timings = time_interleaved(calls, options.repeats, options.budget)
    for case, timing in timings.items():
        records[case].update(dataclasses.asdict(timing))
    results.add(list(records.values()))
    for record in records.values():
        where = [str(record[name]) for name in KEY_FIELDS if record[name] is not None]
        log(f"{' '.join(where)}{progress_line(record)}")


# ---------------------------------------------------------------------------------------------
# Speed


def flops(program: Program) -> float | None:
    """Floating-point operations; None if they depend on the number of iterations."""
    if program.mechanism == "matmul":
        return 2.0 * program.n**3
    if program.mechanism != "softmax":
        return None
    products = 2 if program.which == "forward" else 7  # causal n x n x d products
    return float(products * program.batch * program.heads * program.n**2 * program.head_dim)


def check(case: Case, records: Sequence[dict]) -> dict[str, Any]:
    """Errors, bounds and status of a case to be timed: those of the accuracy case like it."""
    program = case.program
    same = {
        "group": "accuracy", "inputs": "normal", "implementation": program.implementation,
        "mechanism": program.mechanism, "head_dim": program.head_dim, "ridge": program.ridge,
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
    error = truth.errors({"output": out[:rows]}, {"output": left[:rows] @ right})["output"]
    status = {"status": "timed"} if error <= 4e-3 else {"status": "refused", "reason": "wrong"}
    bounds = {"output": 4e-3}
    return {"errors": {"output": error}, "bounds": bounds, "truth": "NumPy, float64", **status}


def run_speed(options, cases: Sequence[Case], compiled: Mapping, results) -> None:
    """Times, in turns, the cases whose accuracy case is within its bounds."""
    records, calls, iterations = {}, {}, {}
    shared: dict[Any, dict[str, jax.Array]] = {}
    for case in cases:
        program, found = case.program, compiled[case.program.compiled_as()]
        record = records[case] = {**case.fields(), **found.memory}
        amount = flops(program)
        if amount is not None:
            record["flops"] = amount
        try:
            if program.mechanism != "matmul":
                record |= check(case, results.records)
            if found.call is None:
                raise RuntimeError(found.error)
            if record.get("status", "timed") != "timed":
                continue
            sizes = (program.n, program.batch, program.heads, program.head_dim)
            if sizes not in shared:
                widest = program
                if program.mechanism != "matmul":
                    widest = program._replace(mechanism="parallax", which="forward_backward")
                arrays = make_inputs(widest, case.inputs, options.seed)
                shared[sizes] = on_device(widest, arrays)
            shapes = input_shapes(program)
            inputs = {name: shared[sizes][name] for name in shapes if name != "ridge"}
            if "ridge" in shapes:
                inputs["ridge"] = jnp.full(shapes["ridge"], program.ridge, jnp.float32)
            out = jax.block_until_ready(found.call(inputs))
            if program.mechanism == "matmul":
                record |= check_matmul(out["output"], inputs)
            if "iterations" in out:
                iterations[program._replace(which="")] = float(out["iterations"])
            if not all(bool(jnp.isfinite(array).all()) for array in out.values()):
                record |= {"status": "refused", "reason": "a result is not finite"}
            del out
            if record["status"] == "timed":
                calls[case] = functools.partial(found.call, inputs)
        except Exception as error:
            for name in ("errors", "bounds", "truth", "worst_row"):
                record.pop(name, None)
            record |= {"status": "unavailable", "reason": error_line(error)}
    for case, record in records.items():
        mean = iterations.get(case.program._replace(which=""))
        if mean is not None:
            record["mean_iterations"] = mean
    finish(options, records, calls, results)


# ---------------------------------------------------------------------------------------------
# The run


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    unsaid = {"mechanisms", "output", "commit", "limit", "compile_share", "workers", "lock"}
    settings = [name for name in vars(options) if name not in unsaid]
    packages = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch")
    results = open_results("hopper", options, settings, KEY_FIELDS, packages=packages)
    cases = [case for case in make_cases(options) if not results.has(case.fields())]
    needed = [case.program.truth() for case in cases if case.group == "accuracy"]
    needed += [case.program for case in cases]
    end = START + options.limit
    deadline = time.monotonic() + options.compile_share * (end - time.monotonic())
    solver = lla.Solver(tol=options.tol, backward_tol=options.backward_tol)
    compiled = compile_all(
        needed, lambda program: compile_program(program, solver), options.workers, deadline
    )
    with device_lock(options.lock):
        return measure_all(options, cases, compiled, results, end)


def measure_all(options, cases, compiled: Mapping, results, end: float) -> int:
    """Runs all groups until the time `end`; returns the exit status."""
    missing = [case for case in cases if case.program.compiled_as() not in compiled]
    cases = [case for case in cases if case.program.compiled_as() in compiled]
    late = False
    for group, run in (("accuracy", run_accuracy), ("speed", run_speed), ("growth", run_speed)):
        for n, head_dim in dict.fromkeys(
            (0 if c.group == "accuracy" else c.program.n, c.program.head_dim)
            for c in cases
            if c.group == group
        ):
            part = [c for c in cases if c.group == group and c.program.head_dim == head_dim]
            part = [c for c in part if group == "accuracy" or c.program.n == n]
            if time.monotonic() > end:
                late = True
                missing += part
            else:
                run(options, part, compiled, results)
    for case in missing:
        log(f"no time left for {case.group} {'-'.join(map(str, case.program))}")
    if results.records:
        print(hopper_tables.markdown(results.document()), flush=True)
    refused = [record for record in results.records if record["status"] == "refused"]
    return int(bool(refused) and not (late or missing))


if __name__ == "__main__":
    exit_after(parse(None).limit + GRACE)
    sys.exit(main())
