"""Times and errors of our kernels and of other libraries' on the same tensors, in one run.

    python experiments/benchmarks/peers.py [--quick] [--flash_lla DIR] [--out FILE]

Each implementation is an adapter (`peers_adapters.py`). Outputs and gradients are compared with
exact results in float64 for some of the heads, and only what is not nonsense is timed; what is
refused keeps its errors. An exception in one adapter is recorded as its reason and does not stop
the others. The exit status is 1 if something of ours was not timed. A run that is started again
does what is missing or was unavailable.

Both frameworks are timed by `measure.time_interleaved`: the same clock, queues of the same length,
the same statistics, in turns within one member of the family.

Members: `lla`, `softmax` and `parallax` as in `hopper.py`, and `mesanet` (arXiv 2506.05233) with
unit queries and keys, no decay, unit weights and Lambda = 1 [ours], which is another operator: its
time is a point of reference, its error is against its own definition.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Two frameworks share the device's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hopper
import hopper_cells
import jax
import jax.numpy as jnp
import measure
import numpy as np
import peers_tables
import report
import subjects
from hopper_cells import Program
from peers_adapters import MEMBERS, Adapter, Case, JaxAdapter, make_adapters, pick

from lla.mixers.mesa import mesa

KEY_FIELDS = ("implementation", "member", "ridge", "pass", "batch", "heads", "n", "head_dim")
PACKAGES = ("torch", "triton", "fla-core", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_QUICK = {"batch": 1, "heads": 2, "length": 512, "head_dims": [64], "repeats": 3}


# ---------------------------------------------------------------------------------------------
# Exact results


def checked_heads(case: Case, count: int) -> list[tuple[int, int]]:
    """`count` pairs (sequence, head), evenly spread, the first and the last among them."""
    flat = np.linspace(0, case.batch * case.heads - 1, count).round().astype(int)
    return [divmod(int(index), case.heads) for index in dict.fromkeys(flat.tolist())]


def exact(member: str, ridge: float | None, inputs: Mapping[str, np.ndarray]) -> tuple[dict, str]:
    """Output and gradients in float64, and their source.

    Args:
      member: one of `MEMBERS`.
      ridge: of `lla`.
      inputs: float64 query, key, value, probe and cotangent ``[heads, T, H]``. Heads are
        independent, so the results hold for the whole call that they were taken from.

    Returns:
      Results ``[heads, T, H]`` by name, and what computed them: `subjects.exact` for `lla` and
      `softmax`, the blockwise implementation for `parallax`, which solves nothing, Cholesky
      factorisations of every prefix for `mesanet`.
    """
    wide = {name: array[:, :, None] for name, array in inputs.items()}
    if member in ("lla", "softmax"):
        rows = np.full(wide["query"].shape[:-1], 1.0 if ridge is None else ridge)
        del wide["probe"]
        truth = _anywhere(lambda: subjects.exact(member, {**wide, "ridge": rows}))
        results, source = dict(truth.results), truth.source
        results.pop("ridge", None)
    else:
        results = _anywhere(lambda: _gradients(member, wide))
        source = "xla, float64" if member == "parallax" else "Cholesky of every prefix, float64"
    return {name: np.asarray(array)[:, :, 0] for name, array in results.items()}, source


def _anywhere(compute: Callable[[], Any]) -> Any:
    """`compute()`, on the CPU if the device cannot."""
    try:
        return compute()
    except Exception as error:
        if jax.default_backend() == "cpu":
            raise
        hopper.say(f"exact results on the CPU: {hopper.brief(error)}")
    with jax.default_device(jax.devices("cpu")[0]):
        return compute()


def _gradients(member: str, wide: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(array) for name, array in wide.items()}
        if member == "mesanet":
            results = jax.jit(_mesanet)(arrays)
        else:
            batch, n, heads, head_dim = arrays["query"].shape
            sizes = (batch, heads, heads, n, head_dim)
            program = Program("xla", member, "forward_backward", *sizes, None, None, "float64")
            results = jax.jit(hopper_cells.make_function(program))(arrays)
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


def verdict(got: Mapping, want: Mapping, limits: tuple[float, float]) -> dict[str, Any]:
    """Fields of a record that say how exact `got` is; the status decides whether it is timed."""
    errors = subjects.errors(got, want)
    bounds = {name: limits[name != "output"] for name in errors}
    difference = np.linalg.norm(got["output"] - want["output"], axis=-1)
    worst = float((difference / np.linalg.norm(want["output"], axis=-1)).max())
    fields = {
        # JSON has no infinity.
        "errors": {name: e if np.isfinite(e) else None for name, e in errors.items()},
        "bounds": bounds,
        "worst_row": worst if np.isfinite(worst) else None,
        "status": "timed",
    }
    bad = [f"{n} {e:.1e} > {bounds[n]:.1e}" for n, e in errors.items() if not e <= bounds[n]]
    if bad:
        fields |= {"status": "refused", "reason": f"error too large: {', '.join(bad)}"}
    return fields


# ---------------------------------------------------------------------------------------------
# The run


class Call:
    """A call for `measure.time_interleaved` that an exception ends instead of the run.

    It is its own result: `jax.block_until_ready` calls the method of this name on what it does not
    know, so that results of every framework are waited for in the same way.
    """

    def __init__(self, function: Callable, given: Any, wait: Callable, reason: str | None = None):
        self.function, self.given, self.wait, self.reason = function, given, wait, reason
        self.results: dict | None = None

    def __call__(self) -> Call:
        self._try(lambda: self.function(self.given))
        return self

    def block_until_ready(self) -> Call:
        results = self.results
        self._try(lambda: self.wait(results) or results)
        return self

    def _try(self, step: Callable[[], dict | None]) -> None:
        if self.reason is not None:
            return
        try:
            self.results = step()
        except Exception as error:
            self.reason, self.results = hopper.brief(error), None


def check_group(
    options: argparse.Namespace,
    case: Case,
    todo: Iterable[tuple[Adapter, float | None]],
    arrays: Mapping[str, jax.Array],
) -> tuple[dict, dict]:
    """Records of the adapters of one member at one size, and the calls that are right.

    Here Triton compiles and tunes, which can take minutes.
    """
    heads = checked_heads(case, options.checked_heads)
    inputs = {name: pick(np.asarray(array), heads) for name, array in arrays.items()}
    truth = functools.cache(lambda member, ridge: exact(member, ridge, inputs))
    records, calls = {}, {}
    for adapter, ridge in todo:
        given, iterations, reason = None, None, adapter.available()
        if reason is None:
            try:
                given = adapter.prepare(case, ridge, arrays)
            except Exception as error:
                reason = hopper.brief(error)
        for cell in _cells(adapter, ridge, case):
            which = cell["pass"]
            records[adapter, ridge, which] = record = {**cell, "checked_heads": len(heads)}
            call = Call(getattr(adapter, which), given, adapter.wait, reason)
            call().block_until_ready()
            try:
                if call.reason is None:
                    got = adapter.collect(call.results, case, heads)
                    iterations = got.pop("iterations", iterations)
                    want, source = truth(adapter.member, ridge)
                    judged = verdict(got, want, adapter.limits(case, ridge))
                    record |= {**judged, **adapter.memory(case, ridge, which), "truth": source}
            except Exception as error:
                call.reason = hopper.brief(error)
            if call.reason is not None:
                record |= {"status": "unavailable", "reason": call.reason}
            elif record["status"] == "timed":
                calls[adapter, ridge, which] = call
            if iterations is not None:
                record["mean_iterations"] = float(iterations)
            hopper.say(f"checked {describe(record)}: {record['status']}")
    return records, calls


def time_group(options: argparse.Namespace, records: dict, calls: dict) -> list[dict]:
    """Times the calls in turns; returns all records."""
    for key, timing in measure.time_interleaved(calls, options.repeats, options.budget).items():
        if calls[key].reason is None:
            records[key] |= dataclasses.asdict(timing)
        else:
            records[key] |= {"status": "unavailable", "reason": calls[key].reason}
    for record in records.values():
        hopper.say(f"{describe(record)}{report.progress_line(record, ())}")
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
    add("--repeats", type=int, default=7)
    add("--budget", type=float, default=1.0, help="seconds for the repeats of one cell")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="one small case")
    add("--flash_lla", type=pathlib.Path, help="folder that holds the package flashlla")
    add("--only", nargs="+", help="names of implementations; the others are left to another run")
    add("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    add("--workers", type=int, default=8, help="threads that compile")
    add("--limit", type=float, default=1e9, help="seconds after which it stops with what it has")
    add("--lock", help="file that processes which measure on one device have in common")
    add("--commit", help="recorded where the repository's history is absent")
    add("--out", "--output", type=pathlib.Path, help="default: results/peers_<device>.json")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(_QUICK)
    return options


def make_header(options: argparse.Namespace) -> dict[str, Any]:
    unsaid = ("flash_lla", "only", "members", "workers", "limit", "lock", "commit", "out", "quick")
    settings = {name: value for name, value in vars(options).items() if name not in unsaid}
    header = measure.make_header("peers", settings)
    header["commit"] = options.commit or header["commit"]
    for name in PACKAGES:
        try:
            header["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return header


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    out = options.out or measure.RESULTS / f"peers_{measure.device_name()}.json"
    results = measure.Results(out, make_header(options), KEY_FIELDS)
    hopper.say(f"{jax.devices()[0].device_kind}, results in {out}")
    compiled: dict[Program, hopper.Compiled] = {}
    groups: dict[tuple[Case, str], list] = {}
    adapters = make_adapters(options, compiled)
    done = {_key(record) for record in results.records if record["status"] != "unavailable"}
    for d in options.head_dims:
        case = Case(options.batch, options.heads, options.length, d, options.dtype)
        for member in options.members:
            chosen = [adapter for adapter in adapters if adapter.member == member]
            ridges = options.ridges if member == "lla" else [None]
            todo = [
                (adapter, ridge)
                for adapter in chosen
                for ridge in ridges
                if not {_key(cell) for cell in _cells(adapter, ridge, case)} <= done
            ]
            if todo:
                groups[case, member] = todo
    programs = [
        adapter.program(case, ridge, which)
        for (case, _), todo in groups.items()
        for adapter, ridge in todo
        for which in subjects.PASSES
        if isinstance(adapter, JaxAdapter) and adapter.available() is None
    ]
    compiled |= hopper.compile_all(programs, options.workers, time.monotonic() + options.limit)
    for (case, _), todo in groups.items():
        sizes = (case.batch, case.heads, case.heads, case.n, case.head_dim)
        widest = Program("", "parallax", "forward_backward", *sizes, None, None, case.dtype)
        made = hopper_cells.make_inputs(widest, "normal", options.seed)
        arrays = hopper_cells.on_device(widest, made)
        checked = check_group(options, case, todo, arrays)
        with measure.exclusive(options.lock):
            _add(results, time_group(options, *checked))
    print(peers_tables.markdown(results.document()), flush=True)
    ours = [r for r in results.records if r["implementation"] == options.implementation]
    return int(any(record["status"] != "timed" for record in ours))


def _key(record: Mapping) -> tuple:
    return tuple(record[name] for name in KEY_FIELDS)


def _cells(adapter: Adapter, ridge: float | None, case: Case) -> list[dict[str, Any]]:
    """The fields that identify the records of both passes, the one with the gradients first."""
    sizes = {name: getattr(case, name) for name in ("batch", "heads", "n", "head_dim")}
    cell = {"implementation": adapter.name, "member": adapter.member, "ridge": ridge, **sizes}
    return [{**cell, "pass": which} for which in reversed(subjects.PASSES)]


def _add(results: measure.Results, records: Sequence[dict]) -> None:
    """Adds `records` in place of earlier ones of the same cells."""
    keys = {_key(record) for record in records}
    results.records = [record for record in results.records if _key(record) not in keys]
    results.add(records)


if __name__ == "__main__":
    hopper.end_at_the_limit(parse(None).limit)
    sys.exit(main())
