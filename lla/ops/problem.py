"""From the public arguments to one checked, canonical description of the computation."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lla.numerics import compute_dtype
from lla.ops import integers
from lla.ops.masks import Mask
from lla.ops.solver import Solver

Mechanism = Literal["softmax", "parallax", "lla"]
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Operands(NamedTuple):
    """The differentiable arrays of a call; each back end lays them out in its own way.

    probe is None unless the mechanism is "parallax", ridge is None unless it is "lla".
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    probe: jax.Array | None
    ridge: jax.Array | None
    scale: jax.Array
    bias: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(*Operands._fields, "mask"),
    meta_fields=(
        "mechanism",
        "solver",
        "static_ridge",
        "leading",
        "soft_cap",
    ),
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, checked and with its leading axes flattened; a pytree.

    Shapes: query and probe ``[B, T, N, H]``, key ``[B, S, K, H]``, value ``[B, S, K, Hv]``, ridge
    and scale ``[B | 1, T | 1, N | 1]`` in `compute_dtype`, bias ``[B | 1, N | 1, T | 1, S | 1]`` in
    any supported dtype. Query heads ``k G ... (k + 1) G - 1`` share key head ``k``, with ``G = N //
    K``. An axis is 1 where the caller gave one number for all: a back end repeats it no earlier
    than it has to. Results are ``[B, T, N, ...]``.
    """

    mechanism: Mechanism
    query: jax.Array
    probe: jax.Array | None
    key: jax.Array
    value: jax.Array
    ridge: jax.Array | None
    scale: jax.Array
    mask: Mask
    solver: Solver
    static_ridge: float | None  # the smallest ridge where its value is known, for solver="auto"
    leading: tuple[int, ...]
    bias: jax.Array | None = None
    soft_cap: float | None = None

    @property
    def operands(self) -> Operands:
        return Operands(*(getattr(self, name) for name in Operands._fields))

    @property
    def compute_dtype(self) -> jnp.dtype:
        return compute_dtype(self.query.dtype)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[2] // self.key.shape[2]

    def by_row(self, array: jax.Array) -> jax.Array:
        """A ridge or scale repeated for every row, ``[B, T, N]``."""
        return jnp.broadcast_to(array, self.query.shape[:3])

    def restore(self, array: jax.Array) -> jax.Array:
        """``[B, T, N, ...] -> [*B, T, N, ...]``."""
        return array.reshape(*self.leading, *array.shape[1:])


def make_problem(
    mechanism: Mechanism,
    query,
    key,
    value,
    *,
    probe=None,
    ridge=None,
    scale=None,
    is_causal=True,
    query_offset=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    segment_ids=None,
    local_window_size=None,
    mask=None,
    bias=None,
    logits_soft_cap=None,
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
    dtype = compute_dtype(query.dtype)

    def row_parameter(array, name):
        array = jnp.asarray(array)
        array = _broadcastable(array, name, leading, {"T": t, "N": n})
        return array.astype(dtype)

    static_ridge = None
    if mechanism == "lla":
        static_ridge = _check_positive(ridge, "ridge", bound=min)
        if static_ridge is None:
            static_ridge = known_ridge
        ridge = row_parameter(ridge, "ridge")
        if static_ridge is None:
            # Traced values cannot raise: a row whose ridge is not positive becomes NaN.
            ridge = _nan_unless_positive(ridge)
    if scale is None:
        scale = 1.0 / math.sqrt(h)
    _check_positive(scale, "scale", bound=min, or_zero=True)
    scale = row_parameter(scale, "scale")
    if mechanism == "parallax":
        probe = _float_array(probe, "probe")
        if probe.shape != query.shape or probe.dtype != query.dtype:
            raise ValueError(
                f"probe must have query's shape and dtype, got probe {probe.dtype} {probe.shape}, "
                f"query {query.dtype} {query.shape}."
            )
        probe = probe.reshape(b, t, n, h)
    if bias is not None:
        bias = _float_array(bias, "bias")
        bias = _broadcastable(bias, "bias", leading, {"N": n, "T": t, "S": s})
    if logits_soft_cap is not None:
        logits_soft_cap = _check_soft_cap(logits_soft_cap, mechanism)
    solver = Solver() if solver is None else solver
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must be an lla.Solver or None, got {type(solver).__name__}.")

    return Problem(
        mechanism=mechanism,
        query=query.reshape(b, t, n, h),
        probe=probe,
        key=key.reshape(b, s, k, h),
        value=value.reshape(b, s, k, hv),
        ridge=ridge,
        scale=scale,
        mask=_make_mask(
            leading, t, s, n, is_causal, query_offset, query_seq_lengths,
            key_value_seq_lengths, segment_ids, local_window_size, mask, bias,
        ),
        solver=solver,
        static_ridge=static_ridge,
        leading=leading,
        bias=bias,
        soft_cap=logits_soft_cap,
    )  # fmt: skip


def _make_mask(
    leading,
    t,
    s,
    n,
    is_causal,
    query_offset,
    query_lengths,
    lengths,
    segment_ids,
    window,
    mask,
    bias,
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

    query_lengths = per_sequence(query_lengths, "query_seq_lengths", 0, t)
    if query_lengths is not None:
        query_segments, key_segments = _without_queries(
            query_lengths, query_segments, key_segments, t, s
        )

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
        mask = _broadcastable(mask, "mask", leading, {"N": n, "T": t, "S": s})
        mask = jnp.broadcast_to(mask, (*mask.shape[:-1], s))

    return Mask(
        is_causal=bool(is_causal),
        window=window,
        offset=per_sequence(query_offset, "query_offset", -limit, limit),
        lengths=per_sequence(lengths, "key_value_seq_lengths", 0, s),
        query_segments=query_segments,
        key_segments=key_segments,
        dense=mask,
        bias=None if bias is None else jax.lax.stop_gradient(bias),
    )


def _broadcastable(
    array: jax.Array, name: str, leading: tuple[int, ...], axes: dict[str, int]
) -> jax.Array:
    """An array that broadcasts to ``[*B, *axes]`` as ``[B | 1, ...]``, any axis of which may be 1.

    Args:
      array: any axis may be 1 or, with those before it, missing.
      name: what an error calls it.
      leading: the sizes ``*B``.
      axes: the other sizes by name.

    Raises:
      ValueError: it does not broadcast.
    """
    full = (*leading, *axes.values())
    if array.ndim > len(full) or any(
        m not in (1, f) for m, f in zip(array.shape[::-1], full[::-1], strict=False)
    ):
        names = ", ".join(("*B", *axes))
        raise ValueError(f"{name} must be broadcastable to [{names}] = {full}, got {array.shape}.")
    array = array.reshape((1,) * (len(full) - array.ndim) + array.shape)
    rest = array.shape[len(leading) :]
    if all(size == 1 for size in array.shape[: len(leading)]):
        return array.reshape(1, *rest)
    return jnp.broadcast_to(array, (*leading, *rest)).reshape(-1, *rest)


def _without_queries(lengths, query_segments, key_segments, t: int, s: int):
    """Segment ids, or those given, under which queries from `lengths` on see no key."""
    b = lengths.shape[0]
    if query_segments is None:
        query_segments, key_segments = jnp.zeros((b, t), jnp.int32), jnp.zeros((b, s), jnp.int32)
    # One of s + 1 numbers is the id of no key.
    known = (key_segments >= 0) & (key_segments <= s)
    used = jnp.zeros((b, s + 1), bool)
    used = jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(
        used, jnp.where(known, key_segments, s + 1)
    )
    free = jnp.argmin(used, axis=1).astype(jnp.int32)[:, None]
    exists = jnp.arange(t, dtype=jnp.int32)[None] < lengths[:, None]
    return jnp.where(exists, query_segments, free), key_segments


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


def _check_soft_cap(cap, mechanism: Mechanism) -> float:
    if mechanism != "softmax":
        raise ValueError(
            "logits_soft_cap is defined for softmax attention alone: the weights of "
            f"{'local linear' if mechanism == 'lla' else 'Parallax'} attention are those of plain "
            "logits."
        )
    if isinstance(cap, (bool, jax.core.Tracer)) or np.ndim(cap) or np.asarray(cap).dtype == object:
        raise ValueError(f"logits_soft_cap must be a positive number or None, got {cap!r}.")
    return _check_positive(cap, "logits_soft_cap", bound=min)


def options_unsupported_by_kernels(problem: Problem) -> str | None:
    """Why no kernel serves `problem` on any machine, for options that none of them has."""
    if problem.bias is not None:
        return "logit bias is not supported by the kernels, it is by 'xla' and 'reference'"
    if problem.soft_cap is not None:
        return "logits_soft_cap is not supported by the kernels, it is by 'xla' and 'reference'"
    return None


def unsupported_by_kernels(
    problem: Problem, dtypes: tuple[str, ...], max_head_dim: int, max_direct_dim: int = 0
) -> str | None:
    """Why kernels for `dtypes` and head dimensions up to `max_head_dim` cannot serve `problem`.

    None if they can. Their direct solver, if any, takes head dimensions up to `max_direct_dim`.
    """
    if (reason := options_unsupported_by_kernels(problem)) is not None:
        return reason
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
    if problem.mechanism == "lla" and problem.solver.method == "direct":
        if not max_direct_dim:
            return "the kernels have no direct solver"
        if max(head_dim, value_dim) > max_direct_dim:
            return (
                f"the kernels solve directly with head dimensions up to {max_direct_dim}, query "
                f"has {head_dim} and value {value_dim}"
            )
    return None
