"""Implementations, their exact results in float64, and the largest errors that are accepted."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.experiments.benchmarks.compilation import memory_fields
from lla.experiments.benchmarks.timing import time_interleaved

PASSES = ("forward", "forward_backward")
_TRUTH_TOL = 1e-12
_DENSE_TRUTH_LENGTH = 512


class Implementation(NamedTuple):
    """One way to compute a kind of attention.

    Attributes:
      mechanism: the kind: "lla", or "softmax", which ignores the ridge.
      function: ``(query, key, value, ridge) -> output``.
      ours: whether it is part of this library.
      roundings: the largest error in 16 bits, as a multiple of one rounding of the exact output.
    """

    mechanism: str
    function: Callable[..., jax.Array]
    ours: bool = True
    roundings: float = 2

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("query", "key", "value", "ridge")[: 4 if self.mechanism == "lla" else 3]


def _lla(implementation: str, method: str | None = None, **options):
    def attend(query, key, value, ridge):
        solver = lla.Solver(method=method, **options) if method else None
        return lla.local_linear_attention(
            query, key, value, ridge=ridge, solver=solver, implementation=implementation
        )

    return attend


def _softmax(implementation: str):
    def attend(query, key, value, ridge):
        del ridge
        return lla.softmax_attention(query, key, value, implementation=implementation)

    return attend


def _jax_softmax(implementation: str):
    def attend(query, key, value, ridge):
        del ridge
        # Without this a GPU would multiply float32 inputs in TF32.
        precision = "highest" if query.dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation=implementation
            )

    return attend


IMPLEMENTATIONS = {
    "reference": Implementation("lla", _lla("reference")),
    "xla_cg": Implementation("lla", _lla("xla", "cg")),
    "xla_direct": Implementation("lla", _lla("xla", "direct")),
    "mosaic_gpu": Implementation("lla", _lla("mosaic_gpu", "cg"), roundings=4),
    "xla_softmax": Implementation("softmax", _softmax("xla")),
    "jax_softmax": Implementation("softmax", _jax_softmax("xla"), ours=False, roundings=5),
    "jax_softmax_cudnn": Implementation("softmax", _jax_softmax("cudnn"), ours=False, roundings=5),
}
_DENSE_TRUTH = {"lla": IMPLEMENTATIONS["reference"].function, "softmax": _softmax("reference")}
_BLOCKWISE_TRUTH = {
    "lla": _lla("xla", "direct", tol=_TRUTH_TOL, backward_tol=_TRUTH_TOL),
    "softmax": _softmax("xla"),
}


def mean_iterations(
    query, key, value, ridge, method: str, implementation: str = "xla"
) -> jax.Array:
    """Solver iterations of the forward pass, averaged over all rows."""
    _, stats = lla.local_linear_attention(
        query, key, value, ridge=ridge, solver=lla.Solver(method=method),
        implementation=implementation, return_stats=True,
    )  # fmt: skip
    return stats.iterations.astype(jnp.float32).mean()


# ---------------------------------------------------------------------------------------------
# Inputs and calls


def normal_inputs(batch: int, length: int, heads: int, head_dim: int, dtype, seed: int) -> dict:
    """Standard normal query, key, value and cotangent ``[batch, length, heads, head_dim]``."""
    rng = np.random.default_rng([seed, length, head_dim])
    shape = (batch, length, heads, head_dim)
    names = ("query", "key", "value", "cotangent")
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for name in names}


def with_ridge(inputs: Mapping[str, jax.Array], ridge: float) -> dict[str, jax.Array]:
    """Adds the ridge as an array with one number per query, so that it has a gradient per query."""
    rows = jnp.full(inputs["query"].shape[:-1], ridge, jnp.float32)
    return {**inputs, "ridge": rows}


def make_call(
    implementation: Implementation, which: str
) -> Callable[[Mapping[str, jax.Array]], dict]:
    """A function of the inputs that returns ``{"output": ...}``, with gradients if asked."""

    def forward(inputs):
        arrays = (inputs[name] for name in ("query", "key", "value", "ridge"))
        return {"output": implementation.function(*arrays)}

    def forward_backward(inputs):
        given = {name: inputs[name] for name in implementation.differentiable}
        rest = {name: inputs[name] for name in inputs if name not in given}
        out, pullback = jax.vjp(lambda given: forward({**rest, **given})["output"], given)
        return {"output": out, **pullback(inputs["cotangent"])[0]}

    return {"forward": forward, "forward_backward": forward_backward}[which]


def compile_call(implementation: Implementation, which: str, inputs: Mapping[str, jax.Array]):
    """The compiled call, and its memory as fields of a record."""
    # A forward pass takes no cotangent.
    used = tuple(name for name in inputs if which != "forward" or name != "cotangent")
    compiled = (
        jax.jit(make_call(implementation, which)).lower({n: inputs[n] for n in used}).compile()
    )
    return (lambda inputs: compiled({n: inputs[n] for n in used})), memory_fields(compiled)


# ---------------------------------------------------------------------------------------------
# Truth and errors


class Truth(NamedTuple):
    """Exact results.

    Attributes:
      results: float64 arrays by name.
      source: what computed them.
      cross_check: the largest difference from a second exact computation, if there was one.
    """

    results: dict[str, np.ndarray]
    source: str
    cross_check: float | None


@functools.cache
def _exact_call(function, mechanism: str):
    return jax.jit(make_call(Implementation(mechanism, function), "forward_backward"))


def exact(mechanism: str, inputs: Mapping[str, jax.Array]) -> Truth:
    """Output and gradients in float64, for the inputs as they are (16-bit inputs are not redrawn).

    Up to 512 keys they come from the dense reference, and the blockwise direct solver has to agree.
    For more keys the reference needs too much memory, and they come from the direct solver.

    Raises:
      RuntimeError: the two disagree.
    """
    blockwise = _in_float64(_BLOCKWISE_TRUTH[mechanism], mechanism, inputs)
    if inputs["query"].shape[1] > _DENSE_TRUTH_LENGTH:
        solver = f", direct solver, tolerance {_TRUTH_TOL:g}" if mechanism == "lla" else ""
        return Truth(blockwise, f"xla, float64{solver}", None)
    dense = _in_float64(_DENSE_TRUTH[mechanism], mechanism, inputs)
    difference = max(errors(blockwise, dense).values())
    if not difference < 1e-9:
        raise RuntimeError(f"two float64 results of {mechanism} differ by {difference:.1e}.")
    return Truth(dense, "reference, float64", difference)


def _in_float64(function, mechanism: str, inputs: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    wide = {name: np.asarray(array).astype(np.float64) for name, array in inputs.items()}
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(array) for name, array in wide.items()}
        return jax.tree.map(np.asarray, _exact_call(function, mechanism)(wide))


def errors(got: Mapping[str, Any], want: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative Frobenius error of every result in `got`; infinite where it is not finite."""
    out = {}
    for name in got:
        array = np.asarray(got[name]).astype(np.float64)
        error = float(np.linalg.norm(array - want[name]) / np.linalg.norm(want[name]))
        out[name] = error if math.isfinite(error) else math.inf
    return out


def bounds(
    implementation: Implementation, ridge: float, dtype, want: Mapping[str, np.ndarray]
) -> dict:
    """The largest relative errors that are accepted.

    In float32, 1e-5 for a ridge of 1 or more, and ten times more for each factor of ten below. In
    16 bits, a multiple of the error of rounding the exact output: 2; 4 for the kernels, which also
    round weights and probe; 5 for softmax attention that is not ours. Gradients may have ten times
    the error of the output.
    """
    if jnp.dtype(dtype) == jnp.float32:
        steps = (
            max(0, math.ceil(-math.log10(ridge) - 1e-9)) if implementation.mechanism == "lla" else 0
        )
        output = 1e-5 * 10.0**steps
    else:
        rounded = np.asarray(jnp.asarray(want["output"], dtype)).astype(np.float64)
        rounding = errors({"output": rounded}, want)["output"]
        output = implementation.roundings * rounding
    return {name: output if name == "output" else 10 * output for name in want}


def verdict(
    got: Mapping[str, Any], want: Mapping[str, np.ndarray], limits: Mapping[str, float]
) -> dict[str, Any]:
    """Fields of a record: errors, bounds, and the status "timed" or, with a reason, "refused".

    Args:
      got: results by name.
      want: exact results.
      limits: the largest relative error of each result.
    """
    found = errors(got, want)
    fields = {
        # JSON has no infinity.
        "errors": {name: e if math.isfinite(e) else None for name, e in found.items()},
        "bounds": {name: limits[name] for name in found},
        "status": "timed",
    }
    bad = [f"{n} {e:.1e} > {limits[n]:.1e}" for n, e in found.items() if not e <= limits[n]]
    if bad:
        fields |= {"status": "refused", "reason": f"error too large: {', '.join(bad)}"}
    return fields


def limits_for(names, output: float, gradients: float) -> dict[str, float]:
    """One bound for the output and one for every other result."""
    return {name: output if name == "output" else gradients for name in names}


def worst_row(got, want: np.ndarray) -> float | None:
    """The largest relative error of a row of the output; None if it is not finite."""
    difference = np.linalg.norm(np.asarray(got).astype(np.float64) - want, axis=-1)
    worst = float((difference / np.linalg.norm(want, axis=-1)).max())
    return worst if math.isfinite(worst) else None


def judge(implementation: Implementation, got, truth: Truth, ridge: float, dtype) -> dict[str, Any]:
    """`verdict` with the bounds of an implementation, and the source of the exact results."""
    limits = bounds(implementation, ridge, dtype, truth.results)
    fields = verdict(got, truth.results, limits)
    return {**fields, "truth": truth.source, "truth_cross_check": truth.cross_check}


def measure_group(
    cells: Mapping[str, dict],
    implementations: Mapping[str, Implementation],
    inputs: Mapping[str, jax.Array],
    truths: Mapping[str, Truth],
    compiled: Mapping[str, tuple],
    *,
    ridge: float,
    repeats: int,
    budget: float,
) -> list[dict]:
    """Records of compiled implementations on the same inputs: those that are right are timed.

    Args:
      cells: by name, the fields that identify a record.
      implementations: by name.
      inputs: of all calls.
      truths: by mechanism.
      compiled: by name, what `compile_call` returned.
      ridge: in `inputs`.
      repeats, budget: as for `time_interleaved`.
    """
    records, calls = {}, {}
    for name, cell in cells.items():
        call, memory = compiled[name]
        implementation = implementations[name]
        truth = truths[implementation.mechanism]
        judged = judge(implementation, call(inputs), truth, ridge, inputs["query"].dtype)
        records[name] = {**cell, **memory, **judged}
        if judged["status"] == "timed":
            calls[name] = lambda call=call: call(inputs)
    for name, timing in time_interleaved(calls, repeats, budget).items():
        records[name] |= dataclasses.asdict(timing)
    return list(records.values())
