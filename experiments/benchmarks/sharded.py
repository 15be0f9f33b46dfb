"""The operator over several devices of one host against one of them: time, memory, error.

    python experiments/benchmarks/sharded.py [--devices 2] [--lengths 131072 524288] [--output FILE]

Two ways to use the devices, each forward and with all gradients, in bfloat16 on a GPU and float32
elsewhere: data-parallel, where every device has as many sequences as the one device has (weak
scaling), under plain ``jax.jit``; and context-parallel, where one long causal sequence is split in
balanced order (strong scaling). The error is that of output and gradients against the one device,
in relative Frobenius norm. Cells go from short to long, the file is rewritten after every one, and
a cell that fails is recorded and does not stop the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lla
import lla.sharding
from lla.experiments.benchmarks import results as result_files

RIDGE = 1.0
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def inputs(batch: int, length: int, heads: int, key_heads: int, dim: int, dtype) -> tuple:
    """Query, key and value, normalised as by QK-norm, and a cotangent."""
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(batch, length, n, dim) for n in (heads, key_heads, key_heads, heads)]
    arrays = [jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True)]
    return tuple(a.astype(dtype) for a in arrays)


def forward(attend, query, key, value, cotangent):
    del cotangent
    return (attend(query, key, value, ridge=RIDGE),)


def forward_backward(attend, query, key, value, cotangent):
    out, pullback = jax.vjp(functools.partial(attend, ridge=RIDGE), query, key, value)
    return (out, *pullback(cotangent))


PASSES = {"forward": forward, "forward_backward": forward_backward}


def run_cell(function, arguments, repeats: int) -> tuple[dict[str, Any], tuple]:
    """Times and memory of a compiled call, and its results."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    results = jax.block_until_ready(compiled(*arguments))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        samples.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    counts = {n: text.count(f" {n}(") + text.count(f" {n}-start(") for n in COLLECTIVES}
    record = {
        "compile_s": compile_s,
        "time_median_s": float(np.median(samples)),
        "time_min_s": min(samples),
        "time_max_s": max(samples),
        "repeats": repeats,
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "output_bytes": getattr(memory, "output_size_in_bytes", None),
        "collectives": {name: count for name, count in counts.items() if count},
    }
    return record, results


def error(found, want) -> list[float]:
    """Relative Frobenius norms, of the output and of every gradient."""
    errors = []
    for a, b in zip(found, want, strict=True):
        a, b = (np.asarray(x, np.float32).astype(np.float64) for x in (a, b))
        errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return errors


def data_parallel(args, name, function, length, devices, dtype):
    """As many sequences on every device as one of them has alone."""
    alone = inputs(args.batch, length, args.heads, args.key_heads, args.dim, dtype)
    call = functools.partial(function, lla.local_linear_attention)
    one, want = run_cell(call, jax.device_put(alone, devices[0]), args.repeats)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    copies = [jnp.concatenate([a] * len(devices)) for a in alone]
    placed = jax.device_put(copies, NamedSharding(mesh, P("data")))
    many, found = run_cell(call, placed, args.repeats)
    many["sharding"] = str(found[0].sharding.spec)
    parts = [np.split(np.asarray(a), len(devices)) for a in found]
    errors = [error([p[i] for p in parts], want) for i in range(len(devices))]
    many["error"] = np.max(errors, axis=0).tolist()
    scaling = len(devices) * one["time_median_s"] / many["time_median_s"]
    return {"one": one, "many": many, "weak_scaling": scaling}


def context_parallel(args, name, function, length, devices, dtype):
    """One sequence, split in balanced order."""
    whole = inputs(1, length, args.heads, args.key_heads, args.dim, dtype)
    call = functools.partial(function, lla.local_linear_attention)
    one, want = run_cell(call, jax.device_put(whole, devices[0]), args.repeats)
    want = [np.asarray(a) for a in want]
    parts = len(devices)
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((parts,), ("context",), axis_types=auto, devices=devices)
    attend = lla.sharding.on_mesh(
        lla.local_linear_attention, mesh, context_axis="context", context_balance=True
    )
    ordered = lla.sharding.balance(whole, parts)
    placed = jax.device_put(ordered, NamedSharding(mesh, P(None, "context")))
    many, found = run_cell(functools.partial(function, attend), placed, args.repeats)
    many["sharding"] = str(found[0].sharding.spec)
    found = [lla.sharding.unbalance(np.asarray(a), parts) for a in found]
    many["error"] = error(found, want)
    return {
        "one": one,
        "many": many,
        "strong_scaling": one["time_median_s"] / many["time_median_s"],
    }


MODES = {"data_parallel": data_parallel, "context_parallel": context_parallel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 131072, 524288])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--longest-data-parallel", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a device")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=540.0, help="seconds; no cell begins later")
    parser.add_argument("--commit", default=None)
    parser.add_argument(
        "--output", type=pathlib.Path, default=result_files.RESULTS / "sharded.json"
    )
    args = parser.parse_args()
    devices = jax.devices()
    if len(devices) < args.devices:
        parser.error(f"--devices {args.devices}: {len(devices)} are visible.")
    devices = devices[: args.devices]
    dtype = args.dtype or ("bfloat16" if devices[0].platform == "gpu" else "float32")
    settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items()}
    header = result_files.make_header("sharded", settings | {"dtype": dtype}, args.commit)
    records: list[dict] = []
    start = time.perf_counter()
    for length in args.lengths:
        for mode in args.modes:
            if mode == "data_parallel" and length > args.longest_data_parallel:
                continue
            for name in args.passes:
                cell = {"mode": mode, "pass": name, "length": length, "devices": args.devices}
                if time.perf_counter() - start > args.limit:
                    cell["status"] = "no time left"
                else:
                    try:
                        cell |= MODES[mode](args, name, PASSES[name], length, devices, dtype)
                        cell["status"] = "measured"
                    except Exception as failure:
                        cell["status"] = f"{type(failure).__name__}: {str(failure)[:2000]}"
                records.append(cell)
                print(json.dumps(cell), flush=True)
                result_files.write_json(args.output, {"header": header, "records": records})


if __name__ == "__main__":
    main()
