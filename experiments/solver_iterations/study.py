"""One record for each kind of inputs, head dimension, ridge and seed.

A record has the errors of every number of iterations in every dtype. Tables and figures are made
from the records alone.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.typed import LARGEST_SEED, check_range

KINDS = ("normal", "anisotropic", "clustered")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one record is computed from."""

    inputs: str
    dim: int
    ridge: float
    seed: int

    @property
    def id(self) -> str:
        """A name that no other trial has."""
        return f"{self.inputs}-d{self.dim}-ridge{self.ridge:g}-seed{self.seed}"

    @property
    def cost(self) -> float:
        """Proportional to the work of the dense reference; only used to estimate the time left."""
        return float(self.dim) ** 2


@dataclasses.dataclass(frozen=True)
class Study:
    """Errors against the number of iterations; fields as in configs/solver_iterations.py."""

    experiment: str
    seeds: tuple[int, ...]
    length: int
    heads: int
    settings: tuple[tuple[str, int], ...]
    dtypes: tuple[str, ...]
    ridges: tuple[float, ...]
    iterations: tuple[int, ...]
    published_iterations: int

    def __post_init__(self):
        for inputs, _ in self.settings:
            if inputs not in KINDS:
                raise ValueError(f"settings may name {', '.join(KINDS)}; got {inputs!r}.")
        if not all(ridge > 0 for ridge in self.ridges):
            raise ValueError(f"ridges must be positive; got {self.ridges}.")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtypes may name {', '.join(DTYPES)}; got {dtype!r}.")
        check_range(0, LARGEST_SEED, seeds=self.seeds)
        check_range(1, length=self.length, heads=self.heads, iterations=self.iterations)
        check_range(1, dimensions=tuple(dim for _, dim in self.settings))

    def trials(self) -> list[Trial]:
        """All trials in the order of the settings."""
        grid = itertools.product(self.settings, self.ridges, self.seeds)
        return [Trial(inputs, dim, ridge, seed) for (inputs, dim), ridge, seed in grid]

    def run(self, trial: Trial) -> dict[str, Any]:
        """The record of a trial, without its name."""
        arrays = make_inputs(trial.inputs, self.length, self.heads, trial.dim, trial.seed)
        exact = _exact(arrays, trial.ridge)
        record = dataclasses.asdict(trial)
        record["results"] = [
            self._dtype(dtype, arrays, trial.ridge, exact) for dtype in self.dtypes
        ]
        return record

    def _dtype(self, dtype, arrays, ridge, exact):
        arrays = [jnp.asarray(array, dtype) for array in arrays]
        ridges = jnp.full(arrays[0].shape[:-1], ridge, jnp.float32)
        fixed = []
        for iterations in self.iterations:
            out, _ = _attend(*arrays, ridges, lla.Solver(method="cg", num_iters=iterations))
            fixed.append({"iterations": iterations, **errors(out, exact)})
        # The ridge is traced, so that the default solver is "cg" with the tolerance of the dtype.
        out, stats = _attend(*arrays, ridges, lla.Solver())
        count = np.asarray(stats.iterations)
        adaptive = {"iterations": float(count.mean()), "max_iterations": int(count.max())}
        return {
            "dtype": dtype,
            "fixed": fixed,
            "adaptive": {**adaptive, **errors(out, exact)},
            "softmax": errors(_softmax(*arrays), exact),  # no iteration at all
            "rounding": errors(jnp.asarray(exact, dtype), exact),  # the exact output, rounded once
        }


def make_inputs(kind: str, length: int, heads: int, dim: int, seed: int) -> list[np.ndarray]:
    """Query, key, value ``[1, length, heads, dim]`` in float32, rounded to bfloat16.

    The values are the same for every dtype, so that one exact result serves all. The kinds are
    those of experiments/benchmarks/hopper_programs.py.
    """
    rng = np.random.default_rng([seed, length, heads, dim])
    shape = (1, length, heads, dim)
    query, key, value = rng.standard_normal((3, *shape), np.float32)
    if kind == "anisotropic":
        # Covariance of condition number 1e4 and unit mean variance, random axes.
        deviation = np.logspace(0, -2, dim)
        deviation /= np.sqrt(np.mean(deviation**2))
        axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        factor = (deviation[:, None] * axes).astype(np.float32)
        query, key = query @ factor, key @ factor
    elif kind == "clustered":
        # Within 0.1 of eight centres that queries and keys share.
        centres = rng.standard_normal((8, dim), np.float32)
        query, key = (
            centres[rng.integers(8, size=shape[:-1])] + np.float32(0.1) * array
            for array in (query, key)
        )
    return [
        np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32)) for a in (query, key, value)
    ]


def errors(out: jax.Array, exact: np.ndarray) -> dict[str, float]:
    """Relative Frobenius error of the output, and the largest one of a single row."""
    difference = np.asarray(out).astype(np.float64) - exact
    rows = np.linalg.norm(difference, axis=-1) / np.linalg.norm(exact, axis=-1)
    return {
        "error": float(np.linalg.norm(difference) / np.linalg.norm(exact)),
        "worst_row": float(rows.max()),
    }


@functools.partial(jax.jit, static_argnames="solver")
def _attend(query, key, value, ridge, solver):
    return lla.local_linear_attention(
        query, key, value, ridge=ridge, solver=solver, implementation="xla", return_stats=True
    )


@jax.jit
def _softmax(query, key, value):
    return lla.softmax_attention(query, key, value, implementation="xla")


@jax.jit
def _reference(query, key, value, ridge):
    return lla.local_linear_attention(query, key, value, ridge=ridge, implementation="reference")


def _exact(arrays, ridge):
    with jax.enable_x64(True):
        wide = [jnp.asarray(array.astype(np.float64)) for array in arrays]
        ridges = jnp.full(wide[0].shape[:-1], ridge, jnp.float64)
        out = np.asarray(_reference(*wide, ridges))
    assert out.dtype == np.float64
    return out
