"""One call of a public function as named arrays and everything else, to be run by any device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lla.ops import backend, context, integers
from lla.ops.context import Context
from lla.ops.placement import DIMS, Placement, label
from lla.ops.problem import Mechanism, make_problem

STATS = ("lse", "iterations", "residual")
CACHE = ("cache_key", "cache_value", "cache_lengths")


@dataclasses.dataclass(frozen=True)
class Call:
    """What of a call is not an array.

    Attributes:
      kind: a whole sequence, or a decoding step.
      mechanism: of the family.
      names: of the arrays, in the order in which they come; see `lla.ops.placement.DIMS`.
      options: the keyword arguments that are no arrays.
      implementation: by name for a whole sequence.
      with_stats: whether statistics have to be complete.
      leading: number of leading axes.
      sizes: of the factors, see `lla.ops.placement.label`.
      known_ridge: the smallest ridge where that is an array and known.
      context: how a sequence is split over devices on purpose.
    """

    kind: Literal["attend", "decode"]
    mechanism: Mechanism
    names: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    implementation: Any
    with_stats: bool
    leading: int
    sizes: tuple[tuple[str, int], ...]
    known_ridge: float | None
    context: Context | None = None

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the results."""
        if self.kind == "attend":
            return ("out", *STATS)
        return ("out", *CACHE, *(STATS if self.with_stats else ()))

    def label(self, name: str, shape) -> tuple[str | None, ...]:
        """The factors of an operand or result."""
        return label(DIMS[name], shape, self.leading, dict(self.sizes))


def run(
    call: Call,
    arrays: Mapping[str, jax.Array],
    placement: Placement | None = None,
) -> dict[str, jax.Array]:
    """The results by name; of this device where a placement is given, with its share of arrays."""
    options, arrays = dict(call.options), dict(arrays)
    if placement is not None:
        arrays = _localise(call, arrays, options, placement)
    if call.context is not None:
        return context.attend(call.context, arrays, options, functools.partial(_run, call))
    return _run(call, arrays, options)


def _run(call: Call, arrays: dict, options: dict) -> dict[str, jax.Array]:
    if call.kind == "decode":
        from lla.ops.decode import decode_arrays

        results = decode_arrays(
            call.mechanism, arrays, call.implementation, call.with_stats, options
        )
        return dict(zip(call.results, results, strict=True))
    if "query_segments" in arrays:
        pair = arrays.pop("query_segments"), arrays.pop("key_segments")
        arrays["segment_ids"] = pair
    problem = make_problem(call.mechanism, known_ridge=call.known_ridge, **arrays, **options)
    out, stats = backend.run(problem, call.implementation, call.with_stats)
    return {"out": out, **stats._asdict()}


def _localise(call: Call, arrays: dict, options: dict, placement: Placement) -> dict:
    """The position of this device's queries, and the key heads that its query heads need."""
    if placement.of("t") and call.context is None and call.kind == "attend":
        first = lax.axis_index(placement.of("t")) * arrays["query"].shape[-3]
        offset = arrays.pop("query_offset", options.pop("query_offset", None))
        offset = jnp.int32(0) if offset is None else jnp.asarray(offset, jnp.int32)
        first = first.astype(jnp.int32)
        arrays["query_offset"] = offset + jnp.broadcast_to(first, offset.shape)
        lengths = arrays.pop("query_seq_lengths", options.pop("query_seq_lengths", None))
        if lengths is not None:
            lengths = jnp.asarray(lengths, jnp.int32)
            arrays["query_seq_lengths"] = lengths - jnp.broadcast_to(first, lengths.shape)
    if placement.of("n") and not placement.keys_follow:
        sizes = dict(call.sizes)
        for name in arrays:
            if "k" in DIMS[name]:
                arrays[name] = _own_key_heads(arrays, name, sizes, placement)
    return arrays


def key_heads(call: Call, placement: Placement) -> int:
    """The key heads that the query heads of a device attend to."""
    sizes, parts = dict(call.sizes), placement.parts("n")
    keys, heads = sizes.get("k", sizes["n"]), sizes["n"] // parts
    if placement.keys_follow:
        return keys // parts
    return 1 if keys == 1 or (sizes["n"] // keys) % heads == 0 else heads


def _own_key_heads(arrays, name, sizes, placement: Placement) -> jax.Array:
    """Of all key heads those that the query heads of this device attend to."""
    key, heads, group = arrays[name], arrays["query"].shape[-2], sizes["n"] // sizes["k"]
    if sizes["k"] == 1:
        return key
    first = lax.axis_index(placement.of("n")) * heads
    if group % heads == 0:
        return lax.dynamic_slice_in_dim(key, first // group, 1, axis=-2)
    # Groups are cut apart: every query head gets a key head of its own.
    return jnp.take(key, (first + jnp.arange(heads)) // group, axis=-2)


# ---------------------------------------------------------------------------------------------
# From the arguments of a public function


def make_call(
    mechanism: Mechanism,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    implementation: Any,
    with_stats: bool,
    kind: Literal["attend", "decode"] = "attend",
    split: Context | None = None,
    parts: int = 1,
) -> tuple[Call, dict[str, jax.Array]]:
    """Checks the arguments of a call, which stay numbers where they are Python's.

    Args:
      arguments: those that may be arrays, by their public names.
      options: the others.
      split: how the sequence is split over devices on purpose.
      parts: how many times more keys there are than these, on other devices.

    Raises:
      ValueError, NotImplementedError: as the function itself.
    """
    checked = dict(arguments)
    static = dict(options)
    known = _Known()
    if kind == "attend":
        implementation = _check(mechanism, checked, static, implementation, known, parts)
    elif implementation is not None and not isinstance(implementation, str):
        implementation = tuple(implementation)
    arrays = {}
    for name, array in checked.items():
        if array is None:
            continue
        if name == "segment_ids":
            pair = integers.labels(array, ["segment_ids (query)", "segment_ids (key)"])
            arrays["query_segments"], arrays["key_segments"] = pair
        elif isinstance(array, (bool, int, float)):
            static[name] = array
        elif name == "query_offset":
            limit = integers.MAX_OFFSET
            arrays[name] = jnp.asarray(integers.saturated(array, name, -limit, limit))
        elif name == "query_seq_lengths":
            most = parts * arrays["query"].shape[-3]
            arrays[name] = integers.saturated(array, name, 0, most)
        elif name == "key_value_seq_lengths":
            arrays[name] = integers.saturated(array, name, 0, parts * arrays["key"].shape[-3])
        else:
            arrays[name] = jnp.asarray(array)
    window = static.get("local_window_size")
    if window is not None:
        one = isinstance(window, (int, np.integer))
        static["local_window_size"] = int(window) if one else tuple(int(w) for w in window)
    query, key = arrays["query"], arrays.get("cache_key", arrays["key"])
    sizes = {f"b{i}": size for i, size in enumerate(query.shape[:-3])}
    sizes |= {"t": query.shape[-3], "n": query.shape[-2], "s": key.shape[-3]}
    if key.shape[-2] != query.shape[-2]:
        sizes["k"] = key.shape[-2]
    call = Call(
        kind, mechanism, tuple(arrays), tuple(sorted(static.items())), implementation, with_stats,
        query.ndim - 3, tuple(sizes.items()), known.ridge, split,
    )  # fmt: skip
    return call, arrays


@dataclasses.dataclass
class _Known:
    ridge: float | None = None


def _check(mechanism, arguments, options, implementation, known: _Known, parts: int) -> str:
    """Makes the `Problem` of shapes alone; returns the implementation."""
    chosen = []
    abstract, concrete = {}, {}
    for name, array in arguments.items():
        heads = name in ("query", "key", "value", "probe", "mask", "bias")
        if isinstance(array, jax.core.Tracer) or (heads and isinstance(array, jax.Array)):
            shape = array.shape
            if name in ("key", "value") and len(shape) > 2:
                shape = (*shape[:-3], shape[-3] * parts, *shape[-2:])
            abstract[name] = jax.ShapeDtypeStruct(shape, array.dtype)
        elif name == "segment_ids" and isinstance(array, (tuple, list)) and len(array) == 2:
            concrete[name] = (_shape_only(array[0], 1), _shape_only(array[1], parts))
        elif isinstance(array, jax.Array):
            concrete[name] = np.asarray(array)
        else:
            concrete[name] = array

    def check(abstract):
        problem = make_problem(mechanism, **abstract, **concrete, **options)
        known.ridge = problem.static_ridge
        chosen.append(backend.choose(problem, implementation))
        return problem.query

    jax.eval_shape(check, abstract)
    return chosen[0]


def _shape_only(ids, parts: int):
    """Segment ids in the place of which zeros are checked; their numbers are looked at later."""
    if not isinstance(ids, jax.Array) or not ids.ndim:
        return ids
    return np.zeros((*ids.shape[:-1], ids.shape[-1] * parts), ids.dtype)
