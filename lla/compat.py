"""The differences between the supported JAX versions, in one place."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_TARGET = contextvars.ContextVar("lla_target_platform", default=None)


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Inside, kernels for `platform` are chosen though the machine has no such device.

    For programs that are lowered, exported or compiled here and run elsewhere. An implementation
    has to be named: ``implementation=None`` goes on choosing for this machine. A function that was
    traced inside cannot run on this machine; JAX keeps such traces, so use a function of its own.
    Only ``"tpu"`` has kernels that a machine without the device can lower in this way::

        with lla.compat.lowering_for("tpu"):
            exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments)

    Args:
      platform: ``"tpu"``.

    Raises:
      ValueError: for another platform.
    """
    if platform != "tpu":
        raise ValueError(f"platform must be 'tpu', got {platform!r}.")
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target_platform() -> str | None:
    """The platform of the enclosing `lowering_for`, None outside of one."""
    return _TARGET.get()


def assume_tpu() -> contextlib.AbstractContextManager:
    """While a kernel for TPUs is traced: JAX asks for the kind of device, here there may be none.

    All supported kinds give the same program at this stage. A mesh that is in use, that of an
    enclosing `jax.shard_map` for example, has to say itself that its devices are TPUs: one made
    from `jax.experimental.topologies`, or a `jax.sharding.AbstractMesh` with an `abstract_device`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty or default_device().platform == "tpu":
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device))


def default_device() -> jax.Device:
    """The device that JAX puts an array on."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device


def shape_varying(shape, dtype, *like: jax.Array) -> jax.ShapeDtypeStruct:
    """The result of a kernel that varies over the mesh axes of any of its operands `like`."""
    axes = varying_axes(*like)
    kind = jax.sharding.ManualAxisType(varying=axes) if axes else None
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def varying_axes(*arrays: jax.Array) -> frozenset:
    """Mesh axes of an enclosing `jax.shard_map` over which any of `arrays` varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def match_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Casts `arrays` to the union of their varying axes.

    Done before a `custom_vjp`: the transpose of the cast then sums the gradients of replicated
    operands over the axes they are replicated on.
    """
    return tuple(vary_like(array, *arrays) for array in arrays)


def vary_like(array: jax.Array, *like: jax.Array) -> jax.Array:
    """`array`, varying over the mesh axes that any of `like` varies over."""
    axes = tuple(sorted(varying_axes(*like) - varying_axes(array)))
    return jax.lax.pcast(array, axes, to="varying") if axes else array


def full_varying(shape, fill_value, dtype, like: jax.Array) -> jax.Array:
    """`jnp.full` that varies over the mesh axes of `like`, as a loop carry has to."""
    return vary_like(jnp.full(shape, fill_value, dtype), like)
