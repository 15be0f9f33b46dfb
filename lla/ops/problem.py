"""From the public arguments to one checked, canonical description of the computation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lla.ops import integers
from lla.ops.masks import Mask
from lla.ops.options import ResolvedSolver, Solver

Member = Literal["softmax", "parallax", "lla"]
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, checked and with its leading axes flattened.

    Shapes: query and probe ``[B, T, K, G, H]`` (``G = N // K`` query heads share a key head), key
    ``[B, S, K, H]``, value ``[B, S, K, Hv]``, ridge and scale ``[B, T, K, G]`` in `compute_dtype`.
    """

    member: Member
    query: jax.Array
    probe: jax.Array | None
    key: jax.Array
    value: jax.Array
    ridge: jax.Array | None
    scale: jax.Array
    mask: Mask
    solver: Solver
    static_ridge: float | None  # the smallest ridge where its value is known, for solver="auto"
    static_scale: float | None
    one_ridge: bool  # whether `static_ridge` is that of all queries
    leading: tuple[int, ...]

    @property
    def compute_dtype(self) -> jnp.dtype:
        return compute_dtype(self.query.dtype)

    @property
    def num_heads(self) -> int:
        return self.query.shape[2] * self.query.shape[3]

    def restore(self, array: jax.Array) -> jax.Array:
        """``[B, T, K, G, ...] -> [*B, T, N, ...]``."""
        _, t, k, g, *rest = array.shape
        return array.reshape(*self.leading, t, k * g, *rest)


def compute_dtype(dtype) -> jnp.dtype:
    """Statistics and solves run in float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def make_problem(
    member: Member,
    query,
    key,
    value,
    *,
    probe=None,
    ridge=None,
    scale=None,
    is_causal=True,
    query_offset=None,
    key_value_seq_lengths=None,
    segment_ids=None,
    local_window_size=None,
    mask=None,
    solver=None,
    known_ridge: float | None = None,
) -> Problem:
    """Checks every argument and builds the `Problem`; see `lla.local_linear_attention`.

    `known_ridge` is the smallest ridge, for a traced one that was known before it was traced.
    """
    query, key, value = (
        _float_array(a, n) for a, n in ((query, "query"), (key, "key"), (value, "value"))
    )
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim < 3:
            raise ValueError(
                f"{name} must have shape [*B, length, heads, head_dim], got {array.shape}."
            )
        if array.dtype != query.dtype:
            raise ValueError(
                f"query, key and value must share one dtype, got {query.dtype}, {key.dtype}, "
                f"{value.dtype}."
            )
    *leading, t, n, h = query.shape
    *key_leading, s, k, key_h = key.shape
    *value_leading, value_s, value_k, hv = value.shape
    leading = tuple(leading)
    if tuple(key_leading) != leading or tuple(value_leading) != leading:
        raise ValueError(f"query, key and value must have equal leading axes, got {shapes}.")
    if key_h != h:
        raise ValueError(f"query and key must have equal head_dim, got {shapes}.")
    if (value_s, value_k) != (s, k):
        raise ValueError(f"key and value must have equal length and heads, got {shapes}.")
    if k == 0 or n % k:
        raise ValueError(
            f"the number of query heads ({n}) must be a multiple of that of key heads ({k}): "
            f"{shapes}."
        )
    if 0 in (t, s, n, h, hv):
        raise ValueError(f"no axis but a leading one may be empty, got {shapes}.")
    b = math.prod(leading)
    heads = (b, t, k, n // k)
    dtype = compute_dtype(query.dtype)

    def row_parameter(array, name):
        array = jnp.asarray(array)
        try:
            array = jnp.broadcast_to(array, (*leading, t, n))
        except ValueError:
            raise ValueError(
                f"{name} must be broadcastable to [*B, T, N] = {(*leading, t, n)}, got "
                f"{array.shape}."
            ) from None
        return array.astype(dtype).reshape(heads)

    static_ridge, ridge_given = None, ridge
    if member == "lla":
        static_ridge = _check_positive(ridge, "ridge", bound=min)
        if static_ridge is None:
            static_ridge = known_ridge
        ridge = row_parameter(ridge, "ridge")
        if static_ridge is None:
            # Traced values cannot raise: a row whose ridge is not positive becomes NaN.
            ridge = _nan_unless_positive(ridge)
    if scale is None:
        scale = 1.0 / math.sqrt(h)
    static_scale = scale if isinstance(scale, (int, float)) else None
    _check_positive(scale, "scale", bound=min, or_zero=True)
    scale = row_parameter(scale, "scale")
    if member == "parallax":
        probe = _float_array(probe, "probe")
        if probe.shape != query.shape or probe.dtype != query.dtype:
            raise ValueError(
                f"probe must have query's shape and dtype, got probe {probe.dtype} {probe.shape}, "
                f"query {query.dtype} {query.shape}."
            )
        probe = probe.reshape(*heads, h)
    solver = Solver() if solver is None else solver
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must be an lla.Solver or None, got {type(solver).__name__}.")

    return Problem(
        member=member,
        query=query.reshape(*heads, h),
        probe=probe,
        key=key.reshape(b, s, k, h),
        value=value.reshape(b, s, k, hv),
        ridge=ridge,
        scale=scale,
        mask=_make_mask(
            leading, t, s, k, n // k, is_causal, query_offset, key_value_seq_lengths,
            segment_ids, local_window_size, mask,
        ),
        solver=solver,
        static_ridge=static_ridge,
        static_scale=None if static_scale is None else float(static_scale),
        one_ridge=member == "lla" and isinstance(ridge_given, (int, float)),
        leading=leading,
    )  # fmt: skip


def _make_mask(
    leading, t, s, k, g, is_causal, query_offset, lengths, segment_ids, window, mask
) -> Mask:
    b, limit = math.prod(leading), integers.MAX_OFFSET

    def per_sequence(array, name, low, high):
        if array is None:
            return None
        array = integers.saturated(array, name, low, high)
        try:
            return jnp.broadcast_to(array, leading).reshape(b)
        except ValueError:
            raise ValueError(
                f"{name} must be broadcastable to the leading axes {leading}, got shape "
                f"{array.shape}."
            ) from None

    query_segments = key_segments = None
    if segment_ids is not None:
        if not isinstance(segment_ids, (tuple, list)) or len(segment_ids) != 2:
            raise ValueError("segment_ids must be a pair (query ids [*B, T], key ids [*B, S]).")
        segments = []
        names = ("query", "key")
        pair = integers.labels(segment_ids, [f"segment_ids ({name})" for name in names])
        for ids, name, length in zip(pair, names, (t, s), strict=True):
            if ids.shape != (*leading, length):
                raise ValueError(
                    f"the {name} part of segment_ids must have shape {(*leading, length)}, got "
                    f"{ids.shape}."
                )
            segments.append(ids.reshape(b, length))
        query_segments, key_segments = segments

    if window is not None:
        pair = (window, window) if isinstance(window, (int, np.integer)) else tuple(window)
        if len(pair) != 2 or any(not isinstance(w, (int, np.integer)) or w < 0 for w in pair):
            raise ValueError(
                "local_window_size must be a non-negative int or a pair (left, right) of them, got "
                f"{window!r}."
            )
        window = tuple(min(int(w), integers.MAX_WINDOW) for w in pair)
        integers.check_limit(query_offset, "query_offset with local_window_size")

    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask must be boolean, got {mask.dtype}.")
        full = (*leading, k * g, t, s)
        if mask.ndim > len(full) or any(
            m not in (1, f) for m, f in zip(mask.shape[::-1], full[::-1], strict=False)
        ):
            raise ValueError(
                f"mask must be broadcastable to [*B, N, T, S] = {full}, got {mask.shape}."
            )
        mask = mask.reshape((1,) * (len(full) - mask.ndim) + mask.shape)
        if any(m != 1 for m in mask.shape[: len(leading)]):
            mask = jnp.broadcast_to(mask, (*leading, *mask.shape[len(leading) :]))
        *_, mask_n, mask_t, mask_s = mask.shape
        mask = mask.reshape(-1, *((1, 1) if mask_n == 1 else (k, g)), mask_t, mask_s)
        mask = jnp.broadcast_to(mask, (*mask.shape[:-1], s))

    return Mask(
        is_causal=bool(is_causal),
        window=window,
        offset=per_sequence(query_offset, "query_offset", -limit, limit),
        lengths=per_sequence(lengths, "key_value_seq_lengths", 0, s),
        query_segments=query_segments,
        key_segments=key_segments,
        dense=mask,
    )


@jax.jit
def _nan_unless_positive(array: jax.Array) -> jax.Array:
    """Compiled, so that JAX's debugging modes find a NaN only where there is one."""
    return jnp.where(array > 0, array, jnp.full_like(array, jnp.nan))


def _float_array(array: Any, name: str) -> jax.Array:
    if array is None:
        raise ValueError(f"{name} is required.")
    array = jnp.asarray(array)
    if array.dtype.name not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{name} must be one of {', '.join(SUPPORTED_DTYPES)}, got {array.dtype} with shape "
            f"{array.shape}."
        )
    return array


def _check_positive(array, name: str, bound, or_zero: bool = False) -> float | None:
    """Raises for a concrete bad value; returns `bound` over concrete values, None if traced."""
    if array is None:
        raise ValueError(f"{name} is required.")
    if isinstance(array, jax.core.Tracer):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be a float or a float array, got {array.dtype}.")
        return None
    values = np.asarray(array)
    try:
        values = values.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a float or a float array, got {array!r}.") from None
    positive = values >= 0 if or_zero else values > 0
    if not (np.isfinite(values).all() and positive.all()):
        sign = "non-negative" if or_zero else "positive"
        raise ValueError(
            f"{name} must be {sign} and finite everywhere; its shape is {values.shape} and its "
            f"values lie in [{values.min() if values.size else 'empty'}, "
            f"{values.max() if values.size else 'empty'}]."
        )
    return float(bound(values.min(), values.max())) if values.size else None


def check_ridge(ridge) -> None:
    """Raises ValueError for a ridge that is known not to be positive."""
    _check_positive(ridge, "ridge", bound=min)


def resolve_solver(problem: Problem, method: Literal["cg", "direct"]) -> ResolvedSolver:
    """Fills in what the caller left open, given the method that `auto` stands for."""
    from lla.ops.options import resolve_tolerances

    solver = problem.solver
    tol, backward_tol = resolve_tolerances(solver, problem.query.dtype)
    if solver.method != "auto":
        method = solver.method
    adaptive = solver.num_iters is None
    max_iters = solver.num_iters or solver.max_iters or max(64, 4 * problem.query.shape[-1])
    return ResolvedSolver(method, tol, backward_tol, max_iters, adaptive)


def refuse_for_kernels(
    problem: Problem, dtypes: tuple[str, ...], max_head_dim: int, max_direct_dim: int = 0
) -> str | None:
    """Why kernels for `dtypes` and head dimensions up to `max_head_dim` cannot serve `problem`.

    None if they can. Their direct solver, if any, takes head dimensions up to `max_direct_dim`.
    """
    dtype = problem.query.dtype
    if dtype.name not in dtypes:
        return f"the kernels multiply in {' or '.join(dtypes)}, the inputs are {dtype}"
    head_dim, value_dim = problem.query.shape[-1], problem.value.shape[-1]
    if max(head_dim, value_dim) > max_head_dim:
        return (
            f"the kernels hold head dimensions up to {max_head_dim}, query has {head_dim} and "
            f"value {value_dim}"
        )
    if problem.mask.dense is not None:
        return "the kernels take no mask array; use lengths, segment_ids or local_window_size"
    if problem.member == "lla" and problem.solver.method == "direct":
        if not max_direct_dim:
            return "the kernels have no direct solver"
        if max(head_dim, value_dim) > max_direct_dim:
            return (
                f"the kernels solve directly with head dimensions up to {max_direct_dim}, query "
                f"has {head_dim} and value {value_dim}"
            )
    return None
