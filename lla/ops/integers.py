"""Integers of any size as the int32 that masks are computed in, without a wrap-around.

Positions differ by less than ``MAX_OFFSET`` plus two lengths, which is less than `MAX_WINDOW`; sums
and differences of these fit into int32. Lengths are taken to be below 2**28.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_OFFSET = 2**29
"""Offsets beyond are taken as this: every key, or none, lies before such a query."""

MAX_WINDOW = 2**30
"""Windows beyond are taken as this: they reach over all positions."""

_INT32 = jnp.iinfo(jnp.int32)


def saturated(array, name: str, low: int, high: int) -> jax.Array:
    """`array` as int32 numbers, those outside ``low ... high`` as the nearest inside.

    Args:
      array: integers of any shape and width, traced or not.
      name: what an error calls it.
      low, high: int32 numbers.

    Raises:
      ValueError: if it does not hold integers.
    """
    array = _integers(array, name)
    if not isinstance(array, jax.Array):
        # NumPy refuses bounds that the dtype of an array cannot hold.
        wide = array.astype(object if array.dtype in (object, np.uint64) else np.int64)
        return jnp.asarray(np.asarray(np.clip(wide, low, high)).astype(np.int32))
    info = jnp.iinfo(array.dtype)
    # Bounds that the dtype cannot hold bound nothing.
    lower, upper = (max(low, int(info.min)), min(high, int(info.max)))
    return jnp.clip(array, lower, upper).astype(jnp.int32)


def labels(arrays: Sequence, names: Sequence[str]) -> list[jax.Array]:
    """`arrays` as int32 numbers that are equal where the given ones are.

    Args:
      arrays: integers of any shapes and widths, traced or not.
      names: what an error calls each of them.

    Raises:
      ValueError: if one does not hold integers.
    """
    arrays = [_integers(array, name) for array, name in zip(arrays, names, strict=True)]
    if not any(isinstance(array, jax.Array) for array in arrays):
        if all(_fits(array) for array in arrays):
            return [jnp.asarray(array.astype(np.int32)) for array in arrays]
        flat = np.concatenate([array.ravel() for array in arrays])
        ranks = np.unique(flat, return_inverse=True)[1].reshape(-1).astype(np.int32)
        ends = np.cumsum([array.size for array in arrays])[:-1]
        parts = np.split(ranks, ends)
        return [jnp.asarray(p.reshape(a.shape)) for p, a in zip(parts, arrays, strict=True)]
    if all(array.dtype.itemsize <= 4 for array in arrays if isinstance(array, jax.Array)) and all(
        _fits(array) for array in arrays if not isinstance(array, jax.Array)
    ):
        kinds = {jnp.issubdtype(array.dtype, jnp.unsignedinteger) for array in arrays}
        # A conversion from uint32 wraps around, but no two numbers become equal.
        if len(kinds) == 1 or all(array.dtype != jnp.uint32 for array in arrays):
            return [jnp.asarray(array).astype(jnp.int32) for array in arrays]
    if not jax.config.jax_enable_x64:
        raise ValueError(
            f"{names[0]} and {names[1]} hold numbers of different signs or beyond 32 bits, at "
            "least one of them in a JAX array: give both as int32, or both as NumPy arrays."
        )
    wide = [jnp.asarray(array).astype(jnp.int64) for array in arrays]
    ordered = jnp.sort(jnp.concatenate([array.reshape(-1) for array in wide]))
    return [jnp.searchsorted(ordered, array).astype(jnp.int32) for array in wide]


def check_limit(array, name: str) -> None:
    """Raises ValueError if known numbers of `array` lie beyond `MAX_OFFSET`."""
    if array is None or isinstance(array, jax.core.Tracer):
        return
    values = np.asarray(array)
    if values.size and not (values.min() >= -MAX_OFFSET and values.max() <= MAX_OFFSET):
        raise ValueError(
            f"{name} must lie within {-MAX_OFFSET} ... {MAX_OFFSET}, got {values.min()} ... "
            f"{values.max()}."
        )


def _integers(array, name: str) -> jax.Array | np.ndarray:
    """A JAX array as it is, anything else as a NumPy array (of Python integers where need be)."""
    if not isinstance(array, jax.Array):
        given, array = array, np.asarray(array)
        if array.dtype.kind == "f" and not hasattr(given, "dtype"):
            # NumPy makes floats of Python integers on both sides of 2**63.
            exact = np.asarray(given, object)
            array = exact if all(type(x) is int for x in exact.flat) else array
        if array.dtype == object and all(isinstance(x, int) for x in array.flat):
            return array
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be an integer array, got {array.dtype} {array.shape}.")
    return array


def _fits(array: np.ndarray) -> bool:
    return not array.size or bool(array.min() >= _INT32.min and array.max() <= _INT32.max)
