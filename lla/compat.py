"""The differences between the supported JAX versions, in one place."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_TARGET = contextvars.ContextVar("lla_target_platform", default=None)
_CAPABILITY = contextvars.ContextVar("lla_target_capability", default=None)


@contextlib.contextmanager
def lowering_for(platform: str, *, capability: str | None = None) -> Iterator[None]:
    """Inside, kernels for `platform` are chosen although the machine has no such device.

    For programs that are lowered, exported or compiled here and run elsewhere. The implementation
    must be named: ``implementation=None`` still chooses for this machine. A function that was
    traced inside cannot run on this machine. JAX keeps such traces, so use a separate function::

        with lla.compat.lowering_for("tpu"):
            exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments)

    Args:
      platform: ``"tpu"`` or ``"cuda"``.
      capability: of ``"cuda"``, the compute capability, ``"8.0"`` for example.

    Raises:
      ValueError: for another platform, or without a compute capability where one is needed.
    """
    if platform not in ("tpu", "cuda"):
        raise ValueError(f"platform must be 'tpu' or 'cuda', got {platform!r}.")
    parts = None
    if platform == "cuda":
        if not isinstance(capability, str) or not re.fullmatch(r"\d+\.\d+", capability):
            raise ValueError(
                f"platform 'cuda' needs a capability such as '8.0' or '9.0', got {capability!r}."
            )
        parts = tuple(int(part) for part in capability.split("."))
    elif capability is not None:
        raise ValueError(f"platform 'tpu' takes no capability, got {capability!r}.")
    tokens = _TARGET.set(platform), _CAPABILITY.set(parts)
    try:
        with _assume_capability(parts):
            yield
    finally:
        _TARGET.reset(tokens[0])
        _CAPABILITY.reset(tokens[1])


@contextlib.contextmanager
def _assume_capability(capability: tuple[int, int] | None) -> Iterator[None]:
    """While kernels for NVIDIA GPUs are lowered: JAX asks the devices of this process."""
    if capability is None or jax.__version_info__ < (0, 11, 2):
        yield
        return
    from jax.experimental.mosaic.gpu import utils

    original = utils._infer_arch
    utils._infer_arch = lambda: _CAPABILITY.get() or original()
    try:
        yield
    finally:
        utils._infer_arch = original


def target_capability() -> tuple[int, int] | None:
    """The compute capability of the enclosing `lowering_for`, None outside of one."""
    return _CAPABILITY.get()


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
