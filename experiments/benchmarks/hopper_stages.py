"""What bounds the Hopper kernels: times of their stages, and of stages that lack something.

    python experiments/benchmarks/hopper_stages.py [--limit SECONDS] [--output FILE]

Calls the kernels of `kernels/mosaic_gpu` directly. The time of an iteration is the slope of calls
with a fixed number of them. A call must agree with a dense computation in float64 to be timed; then
the same call is timed with something left out, whose results are wrong on purpose:

- `no_exp`: weights are the arguments of the exponentials, negated; the fused multiply-add that
  makes them, their sums, conversions and products stay, and two exponentials a thread and tile that
  rescale an online softmax.
- `no_sum_product`: weights are not multiplied by keys or values. Logits, exponentials, the other
  product and the sums of weights, also those from ones, stay, and so does the conversion to 16 bits
  where rounded weights are summed; in the softmax output and with two parts everywhere it goes.
- `no_scores_product`: the product beside the logits, both parts of it, is not computed; the logits
  take its place. One accumulator less is live.
- `no_reload`: the ring is filled once and then only handed on; its barriers stay.
- `no_weights`: neither logits nor exponentials: all that weights which are kept from one iteration
  to the next could gain, if reading them cost nothing.

The first two and the last keep what they leave out in the tiles on the border of the mask (two of
33 on average at n = 4096), so that sums are finite and directions do not vanish: the power that a
product draws, and with it the clock, depends on the numbers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import hopper
import hopper_cells
import jax
import jax.numpy as jnp
import measure
import numpy as np
import stages_tables
from stages_tables import FULL, Cell, make_cells

import lla

KEY_FIELDS = (
    "implementation", "stage", "variant", "iterations", "batch", "heads", "n", "head_dim",
)  # fmt: skip
_PROBE_ITERATIONS = 8  # of the probe that the output is computed with, in two parts
_CHECKED = 512  # queries of the first head
BOUND = 1e-2


# ---------------------------------------------------------------------------------------------
# Variants


@contextlib.contextmanager
def left_out(variant: str) -> Iterator[None]:
    """What is traced inside is the `variant`; the kernels' names are patched for all threads."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _patches(variant):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _patches(variant: str) -> list[tuple[type, str, Callable]]:
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from lla.kernels.mosaic_gpu.launch import Ring
    from lla.kernels.mosaic_gpu.query_rows import QueryRows
    from lla.kernels.mosaic_gpu.tile import ONES, Arithmetic, by_row

    true_weights, true_online_weights = QueryRows.weights, QueryRows.online_weights
    true_summing, true_accumulate = Arithmetic.summing, Arithmetic.accumulate
    true_over_tiles, true_with_products = QueryRows.over_tiles, Arithmetic.with_products
    on_border = [True]

    def weights(self, scores, j, masked, scale, ids, log_sum_exp):
        if masked:
            return true_weights(self, scores, j, masked, scale, ids, log_sum_exp)
        return by_row(log_sum_exp, scores.shape) - scores * by_row(scale, scores.shape)

    def online_weights(self, scores, j, masked, scale, ids, largest):
        if masked:
            return true_online_weights(self, scores, j, masked, scale, ids, largest)
        new = jnp.maximum(largest, scores.max(axis=1) * scale)
        return new, by_row(new, scores.shape) - scores * by_row(scale, scores.shape)

    def over_tiles(self, body, carry):
        def noted(j, carry, masked):
            on_border[0] = masked
            try:
                return body(j, carry, masked)
            finally:
                on_border[0] = True

        return true_over_tiles(self, noted, carry)

    def summing(self, columns, loop, body, carry):
        def step(j, carry, masked, add):
            def rows_only(*sums):
                add(*[[]] * (len(sums) - 1), sums[-1] if columns[-1] == ONES else [])

            return body(j, carry, masked, add if masked else rows_only)

        return true_summing(self, columns, loop, step, carry)

    def accumulate(self, totals, *sums):
        if on_border[0]:
            return true_accumulate(self, totals, *sums)
        if totals[-1].shape[-1] == ONES:
            return (*totals[:-1], *true_accumulate(self, totals[-1:], sums[-1]))
        return totals

    def with_products(self, columns, use, *sums):
        def use_first(read):
            read = functools.cache(read)
            return use(*[read] * len(sums))

        return true_with_products(self, columns, use_first, sums[0])

    def with_second_product(self, columns, use, *sums):
        if on_border[0] or len(sums) < 2:
            return true_with_products(self, columns, use, *sums)

        def use_second(read):
            read = functools.cache(read)
            return use(*[read] * len(sums))

        return true_with_products(self, columns, use_second, sums[1])

    def produce(self, t, sources):
        slot = jax.lax.rem(t, jnp.int32(self.stages))

        @pl.when(t < self.stages)
        def _():
            for source, tile in zip(sources, self.tiles, strict=True):
                plgpu.copy_gmem_to_smem(source, tile.at[slot], self.produced.at[slot])

        @pl.when(t >= self.stages)
        def _():
            plgpu.barrier_wait(self.consumed.at[slot])
            for _ in sources:
                plgpu.barrier_arrive(self.produced.at[slot])

        return t + 1

    return {
        FULL: [],
        "no_exp": [
            (QueryRows, "weights", weights),
            (QueryRows, "online_weights", online_weights),
        ],
        "no_sum_product": [
            (QueryRows, "over_tiles", over_tiles),
            (Arithmetic, "summing", summing),
            (Arithmetic, "accumulate", accumulate),
        ],
        "no_scores_product": [(Arithmetic, "with_products", with_products)],
        "no_reload": [(Ring, "produce", produce)],
        "no_weights": [
            (QueryRows, "weights", weights),
            (QueryRows, "over_tiles", over_tiles),
            (Arithmetic, "with_products", with_second_product),
        ],
    }[variant]


# ---------------------------------------------------------------------------------------------
# Calls


class Operands(NamedTuple):
    """``[B, T, N, D]``, and rows ``[B, N, T]`` in float32; what a solve leaves from `high` on."""

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


def draw(size: tuple[int, int, int, int], ridge: float, seed: int) -> Operands:
    """Standard normal arrays of batch, heads, length and head dimension."""
    batch, heads, n, head_dim = size
    keys = jax.random.split(jax.random.key(seed), 4)
    shape, rows = (batch, n, heads, head_dim), (batch, heads, n)
    arrays = [jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16) for key in keys]
    scale, ridge = (jnp.full(rows, number, jnp.float32) for number in (head_dim**-0.5, ridge))
    numbers = jnp.stack([jnp.zeros(batch, jnp.int32), jnp.full(batch, n, jnp.int32)], axis=1)
    return Operands(*arrays, scale, ridge, numbers)


def run_stage(cell: Cell, given: Operands):
    """The result of the kernel; to be traced."""
    from lla.kernels.mosaic_gpu import attend, configs, launch, solve, tile

    batch, heads, n, head_dim = cell.size
    shape = launch.Shape(batch, n, n, heads, 1, head_dim, given.query.dtype)
    mask, chosen = tile.MaskSpec(True, None, False), configs.choose(head_dim)
    masking = launch.Masking(given.numbers, None, None)
    precise = cell.stage.endswith("precise")
    # The functions below `jit`, whose cache does not know of patches.
    if cell.solves:
        adjoint = None
        if cell.stage == "adjoint":
            adjoint = solve.Adjoint(
                given.value, given.cotangent, given.log_sum_exp, given.delta, given.key_mean
            )
        return solve.solve.__wrapped__(
            shape, mask, chosen.solve_bf16x2 if precise else chosen.solve,
            solve.CGOptions(None, cell.iterations, precise),
            given.query, given.key, given.scale, given.ridge, masking, adjoint,
        )  # fmt: skip
    probe = solved = None
    if cell.stage != "softmax":
        split = cell.stage != "one_part"
        probe = given.high
        solved = attend.Solved(
            given.log_sum_exp,
            given.shift if split else given.shift_high,
            given.low if split else None,
        )
    return attend.attend.__wrapped__(
        shape, mask, chosen.attend_bf16x2 if precise else chosen.attend,
        given.query, given.key, given.value, given.scale, masking, probe, solved, bf16x2=precise,
    )  # fmt: skip


def complete(size: tuple[int, int, int, int], given: Operands) -> Operands:
    """`given` with a solution, and with cotangent times output for the adjoint solve."""
    found = run_stage(Cell("solve_precise", FULL, _PROBE_ITERATIONS, *size), given)
    names = ("high", "low", "shift_high", "shift", "key_mean", "log_sum_exp")
    given = given._replace(**{name: getattr(found, name) for name in names})
    out = run_stage(Cell("two_parts", FULL, 0, *size), given).out
    delta = (given.cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    return given._replace(delta=jnp.swapaxes(delta, 1, 2))


def shapes_of(cell: Cell) -> Operands:
    drawn = jax.eval_shape(lambda: draw(cell.size, 1.0, 0))
    row = drawn.scale
    mean = jax.ShapeDtypeStruct(drawn.query.shape, jnp.float32)
    return drawn._replace(
        high=drawn.query, low=drawn.query, shift_high=row, shift=row, key_mean=mean,
        log_sum_exp=row, delta=row,
    )  # fmt: skip


def needed(cell: Cell, given: Operands) -> Operands:
    """`given` without what the call does not read."""
    names = {"query", "key", "scale", "numbers"}
    names |= {"ridge"} if cell.solves else {"value"}
    if cell.stage == "adjoint":
        names |= {"value", "cotangent", "log_sum_exp", "delta", "key_mean"}
    elif not cell.solves and cell.stage != "softmax":
        names |= {"high", "log_sum_exp"}
        names |= {"shift_high"} if cell.stage == "one_part" else {"low", "shift"}
    return Operands(*(a if name in names else None for name, a in given._asdict().items()))


def trace(cell: Cell, place: Callable = lambda shapes: shapes):
    """The traced call; `place` may give its arguments' shapes a sharding."""
    with left_out(cell.variant):
        function = functools.partial(run_stage, cell)
        return jax.jit(function).trace(place(needed(cell, shapes_of(cell))))


def compile_all(cells: Sequence[Cell], workers: int, end: float) -> dict[Cell, hopper.Compiled]:
    """Traces and lowers in this thread, because patches are global, and compiles in `workers`.

    Cells that were not begun before the time `end` are missing.
    """

    def finish(cell, lowered, start):
        try:
            compiled = lowered.compile()
            memory = {"temp_bytes": int(compiled.memory_analysis().temp_size_in_bytes)}
        except Exception as error:  # one program must not stop the others
            return hopper.Compiled(None, {}, time.monotonic() - start, hopper.brief(error))
        return hopper.Compiled(compiled, memory, time.monotonic() - start)

    done: dict[Cell, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        for cell in cells:
            start = time.monotonic()
            if start > end:
                break
            try:
                done[cell] = executor.submit(finish, cell, trace(cell).lower(), start)
            except Exception as error:
                reason = hopper.brief(error)
                done[cell] = hopper.Compiled(None, {}, time.monotonic() - start, reason)
        hopper.say(f"{len(done)} of {len(cells)} programs lowered")
    return {c: f if isinstance(f, hopper.Compiled) else f.result() for c, f in done.items()}


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


def verdict(cell: Cell, result, want: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    """Status, errors and bounds; without `want` results only have to be finite."""
    if cell.solves and not cell.iterations:
        result = result._replace(shift_high=None, shift=None)  # not written without iterations
    arrays = jax.tree.leaves(result)
    finite = all(bool(jnp.isfinite(array).all()) for array in arrays)
    if cell.variant != FULL:
        return {
            "status": "timed", "errors": {}, "bounds": {}, "finite": finite,
            "truth": "none: wrong on purpose",
        }  # fmt: skip
    if cell.solves:
        name = "cotangent_mean" if cell.stage == "adjoint" else "log_sum_exp"
        got, truth = getattr(result, name)[0, 0, :_CHECKED], name
    else:
        name, truth = "output", "softmax" if cell.stage == "softmax" else "output"
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


def measure_cells(options, cells: Sequence[Cell], compiled: Mapping, results) -> None:
    """Checks and times the cells of one head dimension in turns."""
    records: dict[Cell, dict] = {}
    calls: dict[Cell, Callable] = {}
    main = (options.batch, options.heads, options.length, cells[0].head_dim)
    operands: dict[tuple, Operands] = {}
    want = None
    for cell in cells:
        found = compiled[cell]
        units = stages_tables.units(cell.stage, cell.iterations)
        record = records[cell] = {**cell.fields(), **found.memory}
        record |= {"flops": stages_tables.flops(units, *cell.size)}
        record["compile_s"] = round(found.seconds, 2)
        try:
            if found.call is None:
                raise RuntimeError(found.error)
            if cell.size not in operands:
                given = jax.jit(lambda cell=cell: draw(cell.size, options.ridge, options.seed))()
                if cell.size == main:
                    given = jax.jit(functools.partial(complete, main))(given)
                    want = exact(given)
                operands[cell.size] = given
            call = functools.partial(found.call, needed(cell, operands[cell.size]))
            record |= verdict(cell, call(), want if cell.size == main else None)
            if record["status"] == "timed":
                calls[cell] = call
        except Exception as error:
            record |= {"status": "unavailable", "reason": hopper.brief(error)}
    for cell, timing in measure.time_interleaved(calls, options.repeats, options.budget).items():
        records[cell] |= dataclasses.asdict(timing)
    results.add(list(records.values()))


def measure_matmul(options) -> dict[str, Any]:
    size = options.matmul_size
    program = hopper_cells.Program(
        "xla", "matmul", "forward", 1, 1, 1, size, size, None, None, "bfloat16"
    )
    record = {"implementation": "xla", "pass": "matmul", "stage": "matmul", "variant": FULL}
    record |= {"iterations": 0, "batch": 1, "heads": 1, "n": size, "head_dim": size}
    found = hopper.compile_program(program)
    if found.call is None:
        return record | {"status": "unavailable", "reason": found.error}
    arrays = hopper_cells.make_inputs(program, "normal", options.seed)
    inputs = hopper_cells.on_device(program, arrays)
    call = functools.partial(found.call, inputs)
    record |= hopper.check_matmul(call()["output"], inputs) | {"flops": hopper.flops(program)}
    if record["status"] == "timed":
        timing = measure.time_interleaved({"": call}, options.repeats, options.budget)[""]
        record |= dataclasses.asdict(timing)
    return record


def refusal() -> str | None:
    """Why the kernels cannot run here, None if they can."""
    from lla.ops import mosaic_gpu
    from lla.ops.problem import make_problem

    array = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    return mosaic_gpu.refuse(make_problem("softmax", array, array, array))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--head_dims", type=int, nargs="+", choices=(64, 128), default=[64, 128])
    names = list(stages_tables.VARIANTS)
    add("--variants", nargs="*", choices=names, default=names, help="what is left out in turn")
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=4096, help="a multiple of 128")
    add("--ridge", type=float, default=10.0)
    add("--matmul_size", type=int, default=8192)
    add("--repeats", type=int, default=9)
    add("--budget", type=float, default=1.0, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="threads that compile")
    add("--limit", type=float, default=1e9, help="seconds after which it stops with what it has")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/hopper_stages_<device>.json")
    options = parser.parse_args(argv)
    if options.length % 128:
        parser.error("--length must be a multiple of 128")
    return options


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    said = ("batch", "heads", "length", "ridge", "matmul_size", "repeats", "budget", "seed")
    header = measure.make_header("hopper_stages", {name: getattr(options, name) for name in said})
    return {**header, "commit": options.commit or header["commit"]}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if (reason := refusal()) is not None:
        print(reason, file=sys.stderr)
        return 1
    output = options.output or measure.RESULTS / f"hopper_stages_{measure.device_name()}.json"
    results = measure.Results(output, make_header(options), KEY_FIELDS)
    hopper.say(f"{jax.devices()[0].device_kind}, results in {output}")
    cells = [cell for cell in make_cells(options) if not results.finished(**cell.fields())]
    end = time.monotonic() + 0.7 * options.limit
    compiled = compile_all(cells, options.workers, end)
    hopper.say("compiled")
    with measure.exclusive(options.lock):
        if not any(record["stage"] == "matmul" for record in results.records):
            results.add([measure_matmul(options)])
        for head_dim in options.head_dims:
            part = [cell for cell in cells if cell in compiled and cell.head_dim == head_dim]
            if part:
                measure_cells(options, part, compiled, results)
                hopper.say(f"head dimension {head_dim} measured")
    print(stages_tables.markdown(results.document()), flush=True)
    return int(any(record["status"] == "refused" for record in results.records))


if __name__ == "__main__":
    hopper.end_at_the_limit(parse(None).limit)
    sys.exit(main())
