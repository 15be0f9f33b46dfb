"""Calls whose arrays may lie on several devices.

Three ways lead there, and each gives a device its share of batch, heads and queries: an enclosing
`jax.shard_map`, where nothing is left to do; meshes with Explicit axes, where the types of the
operands tell their sharding, so that a `jax.shard_map` is put around the call; and `jax.jit` with
Auto axes (`lla.ops.partition`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding

from lla.ops import partition
from lla.ops.backend import Implementation
from lla.ops.call import Call, make_call, run
from lla.ops.context import Context, axes_by_kind, no_such_axis
from lla.ops.placement import DIMS, Placement, decide, spec_axes, warn

AUTO = "auto"


def find_mesh(arrays: Iterable[Any]):
    """Where a call on these arrays has to be divided; `AUTO`, a mesh with Explicit axes, or None.

    None: one device has all of the arrays, or an enclosing `jax.shard_map` has divided them.
    """
    arrays = [a for a in jax.tree.leaves(list(arrays)) if isinstance(a, jax.Array)]
    mesh = jax.sharding.get_abstract_mesh()
    for array in arrays:
        if mesh.empty:
            mesh = getattr(jax.typeof(array).sharding, "mesh", mesh)
    kinds = set(mesh.axis_types) if not mesh.empty else set()
    if AxisType.Explicit in kinds:
        return mesh
    if AxisType.Manual in kinds or jax.device_count() == 1 or any(a.size == 0 for a in arrays):
        return None
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return AUTO
    return AUTO if any(len(array.sharding.device_set) > 1 for array in arrays) else None


def attend(
    mesh,
    mechanism: str,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    implementation: Implementation,
    with_stats: bool,
    kind: str = "attend",
) -> dict[str, jax.Array]:
    """The results of a call by name.

    Args:
      mesh: from `find_mesh`.
      mechanism, arguments, options, implementation, with_stats, kind: see `lla.ops.call.make_call`.
    """
    call, arrays = make_call(mechanism, arguments, options, implementation, with_stats, kind)
    if mesh is not AUTO:
        return _explicit(mesh, call, arrays)
    if kind == "attend" and call.implementation not in partition.ROW_UNITS:
        # The reference consists only of sums over axes, which the compiler can partition. Kernels
        # that are not in the table compute everything on every device.
        return run(call, arrays)
    if any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        return partition.attend(call, arrays)
    return _compiled(call, arrays)


def attend_split(
    split: Context,
    mechanism: str,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    implementation: Implementation,
    with_stats: bool,
) -> dict[str, jax.Array]:
    """`attend` where a sequence is split over devices.

    Raises:
      ValueError: the axis is not in use, or lengths do not divide.
    """
    mesh = find_mesh(arguments.values())
    explicit = mesh is not None and mesh is not AUTO
    kinds = axes_by_kind()
    if explicit:
        kinds |= dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    kind = kinds.get(split.axis)
    if kind not in (AxisType.Manual, AxisType.Explicit):
        known = [axis for axis, kind in kinds.items() if kind != AxisType.Auto]
        raise no_such_axis(split, known)
    parts = lax.axis_size(split.axis) if kind == AxisType.Manual else 1
    call, arrays = make_call(
        mechanism, arguments, options, implementation, with_stats, split=split, parts=parts
    )
    if not explicit:
        return run(call, arrays)
    if kind == AxisType.Explicit:
        check_lengths(call, mesh.shape[split.axis])
    return _explicit(mesh, call, arrays, (split.axis,) if kind == AxisType.Explicit else ())


def check_lengths(call: Call, parts: int) -> None:
    """Raises ValueError unless queries and keys can be split."""
    sizes = dict(call.sizes)
    call.context.check("query", sizes["t"], parts)
    call.context.check("key", sizes["s"], parts)


_compiled = jax.jit(partition.attend, static_argnums=0)


def _explicit(
    mesh, call: Call, arrays: dict[str, jax.Array], context: tuple[str, ...] = ()
) -> dict[str, jax.Array]:
    """By the shardings in the types of the operands."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = {name for name, kind in kinds if kind == AxisType.Explicit}
    labels = {name: call.label(name, a.shape) for name, a in arrays.items()}
    operands = [
        (name, labels[name], _explicit_axes(array, names)) for name, array in arrays.items()
    ]
    sizes = {axis: mesh.shape[axis] for axis in names}
    row_unit = 1 if call.kind == "attend" else None
    placement, said = decide(operands, dict(call.sizes), sizes, row_unit=row_unit, context=context)
    warn(said)
    specs = {name: placement.spec(labels[name]) for name in arrays}
    placed = {}
    for name, _, axes in operands:
        array = arrays[name]
        if axes != spec_axes(specs[name], array.ndim):
            array = jax.sharding.reshard(array, NamedSharding(mesh, specs[name]))
        placed[name] = array
    # Without names they are all but those of an enclosing `jax.vmap`, which are not to be named.
    only = frozenset() if set(mesh.axis_types) == {AxisType.Explicit} else frozenset(names)
    return divide(mesh, call, placed, placement, only)


def divide(mesh, call: Call, arrays, placement: Placement, only=frozenset()):
    """The results of a call, each device with its share.

    Args:
      mesh: for `jax.shard_map`.
      call, arrays: from `lla.ops.call.make_call`.
      placement: what a share is.
      only: the mesh axes to divide over; empty for all.
    """
    function = jax.shard_map(
        lambda arrays: run(call, arrays, placement),
        mesh=mesh,
        in_specs=({n: placement.spec(call.label(n, a.shape)) for n, a in arrays.items()},),
        out_specs={name: placement.spec(own) for name, own in _result_labels(call).items()},
        axis_names=only,
    )
    return function(arrays)


def _explicit_axes(array: jax.Array, names: set[str]) -> tuple[tuple[str, ...], ...]:
    sharding = jax.typeof(array).sharding
    found = spec_axes(sharding.spec, array.ndim)
    return tuple(tuple(axis for axis in entry if axis in names) for entry in found)


def _result_labels(call: Call) -> dict[str, tuple]:
    """The factors of the results, none of which is broadcast."""
    leading = tuple(f"b{i}" for i in range(call.leading))
    return {name: (*leading, *DIMS[name]) for name in call.results}
