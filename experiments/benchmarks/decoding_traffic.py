"""Bytes that decoding steps move between the chip and its memory, as the hardware counts them.

    python experiments/benchmarks/decoding_traffic.py [--output FILE]

Runs itself under Nsight Compute (`ncu`, which must be on the path and allowed to read counters)
and adds up the counters of DRAM over all kernels of a compiled loop of `decoding.py`. Caches are
left as they are between kernels. Exit status 1 if nothing was counted.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import measure

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
MARK = "cosine"  # part of the name of the kernel that stands before every cell
_UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_CHILD = "LLA_COUNTED_CELLS"


def cells(options: argparse.Namespace) -> list[decoding.Cell]:
    return [
        decoding.Cell(name, "bfloat16", batch, options.kv_heads, group, head_dim, n)
        for head_dim in options.head_dims
        for group in options.groups
        for batch in options.batches
        for n in options.lengths
        for name in options.implementations
    ]


def count(options: argparse.Namespace) -> None:
    """What runs under the profiler: a mark and one call of the loop for every cell.

    The counters are those of the whole device, so nothing else may run on it.
    """
    library = ctypes.CDLL(options.cudart)
    mark = jax.jit(jnp.cos).lower(jax.ShapeDtypeStruct((64,), jnp.float32)).compile()
    ready = jnp.ones((64,), jnp.float32)
    compiled = {cell: decoding.compile_cell(cell, options.steps).call for cell in cells(options)}
    with measure.exclusive(options.lock):
        for cell, call in compiled.items():
            cache, tokens = decoding.make_inputs(cell, options.steps, options.seed)
            cache, *_ = jax.block_until_ready(call(cache, tokens))
            library.cudaProfilerStart()
            jax.block_until_ready(mark(ready))
            jax.block_until_ready(call(cache, tokens))
            library.cudaProfilerStop()
            print("counted", cell, file=sys.stderr, flush=True)


def parse_counters(lines: Sequence[str]) -> Iterator[dict[str, float]]:
    """Sums of `READ`, of `WRITTEN` and "kernels" for every cell, from ncu's CSV output.

    Raises:
      ValueError: a unit that is none of bytes.
    """
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, float] | None = None
    marks = set()
    for row in csv.DictReader(lines[start:]):
        if MARK in row["Kernel Name"]:
            if row["ID"] not in marks:
                marks.add(row["ID"])
                if found is not None:
                    yield found
                found = {READ: 0.0, WRITTEN: 0.0, "kernels": 0}
            continue
        if found is None or row["Metric Name"] not in (READ, WRITTEN):
            continue
        if row["Metric Unit"] not in _UNITS:
            raise ValueError(f"no unit of bytes: {row['Metric Unit']!r}.")
        number = float(row["Metric Value"].replace(",", ""))
        found[row["Metric Name"]] += number * _UNITS[row["Metric Unit"]]
        found["kernels"] += row["Metric Name"] == READ
    if found is not None:
        yield found


def records(wanted: Sequence[decoding.Cell], counted: Sequence[Mapping], steps: int):
    """One record a cell, per step."""
    for cell, sums in zip(wanted, counted, strict=True):
        yield {
            **cell.fields(),
            "pass": "traffic",
            "status": "memory only",
            "reason": "bytes are counted, and profiling makes times worthless",
            "cache_bytes": cell.cache_bytes,
            "read_bytes": sums[READ] / steps,
            "written_bytes": sums[WRITTEN] / steps,
            "kernels": sums["kernels"] / steps,
        }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ["softmax", "cudnn", "lla_10", "lla_0.1"]
    add("--implementations", nargs="+", default=names)
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--lengths", type=int, nargs="+", default=[16384], help="of the cache")
    add("--batches", type=int, nargs="+", default=[32])
    add("--kv_heads", type=int, default=8)
    add("--groups", type=int, nargs="+", default=[1, 4], help="query heads of a key head")
    add("--steps", type=int, default=2, help="tokens that one call decodes")
    add("--seed", type=int, default=0)
    add("--cudart", default="libcudart.so", help="the CUDA runtime, to start the profiler")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/decoding_traffic_<device>.json")
    return parser.parse_args(argv)


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    header = measure.make_header(
        "decoding_traffic", {name: getattr(options, name) for name in ("steps", "seed")}
    )
    return {**header, "commit": options.commit or header["commit"]}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if os.environ.get(_CHILD):
        count(options)
        return 0
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not on the path.", file=sys.stderr)
        return 1
    command = [
        ncu, "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off",
        "--metrics", f"{READ},{WRITTEN}", "--csv", "--print-units", "base",
        sys.executable, __file__, *(sys.argv[1:] if argv is None else argv),
    ]  # fmt: skip
    # Kernels one by one, not as CUDA graphs, which the profiler does not look into.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    environment = {**os.environ, _CHILD: "1", "XLA_FLAGS": flags.strip()}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    counted = list(parse_counters(done.stdout.splitlines()))
    wanted = cells(options)[: len(counted)]
    if not wanted:
        print(done.stdout[-2000:], file=sys.stderr)
        return 1
    output = options.output or measure.RESULTS / f"decoding_traffic_{measure.device_name()}.json"
    results = measure.Results(output, make_header(options), decoding.KEY_FIELDS)
    results.add(list(records(wanted, counted, options.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
