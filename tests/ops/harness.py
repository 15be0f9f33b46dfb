"""Runs one call of the operator with all its gradients, compiled once per shape and options."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np

import lla
from lla.ops import BACKENDS, Backend, register_backend
from tests.measure import relative_error

FUNCTIONS = {
    "lla": lla.local_linear_attention,
    "parallax": lla.parallax_attention,
    "softmax": lla.softmax_attention,
}
DIFFERENTIABLE = {
    "lla": ("query", "key", "value", "ridge", "scale"),
    "parallax": ("query", "key", "value", "probe", "scale"),
    "softmax": ("query", "key", "value", "scale"),
}


class Implementation(NamedTuple):
    """What a parametrised test runs: an implementation with a solver method."""

    name: str
    method: str | None = None

    def solver(self, **options) -> lla.Solver | None:
        return lla.Solver(method=self.method, **options) if self.method else None

    def __str__(self):
        return f"{self.name}_{self.method}" if self.method else self.name


REFERENCE = Implementation("reference")
XLA_CG = Implementation("xla", "cg")
XLA_DIRECT = Implementation("xla", "direct")
FAST = (XLA_CG, XLA_DIRECT)
EVERY = (REFERENCE, *FAST)


# Compiler options that undo what tests/conftest.py sets to compile faster.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True


class Result(NamedTuple):
    """NumPy results of `evaluate`; gradients by argument name."""

    out: np.ndarray
    stats: lla.Stats
    gradients: dict[str, np.ndarray]


def double_precision():
    """Context in which float64 arrays stay float64."""
    return jax.enable_x64(True)


@contextlib.contextmanager
def registered(backend: Backend):
    """Inside, callers reach `backend` by its name."""
    register_backend(backend)
    try:
        yield
    finally:
        del BACKENDS[backend.name]


@functools.cache
def compiled(
    mechanism: str, implementation: Implementation, static: tuple, solver=None, optimised=False
):
    """Jitted ``(differentiable, options, cotangent) -> (out, stats, gradients)``."""

    def call(differentiable, options, cotangent):
        def forward(arrays):
            extra = {**options, **dict(static)}
            if mechanism == "lla":
                extra["solver"] = solver or implementation.solver()
            return FUNCTIONS[mechanism](
                **arrays, **extra, implementation=implementation.name, return_stats=True
            )

        out, pullback, stats = jax.vjp(forward, differentiable, has_aux=True)
        return out, stats, pullback(cotangent.astype(out.dtype))[0]

    return jax.jit(call, compiler_options=OPTIMISED if optimised else None)


def evaluate(
    inputs: dict[str, Any],
    implementation: Implementation,
    *,
    mechanism: str = "lla",
    dtype="float32",
    solver=None,
    optimised=False,
    **options,
) -> Result:
    """Output, statistics and all gradients of ``<out, cotangent>``.

    Query, key, value and probe are cast to `dtype`, ridge and scale to at least float32. With
    `optimised` the program is compiled as it is outside of the tests.
    """
    dtype = jax.numpy.dtype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    static = {n: o for n, o in options.items() if n in ("is_causal", "local_window_size")}
    arrays = {n: o for n, o in options.items() if n not in static}
    with double_precision() if wide == np.float64 else contextlib.nullcontext():
        differentiable = {
            name: jax.numpy.asarray(
                inputs[name], wide if name in ("ridge", "scale") else dtype
            )
            for name in DIFFERENTIABLE[mechanism]
        }  # fmt: skip
        function = compiled(
            mechanism, implementation, tuple(sorted(static.items())), solver, optimised
        )
        result = function(differentiable, arrays, jax.numpy.asarray(inputs["cotangent"], dtype))
        return Result(*jax.tree.map(np.asarray, result))


def exact(inputs: dict[str, Any], *, rounded="float32", **options) -> Result:
    """The float64 reference on the inputs as `rounded` holds them."""
    narrow = {}
    for name, array in inputs.items():
        kept = np.float32 if name in ("ridge", "scale") and rounded != "float64" else rounded
        narrow[name] = np.asarray(np.asarray(array, jax.numpy.dtype(kept)), np.float64)
    return evaluate(narrow, REFERENCE, dtype="float64", **options)


def errors(actual: Result, expected: Result) -> dict[str, float]:
    """Relative errors of the output and of every gradient."""
    gradients = {
        f"d_{name}": relative_error(actual.gradients[name], gradient)
        for name, gradient in expected.gradients.items()
    }
    return {"out": relative_error(actual.out, expected.out), **gradients}
