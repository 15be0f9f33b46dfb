"""Series, cases and their order, inputs, and exact results."""

from __future__ import annotations

import functools
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.experiments.benchmarks import truth
from lla.mixers.mesa import mesa
from lla.mixers.parts import l2_normalize
from lla.numerics import compute_dtype
from lla.ops.reference import solve_positive_definite

SERIES = (
    "lla_cg", "softmax", "jax_softmax", "lla_direct", "dense", "dense_matrices", "mesanet",
)  # fmt: skip
DENSE = ("dense", "dense_matrices")
PASSES = ("forward_backward", "forward")
KEY_FIELDS = ("implementation", "dtype", "pass", "heads", "head_dim", "n")
ARRAYS = ("query", "key", "value", "cotangent")
# The exact recurrence of MesaNet factorises one matrix per token, one after the other.
MESANET_CHECKED = 512
# Largest relative errors of MesaNet's output and gradients, those of experiments/benchmarks/
# mixers.py: its conjugate gradients end after 30 iterations.
MESANET_BOUNDS = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 1e-1)}


class Case(NamedTuple):
    """One call with one set of sizes."""

    series: str
    dtype: str
    which: str  # one of PASSES
    heads: int  # the batch is one sequence
    head_dim: int
    n: int

    def fields(self) -> dict[str, Any]:
        """The fields that identify its record."""
        return dict(zip(KEY_FIELDS, self, strict=True))


def make_units(
    series: Sequence[str],
    dtype: str,
    heads: Sequence[int],
    head_dims: Sequence[int],
    lengths: Sequence[int],
    part: tuple[int, int] = (1, 1),
) -> list[list[Case]]:
    """Units, the most important ones first: the cases of a unit differ only in their length.

    Args:
      part: ``(i, parts)`` takes the i-th share, i = 1 .. parts. The last has the dense forms, all
        of them because a process keeps the memory that it has once had, and the others take turns.
    """  # fmt: skip
    index, parts = part
    units = [
        [Case(name, dtype, which, count, head_dim, n) for n in sorted(lengths)]
        for count in heads
        for name in series
        for which in PASSES
        for head_dim in head_dims
    ]
    if parts == 1:
        return units
    dense = [unit for unit in units if unit[0].series in DENSE]
    if index == parts:
        return dense
    return [unit for unit in units if unit not in dense][index - 1 :: parts - 1]


# ---------------------------------------------------------------------------------------------
# Implementations


def _dense_matrices(query, key, value, ridge):
    """All weights of a head, and for every query the second moment of its keys, d by d.

    Causal, ``[B, T, N, H]``. The plainest program with matrices per query: its memory grows with
    n d^2 beside the n^2 of the weights, not with n^2 d.
    """
    einsum = functools.partial(jnp.einsum, precision="highest")
    batch, n, heads, dim = query.shape
    wide = compute_dtype(query.dtype)
    q, k, v = (jnp.moveaxis(array.astype(wide), 2, 1) for array in (query, key, value))
    logits = einsum("bhid,bhjd->bhij", q, k) * jnp.asarray(1 / math.sqrt(dim), wide)
    seen = jnp.tril(jnp.ones((n, n), bool))
    weights = jax.nn.softmax(jnp.where(jnp.broadcast_to(seen, logits.shape), logits, -jnp.inf))
    mean = einsum("bhij,bhjd->bhid", weights, k)
    outer = (k[..., :, None] * k[..., None, :]).reshape(batch, heads, n, dim * dim)
    moment = einsum("bhij,bhjx->bhix", weights, outer).reshape(batch, heads, n, dim, dim)
    identity = jnp.broadcast_to(jnp.eye(dim, dtype=wide), moment.shape)
    ridges = jnp.moveaxis(ridge.astype(wide), 2, 1)[..., None, None]
    systems = moment - mean[..., :, None] * mean[..., None, :] + ridges * identity
    solve = solve_positive_definite
    for _ in range(3):
        solve = jax.vmap(solve)
    probe = solve(systems, mean - q)
    # sum_j w_ij (1 - (k_j - mean_i) . x_i) v_j
    slope = einsum("bhid,bhjd->bhij", probe, k)
    level = 1 + (mean * probe).sum(-1, keepdims=True)
    factor = jnp.broadcast_to(level, slope.shape) - slope
    out = einsum("bhij,bhjd->bhid", weights * factor, v)
    return jnp.moveaxis(out, 1, 2).astype(query.dtype)


def _mesanet(form: str, solver: str):
    def attend(query, key, value, ridge):
        del ridge
        weight = jnp.ones(query.shape[:-1], compute_dtype(value.dtype))
        diagonal = jnp.ones((query.shape[2], query.shape[3]), compute_dtype(value.dtype))
        query, key = l2_normalize(query), l2_normalize(key)
        return mesa(query, key, value, weight, ridge=diagonal, form=form, solver=solver)

    return attend


def _kernel_softmax(query, key, value, ridge):
    del ridge
    return lla.softmax_attention(query, key, value, implementation="mosaic_gpu")


def make_implementation(series: str, dtype: str, backend: str) -> tuple[str, truth.Implementation]:
    """The implementation that runs as `series` on `backend`, and its name."""
    kernels = backend == "gpu" and dtype != "float32"
    own = {
        "dense_matrices": truth.Implementation("lla", _dense_matrices),
        "mesanet": truth.Implementation("mesanet", _mesanet("parallel", "cg")),
        "mosaic_gpu_softmax": truth.Implementation("softmax", _kernel_softmax, roundings=4),
    }
    name = {
        "lla_cg": "mosaic_gpu" if kernels else "xla_cg",
        "lla_direct": "xla_direct",
        "softmax": "mosaic_gpu_softmax" if kernels else "xla_softmax",
        "jax_softmax": "jax_softmax_cudnn" if kernels else "jax_softmax",
        "dense": "reference",
    }.get(series, series)
    return name, own.get(name) or truth.IMPLEMENTATIONS[name]


# ---------------------------------------------------------------------------------------------
# Inputs


def shapes(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the inputs of a call."""
    size = (1, case.n, case.heads, case.head_dim)
    out = {name: jax.ShapeDtypeStruct(size, case.dtype) for name in ARRAYS}
    return {**out, "ridge": jax.ShapeDtypeStruct(size[:-1], jnp.float32)}


def one_head(head: int, n: int, head_dim: int, seed: int) -> dict[str, np.ndarray]:
    """Standard normal ``[n, head_dim]``, rounded to bfloat16 and kept as float32.

    Shorter inputs are the beginning of longer ones, and a head is the same among any number of
    heads, so that one exact result serves many cases.
    """
    arrays = {}
    for index, name in enumerate(ARRAYS):
        rng = np.random.default_rng([seed, head_dim, head, index])
        drawn = rng.standard_normal((n, head_dim), np.float32)
        arrays[name] = drawn.astype(jnp.bfloat16).astype(np.float32)
    return arrays


@functools.lru_cache(maxsize=1)
def _longest(heads: int, n: int, head_dim: int, dtype: str, seed: int) -> dict[str, np.ndarray]:
    every = [one_head(head, n, head_dim, seed) for head in range(heads)]
    return {
        name: np.stack([arrays[name] for arrays in every], 1)[None].astype(jnp.dtype(dtype))
        for name in ARRAYS
    }


def make_inputs(case: Case, longest: int, ridge: float, seed: int) -> dict[str, np.ndarray]:
    """Inputs of a call, cut from those of the length `longest`."""
    arrays = _longest(case.heads, longest, case.head_dim, case.dtype, seed)
    inputs = {name: array[:, : case.n] for name, array in arrays.items()}
    return {**inputs, "ridge": np.full(inputs["query"].shape[:-1], ridge, np.float32)}


# ---------------------------------------------------------------------------------------------
# Exact results


def checked_length(case: Case, mechanism: str, longest: int) -> int:
    """How many first tokens are compared with exact results."""
    return min(case.n, longest, MESANET_CHECKED if mechanism == "mesanet" else longest)


@functools.lru_cache(maxsize=8)
def exact_results(
    mechanism: str, n: int, head_dim: int, ridge: float, seed: int, folder: str | None = None
) -> truth.Truth:
    """Output and gradients of the first head in float64.

    Args:
      folder: where exact results are kept between runs; None for nowhere.
    """
    arrays = {name: array[None, :, None] for name, array in one_head(0, n, head_dim, seed).items()}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    inputs = {**arrays, "ridge": np.full((1, n, 1), ridge, np.float32)}
    path = None
    if folder is not None:
        name = f"{mechanism}-n{n}-d{head_dim}-ridge{ridge:g}-seed{seed}-{digest[:12]}.npz"
        path = pathlib.Path(folder) / name
        if path.exists():
            with np.load(path) as stored:
                results = {name: stored[name] for name in stored.files}
            source, check = str(results.pop("source")), float(results.pop("cross_check"))
            return truth.Truth(results, source, None if math.isnan(check) else check)
    found = _mesanet_truth(inputs) if mechanism == "mesanet" else truth.exact(mechanism, inputs)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        check = math.nan if found.cross_check is None else found.cross_check
        np.savez(path, **found.results, source=found.source, cross_check=check)
    return found


def _mesanet_truth(inputs: Mapping[str, np.ndarray]) -> truth.Truth:
    call = truth.make_call(
        truth.Implementation("mesanet", _mesanet("recurrent", "exact")), "forward_backward"
    )
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(array, jnp.float64) for name, array in inputs.items()}
        results = jax.tree.map(np.asarray, jax.jit(call)(wide))
    return truth.Truth(results, "recurrence, float64, exact solver", None)


def compile_check(case: Case, implementation: truth.Implementation, length: int):
    """Compiles a function of the results: those of the first head, and whether all are finite.

    Beyond `length`, that of the exact results, the first tokens of the output are compared, which
    no later token may change.
    """
    given = shapes(case)
    names = ("output", *implementation.differentiable) if case.which != "forward" else ("output",)
    results = {name: given["query" if name == "output" else name] for name in names}

    def check(got):
        compared = names if length == case.n else ("output",)
        finite = jnp.stack([jnp.isfinite(array).all() for array in got.values()]).all()
        return {name: got[name][:, :length, :1] for name in compared}, finite

    return jax.jit(check).lower(results).compile()


def judge(
    case: Case,
    implementation: truth.Implementation,
    compared: Mapping[str, jax.Array],
    finite: bool,
    exact: truth.Truth,
    ridge: float,
) -> dict[str, Any]:
    """Errors, bounds and status of the first head.

    Args:
      compared, finite: what the function of `compile_check` returns.
    """  # fmt: skip
    first = {name: np.asarray(array).astype(np.float64) for name, array in compared.items()}
    if implementation.mechanism == "mesanet":
        verdict = truth.verdict(
            first, exact.results, truth.limits_for(first, *MESANET_BOUNDS[case.dtype])
        )
        verdict |= {"truth": exact.source, "truth_cross_check": exact.cross_check}
    else:
        verdict = truth.judge(implementation, first, exact, ridge, case.dtype)
    if not finite:
        verdict["status"] = "refused"
        verdict.setdefault("reason", "a result is not finite")
    return {**verdict, "checked_tokens": first["output"].shape[1]}
