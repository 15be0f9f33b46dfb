"""Times of the stages of the Hopper kernels; see pages/hopper_stages.md.

    python experiments/benchmarks/hopper_stages.py [--limit SECONDS] [--output FILE]

Calls the kernels of `kernels/mosaic_gpu` directly. The time of an iteration is the slope over calls
with fixed numbers of iterations. A call that does not agree with a dense computation in float64 is
not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.experiments.benchmarks import hopper
from lla.experiments.benchmarks.compilation import Compiled, compile_all, try_compile
from lla.experiments.benchmarks.formatting import provenance
from lla.experiments.benchmarks.hopper_programs import Program, make_inputs, on_device
from lla.experiments.benchmarks.results import add_options, open_results
from lla.experiments.benchmarks.timing import (
    device_lock,
    error_line,
    exit_after,
    log,
    time_interleaved,
)
from lla.runs import tables

KEY_FIELDS = (
    "implementation", "stage", "variant", "iterations", "batch", "heads", "n", "head_dim",
)  # fmt: skip
SETTINGS = ("batch", "heads", "length", "ridge", "matmul_size", "repeats", "budget", "seed")
# Work of a call without iterations, and of one iteration. The unit is a product of all visible
# pairs with the head dimension; see kernels/HOPPER.md.
FIRST = {
    "solve": 2, "solve_precise": 3, "adjoint": 3,
    "one_part": 3, "two_parts": 4, "precise": 6, "softmax": 2,
}  # fmt: skip
EACH = {"solve": 3, "solve_precise": 5, "adjoint": 3}
FULL = "full"
# Parts that the run in results/ also left out in turn. Not measured any more.
VARIANTS = {
    "no_exp": "exponentials",
    "no_sum_product": "last product",
    "no_scores_product": "product beside the logits",
    "no_reload": "copies of tiles",
    "no_weights": "logits and exponentials",
}
COUNTS = (0, 1, 3, 5)  # iterations of full calls
_BALANCE = ("solve", 3)  # the call that is timed for more heads, and its iterations
_BALANCE_FACTORS = (2, 4)
_ROWS = (
    ("first pass", "solve", False),
    ("iteration", "solve", True),
    ("first pass, two parts everywhere", "solve_precise", False),
    ("iteration, two parts everywhere", "solve_precise", True),
    ("adjoint: first pass", "adjoint", False),
    ("adjoint: iteration", "adjoint", True),
    ("output, probe in one part", "one_part", False),
    ("output, probe in two parts", "two_parts", False),
    ("output, weights in two parts, too", "precise", False),
    ("output without a probe (softmax)", "softmax", False),
)
_PROBE_ITERATIONS = 8  # of the probe that the output is computed with, in two parts
_CHECKED = 512  # queries of the first head
BOUND = 1e-2


class StageCall(NamedTuple):
    """A stage of the kernels, with `n` queries and keys in each head.

    Attributes:
      stage: one of `FIRST`.
      variant: `FULL`; the recorded run also has those in `VARIANTS`.
      iterations: of the solver.
      batch, heads, n, head_dim: sizes.
    """

    stage: str
    variant: str
    iterations: int
    batch: int
    heads: int
    n: int
    head_dim: int

    def fields(self) -> dict[str, Any]:
        which = "adjoint" if self.stage == "adjoint" else "forward"
        return {"implementation": "mosaic_gpu", "pass": which, **self._asdict()}

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.n, self.head_dim

    @property
    def solves(self) -> bool:
        return self.stage in EACH


def make_calls(options: argparse.Namespace) -> list[StageCall]:
    calls = []
    for d in options.head_dims:
        size = (options.batch, options.heads, options.length, d)
        for stage in FIRST:
            solves = stage in EACH
            calls += [StageCall(stage, FULL, t, *size) for t in (COUNTS if solves else (0,))]
        stage, t = _BALANCE
        for factor in _BALANCE_FACTORS:
            heads = factor * options.heads
            calls.append(StageCall(stage, FULL, t, options.batch, heads, options.length, d))
    return calls


# ---------------------------------------------------------------------------------------------
# Calls


class Operands(NamedTuple):
    """Arguments of the kernels, ``[B, T, N, D]``, or ``[B, N, T]`` in float32 for one number a row.

    From `high` on, they are results of a solve.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    cotangent: jax.Array
    scale: jax.Array
    ridge: jax.Array
    numbers: jax.Array
    high: jax.Array | None = None
    low: jax.Array | None = None
    shift_high: jax.Array | None = None
    shift: jax.Array | None = None
    key_mean: jax.Array | None = None
    log_sum_exp: jax.Array | None = None
    delta: jax.Array | None = None


def draw_operands(size: tuple[int, int, int, int], ridge: float, seed: int) -> Operands:
    """Standard normal arrays of batch, heads, length and head dimension."""
    batch, heads, n, head_dim = size
    keys = jax.random.split(jax.random.key(seed), 4)
    shape, rows = (batch, n, heads, head_dim), (batch, heads, n)
    arrays = [jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16) for key in keys]
    scale, ridge = (jnp.full(rows, number, jnp.float32) for number in (head_dim**-0.5, ridge))
    numbers = jnp.stack([jnp.zeros(batch, jnp.int32), jnp.full(batch, n, jnp.int32)], axis=1)
    return Operands(*arrays, scale, ridge, numbers)


def run_stage(stage_call: StageCall, given: Operands):
    """Calls the kernel of a stage; to be traced."""
    from lla.kernels.mosaic_gpu import attend, configs, launch, solve, tile

    batch, heads, n, head_dim = stage_call.size
    shape = launch.Shape(batch, n, n, heads, 1, head_dim, given.query.dtype)
    mask, chosen = tile.MaskSpec(True, None, False), configs.choose(head_dim)
    masking = launch.Masking(given.numbers, None, None)
    precise = stage_call.stage.endswith("precise")
    if stage_call.solves:
        adjoint = None
        if stage_call.stage == "adjoint":
            adjoint = solve.Adjoint(
                given.value, given.cotangent, given.log_sum_exp, given.delta, given.key_mean
            )
        return solve.solve(
            shape, mask, chosen.solve_bf16x2 if precise else chosen.solve,
            solve.CGOptions(None, stage_call.iterations, precise),
            given.query, given.key, given.scale, given.ridge, masking, adjoint,
        )  # fmt: skip
    probe = solved = None
    if stage_call.stage != "softmax":
        split = stage_call.stage != "one_part"
        probe = given.high
        solved = attend.Solved(
            given.log_sum_exp,
            given.shift if split else given.shift_high,
            given.low if split else None,
        )
    return attend.attend(
        shape, mask, chosen.attend_bf16x2 if precise else chosen.attend,
        given.query, given.key, given.value, given.scale, masking, probe, solved, bf16x2=precise,
    )  # fmt: skip


def complete(size: tuple[int, int, int, int], given: Operands) -> Operands:
    """`given` with a solution, and with cotangent times output for the adjoint solve."""
    found = run_stage(StageCall("solve_precise", FULL, _PROBE_ITERATIONS, *size), given)
    names = ("high", "low", "shift_high", "shift", "key_mean", "log_sum_exp")
    given = given._replace(**{name: getattr(found, name) for name in names})
    out = run_stage(StageCall("two_parts", FULL, 0, *size), given).out
    delta = (given.cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    return given._replace(delta=jnp.swapaxes(delta, 1, 2))


def shapes_of(stage_call: StageCall) -> Operands:
    drawn = jax.eval_shape(lambda: draw_operands(stage_call.size, 1.0, 0))
    row = drawn.scale
    mean = jax.ShapeDtypeStruct(drawn.query.shape, jnp.float32)
    return drawn._replace(
        high=drawn.query, low=drawn.query, shift_high=row, shift=row, key_mean=mean,
        log_sum_exp=row, delta=row,
    )  # fmt: skip


def needed(stage_call: StageCall, given: Operands) -> Operands:
    """`given` with None for what the call does not read."""
    names = {"query", "key", "scale", "numbers"}
    names |= {"ridge"} if stage_call.solves else {"value"}
    if stage_call.stage == "adjoint":
        names |= {"value", "cotangent", "log_sum_exp", "delta", "key_mean"}
    elif not stage_call.solves and stage_call.stage != "softmax":
        names |= {"high", "log_sum_exp"}
        names |= {"shift_high"} if stage_call.stage == "one_part" else {"low", "shift"}
    return Operands(*(a if name in names else None for name, a in given._asdict().items()))


def compile_call(stage_call: StageCall) -> Compiled:
    """Compiles a call without inputs."""
    run = jax.jit(functools.partial(run_stage, stage_call))
    return try_compile(lambda: run.lower(needed(stage_call, shapes_of(stage_call))).compile())


# ---------------------------------------------------------------------------------------------
# Checks


def exact(given: Operands) -> dict[str, np.ndarray]:
    """Results in float64 for the first queries of the first head."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arrays = [
            jnp.asarray(np.asarray(a[:1, :_CHECKED, :1]).astype(np.float64)) for a in given[:4]
        ]
        query, key, value, cotangent = arrays
        ridge = float(given.ridge[0, 0, 0])
        options = {"ridge": ridge, "implementation": "reference"}
        output = lla.local_linear_attention(query, key, value, **options)
        with jax.numpy_dtype_promotion("standard"):
            softmax = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        query, key, value, cotangent, output, softmax = (
            np.asarray(a)[0, :, 0] for a in (*arrays, output, softmax)
        )
    logits = query @ key.T * query.shape[-1] ** -0.5
    logits = np.where(np.tril(np.ones(logits.shape, bool)), logits, -np.inf)
    log_sum_exp = np.logaddexp.reduce(logits, axis=1)
    weights = np.exp(logits - log_sum_exp[:, None])
    return {
        "log_sum_exp": log_sum_exp / np.log(2),
        "cotangent_mean": (weights * (cotangent @ value.T)).sum(1),
        "output": output,
        "softmax": softmax,
    }


def verdict(stage_call: StageCall, result, want: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    """Status, errors and bounds. Without `want`, results only have to be finite."""
    if stage_call.solves and not stage_call.iterations:
        result = result._replace(shift_high=None, shift=None)  # not written without iterations
    arrays = jax.tree.leaves(result)
    finite = all(bool(jnp.isfinite(array).all()) for array in arrays)
    if stage_call.solves:
        name = "cotangent_mean" if stage_call.stage == "adjoint" else "log_sum_exp"
        got, truth = getattr(result, name)[0, 0, :_CHECKED], name
    else:
        name, truth = "output", "softmax" if stage_call.stage == "softmax" else "output"
        got = result.out[0, :_CHECKED, 0]
    fields = {"errors": {}, "bounds": {}, "truth": "none", "finite": finite, "status": "timed"}
    if want is not None:
        got = np.asarray(got).astype(np.float64)
        error = float(np.linalg.norm(got - want[truth]) / np.linalg.norm(want[truth]))
        fields["errors"] = {name: error if np.isfinite(error) else None}
        fields["bounds"] = {name: BOUND}
        fields["truth"] = f"float64, first head, {len(got)} queries"
        if not error <= BOUND:
            fields |= {"status": "refused", "reason": f"{name}: error {error:.1e}"}
    if not finite and fields["status"] == "timed":
        fields |= {"status": "refused", "reason": "a result is not finite"}
    return fields


# ---------------------------------------------------------------------------------------------
# The run


def measure_all(options, stages: Sequence[StageCall], compiled: Mapping, results) -> None:
    """Checks the calls of one head dimension and times them in turns."""
    records: dict[StageCall, dict] = {}
    calls: dict[StageCall, Callable] = {}
    main = (options.batch, options.heads, options.length, stages[0].head_dim)
    operands: dict[tuple, Operands] = {}
    want = None
    for stage_call in stages:
        found = compiled[stage_call]
        record = records[stage_call] = {**stage_call.fields(), **found.memory}
        record |= {"flops": flops(units(stage_call.stage, stage_call.iterations), *stage_call.size)}
        record["compile_s"] = round(found.seconds, 2)
        try:
            if found.call is None:
                raise RuntimeError(found.error)
            if stage_call.size not in operands:
                given = jax.jit(
                    lambda stage_call=stage_call: draw_operands(
                        stage_call.size, options.ridge, options.seed
                    )
                )()
                if stage_call.size == main:
                    given = jax.jit(functools.partial(complete, main))(given)
                    want = exact(given)
                operands[stage_call.size] = given
            call = functools.partial(found.call, needed(stage_call, operands[stage_call.size]))
            record |= verdict(stage_call, call(), want if stage_call.size == main else None)
            if record["status"] == "timed":
                calls[stage_call] = call
        except Exception as error:
            record |= {"status": "unavailable", "reason": error_line(error)}
    for stage_call, timing in time_interleaved(calls, options.repeats, options.budget).items():
        records[stage_call] |= dataclasses.asdict(timing)
    results.add(list(records.values()))


def measure_matmul(options) -> dict[str, Any]:
    size = options.matmul_size
    program = Program("xla", "matmul", "forward", 1, 1, 1, size, size, None, None, "bfloat16")
    record = {"implementation": "xla", "pass": "matmul", "stage": "matmul", "variant": FULL}
    record |= {"iterations": 0, "batch": 1, "heads": 1, "n": size, "head_dim": size}
    found = hopper.compile_program(program)
    if found.call is None:
        return record | {"status": "unavailable", "reason": found.error}
    arrays = make_inputs(program, "normal", options.seed)
    inputs = on_device(program, arrays)
    call = functools.partial(found.call, inputs)
    record |= hopper.check_matmul(call()["output"], inputs) | {"flops": hopper.flops(program)}
    if record["status"] == "timed":
        timing = time_interleaved({"": call}, options.repeats, options.budget)[""]
        record |= dataclasses.asdict(timing)
    return record


def refusal() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    array = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    return lla.explain(array, array, array, implementation="mosaic_gpu")["mosaic_gpu"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--head_dims", type=int, nargs="+", choices=(64, 128), default=[64, 128])
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=4096, help="a multiple of 128")
    add("--ridge", type=float, default=10.0)
    add("--matmul_size", type=int, default=8192)
    add_options(parser, "seed workers limit lock commit output", repeats=9, budget=1.0)
    options = parser.parse_args(argv)
    if options.length % 128:
        parser.error("--length must be a multiple of 128")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if (reason := refusal()) is not None:
        print(reason, file=sys.stderr)
        return 1
    results = open_results("hopper_stages", options, SETTINGS, KEY_FIELDS)
    stages = [call for call in make_calls(options) if not results.has(call.fields())]
    end = time.monotonic() + 0.7 * options.limit
    compiled = compile_all(stages, compile_call, options.workers, end)
    with device_lock(options.lock):
        if not any(record["stage"] == "matmul" for record in results.records):
            results.add([measure_matmul(options)])
        for head_dim in options.head_dims:
            part = [call for call in stages if call in compiled and call.head_dim == head_dim]
            if part:
                measure_all(options, part, compiled, results)
                log(f"head dimension {head_dim} measured")
    print(markdown(results.document()), flush=True)
    return int(any(record["status"] == "refused" for record in results.records))


# ---------------------------------------------------------------------------------------------
# Tables


def units(stage: str, iterations: int) -> int:
    """The work of a call, in units of `FIRST` and `EACH`."""
    return FIRST[stage] + iterations * EACH.get(stage, 0)


def flops(units: float, batch: int, heads: int, n: int, head_dim: int) -> float:
    """Operations of causal products, which have half of the ``2 n^2 d`` of full ones."""
    return float(units) * batch * heads * n**2 * head_dim


def slope(seconds: Mapping[int, float]) -> float | None:
    """Seconds of an iteration, by least squares over the calls with at least one; None for fewer.

    Args:
      seconds: of a call, by its number of iterations.
    """
    counts = sorted(count for count in seconds if count >= 1)
    if len(counts) < 2:
        return None
    return float(np.polyfit(counts, [seconds[count] for count in counts], 1)[0])


def matmul_rate(records: Sequence[Mapping]) -> float | None:
    """Operations in a second of the plain matrix product, if it was timed."""
    found = [r for r in records if r["stage"] == "matmul" and r["status"] == "timed"]
    return found[0]["flops"] / found[0]["time_median_s"] if found else None


def amount(records: Sequence[Mapping], stage: str, variant: str, each: bool, field: str):
    """`field` of a call without iterations, or of an iteration; None if that was not timed."""
    found = {
        r["iterations"]: r[field]
        for r in records
        if (r["stage"], r["variant"], r["status"]) == (stage, variant, "timed")
    }
    return slope(found) if each else found.get(0)


def markdown(document: Mapping) -> str:
    """Provenance and tables of a result file of `hopper_stages.py`."""
    records, settings = document["records"], document["header"]["settings"]
    rate = matmul_rate(records)
    parts = [provenance(document)]
    if rate is not None:
        parts.append(f"Matrix product on the same card: {rate / 1e12:.0f} TFLOP/s.")
    size = settings["batch"], settings["heads"], settings["length"]
    ours = [r for r in records if r["stage"] in FIRST]
    for head_dim in sorted({r["head_dim"] for r in ours}):
        here = [r for r in ours if r["head_dim"] == head_dim]
        main = [r for r in here if (r["batch"], r["heads"], r["n"]) == size]
        if main:
            parts.append(_stages(main, head_dim, size, rate))
    if balance := _balance(ours, settings["length"]):
        parts.append(balance)
    missing = [
        f"- {r['stage']}, {r['variant']}, {r['iterations']} iterations, head dimension "
        f"{r['head_dim']}: {r['status']}: {r['reason']}"
        for r in records
        if r["status"] != "timed"
    ]
    return "\n\n".join([*parts, "\n".join(missing)] if missing else parts)


def _stages(records: Sequence[Mapping], head_dim: int, size, rate: float | None) -> str:
    rows = []
    measured = {r["variant"] for r in records}
    variants = {name: what for name, what in VARIANTS.items() if name in measured}
    for label, stage, each in _ROWS:
        seconds = amount(records, stage, FULL, each, "time_median_s")
        if seconds is None:
            continue
        reached = amount(records, stage, FULL, each, "flops") / seconds
        share = "" if rate is None else f"{reached / rate:.0%}"
        row = [label, f"{1e3 * seconds:.3f}", f"{reached / 1e12:.0f}", share]
        for variant in variants:
            less = amount(records, stage, variant, each, "time_median_s")
            row.append("" if less is None else f"{1e3 * less:.3f} ({less / seconds - 1:+.0%})")
        rows.append(row)
    batch, heads, n = size
    head = ["stage", "ms", "TFLOP/s", "of the matrix product"]
    head += [f"without {what}" for what in variants.values()]
    return (
        f"**Head dimension {head_dim}**, batch {batch}, {heads} heads, n = {n}: median ms of every "
        "stage, and when something is left out (exponentials and last product stay in the tiles on "
        f"the border of the mask, {2 / (n / 128 + 1):.0%} of all).\n\n"
        + tables.markdown(head, rows)
    )


def _balance(records: Sequence[Mapping], n: int) -> str:
    """Time of a head against the number of heads, where more than one number was timed."""
    full = [r for r in records if r["variant"] == FULL and r["status"] == "timed" and r["n"] == n]
    rows = []
    for case in dict.fromkeys((r["head_dim"], r["stage"], r["iterations"]) for r in full):
        here = [r for r in full if (r["head_dim"], r["stage"], r["iterations"]) == case]
        here.sort(key=lambda r: r["batch"] * r["heads"])
        if len(here) < 2:
            continue
        head_dim, stage, iterations = case
        for r in here:
            count, seconds = r["batch"] * r["heads"], r["time_median_s"]
            rate = flops(units(stage, iterations), r["batch"], r["heads"], n, head_dim) / seconds
            rows.append(
                [
                    str(head_dim),
                    f"{stage}, {iterations} iterations",
                    str(count),
                    f"{1e3 * seconds:.3f}",
                    f"{1e6 * seconds / count:.2f}",
                    f"{rate / 1e12:.0f}",
                ]
            )
    if not rows:
        return ""
    head = ["d", "call", "batch x heads", "ms", "µs a head", "TFLOP/s"]
    return f"**Balance of load**, n = {n}.\n\n" + tables.markdown(head, rows)


if __name__ == "__main__":
    exit_after(parse(None).limit)
    sys.exit(main())
