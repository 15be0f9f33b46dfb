"""Every implementation on this machine against the exact reference: ``python -m lla.selftest``.

Outputs and gradients of all mechanisms of the family are compared with automatic differentiation of
the dense reference in float64 on the CPU, for the same inputs. Prints a table of errors and times,
exits with 0 if everything that can run is within its bound and with 1 otherwise.

Errors are relative Frobenius norms. Bounds for float32: 1e-5 for a ridge of at least 1 (and for the
mechanisms without a ridge), 1e-4 for at least 0.1, 1e-3 below, and ten times that for gradients.
Bounds for bfloat16: twice the error of the exact result rounded once to bfloat16, plus 1e-5. The
kernels round weights and probe besides: for local linear attention in bfloat16 their bounds are
5e-3, and 2e-2 for gradients, at every ridge. Where few rows have a cotangent the tolerance of the
solve does not average out of the gradients: elsewhere in bfloat16 theirs may be four times that of
rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.ops.backend import BACKENDS

FUNCTIONS = {
    "lla": "local_linear_attention",
    "parallax": "parallax_attention",
    "softmax": "softmax_attention",
}
METHODS = ("cg", "direct")  # for the cases that try each; the others take the default, "auto"
RIDGES = (10.0, 1.0, 0.1, 0.01)
QUICK_RIDGES = (10.0, 0.1)
TIMED_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape with its masks; `plan` lists the pairs of mechanism and dtype to run.

    `faint` lets the cotangent of the later queries fall to 1e-30, as behind sharp softmax weights.
    `step` decodes one token, the last of the keys, with the others in a cache.
    Cases are few because compiling them is what the self test spends its time on.
    """

    name: str
    query: tuple[int, int, int, int]  # [B, T, N, H]
    key: tuple[int, int, int, int]  # [B, S, K, H]
    value_dim: int
    options: dict[str, Any]
    plan: tuple[tuple[str, str], ...] = (("lla", "float32"),)
    methods: tuple[str, ...] = ("auto",)
    faint: bool = False
    step: bool = False


_EVERYTHING = tuple((m, d) for m in FUNCTIONS for d in ("float32", "bfloat16"))

CASES = (
    Case("causal", (1, 96, 2, 64), (1, 96, 2, 64), 64, {}, _EVERYTHING, METHODS),
    Case(
        "grouped odd",
        (1, 129, 4, 32),
        (1, 129, 2, 32),
        48,
        {},
        (("lla", "float32"), ("parallax", "float32"), ("softmax", "float32")),
        METHODS,
    ),
    Case("narrow", (2, 70, 4, 24), (2, 70, 2, 24), 32, {}, (("lla", "bfloat16"),), METHODS),
    Case("cross", (2, 37, 2, 32), (2, 100, 2, 32), 32, {"is_causal": False}),
    Case("window", (1, 200, 2, 32), (1, 200, 2, 32), 32, {"local_window_size": (40, 0)}),
    Case(
        "lengths",
        (3, 70, 2, 32),
        (3, 70, 1, 32),
        16,
        {"key_value_seq_lengths": np.array([70, 53, 0], np.int32)},
    ),
    Case(
        "faint",
        (1, 96, 2, 64),
        (1, 96, 2, 64),
        64,
        {},
        (("lla", "float32"), ("lla", "bfloat16")),
        faint=True,
    ),
    Case(
        "step",
        (2, 1, 4, 64),
        (2, 200, 2, 64),
        64,
        {},
        (("lla", "float32"), *((mechanism, "bfloat16") for mechanism in FUNCTIONS)),
        step=True,
    ),
)
QUICK_CASES = (
    Case(
        "grouped odd",
        (1, 63, 4, 16),
        (1, 63, 2, 16),
        24,
        {},
        (("lla", "float32"), ("lla", "bfloat16"), ("parallax", "float32"), ("softmax", "float32")),
        METHODS,
    ),
)


@dataclasses.dataclass
class Result:
    """One row of the table; errors and bounds are absent where nothing ran.

    `error` and `bound` are those of the output, `gradient` is the gradient that comes closest to
    (or furthest beyond) its bound, `milliseconds` the median time of a compiled forward and
    backward pass.
    """

    case: str
    mechanism: str
    dtype: str
    implementation: str
    method: str | None
    ridge: float | None
    status: str = "pass"
    error: float | None = None
    bound: float | None = None
    gradient: str | None = None
    gradient_error: float | None = None
    gradient_bound: float | None = None
    milliseconds: float | None = None
    reason: str | None = None


# ---------------------------------------------------------------------------------------------
# What is computed


def make_inputs(case: Case, mechanism: str, dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs without the ridge, and a cotangent, standard normal and rounded to `dtype`."""
    b, t, n, _ = case.query
    shapes = {
        "query": case.query,
        "key": case.key,
        "value": (*case.key[:-1], case.value_dim),
        "cotangent": (b, t, n, case.value_dim),
        "probe": case.query,
    }
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32).astype(jnp.dtype(dtype))
        for name, shape in shapes.items()
    }
    # A probe of length 1 changes the softmax weights by about a quarter of their size.
    probe, cotangent = arrays.pop("probe"), arrays.pop("cotangent")
    if case.faint:
        fall = np.ones((t, 1, 1), np.float32)
        fall[t // 2 :, 0, 0] = np.logspace(0, -30, t - t // 2)
        cotangent = (cotangent.astype(np.float32) * fall).astype(cotangent.dtype)
    if mechanism == "parallax":
        arrays["probe"] = (probe.astype(np.float32) / 8).astype(probe.dtype)
    return arrays, cotangent


def with_ridge(inputs: dict, ridge: float | None, dtype) -> dict:
    """Adds a ridge for every query, so that its gradient is an array as large as the others."""
    if ridge is None:
        return inputs
    return inputs | {"ridge": np.full(inputs["query"].shape[:-1], ridge, dtype)}


def decode_last(mechanism: str, **inputs):
    """The output of one step of decoding with the tokens before it in a cache."""
    key, value = inputs.pop("key"), inputs.pop("value")
    lengths = jnp.full(key.shape[0], key.shape[1] - 1, jnp.int32)
    cache = lla.KVCache(key.at[:, -1].set(0), value.at[:, -1].set(0), lengths)
    name = {"lla": "decode_step"}.get(mechanism, f"{mechanism}_decode_step")
    return getattr(lla, name)(key=key[:, -1:], value=value[:, -1:], cache=cache, **inputs)[0]


def compile_pass(mechanism: str, options: dict[str, Any], step: bool = False):
    """A compiled function of inputs and cotangent: the output and the gradients by name."""
    whole = getattr(lla, FUNCTIONS[mechanism])
    function = functools.partial(decode_last, mechanism) if step else whole

    @jax.jit
    def run(inputs, cotangent):
        out, vjp = jax.vjp(lambda inputs: function(**inputs, **options), inputs)
        return out, vjp(cotangent)[0]

    return run


class Reference:
    """Exact results in float64 on the CPU, whatever device and precision JAX uses otherwise."""

    def __init__(self):
        self.device = jax.devices("cpu")[0]
        self.compiled, self.results = {}, {}

    def __call__(self, case: Case, mechanism: str, dtype: str, ridge: float | None):
        key = (case.name, mechanism, dtype, ridge)
        if key not in self.results:
            with jax.enable_x64(True), jax.default_device(self.device):
                if key[:2] not in self.compiled:
                    options = case.options | {"implementation": "reference"}
                    if case.step:
                        options["query_offset"] = case.key[1] - 1
                    self.compiled[key[:2]] = compile_pass(mechanism, options)
                inputs, cotangent = make_inputs(case, mechanism, dtype)
                inputs = with_ridge(inputs, ridge, np.float64)
                exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (inputs, cotangent))
                results = self.compiled[key[:2]](*exact)
                self.results[key] = jax.tree.map(np.asarray, results)
        return self.results[key]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of `expected` (absolute where that is zero)."""
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    norm = np.linalg.norm(expected)
    return float(difference / norm if norm > 0 else difference)


def error_bound(
    expected: np.ndarray,
    dtype: str,
    ridge: float | None,
    gradient: bool,
    implementation: str = "xla",
    faint: bool = False,
) -> float:
    """The bound in the module's docstring."""
    if implementation.startswith("mosaic") and dtype == "bfloat16" and ridge is not None:
        return 2e-2 if gradient else 5e-3
    if dtype == "bfloat16":
        rounded = expected.astype(jnp.bfloat16).astype(np.float64)
        return (4 if faint else 2) * relative_error(rounded, expected) + 1e-5
    bound = 1e-5 if ridge is None or ridge >= 1 else 1e-4 if ridge >= 0.1 else 1e-3
    return 10 * bound if gradient else bound


# ---------------------------------------------------------------------------------------------
# Running


def run_variant(
    case: Case,
    mechanism: str,
    dtype: str,
    implementation: str,
    method: str | None,
    ridges: tuple[float, ...],
    reference: Reference,
) -> Iterator[Result]:
    """One row for every ridge, from one compiled function."""
    options = case.options | {"implementation": implementation}
    if method is not None:
        options["solver"] = lla.Solver(method=method)
    run = compile_pass(mechanism, options, case.step)
    for ridge in ridges if mechanism == "lla" else (None,):
        result = Result(case.name, mechanism, dtype, implementation, method, ridge)
        inputs, cotangent = make_inputs(case, mechanism, dtype)
        inputs = with_ridge(inputs, ridge, np.float32)
        inputs, cotangent = jax.device_put((inputs, cotangent))
        try:
            first = jax.block_until_ready(run(inputs, cotangent))
            times = []
            for _ in range(TIMED_RUNS):
                start = time.perf_counter()
                again = jax.block_until_ready(run(inputs, cotangent))
                times.append(1e3 * (time.perf_counter() - start))
        except NotImplementedError as refusal:
            result.status, result.reason = "refused", str(refusal)
        except Exception as error:  # a broken back end is a row of the table, not the end of it
            result.status, result.reason = "FAIL", f"{type(error).__name__}: {error}"
        else:
            result.milliseconds = statistics.median(times)
            judge(result, first, again, reference(case, mechanism, dtype, ridge), case.faint)
        yield result


def judge(result: Result, first, again, expected, faint: bool) -> None:
    """Fills in errors, bounds and the verdict."""
    out, gradients = first
    result.error = relative_error(out, expected[0])
    result.bound = error_bound(
        expected[0], result.dtype, result.ridge, False, result.implementation
    )
    worst = 0.0
    for name, exact in expected[1].items():
        error = relative_error(gradients[name], exact)
        bound = error_bound(exact, result.dtype, result.ridge, True, result.implementation, faint)
        # Written so that NaN counts as worst.
        if result.gradient is None or not error / bound <= worst:
            worst = error / bound
            result.gradient, result.gradient_error, result.gradient_bound = name, error, bound
    if not (result.error <= result.bound and result.gradient_error <= result.gradient_bound):
        result.status, result.reason = "FAIL", "an error exceeds its bound"
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), first, again)
    if not all(jax.tree.leaves(equal)):
        result.status, result.reason = "FAIL", "two equal runs differ"


def run_cases(cases, implementations, ridges) -> Iterator[Result]:
    reference = Reference()
    for case in cases:
        for mechanism, dtype in case.plan:
            for implementation in implementations:
                solves = mechanism == "lla" and implementation != "reference"
                for method in case.methods if solves else (None,):
                    yield from run_variant(
                        case, mechanism, dtype, implementation, method, ridges, reference
                    )


# ---------------------------------------------------------------------------------------------
# Reporting


def report_name() -> str:
    """The name of a report from this machine."""
    found = environment()
    parts = ("lla_selftest", found["device"], found["lla"], found["jax"])
    return re.sub(r"[^A-Za-z0-9.]+", "_", "_".join(parts)) + ".json"


def environment() -> dict[str, Any]:
    """What the results depend on."""
    devices = jax.devices()
    return {
        "lla": lla.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "compute_capability": getattr(devices[0], "compute_capability", None),
        "device_count": len(devices),
    }


_HEADER = (
    f"{'case':<12} {'mechanism':<9}{'dtype':<9} {'implementation':<18}{'ridge':>6}  {'output':>8}"
    f" {'(bound)':>9}  {'gradient':>8} {'(bound)':>9} {'of':<7}{'ms':>8}  status"
)


def format_row(row: Result) -> str:
    name = row.implementation + (f" {row.method}" if row.method else "")
    ridge = "" if row.ridge is None else f"{row.ridge:g}"
    start = f"{row.case:<12} {row.mechanism:<9}{row.dtype:<9} {name:<18}{ridge:>6}  "
    if row.error is None:
        reason = (row.reason or "").splitlines()[0]
        return f"{start}{row.status}: {reason}"
    status = row.status if row.reason is None else f"{row.status}: {row.reason}"
    return (
        f"{start}{row.error:8.1e} ({row.bound:7.1e})  {row.gradient_error:8.1e}"
        f" ({row.gradient_bound:7.1e}) {row.gradient:<7}{row.milliseconds:8.2f}  {status}"
    )


def available(implementations, case: Case) -> dict[str, str | None]:
    """Why each implementation cannot serve a plain call on this machine, None where it can."""
    shapes = (case.query, case.key, (*case.key[:-1], case.value_dim))
    # A dtype that every implementation serves; what refuses another is a row of the table.
    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return lla.explain(*arrays, implementation=implementations)


def keep_cpu() -> None:
    """Makes the CPU available beside the platform that ``JAX_PLATFORMS`` asks for."""
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def main(argv: list[str] | None = None) -> int:
    """Runs the self test; see the module's docstring for `argv` from ``--help``."""
    parser = argparse.ArgumentParser(
        prog="lla-selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one shape and two ridges")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write the results to a file named after the device, to be sent to the authors",
    )
    parser.add_argument(
        "--implementation",
        action="append",
        choices=tuple(BACKENDS),
        help="only this one; may be repeated",
    )
    args = parser.parse_args(argv)
    keep_cpu()
    cases, ridges = (QUICK_CASES, QUICK_RIDGES) if args.quick else (CASES, RIDGES)

    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    implementations, reasons = [], available(args.implementation or tuple(BACKENDS), cases[0])
    for name, reason in reasons.items():
        print(f"{name}: {'available' if reason is None else f'not available, {reason}'}")
        if reason is None:
            implementations.append(name)
    print(f"\n{_HEADER}\n{'-' * len(_HEADER)}")
    start, results = time.perf_counter(), []
    for result in run_cases(cases, implementations, ridges):
        results.append(result)
        print(format_row(result), flush=True)

    count = {status: sum(r.status == status for r in results) for status in ("pass", "FAIL")}
    # A run in which no case passed is not a success either.
    passed = count["FAIL"] == 0 and count["pass"] > 0
    seconds = time.perf_counter() - start
    refused = len(results) - sum(count.values())
    print(
        f"\n{'PASS' if passed else 'FAIL'}: {count['pass']} within their bounds, {count['FAIL']} "
        f"failed, {refused} refused, in {seconds:.0f} s"
    )
    paths = [args.json] if args.json else []
    if args.report:
        paths.append(report_name())
        print(f"The report is in {paths[-1]}.")
    for path in paths:
        report = {
            "environment": environment(),
            "implementations": reasons,
            "passed": passed,
            "seconds": seconds,
            "results": [dataclasses.asdict(result) for result in results],
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return 0 if passed else 1


def run() -> None:
    """The command `lla-selftest`."""
    sys.exit(main())


if __name__ == "__main__":
    run()
