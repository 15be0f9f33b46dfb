"""Meshes, and the shardings of arrays on them."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lla.training.settings import Sharding

BATCH = PartitionSpec(("data", "fsdp"))  # the leading axis of a batch


def make_mesh(settings: Sharding, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh [data, fsdp] over `devices`, all visible ones if None.

    Raises:
      ValueError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": settings.data, "fsdp": settings.fsdp}
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if len(devices) % known:
            raise ValueError(
                f"{len(devices)} devices cannot be split into groups of {known} "
                f"(sharding.data={settings.data}, sharding.fsdp={settings.fsdp})."
            )
        sizes = {
            name: len(devices) // known if size == -1 else size for name, size in sizes.items()
        }
    shape = tuple(sizes.values())
    if math.prod(shape) > len(devices):
        raise ValueError(
            f"sharding.data={shape[0]} times sharding.fsdp={shape[1]} needs {math.prod(shape)} "
            f"devices, {len(devices)} are visible."
        )
    grid = np.asarray(devices[: math.prod(shape)], dtype=object).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_state(tree: Any, mesh: Mesh) -> Any:
    """Shardings of parameters and optimiser state (a tree of arrays or of their shapes).

    Every array is split over `fsdp` along its longest axis that `fsdp` divides, the last one of
    equal axes. Arrays without such an axis are replicated.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size >= parts and size % parts == 0]
        if parts == 1 or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(place, tree)
