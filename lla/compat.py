"""The differences between the supported JAX versions, in one place."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
