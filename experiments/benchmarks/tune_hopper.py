"""Times launch configurations of the Hopper kernels.

    python experiments/benchmarks/tune_hopper.py [--limit SECONDS] [--output FILE]

Prints the fastest configuration of every kernel and writes all times as JSON. The table in
``kernels/mosaic_gpu/configs.py`` is edited by hand from it; nothing is tuned when a kernel is
called. A configuration whose results are not close to those of the table's own is not timed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lla.experiments.benchmarks.results import make_header, write_json
from lla.experiments.benchmarks.timing import device_lock, time_interleaved

ITERATIONS = 3
CLOSE = 2e-2  # relative difference of two configurations, whose roundings differ


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--head_dims", type=int, nargs="+", default=[32, 64, 128])
    add("--kernels", nargs="+", help="names; default: all")
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=4096)
    add("--repeats", type=int, default=5)
    add("--limit", type=float, default=600.0, help="seconds after which nothing more is timed")
    output = pathlib.Path(__file__).parent / "tuning" / "hopper_configs.json"
    add("--output", type=pathlib.Path, default=output)
    add("--lock", help="file that processes which measure on one device have in common")
    return parser.parse_args(argv)


TWO_WARPGROUPS = {"warpgroups": 2, "registers": (240, 24)}
THREE_WARPGROUPS = {"warpgroups": 3, "registers": (160, 24)}
# Kernels that share the configuration of another.
_SHARED = {
    "adjoint": "solve",
    "adjoint_bf16x2": "solve_bf16x2",
    "adjoint_mixed": "solve_mixed",
    "softmax": "attend",
    "parallax": "attend",
    "moments_16": "moments",
    "invert": "moments",
    "invert_16": "moments",
}


def candidates(kernel: str, head_dim: int, base) -> list:
    """The table's configuration first, then its neighbours."""
    solve = kernel.startswith(("solve", "adjoint"))
    # As many tiles as fit into shared memory, or a few less.
    stages = (2, 3) if head_dim == 128 else (4, 6) if solve else (3, 4)
    choices = [{}]
    if kernel != "key_gradients":
        choices += [{**TWO_WARPGROUPS, "block": 64, "stages": count} for count in stages]
    if head_dim < 128 and kernel != "key_gradients":
        choices.append({**THREE_WARPGROUPS, "block": 64, "stages": 4})
    if head_dim == 32:
        choices.append({**TWO_WARPGROUPS, "block": 128, "stages": 4})
    if head_dim == 128 and (solve or kernel == "attend_bf16x2"):
        choices += [{"block": 32, "stages": count} for count in (4, 6)]
    if kernel == "key_gradients":
        choices += [{"stages": count} for count in stages]
    if kernel.startswith("invert"):
        return [base]
    if kernel.startswith("moments"):
        choices = [{}, {**TWO_WARPGROUPS, "block": 64, "stages": 4}]
        choices += [
            {**THREE_WARPGROUPS, "block": block, "stages": count}
            for block, count in ((32, 6), (32, 8), (64, 4))
        ]
    if kernel == "solve" and head_dim == 64:  # shows the gain from several warpgroups
        choices.append({"warpgroups": 1, "registers": (240, 24), "stages": 6})
    more = [{}]
    if solve or kernel in ("softmax", "attend", "attend_bf16x2"):
        more.append({"sum_products": True})
    if solve:
        more += [{"pingpong": True}, {"sum_products": True, "pingpong": True}]
    found = [base]
    for choice, hold, option in itertools.product(choices, (True, False), more):
        config = dataclasses.replace(base, **choice, hold_sums=hold, **option)
        if config.sum_products and config.block > 64:
            continue
        if config not in found:
            found.append(config)
    return found


def table_config(kernel: str, head_dim: int):
    """The configuration that the table has for a kernel."""
    from lla.kernels.mosaic_gpu import configs

    return getattr(configs.choose(head_dim), _SHARED.get(kernel, kernel))


def make_kernels(options, head_dim: int) -> dict:
    """Kernel -> a function of its configuration and operands, and the operands."""
    from lla.kernels.mosaic_gpu import attend, configs, gradients, inverse, launch, solve, tile

    b, t, n = options.batch, options.length, options.heads
    shape = launch.Shape(b, t, t, n, 1, head_dim, jnp.dtype(jnp.bfloat16))
    mask = tile.MaskSpec(True, None, False)
    rng = np.random.default_rng(0)

    def normal(size=1.0):
        array = rng.standard_normal((b, t, n, head_dim), np.float32) * size
        return jnp.asarray(array, jnp.bfloat16)

    query, key, value, cotangent = (normal() for _ in range(4))
    scale = jnp.full((b, n, t), head_dim**-0.5, jnp.float32)
    ridge = jnp.full((b, n, t), 10.0, jnp.float32)
    masking = launch.Masking(jnp.asarray([[0, t]] * b, jnp.int32), None, None)
    plain = solve.CGOptions(None, ITERATIONS)
    precise = dataclasses.replace(plain, bf16x2=True)
    unmarked = jnp.zeros((b, n, t // 64), jnp.int32)
    solution = jax.jit(
        lambda *a: solve.solve(shape, mask, configs.choose(head_dim).solve, plain, *a)
    )(query, key, scale, ridge, masking)
    rows = gradients.Rows(scale, solution.log_sum_exp, solution.shift)
    directions = gradients.Directions(
        solution.high, solution.shift_high, solution.high, solution.low, solution.key_mean
    )
    solved = attend.Solved(solution.log_sum_exp, solution.shift_high, None)
    exactly_solved = attend.Solved(solution.log_sum_exp, solution.shift, solution.low)
    adjoint = solve.Adjoint(
        value, cotangent, solution.log_sum_exp, solution.shift, solution.key_mean
    )

    def solving(iteration, adjoint, marked=None):
        def run(config, *operands):
            choice = None
            if marked is not None:
                *operands, mark = operands
                choice = solve.TileOverride(precise, mark)
            return solve.solve(shape, mask, config, iteration, *operands, override=choice).high

        operands = (query, key, scale, ridge, masking)
        operands += () if adjoint is None else (adjoint,)
        return run, operands + (() if marked is None else (marked,))

    def summing(dim):
        parts = inverse.key_products(inverse.centred(key, masking.numbers[:, 1], dim))
        return (
            lambda config, *a: inverse.moments(shape, mask, config, *a),
            (query, key, parts, scale, solution.log_sum_exp, masking),
        )

    def inverting(dim):
        parts = jnp.ones((b, n, inverse.num_sums(dim), t), jnp.float32)
        return lambda config, *a: inverse.invert(shape, dim, *a), (parts, ridge)

    def preconditioned():
        zeros = jnp.zeros((b, n, head_dim, head_dim, t), jnp.float32)
        inverses = zeros.at[:, :, jnp.arange(head_dim), jnp.arange(head_dim)].set(0.1)
        preconditioner = solve.Preconditioner(inverses, solution.log_sum_exp, solution.key_mean)
        iteration = dataclasses.replace(precise, max_iters=1)

        def run(config, *operands):
            *operands, preconditioner = operands
            return solve.solve(
                shape, mask, config, iteration, *operands, preconditioner=preconditioner
            ).high

        return run, (query, key, scale, ridge, masking, preconditioner)

    direct = {}
    if head_dim == configs.DIRECT_DIM:
        direct = {
            "moments": summing(head_dim),
            "moments_16": summing(16),
            "invert": inverting(head_dim),
            "invert_16": inverting(16),
            "solve_direct": preconditioned(),
        }
    return direct | {
        "solve": solving(plain, None),
        "solve_bf16x2": solving(precise, None),
        "solve_mixed": solving(plain, None, unmarked),
        "adjoint": solving(plain, adjoint),
        "adjoint_bf16x2": solving(precise, adjoint),
        "adjoint_mixed": solving(plain, adjoint, unmarked),
        "softmax": (
            lambda config, *a: attend.attend(shape, mask, config, *a).out,
            (query, key, value, scale, masking),
        ),
        "parallax": (
            lambda config, *a: attend.attend(shape, mask, config, *a).out,
            (query, key, value, scale, masking, solution.high),
        ),
        "attend": (
            lambda config, *a: attend.attend(shape, mask, config, *a).out,
            (query, key, value, scale, masking, solution.high, solved),
        ),
        "attend_bf16x2": (
            lambda config, *a: attend.attend(shape, mask, config, *a, bf16x2=True).out,
            (query, key, value, scale, masking, solution.high, exactly_solved),
        ),
        "query_gradients": (
            lambda config, *a: gradients.query_gradients(shape, mask, config, *a).query,
            (query, key, value, cotangent, rows, directions, masking),
        ),
        "key_gradients": (
            lambda config, *a: gradients.key_gradients(shape, mask, config, *a)[0],
            (query, key, value, cotangent, rows, solution.shift, directions, masking),
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(argv)
    jobs = []
    for head_dim in options.head_dims:
        for name, (function, operands) in make_kernels(options, head_dim).items():
            if options.kernels and name not in options.kernels:
                continue
            for config in candidates(name, head_dim, table_config(name, head_dim)):
                jobs.append((head_dim, name, config, function, operands))

    def build(job):
        _, _, config, function, operands = job
        try:
            return jax.jit(lambda *a: function(config, *a)).lower(*operands).compile()
        except Exception as error:  # most often, too little shared memory
            return str(error).splitlines()[0][:120]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(build, jobs))
    print(f"compiled {len(jobs)} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    with device_lock(options.lock):
        measure_all(options, jobs, compiled, start)
    return 0


def measure_all(options, jobs, compiled, start: float) -> None:
    """Times the compiled calls, writes the result and prints the fastest."""
    records, expected = [], {}
    for (head_dim, name, config, _, operands), call in zip(jobs, compiled, strict=True):
        record = {"head_dim": head_dim, "kernel": name, "config": dataclasses.asdict(config)}
        if isinstance(call, str):
            records.append({**record, "reason": call})
            continue
        if time.monotonic() - start > options.limit:
            records.append({**record, "reason": "the time ran out"})
            continue
        result = np.asarray(call(*operands), np.float32)
        truth = expected.setdefault((head_dim, name), result)
        difference = float(np.linalg.norm(result - truth) / np.linalg.norm(truth))
        if not difference <= CLOSE:
            records.append({**record, "reason": f"differs by {difference:.1e}"})
            continue
        timing = time_interleaved(
            {name: lambda call=call, operands=operands: call(*operands)}, options.repeats, 1.0
        )[name]
        records.append({**record, "milliseconds": 1e3 * timing.time_median_s})
    header = make_header(
        "tune_hopper",
        {name: getattr(options, name) for name in ("batch", "heads", "length", "repeats")},
    )
    write_json(options.output, {"header": header, "records": records})
    for head_dim, name in expected:
        group = [r for r in records if (r["head_dim"], r["kernel"]) == (head_dim, name)]
        timed = sorted((r for r in group if "milliseconds" in r), key=lambda r: r["milliseconds"])
        table = next((r for r in group if "milliseconds" in r), None)
        best = timed[0]
        print(
            f"{name}, head dimension {head_dim}: table {table['milliseconds']:.3f} ms, best "
            f"{best['milliseconds']:.3f} ms with {best['config']}"
        )


if __name__ == "__main__":
    sys.exit(main())
