"""Bytes that decoding steps move between the chip and its memory, by the device's own counter.

    python experiments/benchmarks/decoding_traffic.py [--output FILE]

A compiled loop of `decoding.py` runs for a while between two readings of the counter that says
which part of the time the memory was busy (NVML's GPM metrics, on Hopper and later; package
nvidia-ml-py). What a busy second moves is measured in the same way by copying an array of known
size. Nothing else may run on the device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import decoding
import hopper
import jax
import jax.numpy as jnp
import measure

_BEFORE = 0.4  # seconds of calls before the first reading, see `busy_seconds`


class MemoryCounter:
    """The counter of one device.

    Raises:
      RuntimeError: if there is none, or its package is not installed.
    """

    def __init__(self, index: int):
        try:
            import pynvml
        except ImportError as error:
            raise RuntimeError("the counter needs the package nvidia-ml-py.") from error
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            self.device = pynvml.nvmlDeviceGetHandleByIndex(index)
            self.read()
        except pynvml.NVMLError as error:
            raise RuntimeError(f"device {index} has no such counter: {error}.") from error

    def read(self) -> Any:
        """A sample, to be handed to `busy`."""
        sample = self.nvml.nvmlGpmSampleAlloc()
        self.nvml.nvmlGpmSampleGet(self.device, sample)
        return sample

    def busy(self, first: Any, second: Any) -> float:
        """Part of the time between two samples, from 0 to 1."""
        query = self.nvml.c_nvmlGpmMetricsGet_t()
        query.version = self.nvml.NVML_GPM_METRICS_GET_VERSION
        query.numMetrics = 1
        query.sample1, query.sample2 = first, second
        query.metrics[0].metricId = self.nvml.NVML_GPM_METRIC_DRAM_BW_UTIL
        self.nvml.nvmlGpmMetricsGet(query)
        if query.metrics[0].nvmlReturn != self.nvml.NVML_SUCCESS:
            raise RuntimeError(f"no reading: {self.nvml.NVMLError(query.metrics[0].nvmlReturn)}.")
        return query.metrics[0].value / 100


def repeat(call: Callable[[], Any], seconds: float) -> float:
    """Calls for so many seconds; returns those that one call takes."""
    calls, start = 0, time.perf_counter()
    while True:
        for _ in range(4):
            out = call()
        jax.block_until_ready(out)
        calls += 4
        if time.perf_counter() >= start + seconds:
            break
    return (time.perf_counter() - start) / calls


def busy_seconds(counter, call: Callable[[], Any], seconds: float) -> float:
    """Seconds that the memory is busy in one call, from as many as take `seconds`.

    A reading can be some tenths of a second old, so that the device does the same before the first
    one.
    """
    repeat(call, _BEFORE)
    first = counter.read()
    each = repeat(call, seconds)
    return counter.busy(first, counter.read()) * each


def bytes_per_second(counter, size: int, seconds: float) -> float:
    """Bytes read and written in a busy second by the copy of an array of `size` bytes."""
    array = jnp.zeros((size // 4,), jnp.float32)
    copied = jax.jit(lambda a: a + 1).lower(array).compile()
    return 2 * size / busy_seconds(counter, lambda: copied(array), seconds)


def make_cells(options: argparse.Namespace) -> list[decoding.Cell]:
    return [
        decoding.Cell(name, "bfloat16", batch, options.kv_heads, group, head_dim, n)
        for head_dim in options.head_dims
        for group in options.groups
        for batch in options.batches
        for n in options.lengths
        for name in options.implementations
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ["softmax", decoding.CUDNN, "parallax", "lla_10", "lla_0.1"]
    add("--implementations", nargs="+", default=names)
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--lengths", type=int, nargs="+", default=[16384], help="of the cache")
    add("--batches", type=int, nargs="+", default=[32])
    add("--kv_heads", type=int, default=8)
    add("--groups", type=int, nargs="+", default=[1, 4], help="query heads of a key head")
    add("--steps", type=int, default=16, help="tokens that one call decodes")
    add("--seconds", type=float, default=1.0, help="between two readings")
    add("--copied", type=int, default=1 << 31, help="bytes of the array that is copied")
    add("--seed", type=int, default=0)
    add("--index", type=int, default=0, help="of the device, as nvidia-smi counts")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="threads that compile")
    add("--commit", help="recorded where the repository's history is absent")
    add("--output", type=pathlib.Path, help="default: results/decoding_traffic_<device>.json")
    return parser.parse_args(argv)


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    said = ("steps", "seconds", "copied", "seed")
    header = measure.make_header(
        "decoding_traffic", {name: getattr(options, name) for name in said}
    )
    return {**header, "commit": options.commit or header["commit"]}


def count(options, counter, cells, results: measure.Results) -> None:
    """Compiles and counts `cells`, and adds their records."""
    speed = bytes_per_second(counter, options.copied, options.seconds)
    hopper.say(f"a busy second moves {speed / 1e12:.3f} TB")
    with concurrent.futures.ThreadPoolExecutor(options.workers) as executor:
        compiled = list(executor.map(lambda c: decoding.compile_cell(c, options.steps), cells))
    for cell, found in zip(cells, compiled, strict=True):
        record = {**cell.fields(), "pass": "traffic", "cache_bytes": cell.cache_bytes}
        record |= {"bytes_per_busy_second": speed, "status": "memory only"}
        record["reason"] = "bytes are counted; `decoding.py` has the times"
        if found.error is None:
            run = decoding.Run(found.call, *decoding.make_inputs(cell, options.steps, options.seed))
            busy = busy_seconds(counter, run, options.seconds)
            record["moved_bytes"] = busy * speed / options.steps
            hopper.say(f"{cell}: {record['moved_bytes'] / cell.cache_bytes:.3f} caches")
        else:
            record |= {"status": "unavailable", "reason": found.error}
        results.add([record])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output or measure.RESULTS / f"decoding_traffic_{measure.device_name()}.json"
    results = measure.Results(output, make_header(options), decoding.KEY_FIELDS)
    cells = [cell for cell in make_cells(options) if not results.finished(**cell.fields())]
    try:
        counter = MemoryCounter(options.index)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    count(options, counter, cells, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
