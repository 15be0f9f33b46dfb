"""Error and time of the kernels for every NVIDIA GPU since Ampere, on the card at hand.

    python experiments/benchmarks/portable.py [--limit SECONDS] [--workers N] [--output FILE]

Beside them the Hopper kernels (where the card is one), cuDNN and XLA. Worker processes take one
cell after the other, compile it side by side, and have the card to themselves while they compute;
one that crashes or takes too long loses its cell alone. Every result is printed and written at
once. Errors are relative to the exact result in float64, with the bounds of hopper.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

_START = time.monotonic()
OURS = "mosaic_gpu_portable"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement.

    `kind` is "accuracy" (of the output and all gradients, twice, which have to be equal in every
    bit), "speed", or "variant": the time of one kernel in another configuration. `options` are
    those of the operator, with "num_iters" for the solver's, or of the configuration.
    """

    kind: str
    mechanism: str
    implementation: str = OURS
    which: str = "forward_backward"
    batch: int = 1
    queries: int = 1024
    keys: int = 1024
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "bfloat16"
    ridge: float | None = None
    traced: bool = False  # whether the ridge is an array
    inputs: str = "normal"
    options: tuple = ()

    def name(self) -> str:
        fields = dataclasses.asdict(self)
        default = {f.name: f.default for f in dataclasses.fields(self)}
        shown = [self.kind, self.mechanism, self.implementation]
        for name, value in fields.items():
            if name not in ("kind", "mechanism", "implementation") and value != default[name]:
                shown.append(f"{name}={value}")
        return " ".join(shown)


def make_cells(options) -> list[Cell]:
    """All cells, in the order in which they are wanted."""
    cells = []

    def accuracy(mechanism, head_dim=64, **fields):
        fields = {"value_dim": head_dim} | fields
        cells.append(Cell("accuracy", mechanism, head_dim=head_dim, **fields))

    accuracy("softmax")
    accuracy("lla", ridge=10.0)
    accuracy("softmax", 128)
    accuracy("lla", 128, ridge=10.0)
    accuracy("lla", ridge=1.0)
    accuracy("parallax")
    accuracy("lla", 128, ridge=1.0)
    sizes = {"batch": 2, "queries": 4096, "keys": 4096, "heads": 16, "kv_heads": 16}

    def speed(
        implementation, mechanism, head_dim, ridge=None, passes=("forward", "forward_backward")
    ):
        for which in passes:
            cells.append(
                Cell(
                    "speed", mechanism, implementation, which, **sizes, head_dim=head_dim,
                    value_dim=head_dim, ridge=ridge,
                )
            )  # fmt: skip

    for head_dim in options.head_dims:
        for implementation in (OURS, "mosaic_gpu"):
            speed(implementation, "softmax", head_dim)
            for ridge in (10.0, 1.0):
                speed(implementation, "lla", head_dim, ridge)
        speed("cudnn", "softmax", head_dim)
    if options.variants:
        for kernel, head_dim, fields in variants(options.head_dims):
            changed = tuple(sorted(fields.items()))
            cells.append(
                Cell("variant", kernel, head_dim=head_dim, value_dim=head_dim, options=changed,
                     **sizes)
            )  # fmt: skip
    window, length = ("local_window_size", (100, 0)), ("key_value_seq_lengths", (700, 130, 0))
    for mechanism, ridge in (("softmax", None), ("lla", 1.0)):
        accuracy(mechanism, 32, ridge=ridge)
        accuracy(mechanism, queries=1000, keys=1000, value_dim=48, ridge=ridge, options=(window,))
        accuracy(
            mechanism, 128, batch=3, ridge=ridge, options=(length, ("is_causal", False)), keys=900
        )
        accuracy(mechanism, dtype="float16", ridge=ridge, options=(("segments", True),))
    step = {"batch": 2, "queries": 1, "keys": 1000, "heads": 8, "kv_heads": 2}  # one token
    for mechanism, ridge in (("softmax", None), ("lla", 10.0), ("lla", 1.0), ("parallax", None)):
        accuracy(mechanism, ridge=ridge, options=(("query_offset", (999, 700)),), **step)
    accuracy("parallax", 128)
    accuracy("parallax", 40, queries=300, keys=700, options=(("query_offset", (400,)),))
    for head_dim in options.head_dims:
        accuracy("lla", head_dim, ridge=1.0, traced=True)
        accuracy("lla", head_dim, ridge=0.01)
        accuracy("lla", head_dim, ridge=0.1)
        for ridge in (10.0, 0.1, 0.01):
            accuracy("lla", head_dim, ridge=ridge, traced=True)
    for head_dim in (256, 160):  # served by the kernels for 256
        accuracy("softmax", head_dim)
        accuracy("parallax", head_dim)
        for ridge in (10.0, 1.0, 0.1):
            accuracy("lla", head_dim, ridge=ridge)
        accuracy("lla", head_dim, ridge=1.0, traced=True)
    for kind in ("anisotropic", "clustered", "offset", "sharp"):
        for ridge in (10.0, 1.0, 0.1, 0.01):
            accuracy("lla", ridge=ridge, inputs=kind)
    for head_dim in options.head_dims:
        speed("xla", "lla", head_dim, 10.0)
        speed("xla", "softmax", head_dim)
        speed("xla", "lla", head_dim, 1.0)
    return [c for c in cells if c.kind in options.kinds and re.search(options.only, c.name())]


def variants(head_dims):
    """Kernel, head dimension and what is different in its configuration."""
    for head_dim in head_dims:
        for kernel in ("softmax", "solved", "solve", "adjoint", "query_gradients", "key_gradients"):
            for block in (32, 64):
                for stages in (2, 3):
                    for resident in (False, True):
                        fields = {"block": block, "stages": stages, "resident_operand": resident}
                        yield kernel, head_dim, fields


# ---------------------------------------------------------------------------------------------
# In a worker


def make_inputs(cell: Cell) -> dict[str, Any]:
    """Arrays as hopper_programs.py makes them, for other sizes, too; what is hidden is NaN."""
    import jax.numpy as jnp
    import numpy as np

    from lla.experiments.benchmarks import hopper_programs

    program = hopper_programs.Program(
        OURS, "parallax", "forward_backward", cell.batch, cell.heads, cell.kv_heads,
        max(cell.queries, cell.keys), cell.head_dim, None, None, cell.dtype,
    )  # fmt: skip
    found = hopper_programs.make_inputs(program, cell.inputs, 0)
    rng = np.random.default_rng(1)
    arrays = {}
    for name, array in found.items():
        length = cell.keys if name in ("key", "value") else cell.queries
        array = array[:, :length]
        if name in ("value", "cotangent"):
            array = rng.standard_normal((*array.shape[:-1], cell.value_dim), dtype=np.float32)
        arrays[name] = np.asarray(jnp.asarray(array, cell.dtype))
    arrays["scale"] = np.full(arrays["query"].shape[:-1], cell.head_dim**-0.5, np.float32)
    if cell.mechanism != "parallax":
        del arrays["probe"]
    if cell.traced:
        arrays["ridge"] = np.full(arrays["query"].shape[:-1], cell.ridge, np.float32)
    return arrays


def operator_options(cell: Cell) -> dict[str, Any]:
    import numpy as np

    import lla

    options = dict(cell.options)
    if "num_iters" in options:
        options["solver"] = lla.Solver(num_iters=options.pop("num_iters"))
    if options.pop("segments", False):
        ids = np.sort(np.random.default_rng(2).integers(0, 5, (cell.batch, cell.keys)))
        options["segment_ids"] = (ids.astype(np.int32), ids.astype(np.int32))
    for name in ("query_offset", "key_value_seq_lengths"):
        if name in options:
            options[name] = np.asarray(options[name], np.int32)
    if cell.mechanism == "lla" and not cell.traced:
        options["ridge"] = cell.ridge
    return options


def make_function(cell: Cell, implementation: str):
    """A function of the arrays: the output, and the gradients if they are asked for."""
    import jax

    import lla

    options = operator_options(cell)

    def attend(arrays):
        if implementation == "cudnn":
            found = [arrays[name] for name in ("query", "key", "value")]
            return jax.nn.dot_product_attention(*found, is_causal=True, implementation="cudnn")
        functions = {
            "softmax": lla.softmax_attention,
            "parallax": lla.parallax_attention,
            "lla": lla.local_linear_attention,
        }
        return functions[cell.mechanism](**arrays, **options, implementation=implementation)

    def run(arrays):
        arrays = dict(arrays)
        cotangent = arrays.pop("cotangent")
        if cell.which == "forward":
            return {"output": attend(arrays)}
        if cell.kind == "speed":  # the gradients that a layer takes
            scale = arrays.pop("scale")
            out, pullback = jax.vjp(lambda a: attend({**a, "scale": scale}), arrays)
        else:
            out, pullback = jax.vjp(attend, arrays)
        return {"output": out, **pullback(cotangent)[0]}

    return run


def measure_cell(cell: Cell, lock: str) -> dict[str, Any]:
    import jax
    import numpy as np

    from lla.experiments.benchmarks import timing

    if cell.kind == "variant":
        run, arrays = kernel_call(cell)
    else:
        run, arrays = make_function(cell, cell.implementation), make_inputs(cell)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    start = time.monotonic()
    if cell.implementation == "xla":  # which tries things out on the card
        with timing.device_lock(lock):
            compiled = jax.jit(run).lower(shapes).compile()
    else:
        compiled = jax.jit(run).lower(shapes).compile()
    result = {"compile_s": time.monotonic() - start}
    truth = None
    if cell.kind == "accuracy":
        truth = compile_exact(cell, arrays)
    with timing.device_lock(lock):
        given = jax.tree.map(jax.numpy.asarray, arrays)
        if truth is not None:
            first, second = (jax.tree.map(np.asarray, compiled(given)) for _ in range(2))
        else:
            jax.block_until_ready(compiled(given))
            measured = timing.time_interleaved({"": lambda: compiled(given)}, 5, 1.0)[""]
    if truth is not None:
        return result | compare(cell, first, second, truth())
    return result | {
        "time_min_s": measured.time_min_s,
        "time_median_s": measured.time_median_s,
    }


def compile_exact(cell: Cell, arrays):
    """A function without arguments: the dense reference in float64, on the host.

    For a GPU its solves take minutes to compile.
    """
    import jax
    import numpy as np

    given = {name: np.asarray(array).astype(np.float64) for name, array in arrays.items()}
    host = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(host):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), given)
        compiled = jax.jit(make_function(cell, "reference")).lower(shapes).compile()

    def run():
        with jax.enable_x64(True), jax.default_device(host):
            return jax.tree.map(np.asarray, compiled(given))

    return run


def compare(cell: Cell, first, second, exact) -> dict[str, Any]:
    """Errors of one run, and whether another one gave the same."""
    import numpy as np

    errors = {}
    for name, want in exact.items():
        got = first[name].astype(np.float64)
        errors[name] = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))
    easy = cell.mechanism != "lla" or (cell.ridge >= 1 and cell.head_dim <= 64)
    limit = 4e-3 if easy and cell.inputs == "normal" else 1e-2
    bad = [n for n, e in errors.items() if not e <= limit * (1 if n == "output" else 10)]
    return {
        "errors": errors,
        "bound": limit,
        "status": "refused" if bad else "right",
        "repeatable": all(a.tobytes() == second[name].tobytes() for name, a in first.items()),
    }


def kernel_call(cell: Cell):
    """A function of arrays that runs one kernel in the cell's configuration, and the arrays."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lla.kernels.mosaic_gpu.attend import Solved
    from lla.kernels.mosaic_gpu.gradients import Directions, Rows
    from lla.kernels.mosaic_gpu.launch import Masking, Shape
    from lla.kernels.mosaic_gpu.solve import Adjoint
    from lla.kernels.mosaic_gpu.solve_rows import CGOptions
    from lla.kernels.mosaic_gpu.tile import MaskSpec
    from lla.kernels.mosaic_gpu_mma import attend, gradients, solve
    from lla.kernels.mosaic_gpu_mma.launch import Config
    from lla.ops.mosaic_gpu.portable import capability

    b, t, n, d = cell.batch, cell.queries, cell.heads, cell.head_dim
    shape = Shape(b, t, t, n, 1, d, jnp.dtype(cell.dtype))
    mask = MaskSpec(True, None, False)
    config = Config(capability=capability(), **dict(cell.options))
    rng = np.random.default_rng(0)

    def normal(shape, factor=1.0):
        array = rng.standard_normal(shape.shape, dtype=np.float32) * factor
        return np.asarray(jnp.asarray(array, shape.dtype))

    row = shape.rows()
    arrays = {
        "query": normal(shape.queries()),
        "key": normal(shape.keys()),
        "value": normal(shape.keys()),
        "cotangent": normal(shape.queries()),
        "scale": np.full(row.shape, d**-0.5, np.float32),
        "log_sum_exp": np.full(row.shape, 11.0, np.float32),
        "ridge": np.full(row.shape, 10.0, np.float32),
        "mean": np.zeros(shape.queries().shape, np.float32),
        "numbers": np.tile(np.asarray([0, t], np.int32), (b, 1)),
    }
    steps = CGOptions(None, 4)

    def run(given):
        query, key, value, cotangent, scale, lse, ridge, mean, numbers = given.values()
        masking = Masking(numbers, None, None)
        zero = 0 * scale
        sizes = shape, mask, config
        if cell.mechanism == "softmax":
            return attend.attend(*sizes, query, key, value, scale, masking)
        if cell.mechanism == "solved":
            solved = Solved(lse, zero, None)
            return attend.attend(*sizes, query, key, value, scale, masking, cotangent, solved)
        if cell.mechanism == "solve":
            return solve.solve(*sizes, steps, query, key, scale, ridge, masking)
        if cell.mechanism == "adjoint":
            adjoint = Adjoint(value, cotangent, lse, zero, mean, scale)
            return solve.solve(*sizes, steps, query, key, scale, ridge, masking, adjoint)
        directions = Directions(query, zero, cotangent, cotangent, mean)
        rows = Rows(scale, lse, zero)
        call = (query, key, value, cotangent, rows)
        if cell.mechanism == "query_gradients":
            return gradients.query_gradients(*sizes, *call, directions, masking)
        return gradients.key_gradients(*sizes, *call, zero, directions, masking)

    names = (
        "query", "key", "value", "cotangent", "scale", "log_sum_exp", "ridge", "mean", "numbers",
    )  # fmt: skip
    arrays = {str(i): arrays[name] for i, name in enumerate(names)}
    return run, jax.tree.map(lambda a: a, arrays)


def read_cell(fields: dict) -> Cell:
    """A cell from what JSON makes of it."""
    options = ((n, tuple(v) if isinstance(v, list) else v) for n, v in fields["options"])
    return Cell(**fields | {"options": tuple(options)})


def work(lock: str) -> None:
    """Measures the cells that come in, one JSON line each."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for line in sys.stdin:
        try:
            result = measure_cell(read_cell(json.loads(line)), lock)
        except Exception as error:
            text = " | ".join(str(error).strip().splitlines()[:4])
            result = {"status": "failed", "reason": f"{type(error).__name__}: {text[:600]}"}
        print("result " + json.dumps(result), flush=True)


# ---------------------------------------------------------------------------------------------
# The process that hands out the cells


class Board:
    """Cells to do and results, written after each one."""

    def __init__(self, cells, output: pathlib.Path, header: dict):
        self.waiting: queue.Queue = queue.Queue()
        for cell in cells:
            self.waiting.put(cell)
        self.records: list[dict] = []
        self.output, self.lock, self.header = output, threading.Lock(), header

    def add(self, cell: Cell, result: dict) -> None:
        with self.lock:
            self.records.append({"cell": dataclasses.asdict(cell), **result})
            said = {k: v for k, v in result.items() if k != "compile_s"}
            if "errors" in said:
                said["errors"] = {n: f"{e:.1e}" for n, e in said["errors"].items()}
            if "time_median_s" in said:
                said = f"{said['time_median_s'] * 1e3:.3f} ms"
            print(f"[{time.monotonic() - _START:5.0f} s] {cell.name()}: {said}", flush=True)
            document = {"header": self.header, "records": self.records}
            self.output.write_text(json.dumps(document, indent=1) + "\n")


def serve(board: Board, lock: str, seconds: float, deadline: float) -> None:
    """Keeps one worker busy until there is nothing to do or no time."""
    process = None
    while time.monotonic() < deadline:
        try:
            cell = board.waiting.get_nowait()
        except queue.Empty:
            break
        if process is not None and process.poll() is not None:
            _end(process)
            process = None
        if process is None:
            process = subprocess.Popen(
                [sys.executable, __file__, "--work", lock], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            said: queue.Queue = queue.Queue()
            for stream in (process.stdout, process.stderr):
                threading.Thread(target=_read, args=(stream, said), daemon=True).start()
        with contextlib.suppress(OSError):  # of a process that has ended, as is seen below
            process.stdin.write(json.dumps(dataclasses.asdict(cell)) + "\n")
            process.stdin.flush()
        last, result = [], None
        end = min(time.monotonic() + seconds, deadline + 5)
        while result is None and time.monotonic() < end:
            try:
                line = said.get(timeout=1)
            except queue.Empty:
                if process.poll() is not None:
                    break
                continue
            if line.startswith("result "):
                result = json.loads(line[7:])
            else:
                last = [*last[-4:], line.strip()[:300]]
        if result is None:
            code = process.poll()
            _end(process)
            process = None
            reason = "out of time" if code is None else f"the worker ended with {code}"
            result = {"status": "failed", "reason": f"{reason}: {' | '.join(last)}"}
        board.add(cell, result)
    if process is not None:
        _end(process)


def _read(stream, said) -> None:
    with stream:
        for line in stream:
            said.put(line)


def _end(process) -> None:
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.kill()
    process.wait()


def table(records) -> str:
    """Times side by side, with the ratios that matter."""
    times = {}
    for record in records:
        cell = record["cell"]
        if cell["kind"] == "speed" and "time_median_s" in record:
            where = cell["mechanism"], cell["head_dim"], cell["ridge"], cell["which"]
            times.setdefault(where, {})[cell["implementation"]] = record["time_median_s"] * 1e3
    lines = ["mechanism d ridge pass: portable, hopper, cudnn, xla (ms); portable / hopper"]
    for where, found in times.items():
        row = [found.get(name) for name in (OURS, "mosaic_gpu", "cudnn", "xla")]
        text = ", ".join("-" if value is None else f"{value:.3f}" for value in row)
        ratio = f"{row[0] / row[1]:.2f}" if row[0] and row[1] else "-"
        lines.append(f"{' '.join(map(str, where))}: {text}; {ratio}")
    counts = {}
    for record in records:
        status = record.get("status", "timed")
        counts[status] = counts.get(status, 0) + 1
    return "\n".join([*lines, f"cells: {counts}"])


def main(make_cells=make_cells, name="portable") -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    kinds = ("accuracy", "speed", "variant")
    add("--work", help="run as a worker, with this file as the lock")
    add("--limit", type=float, default=270.0, help="seconds after which it stops with what it has")
    add("--cell_limit", type=float, default=120.0, help="seconds for one cell")
    add("--workers", type=int, default=8)
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--kinds", nargs="+", default=list(kinds), choices=kinds)
    add("--only", default="", help="regular expression: cells whose name it is found in")
    add("--variants", action="store_true", help="other configurations of every kernel, too")
    add("--commit", help="recorded with the results")
    add("--device", help="name of the card, recorded with the results")
    add("--output", type=pathlib.Path, default=pathlib.Path(f"{name}.json"))
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return 0
    header = {"benchmark": name, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    header |= {"commit": options.commit, "device": options.device}
    header["jax"] = importlib.metadata.version("jax")
    board = Board(make_cells(options), options.output, header)
    with tempfile.TemporaryDirectory() as folder:
        lock = str(pathlib.Path(folder) / "lock")
        arguments = (board, lock, options.cell_limit, _START + options.limit)
        threads = [threading.Thread(target=serve, args=arguments) for _ in range(options.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(table(board.records), flush=True)
    print(f"left out for want of time: {board.waiting.qsize()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
