"""Sequences split over devices: the order that balances them, and calls on a mesh.

See `lla.local_linear_attention` for ``context_axis``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lla.ops import context
from lla.ops.api import local_linear_attention, parallax_attention, softmax_attention
from lla.ops.call import make_call
from lla.ops.placement import Placement
from lla.ops.sharding import check_lengths, divide

__all__ = ["balance", "on_mesh", "positions", "unbalance"]

Axes = str | tuple[str, ...] | None


def balance(tree: Any, parts: int, axis: int = 1) -> Any:
    """Brings sequences into the order in which `parts` devices have the same work.

    A sequence is cut into ``2 * parts`` chunks, and device ``i`` gets the chunks ``i`` and
    ``2 * parts - 1 - i``: under a causal mask one with few keys and one with many. Bring a batch
    into this order before it is placed on the devices (tokens, targets, segment ids, positions: all
    that has an axis of tokens), and results back with `unbalance`.

    Example::

        >>> import jax.numpy as jnp, lla.sharding
        >>> lla.sharding.balance(jnp.arange(8), parts=2, axis=0).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]

    Args:
      tree: arrays with an axis of tokens.
      parts: devices that share a sequence, the size of ``context_axis``.
      axis: of tokens, in all arrays.

    Raises:
      ValueError: a length is not a multiple of ``2 * parts``.
    """
    return _ordered(tree, parts, axis, back=False)


def unbalance(tree: Any, parts: int, axis: int = 1) -> Any:
    """The inverse of `balance`."""
    return _ordered(tree, parts, axis, back=True)


def _ordered(tree, parts, axis, back):
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}.")

    def order(array):
        array = jnp.asarray(array)
        if not -array.ndim <= axis < array.ndim:
            raise ValueError(f"axis {axis} is not one of an array of shape {array.shape}.")
        length = array.shape[axis]
        if length % (2 * parts):
            below, above = length // (2 * parts) * 2 * parts, -(-length // (2 * parts)) * 2 * parts
            raise ValueError(
                f"{parts} devices with two chunks each need a length that is a multiple of "
                f"{2 * parts}, axis {axis} of {array.shape} has {length}; {below} or {above} would "
                "fit."
            )
        return context.ordered(array, parts, axis, back=back)

    return jax.tree.map(order, tree)


def positions(length: int, context_axis: str, *, context_balance: bool = False) -> jax.Array:
    """Int32 ``[length]``: where the tokens are in the sequence that `context_axis` splits.

    Args:
      length: number of tokens: those of a device inside a `jax.shard_map` over the axis, all of
        them where the axis is Explicit.
      context_axis, context_balance: as in `lla.local_linear_attention`.

    Raises:
      ValueError: the axis is not in use, or `length` does not divide.
    """
    split = context.make_context(context_axis, context_balance)
    if split is None:
        raise ValueError("context_axis must be the name of a mesh axis.")
    return context.token_positions(split, length)


_MECHANISMS: Mapping[Callable, str] = {
    local_linear_attention: "lla",
    parallax_attention: "parallax",
    softmax_attention: "softmax",
}
_ARRAYS = (
    "query", "probe", "key", "value", "ridge", "scale", "query_offset", "key_value_seq_lengths",
    "query_seq_lengths", "segment_ids", "mask", "bias",
)  # fmt: skip


def on_mesh(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    batch: Axes = None,
    heads: Axes = None,
    context_axis: str | None = None,
    context_balance: bool = False,
) -> Callable[..., Any]:
    """`function` on the devices of `mesh`, whatever kind of axes it has.

    Needed for ``context_axis`` on meshes with Auto axes; everything else the functions do by
    themselves. The result is called as `function` is, on whole arrays.

    Example::

        >>> import functools, jax, jax.numpy as jnp, lla, lla.sharding
        >>> auto = jax.sharding.AxisType.Auto
        >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(auto,))
        >>> attend = lla.sharding.on_mesh(
        ...     lla.local_linear_attention, mesh, context_axis="context"
        ... )
        >>> heads = jnp.ones((2, 16, 4, 8))
        >>> jax.jit(functools.partial(attend, ridge=1.0))(heads, heads, heads).shape
        (2, 16, 4, 8)

    Args:
      function: `lla.local_linear_attention`, `lla.parallax_attention` or `lla.softmax_attention`.
      mesh: the devices.
      batch: mesh axes over which the first axis of all arrays is split.
      heads: mesh axes over which heads are split; key heads with them where they divide.
      context_axis: mesh axis over which the sequence is split.
      context_balance: whether the sequence is in the order of `balance`.

    Raises:
      ValueError: an axis that `mesh` does not have, or, when called, a size that does not divide.
    """
    if function not in _MECHANISMS:
        names = ", ".join(f"lla.{f.__name__}" for f in _MECHANISMS)
        raise ValueError(f"function must be one of {names}, got {function!r}.")
    split = context.make_context(context_axis, context_balance)
    axes = {"b0": _tuple(batch), "n": _tuple(heads), "t": _tuple(context_axis)}
    named = [axis for own in axes.values() for axis in own]
    unknown = [axis for axis in named if axis not in mesh.shape]
    if unknown or len(set(named)) != len(named):
        raise ValueError(
            f"batch={batch!r}, heads={heads!r} and context_axis={context_axis!r} must be different "
            f"axes of the mesh, which has {dict(mesh.shape)}."
        )

    def call(*args, **kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        implementation = arguments.pop("implementation", None)
        with_stats = arguments.pop("return_stats", False)
        arrays = {name: arguments.pop(name) for name in _ARRAYS if name in arguments}
        options = {
            "is_causal": True,
            "local_window_size": None,
            "logits_soft_cap": None,
        } | arguments
        made, arrays = make_call(
            _MECHANISMS[function], arrays, options, implementation, with_stats, split=split
        )
        sizes = dict(made.sizes)
        for factor, own in axes.items():
            _check_divides(mesh, factor, own, sizes, split)
        if split is not None:
            check_lengths(made, mesh.shape[split.axis])
        parts = math.prod(mesh.shape[axis] for axis in axes["n"])
        follow = sizes.get("k", parts) % parts == 0
        placement = Placement(axes | {"s": axes["t"]}, dict(mesh.shape), follow)
        found = divide(mesh, made, arrays, placement)
        if not with_stats:
            return found["out"]
        from lla.ops.solver import Stats

        return found["out"], Stats(*(found[name] for name in Stats._fields))

    return call


def _tuple(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _check_divides(mesh, factor, axes, sizes, split) -> None:
    parts = math.prod(mesh.shape[axis] for axis in axes)
    size = sizes.get(factor)
    if not axes or (factor == "t" and split is not None):
        return
    what = {"b0": "batch", "n": "heads"}[factor]
    if size is None or size % parts:
        raise ValueError(
            f"{what}={axes!r} splits into {parts}: the number of {what} has to be a multiple of "
            f"it, got {size}."
        )
