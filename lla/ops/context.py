"""One sequence over several devices: context parallelism, inside a `jax.shard_map`.

Each device holds a share of the queries, keys and values. It gathers all keys and values once, or
with a window only those near its own, and solves for its own queries. Gradients of keys and values
are summed in float32 and scattered back.

With a causal mask the last queries have the most work. Balanced, the sequence is cut into twice as
many chunks as there are devices, and device ``i`` of ``n`` holds chunk ``i`` followed by chunk
``2 n - 1 - i``; `lla.sharding.balance` puts a batch in that order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from lla.compat import match_varying, vary_like
from lla.ops.placement import DIMS
from lla.ops.problem import compute_dtype

_KEYS = ("key", "value", "key_segments")


@dataclasses.dataclass(frozen=True)
class Context:
    """The mesh axis over which a sequence is split, and whether the split is balanced."""

    axis: str
    balanced: bool = False

    @property
    def chunks(self) -> int:
        """Chunks of a device."""
        return 2 if self.balanced else 1

    def check(self, name: str, length: int, parts: int) -> None:
        """Raises ValueError unless `length` tokens can be split over `parts` devices."""
        unit = parts * self.chunks
        if length % unit == 0 and length:
            return
        how = "twice that with balance, " if self.balanced else ""
        below, above = length // unit * unit, -(-length // unit) * unit
        fits = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"context_axis={self.axis!r} has size {parts}: the length of {name} must be a multiple "
            f"of it, {how}got {length}; {fits} would fit."
        )


def make_context(axis: str | None, balanced: bool) -> Context | None:
    if axis is None:
        if balanced:
            raise ValueError("context_balance=True needs a context_axis.")
        return None
    if not isinstance(axis, str):
        raise ValueError(f"context_axis must be the name of a mesh axis, got {axis!r}.")
    return Context(axis, bool(balanced))


def axes_by_kind() -> dict[str, AxisType]:
    """The axes of the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def no_such_axis(context: Context, known) -> ValueError:
    known = ", ".join(repr(axis) for axis in known) or "none"
    return ValueError(
        f"context_axis={context.axis!r} is no Explicit mesh axis, nor one of an enclosing "
        f"jax.shard_map (those in use: {known}). Use jax.set_mesh with Explicit axes, "
        "jax.shard_map, or lla.sharding.on_mesh, which takes a mesh."
    )


# ---------------------------------------------------------------------------------------------
# Where chunks lie


def _place(chunk: int, parts: int, context: Context) -> tuple[int, int]:
    """Device and slot of a chunk."""
    if chunk < parts or not context.balanced:
        return chunk, 0
    return 2 * parts - 1 - chunk, 1


def _own_chunk(slot: int, parts: int, context: Context) -> jax.Array:
    index = lax.axis_index(context.axis).astype(jnp.int32)
    return index if slot == 0 else 2 * parts - 1 - index


def positions(context: Context, length: int) -> jax.Array:
    """Int32 ``[length]``: where the tokens of a device are in the sequence."""
    parts = lax.axis_size(context.axis)
    context.check("the sequence", length * parts, parts)
    size = length // context.chunks
    steps = jnp.arange(size, dtype=jnp.int32)
    firsts = [_own_chunk(slot, parts, context) * size for slot in range(context.chunks)]
    return jnp.concatenate([jnp.broadcast_to(first, (size,)) + steps for first in firsts])


def token_positions(context: Context | None, length: int) -> jax.Array:
    """Int32 ``[length]``: places in the sequence of a device's tokens, or of all of them.

    All of them under Explicit axes, and where the sequence is not split.
    """
    steps = jnp.arange(length, dtype=jnp.int32)
    if context is None:
        return steps
    kind = axes_by_kind().get(context.axis)
    if kind == AxisType.Manual:
        return positions(context, length)
    if kind != AxisType.Explicit:
        raise no_such_axis(context, axes_by_kind())
    parts = jax.sharding.get_abstract_mesh().shape[context.axis]
    context.check("the sequence", length, parts)
    return ordered(steps, parts, 0, back=False) if context.balanced else steps


def ordered(array: jax.Array, parts: int, axis: int, *, back: bool) -> jax.Array:
    """Brings chunks into balanced order, or `back` into that of the sequence."""
    axis %= array.ndim
    before, length, behind = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
    size = length // (2 * parts)
    if back:
        pairs = array.reshape(*before, parts, 2, size, *behind)
        first, second = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
        joined = jnp.concatenate([first, lax.rev(second, (axis,))], axis=axis)
    else:
        chunks = array.reshape(*before, 2, parts, size, *behind)
        first, second = (lax.index_in_dim(chunks, i, axis, keepdims=False) for i in range(2))
        joined = jnp.stack([first, lax.rev(second, (axis,))], axis=axis + 1)
    return joined.reshape(array.shape)


# ---------------------------------------------------------------------------------------------
# Collectives


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(context: Context, axis: int, array: jax.Array) -> jax.Array:
    """The shares of all devices, in the order of the sequence."""
    whole = lax.all_gather(array, context.axis, axis=axis, tiled=True)
    if context.balanced:
        whole = ordered(whole, lax.axis_size(context.axis), axis, back=True)
    return whole


def _gather_fwd(context, axis, array):
    return _gather(context, axis, array), jnp.zeros((0,), array.dtype)


def _gather_bwd(context, axis, like, gradient):
    wide = gradient.astype(compute_dtype(gradient.dtype))
    if context.balanced:
        wide = ordered(wide, lax.axis_size(context.axis), axis, back=False)
    summed = lax.psum_scatter(wide, context.axis, scatter_dimension=axis, tiled=True)
    return (summed.astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _neighbour(context: Context, parts: int, slots, to: int, distance: int, rows: slice, axis: int):
    """Rows of the chunk that lies `distance` behind (below 0: before) that of the slot `to`.

    Zeros where there is none.
    """
    by_slot: dict[int, list[tuple[int, int]]] = {}
    count = parts * context.chunks
    for chunk in range(count):
        device, slot = _place(chunk, parts, context)
        if slot == to and 0 <= chunk + distance < count:
            source, source_slot = _place(chunk + distance, parts, context)
            by_slot.setdefault(source_slot, []).append((source, device))
    found = None
    for slot, pairs in by_slot.items():
        size = slots[slot].shape[axis]
        start, stop, _ = rows.indices(size)
        part = lax.slice_in_dim(slots[slot], start, stop, axis=axis)
        part = lax.ppermute(part, context.axis, pairs)
        found = part if found is None else found + part
    return found


def _around(context: Context, parts: int, slots, to: int, left: int, right: int, axis: int):
    """A chunk of keys with `left` rows before and `right` rows behind it, zeros beyond the ends."""
    size = slots[to].shape[axis]
    pieces = [slots[to]]
    for step in range(-(-left // size)):
        rows = min(size, left - step * size)
        part = _neighbour(context, parts, slots, to, -step - 1, slice(size - rows, None), axis)
        pieces.insert(0, _or_zeros(part, slots[to], rows, axis))
    for step in range(-(-right // size)):
        rows = min(size, right - step * size)
        part = _neighbour(context, parts, slots, to, step + 1, slice(0, rows), axis)
        pieces.append(_or_zeros(part, slots[to], rows, axis))
    return jnp.concatenate(pieces, axis=axis)


def _or_zeros(part, like, rows: int, axis: int) -> jax.Array:
    if part is not None:
        return part
    return jnp.zeros_like(lax.slice_in_dim(like, 0, rows, axis=axis))


# ---------------------------------------------------------------------------------------------
# The operator


def attend(
    context: Context,
    arrays: Mapping[str, jax.Array],
    options: Mapping[str, object],
    run: Callable[[dict, dict], dict[str, jax.Array]],
) -> dict[str, jax.Array]:
    """The results for this device's queries.

    Args:
      context: how the sequence is split.
      arrays, options: of the call, see `lla.ops.call`; lengths, offsets and the keys of a mask are
        those of the whole sequence.
      run: computes the results of a call on one device.
    """
    parts = lax.axis_size(context.axis)
    arrays, options = dict(arrays), dict(options)
    queries, keys = arrays["query"].shape[-3], arrays["key"].shape[-3]
    for name, length in (("query", queries), ("key", keys)):
        context.check(name, length * parts, parts)
    leaves, tree = jax.tree.flatten({name: arrays.pop(name) for name in ("query", *_KEYS[:2])})
    arrays |= jax.tree.unflatten(tree, match_varying(*leaves))
    if "key_segments" in arrays:
        for name in ("query_segments", "key_segments"):
            arrays[name] = vary_like(arrays[name], arrays["query"])
    size, whole = queries // context.chunks, keys * parts
    halo = _halo(arrays, options, queries, keys, whole // (parts * context.chunks), whole)
    given = {name: arrays.pop(name) for name in _KEYS if name in arrays}
    if halo is None:
        given = {name: _gather(context, _axis(name, a), a) for name, a in given.items()}
    found = []
    for slot in range(context.chunks):
        mine = {name: _rows(name, a, slot, size, queries) for name, a in arrays.items()}
        first = _own_chunk(slot, parts, context) * size
        chosen = dict(options)
        if halo is None:
            mine |= given
        else:
            lengths = mine.pop("key_value_seq_lengths", chosen.pop("key_value_seq_lengths", None))
            part, first, lengths = _inside(context, parts, given, slot, halo, first, whole, lengths)
            mine |= part
            if lengths is not None:
                mine["key_value_seq_lengths"] = lengths
        offset = mine.pop("query_offset", chosen.pop("query_offset", None))
        if options["is_causal"] or options["local_window_size"] is not None:
            offset = jnp.int32(0) if offset is None else jnp.asarray(offset, jnp.int32)
            mine["query_offset"] = offset + jnp.broadcast_to(first, offset.shape)
        rows = mine.pop("query_seq_lengths", chosen.pop("query_seq_lengths", None))
        if rows is not None:
            rows = jnp.asarray(rows, jnp.int32)
            own = _own_chunk(slot, parts, context) * size
            mine["query_seq_lengths"] = rows - jnp.broadcast_to(own, rows.shape)
        found.append(run(mine, chosen))
    if len(found) == 1:
        return found[0]
    return {
        name: jnp.concatenate([part[name] for part in found], axis=_axis(name, found[0][name]))
        for name in found[0]
    }


def _axis(name: str, array: jax.Array) -> int:
    """The axis of queries or keys."""
    dims = DIMS[name]
    letter = "t" if "t" in dims else "s"
    return array.ndim - len(dims) + dims.index(letter)


def _rows(name: str, array: jax.Array, slot: int, size: int, queries: int) -> jax.Array:
    """The rows of a chunk of an operand that has one for every query."""
    dims = DIMS[name]
    if "t" not in dims or size == queries:
        return array
    axis = array.ndim - len(dims) + dims.index("t")
    if axis < 0 or array.shape[axis] == 1:
        return array
    return lax.slice_in_dim(array, slot * size, (slot + 1) * size, axis=axis)


def _halo(arrays, options, queries, keys, size, whole) -> tuple[int, int] | None:
    """Keys before and behind a chunk that its queries see; None to take all keys.

    Queries and keys have to lie alike, which a mask or an offset may change.
    """
    window = options["local_window_size"]
    if window is None or queries != keys or {"mask", "bias"} & set(arrays):
        return None
    if "query_offset" in arrays or options.get("query_offset") not in (None, 0):
        return None
    left, right = (window, window) if isinstance(window, int) else window
    left, right = min(left, whole), 0 if options["is_causal"] else min(right, whole)
    return None if size + left + right >= whole else (left, right)


def _inside(context, parts, given, slot, halo, first, whole, lengths):
    """Keys around a chunk, the place of its first query among them, and how many exist."""
    left, right = halo
    missing = jnp.maximum(left - first, 0)
    near = {}
    for name, array in given.items():
        axis = _axis(name, array)
        slots = jnp.split(array, context.chunks, axis=axis)
        around = _around(context, parts, slots, slot, left, right, axis)
        # What is missing before the first key goes behind the last one, where lengths hide it.
        near[name] = jnp.roll(around, -missing, axis=axis)
    start = first + missing - left
    if lengths is None and not right:
        return near, left - missing, None  # the causal mask hides it
    lengths = jnp.minimum(jnp.asarray(whole if lengths is None else lengths, jnp.int32), whole)
    lengths = lengths - jnp.broadcast_to(start, lengths.shape)
    size = near["key"].shape[-3]
    return near, left - missing, jnp.clip(lengths, 0, size)
