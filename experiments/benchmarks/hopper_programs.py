"""The programs that `hopper.py` compiles, and the cases that it measures with them."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lla

KEY_FIELDS = (
    "group", "implementation", "mechanism", "pass", "batch", "heads", "kv_heads", "n", "head_dim",
    "ridge", "ridge_kind", "inputs",
)  # fmt: skip
HOSTILE = ("anisotropic", "clustered", "offset", "sharp")
_HOSTILE_DIM = 64
_GROWTH_CASE = (64, 10.0)
_PROBE = 1 / 8


class Program(NamedTuple):
    """What is compiled. Cases that differ only in their inputs share a program."""

    implementation: str
    mechanism: str
    which: str
    batch: int
    heads: int
    kv_heads: int
    n: int
    head_dim: int
    ridge: float | None
    ridge_kind: str | None
    dtype: str

    @property
    def differentiable(self) -> tuple[str, ...]:
        extra = {"parallax": ("probe",), "lla": ("ridge",) if self.ridge_kind == "array" else ()}
        return ("query", "key", "value", *extra.get(self.mechanism, ()))

    def compiled_as(self) -> Program:
        """The program to compile: if the ridge is an argument, one program serves all ridges."""
        return self._replace(ridge=1.0) if self.ridge_kind == "array" else self

    def truth(self) -> Program:
        """The same problem for the dense reference in float64, with the ridge as an argument."""
        kind = "array" if self.mechanism == "lla" else None
        return self._replace(
            implementation="reference", which="forward_backward", ridge=None, ridge_kind=kind,
            dtype="float64",
        )  # fmt: skip


class Case(NamedTuple):
    """A program on one kind of inputs.

    Attributes:
      group: "accuracy", "speed" or "growth".
      inputs: "normal" or one of `HOSTILE`.
      program: what is called.
    """

    group: str
    inputs: str
    program: Program

    def fields(self) -> dict[str, Any]:
        fields = self.program._asdict()
        del fields["dtype"]
        which = fields.pop("which")
        return {"group": self.group, "pass": which, **fields, "inputs": self.inputs}


def make_cases(options: argparse.Namespace) -> list[Case]:
    """All cases. Those of the group "accuracy", which decide what may be timed, come first."""
    ours = options.implementation

    def programs(passes, batch, heads, kv_heads, n, head_dim, ridges, others, kind="static"):
        sizes = (batch, heads, kv_heads, n, head_dim)
        for which in passes:
            for ridge in ridges if "lla" in options.mechanisms else ():
                yield Program(ours, "lla", which, *sizes, ridge, kind, options.dtype)
            for name, mechanism in others:
                yield Program(name, mechanism, which, *sizes, None, None, options.dtype)

    both = ("forward_backward", "forward")
    others = ((ours, "softmax"), (ours, "parallax"), ("cudnn", "softmax"))
    others = [(name, mechanism) for name, mechanism in others if mechanism in options.mechanisms]
    small = (1, 2, 1, options.accuracy_length)
    cases = []
    for d in options.head_dims:
        found = list(programs(both[:1], *small, d, options.ridges, others))
        cases += [Case("accuracy", "normal", program) for program in found]
        if d == _HOSTILE_DIM or len(options.head_dims) == 1:
            for kind in HOSTILE:
                found = programs(both[:1], *small, d, options.ridges, ())
                cases += [Case("accuracy", kind, program) for program in found]
        found = programs(both[:1], *small, d, options.ridges, (), "array")
        cases += [Case("accuracy", "normal", program) for program in found]
    for d in options.head_dims:
        sizes = (options.batch, options.heads, options.heads, options.length, d)
        cases += [
            Case("speed", "normal", p) for p in programs(both, *sizes, options.ridges, others)
        ]
        traced = programs(both, *sizes, options.ridges, (), "array")
        cases += [Case("speed", "normal", p) for p in traced]
    size = options.matmul_size
    matmul = Program("xla", "matmul", "forward", 1, 1, 1, size, size, None, None, options.dtype)
    cases.append(Case("speed", "normal", matmul))
    d, ridge = _GROWTH_CASE
    if d not in options.head_dims:
        d = options.head_dims[0]
    for n in options.growth_lengths:
        found = programs(both, 1, options.heads, options.heads, n, d, [ridge], ())
        cases += [Case("growth", "normal", program) for program in found]
    if options.long_length:
        found = programs(both[:1], 1, 1, 1, options.long_length, d, [ridge], ())
        cases += [Case("growth", "normal", program) for program in found]
    return cases


def attend(program: Program, inputs: Mapping[str, jax.Array], solver: lla.Solver | None = None):
    """The output, and the iterations of the solver, None if nothing is solved."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    if program.implementation == "cudnn":
        out = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
        return out, None
    options = {"implementation": program.implementation}
    if program.mechanism == "softmax":
        return lla.softmax_attention(query, key, value, **options), None
    if program.mechanism == "parallax":
        return lla.parallax_attention(query, inputs["probe"], key, value, **options), None
    # If the ridge is known at compile time, the kernels choose their tolerance by it.
    ridge = inputs["ridge"] if program.ridge_kind == "array" else program.ridge
    out, stats = lla.local_linear_attention(
        query, key, value, ridge=ridge, solver=solver, return_stats=True, **options
    )
    return out, stats.iterations


def make_function(
    program: Program, solver: lla.Solver | None = None
) -> Callable[[Mapping[str, jax.Array]], dict]:
    """A function of the inputs. With gradients, it also returns the mean forward iterations."""

    def matmul(inputs):
        return {"output": inputs["query"] @ inputs["key"]}

    def forward(inputs):
        return {"output": attend(program, inputs, solver)[0]}

    def forward_backward(inputs):
        given = {name: inputs[name] for name in program.differentiable}
        rest = {name: inputs[name] for name in inputs if name not in given}
        out, pullback, iterations = jax.vjp(
            lambda given: attend(program, {**rest, **given}, solver), given, has_aux=True
        )
        results = {"output": out, **pullback(inputs["cotangent"])[0]}
        if iterations is not None:
            results["iterations"] = iterations.astype(jnp.float32).mean()
        return results

    if program.mechanism == "matmul":
        return matmul
    return {"forward": forward, "forward_backward": forward_backward}[program.which]


def input_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    if program.mechanism == "matmul":
        return dict.fromkeys(("query", "key"), (program.n, program.n))
    query = (program.batch, program.n, program.heads, program.head_dim)
    key = (program.batch, program.n, program.kv_heads, program.head_dim)
    shapes = {"query": query, "key": key, "value": key}
    if program.mechanism == "parallax":
        shapes["probe"] = query
    if program.ridge_kind == "array":
        shapes["ridge"] = query[:-1]
    if program.which != "forward":
        shapes["cotangent"] = query
    return shapes


def make_inputs(program: Program, kind: str, seed: int) -> dict[str, np.ndarray]:
    """float32 arrays; they depend on sizes and kind, not on the mechanism or the pass."""
    sizes = (program.batch, program.heads, program.kv_heads, program.n, program.head_dim)
    rng = np.random.default_rng([seed, *sizes])
    full = input_shapes(program._replace(mechanism="parallax", which="forward_backward"))
    if program.mechanism == "matmul":
        full = input_shapes(program)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    arrays = {name: draw(full[name]) for name in full if name != "ridge"}
    if "probe" in arrays:
        arrays["probe"] *= np.float32(_PROBE)
    d = program.head_dim
    if kind == "anisotropic":
        # Covariance of condition number 1e4 and unit mean variance, random axes.
        deviation = np.logspace(0, -2, d)
        deviation /= np.sqrt(np.mean(deviation**2))
        factor = (deviation[:, None] * np.linalg.qr(rng.normal(size=(d, d)))[0]).astype(np.float32)
        arrays |= {name: arrays[name] @ factor for name in ("query", "key")}
    elif kind == "clustered":
        centres = draw((8, d))
        for name in ("query", "key"):
            centre = centres[rng.integers(8, size=arrays[name].shape[:-1])]
            arrays[name] = centre + np.float32(0.1) * arrays[name]
    elif kind == "offset":
        arrays["key"] = arrays["key"] + 4 * draw(d)
    elif kind == "sharp":
        arrays |= {name: 2 * arrays[name] for name in ("query", "key")}
    if program.ridge_kind == "array":
        arrays["ridge"] = np.full(full["ridge"], program.ridge, np.float32)
    return {name: arrays[name] for name in input_shapes(program)}


def on_device(program: Program, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {
        name: jnp.asarray(array, jnp.float32 if name == "ridge" else program.dtype)
        for name, array in arrays.items()
    }
