"""Times and errors of our kernels and of other libraries' on the same tensors, in one run.

    python experiments/benchmarks/peers.py [--quick] [--flash_lla DIR] [--out FILE]

Each implementation has an adapter in `peers_adapters.py`. For some of the heads, outputs and
gradients are compared with exact results in float64. An implementation whose error exceeds its
bound is refused: its errors are recorded, and it is not timed. An exception in one adapter is
recorded and does not stop the others. The exit status is 1 if one of our own implementations was
not timed. A run that is started again measures what is missing or was unavailable.

Both frameworks are timed by `time_interleaved`: with the same clock, queues of the same length and
the same statistics, taking turns.

Mechanisms are `lla`, `softmax` and `parallax` as in `hopper.py`, and `mesanet` (arXiv 2506.05233)
with unit queries and keys, no decay, unit weights and Lambda = 1 [ours]. MesaNet is a different
operator: its time is given for comparison, and its error is against its own definition.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lla.experiments.benchmarks import hopper, truth
from lla.experiments.benchmarks.compilation import Compiled, compile_all
from lla.experiments.benchmarks.formatting import (
    PASSES,
    progress_line,
    provenance,
    ratio,
    time_text,
)
from lla.experiments.benchmarks.hopper_programs import (
    Program,
    make_function,
    make_inputs,
    on_device,
)
from lla.experiments.benchmarks.peers_adapters import (
    MECHANISMS,
    Adapter,
    JaxAdapter,
    Sizes,
    make_adapters,
    pick,
)
from lla.experiments.benchmarks.results import add_options, open_results
from lla.experiments.benchmarks.timing import (
    GuardedCall,
    device_lock,
    error_line,
    exit_after,
    log,
    time_interleaved,
)
from lla.mixers.mesa import mesa
from lla.runs import tables

KEY_FIELDS = ("implementation", "mechanism", "ridge", "pass", "batch", "heads", "n", "head_dim")
FINAL = ("timed", "refused", "memory only")  # records that another run does not repeat
PACKAGES = ("torch", "triton", "fla-core", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_NAMES = {
    "cudnn": "cuDNN through JAX",
    "torch_flash": "PyTorch, flash",
    "torch_cudnn": "PyTorch, cuDNN",
    "fla": "flash-linear-attention",
    "flash_lla": "FlashLLA",
}
_FLOOR = ("softmax", "cudnn", None)
_GRADIENTS = ("query", "key", "value", "probe")


_QUICK = {"batch": 1, "heads": 2, "length": 512, "head_dims": [64], "repeats": 3}


# ---------------------------------------------------------------------------------------------
# Exact results


def checked_heads(sizes: Sizes, count: int) -> list[tuple[int, int]]:
    """`count` pairs (sequence, head), evenly spread, the first and the last among them."""
    flat = np.linspace(0, sizes.batch * sizes.heads - 1, count).round().astype(int)
    return [divmod(int(index), sizes.heads) for index in dict.fromkeys(flat.tolist())]


def exact(
    mechanism: str, ridge: float | None, inputs: Mapping[str, np.ndarray]
) -> tuple[dict, str]:
    """Output and gradients in float64, and their source.

    Args:
      mechanism: one of `MECHANISMS`.
      ridge: of `lla`.
      inputs: float64 query, key, value, probe and cotangent ``[heads, T, H]``. Heads are
        independent, so the results hold for the whole call that they were taken from.

    Returns:
      Results ``[heads, T, H]`` by name, and what computed them: `truth.exact` for `lla` and
      `softmax`, the blockwise implementation for `parallax`, which solves nothing, Cholesky
      factorisations of every prefix for `mesanet`.
    """
    wide = {name: array[:, :, None] for name, array in inputs.items()}
    if mechanism in ("lla", "softmax"):
        rows = np.full(wide["query"].shape[:-1], 1.0 if ridge is None else ridge)
        del wide["probe"]
        found = _anywhere(lambda: truth.exact(mechanism, {**wide, "ridge": rows}))
        results, source = dict(found.results), found.source
        results.pop("ridge", None)
    else:
        results = _anywhere(lambda: _gradients(mechanism, wide))
        source = "xla, float64" if mechanism == "parallax" else "Cholesky of every prefix, float64"
    return {name: np.asarray(array)[:, :, 0] for name, array in results.items()}, source


def _anywhere(compute: Callable[[], Any]) -> Any:
    """`compute()`, on the CPU if the device cannot."""
    try:
        return compute()
    except Exception as error:
        if jax.default_backend() == "cpu":
            raise
        log(f"exact results on the CPU: {error_line(error)}")
    with jax.default_device(jax.devices("cpu")[0]):
        return compute()


def _gradients(mechanism: str, wide: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(array) for name, array in wide.items()}
        if mechanism == "mesanet":
            results = jax.jit(_mesanet)(arrays)
        else:
            batch, n, heads, head_dim = arrays["query"].shape
            sizes = (batch, heads, heads, n, head_dim)
            program = Program("xla", mechanism, "forward_backward", *sizes, None, None, "float64")
            results = jax.jit(make_function(program))(arrays)
        return jax.tree.map(np.asarray, results)


def _mesanet(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    def attend(query, key, value):
        unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key)]
        ones = jnp.ones(query.shape[:-1], query.dtype)
        ridge = jnp.ones(query.shape[2:], query.dtype)
        return mesa(*unit, value, ones, ridge=ridge, solver="exact")

    names = ("query", "key", "value")
    out, pullback = jax.vjp(attend, *(arrays[name] for name in names))
    return {"output": out, **dict(zip(names, pullback(arrays["cotangent"]), strict=True))}


# ---------------------------------------------------------------------------------------------
# The run


def check_group(
    options: argparse.Namespace,
    sizes: Sizes,
    todo: Iterable[tuple[Adapter, float | None]],
    arrays: Mapping[str, jax.Array],
) -> tuple[dict, dict]:
    """Records of the adapters of one mechanism at one size, and the calls that may be timed.

    Triton compiles and tunes its kernels here, which can take minutes.
    """
    heads = checked_heads(sizes, options.checked_heads)
    inputs = {name: pick(np.asarray(array), heads) for name, array in arrays.items()}
    exact_once = functools.cache(lambda mechanism, ridge: exact(mechanism, ridge, inputs))
    records, calls = {}, {}
    for adapter, ridge in todo:
        given, iterations, reason = None, None, adapter.available()
        if reason is None:
            try:
                given = adapter.prepare(sizes, ridge, arrays)
            except Exception as error:
                reason = error_line(error)
        for fields in _fields(adapter, ridge, sizes):
            which = fields["pass"]
            records[adapter, ridge, which] = record = {**fields, "checked_heads": len(heads)}
            call = GuardedCall(getattr(adapter, which), given, adapter.wait, reason)
            call().block_until_ready()
            try:
                if call.reason is None:
                    got = adapter.collect(call.results, sizes, heads)
                    iterations = got.pop("iterations", iterations)
                    want, source = exact_once(adapter.mechanism, ridge)
                    limits = truth.limits_for(want, *adapter.limits(sizes, ridge))
                    record |= truth.verdict(got, want, limits)
                    record["worst_row"] = truth.worst_row(got["output"], want["output"])
                    record |= {**adapter.memory(sizes, ridge, which), "truth": source}
            except Exception as error:
                call.reason = error_line(error)
            if call.reason is not None:
                record |= {"status": "unavailable", "reason": call.reason}
            elif record["status"] == "timed":
                calls[adapter, ridge, which] = call
            if iterations is not None:
                record["mean_iterations"] = float(iterations)
            log(f"checked {describe(record)}: {record['status']}")
    return records, calls


def time_group(options: argparse.Namespace, records: dict, calls: dict) -> list[dict]:
    """Times the calls in turns; returns all records."""
    for key, timing in time_interleaved(calls, options.repeats, options.budget).items():
        if calls[key].reason is None:
            records[key] |= dataclasses.asdict(timing)
        else:
            records[key] |= {"status": "unavailable", "reason": calls[key].reason}
    for record in records.values():
        log(f"{describe(record)}{progress_line(record)}")
    return list(records.values())


def describe(record: Mapping) -> str:
    return " ".join(str(record[name]) for name in KEY_FIELDS if record[name] is not None)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--implementation", default="mosaic_gpu", choices=("mosaic_gpu", "xla"), help="ours")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=16)
    add("--length", type=int, default=4096)
    add("--head_dims", type=int, nargs="+", default=[64, 128])
    add("--ridges", type=float, nargs="+", default=[10.0, 1.0, 0.1, 0.01])
    add("--checked_heads", type=int, default=2, help="of all sequences, compared with float64")
    add_options(parser, "seed limit lock commit output", repeats=7, budget=1.0, workers=8)
    add("--quick", action="store_true", help="one small problem")
    add("--flash_lla", type=pathlib.Path, help="folder that holds the package flashlla")
    add("--only", nargs="+", help="names of implementations; the others are left to another run")
    add("--mechanisms", nargs="+", choices=MECHANISMS, default=list(MECHANISMS))
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(_QUICK)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    # JAX must leave memory of the device to the other framework.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = parse(argv)
    unsaid = {"flash_lla", "only", "mechanisms", "workers", "limit", "lock", "commit"}
    unsaid |= {"output", "quick"}
    settings = [name for name in vars(options) if name not in unsaid]
    results = open_results("peers", options, settings, KEY_FIELDS, packages=PACKAGES)
    compiled: dict[Program, Compiled] = {}
    groups: dict[tuple[Sizes, str], list] = {}
    adapters = make_adapters(options, compiled)
    for d in options.head_dims:
        sizes = Sizes(options.batch, options.heads, options.length, d, options.dtype)
        for mechanism in options.mechanisms:
            chosen = [adapter for adapter in adapters if adapter.mechanism == mechanism]
            ridges = options.ridges if mechanism == "lla" else [None]
            todo = [
                (adapter, ridge)
                for adapter in chosen
                for ridge in ridges
                if not all(results.has(f, FINAL) for f in _fields(adapter, ridge, sizes))
            ]
            if todo:
                groups[sizes, mechanism] = todo
    programs = [
        adapter.program(sizes, ridge, which)
        for (sizes, _), todo in groups.items()
        for adapter, ridge in todo
        for which in truth.PASSES
        if isinstance(adapter, JaxAdapter) and adapter.available() is None
    ]
    deadline = time.monotonic() + options.limit
    compiled |= compile_all(programs, hopper.compile_program, options.workers, deadline)
    for (sizes, _), todo in groups.items():
        widest = Program(
            "", "parallax", "forward_backward", sizes.batch, sizes.heads, sizes.heads, sizes.n,
            sizes.head_dim, None, None, sizes.dtype,
        )  # fmt: skip
        made = make_inputs(widest, "normal", options.seed)
        arrays = on_device(widest, made)
        checked = check_group(options, sizes, todo, arrays)
        with device_lock(options.lock):
            results.add(time_group(options, *checked))
    print(markdown(results.document()), flush=True)
    ours = [r for r in results.records if r["implementation"] == options.implementation]
    return int(any(record["status"] != "timed" for record in ours))


def _fields(adapter: Adapter, ridge: float | None, sizes: Sizes) -> list[dict[str, Any]]:
    """The fields that identify the records of both passes, the one with the gradients first."""
    fields = {name: getattr(sizes, name) for name in ("batch", "heads", "n", "head_dim")}
    call = {
        "implementation": adapter.name,
        "mechanism": adapter.mechanism,
        "ridge": ridge,
        **fields,
    }
    return [{**call, "pass": which} for which in reversed(truth.PASSES)]


# ---------------------------------------------------------------------------------------------
# Tables


def markdown(document: Mapping) -> str:
    """The tables of a result file."""
    return f"{provenance(document)}\n\n{result_tables(document['records'])}"


def result_tables(records: Sequence[Mapping]) -> str:
    """A table for each size, with times, their ratio to cuDNN's softmax attention, and errors.

    What was refused has errors and no time. The reasons are listed below the tables.
    """
    fields = ("batch", "heads", "n", "head_dim")
    parts = []
    for size in sorted({tuple(record[name] for name in fields) for record in records}):
        here = [r for r in records if tuple(r[name] for name in fields) == size]
        batch, heads, n, head_dim = size
        parts.append(
            f"**Head dimension {head_dim}**, batch {batch}, {heads} heads, n = {n}: median "
            "(fastest) ms, and the ratio to cuDNN's softmax attention; relative errors of output "
            "and gradients against float64.\n\n" + _size(here)
        )
    notes: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "timed":
            where = f"{_label(_call(record))}, head dimension {record['head_dim']}"
            labels = notes.setdefault(f"{record['status']}: {record['reason']}", [])
            labels += [where] if where not in labels else []
    lines = [f"- {'; '.join(labels)}: {reason}" for reason, labels in notes.items()]
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def _call(record: Mapping) -> tuple:
    return record["mechanism"], record["implementation"], record["ridge"]


def _order(key: tuple) -> tuple:
    mechanism, name, ridge = key
    peers = list(_NAMES)
    return (
        MECHANISMS.index(mechanism),
        -(ridge or 0),
        peers.index(name) + 1 if name in peers else 0,
    )


def _label(key: tuple) -> str:
    mechanism, name, ridge = key
    text = f"{_NAMES.get(name, name)}, {mechanism}"
    return text if ridge is None else f"{text}, ridge {ridge:g}"


def _size(records: Sequence[Mapping]) -> str:
    cells = {(_call(record), record["pass"]): record for record in records}
    rows = []
    for key in sorted({key for key, _ in cells}, key=_order):
        found = {which: cells.get((key, which)) for which in PASSES}
        row = [_label(key)]
        for which, record in found.items():
            row += [time_text(record), ratio(record, cells.get((_FLOOR, which)))]
        # The pass with the gradients has all errors; the forward pass alone, the output's.
        best = next((r for r in reversed(found.values()) if r and "errors" in r), {})
        errors = best.get("errors", {})
        row += [_error(errors, "output"), _error(best, "worst_row")]
        rows.append(row + [_error(errors, name) for name in _GRADIENTS])
    times = [name for title in PASSES.values() for name in (title, "/ cuDNN")]
    return tables.markdown(["call", *times, "output", "worst row", *_GRADIENTS], rows)


def _error(values: Mapping, name: str) -> str:
    if name not in values:
        return ""
    return "not finite" if values[name] is None else f"{values[name]:.1e}"


if __name__ == "__main__":
    exit_after(parse(None).limit)
    sys.exit(main())
