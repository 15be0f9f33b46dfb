"""What the benchmarks measure: implementations, their exact results, and when one is wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np

import lla

PASSES = ("forward", "forward_backward")
_TRUTH_TOL = 1e-12
_DENSE_TRUTH_LENGTH = 512


class Subject(NamedTuple):
    """An implementation: ``function(query, key, value, ridge) -> output`` of one member."""

    member: str  # "lla" or "softmax", which takes no notice of the ridge
    function: Callable[..., jax.Array]
    ours: bool = True
    roundings: float = 2  # 16-bit error that still counts as right, as a multiple of one rounding

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("query", "key", "value", "ridge")[: 4 if self.member == "lla" else 3]


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


SUBJECTS = {
    "reference": Subject("lla", _lla("reference")),
    "xla_cg": Subject("lla", _lla("xla", "cg")),
    "xla_direct": Subject("lla", _lla("xla", "direct")),
    "mosaic_gpu": Subject("lla", _lla("mosaic_gpu", "cg"), roundings=4),
    "xla_softmax": Subject("softmax", _softmax("xla")),
    "jax_softmax": Subject("softmax", _jax_softmax("xla"), ours=False, roundings=5),
    "jax_softmax_cudnn": Subject("softmax", _jax_softmax("cudnn"), ours=False, roundings=5),
}
_DENSE_TRUTH = {"lla": SUBJECTS["reference"].function, "softmax": _softmax("reference")}
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
    """Adds the ridge, one number per query so that its gradient is as well."""
    rows = jnp.full(inputs["query"].shape[:-1], ridge, jnp.float32)
    return {**inputs, "ridge": rows}


def make_call(subject: Subject, which: str) -> Callable[[Mapping[str, jax.Array]], dict]:
    """A function of the inputs that returns ``{"output": ...}``, with all gradients if asked."""

    def forward(inputs):
        arrays = (inputs[name] for name in ("query", "key", "value", "ridge"))
        return {"output": subject.function(*arrays)}

    def forward_backward(inputs):
        given = {name: inputs[name] for name in subject.differentiable}
        rest = {name: inputs[name] for name in inputs if name not in given}
        out, pullback = jax.vjp(lambda given: forward({**rest, **given})["output"], given)
        return {"output": out, **pullback(inputs["cotangent"])[0]}

    return {"forward": forward, "forward_backward": forward_backward}[which]


def compile_call(subject: Subject, which: str, inputs: Mapping[str, jax.Array]):
    """The compiled call and its memory as fields of a record."""
    # The cotangent is no argument of a forward pass.
    used = tuple(name for name in inputs if which != "forward" or name != "cotangent")
    compiled = jax.jit(make_call(subject, which)).lower({n: inputs[n] for n in used}).compile()
    memory = compiled.memory_analysis()
    fields = {
        "temp_bytes": int(memory.temp_size_in_bytes),
        "output_bytes": int(memory.output_size_in_bytes),
    }
    return (lambda inputs: compiled({n: inputs[n] for n in used})), fields


# ---------------------------------------------------------------------------------------------
# Truth and errors


class Truth(NamedTuple):
    """Exact results as float64 NumPy arrays, and what they were computed by."""

    results: dict[str, np.ndarray]
    source: str
    cross_check: float | None  # largest difference to a second exact computation


@functools.cache
def _exact_call(function, member: str):
    return jax.jit(make_call(Subject(member, function), "forward_backward"))


def exact(member: str, inputs: Mapping[str, jax.Array]) -> Truth:
    """Output and gradients in float64 for the inputs as they are, 16-bit ones included.

    Up to 512 keys from the dense reference, compared with the blockwise direct solver; beyond,
    where the reference does not fit, from the latter alone.

    Raises:
      RuntimeError: if the two disagree.
    """
    blockwise = _in_float64(_BLOCKWISE_TRUTH[member], member, inputs)
    if inputs["query"].shape[1] > _DENSE_TRUTH_LENGTH:
        solver = f", direct solver, tolerance {_TRUTH_TOL:g}" if member == "lla" else ""
        return Truth(blockwise, f"xla, float64{solver}", None)
    dense = _in_float64(_DENSE_TRUTH[member], member, inputs)
    difference = max(errors(blockwise, dense).values())
    if not difference < 1e-9:
        raise RuntimeError(f"two float64 results of {member} differ by {difference:.1e}.")
    return Truth(dense, "reference, float64", difference)


def _in_float64(function, member: str, inputs: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    wide = {name: np.asarray(array).astype(np.float64) for name, array in inputs.items()}
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(array) for name, array in wide.items()}
        return jax.tree.map(np.asarray, _exact_call(function, member)(wide))


def errors(got: Mapping[str, Any], want: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative Frobenius error of every result in `got`; infinite where it is not finite."""
    out = {}
    for name in got:
        array = np.asarray(got[name]).astype(np.float64)
        error = float(np.linalg.norm(array - want[name]) / np.linalg.norm(want[name]))
        out[name] = error if math.isfinite(error) else math.inf
    return out


def bounds(subject: Subject, ridge: float, dtype, want: Mapping[str, np.ndarray]) -> dict:
    """Largest relative errors with which an implementation still counts as right.

    float32: 1e-5 for a ridge of 1 or more, ten times as much per factor of ten below. 16 bits:
    twice what rounding the exact output costs, four times for the kernels, which round weights and
    probe besides, five times for softmax attention that is not ours. Gradients: ten times the
    output's bound.
    """
    if jnp.dtype(dtype) == jnp.float32:
        steps = max(0, math.ceil(-math.log10(ridge) - 1e-9)) if subject.member == "lla" else 0
        output = 1e-5 * 10.0**steps
    else:
        rounded = np.asarray(jnp.asarray(want["output"], dtype)).astype(np.float64)
        rounding = errors({"output": rounded}, want)["output"]
        output = subject.roundings * rounding
    return {name: output if name == "output" else 10 * output for name in want}


def judge(subject: Subject, got, truth: Truth, ridge: float, dtype) -> dict[str, Any]:
    """Fields of a record that say how exact `got` is; "reason" only if it is too far off."""
    found = errors(got, truth.results)
    allowed = bounds(subject, ridge, dtype, truth.results)
    fields = {
        # JSON has no infinity.
        "errors": {name: e if math.isfinite(e) else None for name, e in found.items()},
        "bounds": {name: allowed[name] for name in found},
        "truth": truth.source,
        "truth_cross_check": truth.cross_check,
    }
    bad = [f"{name} {found[name]:.1e} > {allowed[name]:.1e}" for name in found
           if not found[name] <= allowed[name]]  # fmt: skip
    if bad:
        fields["reason"] = f"error too large: {', '.join(bad)}"
    return fields


def measure_group(
    cells: Mapping[str, dict],
    subjects: Mapping[str, Subject],
    inputs: Mapping[str, jax.Array],
    truths: Mapping[str, Truth],
    compiled: Mapping[str, tuple],
    *,
    ridge: float,
    repeats: int,
    budget: float,
) -> list[dict]:
    """Checks and then times the compiled implementations of one group of cells in turns.

    Args:
      cells: per name the fields that identify the cell; what is refused gets no time.
      compiled: per name what `compile_call` returned.
    """
    records, calls = {}, {}
    for name, cell in cells.items():
        call, memory = compiled[name]
        subject = subjects[name]
        verdict = judge(subject, call(inputs), truths[subject.member], ridge, inputs["query"].dtype)
        records[name] = {**cell, **memory, **verdict}
        if "reason" in verdict:
            records[name]["status"] = "refused"
        else:
            records[name]["status"] = "timed"
            calls[name] = lambda call=call: call(inputs)
    for name, timing in measure.time_interleaved(calls, repeats, budget).items():
        records[name] |= dataclasses.asdict(timing)
    return list(records.values())
