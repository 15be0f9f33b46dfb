"""Bytes that decoding steps move between the chip and its memory, by the device's own counter.

    python experiments/benchmarks/decoding_traffic.py [--output FILE]

A compiled loop of `decoding.py` runs between two readings of the counter that tells for which part
of the time the memory was busy (NVML's GPM metrics, on Hopper and later; package nvidia-ml-py).
Copying an array of known size tells how many bytes a busy second moves. Nothing else may run on the
device. See pages/decoding_traffic.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lla.experiments.benchmarks import decoding
from lla.experiments.benchmarks.compilation import compile_all
from lla.experiments.benchmarks.formatting import provenance
from lla.experiments.benchmarks.results import Results, add_options, open_results
from lla.experiments.benchmarks.timing import log
from lla.runs import figures, styles, tables

CAPTION = "Bytes that a decoding step moves against the length of the cache"
_BEFORE = 0.4  # seconds of calls before the first reading, see `busy_seconds`


class MemoryCounter:
    """The counter of a device.

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
        """The busy part of the time between two samples, from 0 to 1."""
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
    """Repeats a call for so many seconds; returns the seconds of one call."""
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
    """Seconds that the memory is busy in one call, on average over `seconds`.

    A reading may be some tenths of a second old. Therefore the calls begin before the first one.
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


def make_cases(options: argparse.Namespace) -> list[decoding.Case]:
    return [
        decoding.Case(name, "bfloat16", batch, options.kv_heads, group, head_dim, n)
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
    add_options(parser, "seed workers commit output")
    add("--index", type=int, default=0, help="of the device, as nvidia-smi counts")
    return parser.parse_args(argv)


def count(options, counter, cases, results: Results) -> None:
    """Compiles the cases, counts their bytes and adds their records."""
    speed = bytes_per_second(counter, options.copied, options.seconds)
    log(f"a busy second moves {speed / 1e12:.3f} TB")
    compiled = compile_all(
        cases, lambda case: decoding.compile_case(case, options.steps), options.workers
    )
    for case, found in compiled.items():
        record = {**case.fields(), "pass": "traffic", "cache_bytes": case.cache_bytes}
        record |= {"bytes_per_busy_second": speed, "status": "memory only"}
        record["reason"] = "bytes are counted; `decoding.py` has the times"
        if found.error is None:
            run = decoding.Run(found.call, *decoding.make_inputs(case, options.steps, options.seed))
            busy = busy_seconds(counter, run, options.seconds)
            record["moved_bytes"] = busy * speed / options.steps
            log(f"{case}: {record['moved_bytes'] / case.cache_bytes:.3f} caches")
        else:
            record |= {"status": "unavailable", "reason": found.error}
        results.add([record])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    settings = ("steps", "seconds", "copied", "seed")
    results = open_results("decoding_traffic", options, settings, decoding.KEY_FIELDS)
    cases = [case for case in make_cases(options) if not results.has(case.fields())]
    try:
        counter = MemoryCounter(options.index)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    count(options, counter, cases, results)
    return 0


# ---------------------------------------------------------------------------------------------
# Table and figure


def markdown(document: Mapping) -> str:
    """The table of a result file."""
    rows = [
        [
            str(r["head_dim"]),
            str(r["group"]),
            str(r["batch"]),
            str(r["n"]),
            r["implementation"].replace("lla_", "lla, ridge "),
            f"{r['cache_bytes'] / 2**20:.4g}",
            f"{r['moved_bytes'] / 2**20:.4g}",
            f"{r['moved_bytes'] / r['cache_bytes']:.3f}",
        ]
        for r in document["records"]
        if "moved_bytes" in r
    ]
    head = ["d", "query heads of a key head", "batch", "tokens", "attention"]
    table = tables.markdown([*head, "cache, MiB", "moved a step, MiB", "moved / cache"], rows)
    return f"{provenance(document)}\n\n{table}"


def draw(records: Sequence[Mapping]):
    """The figure: bytes moved divided by bytes of the cache, for each head dimension."""
    counted = [r for r in records if "moved_bytes" in r and r["group"] == 1]
    batch = max((r["batch"] for r in counted), default=0)
    head_dims = sorted({r["head_dim"] for r in counted})
    figure, axes = figures.new(1, max(1, len(head_dims)), height=2.6, sharey=True)
    for axis, head_dim in zip(axes[0], head_dims, strict=False):
        panel = [r for r in counted if (r["head_dim"], r["batch"]) == (head_dim, batch)]
        for name in decoding.DRAWN:
            points = sorted(
                (r["n"], r["moved_bytes"] / r["cache_bytes"])
                for r in panel
                if r["implementation"] == name
            )
            if points:
                figures.marks(axis, styles.style(name), *zip(*points, strict=True))
        axis.axhline(1, color="#8C8C8C", linewidth=0.8, linestyle=":")
        axis.set(xlabel="tokens in the cache")
        axis.set_title(f"batch {batch}, d = {head_dim}")
        figures.length_axis(axis, [r["n"] for r in panel])
        axis.grid(True, axis="y")
    axes[0, 0].set_ylabel("moved / cache")
    figures.legend(figure, axes[0])
    return figure


if __name__ == "__main__":
    sys.exit(main())
