"""Derivatives beyond the first: what JAX differentiates in the place of a hand-written gradient.

The blockwise form written out, with its solve as `jax.lax.custom_linear_solve`: JAX then applies
the implicit function theorem to it, in forward and reverse mode, as often as asked. A derivative
is as exact as the solves, which stop at the smaller of the two tolerances.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lla.kernels import tiles


def with_derivative(function, differentiable):
    """`function`, whose derivative is that of `differentiable`.

    Args:
      function: ``(static, *arguments) -> results``, pytrees of arrays.
      differentiable: the same, but for results that count as constants, which are None.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def wrapped(static, *arguments):
        return function(static, *arguments)

    @wrapped.defjvp
    def derivative(static, arguments, tangents):
        results = wrapped(static, *arguments)
        moving, tree = jax.tree.flatten(arguments)
        tangents = jax.tree.leaves(tangents)
        floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in moving]

        def call(*floats):
            floats = iter(floats)
            leaves = [next(floats) if f else a for f, a in zip(floating, moving, strict=True)]
            return differentiable(static, *jax.tree.unflatten(tree, leaves))

        def chosen(leaves):
            return tuple(a for f, a in zip(floating, leaves, strict=True) if f)

        _, found = jax.jvp(call, chosen(moving), chosen(tangents))

        def fill(result, tangent):
            return _zero(result) if tangent is None and result is not None else tangent

        return results, jax.tree.map(fill, results, found, is_leaf=lambda a: a is None)

    return wrapped


def refuse_derivative(function, name: str):
    """`function`, a part of the first derivative of the implementation `name`, which has no second.

    Args:
      function: ``(static, *arguments) -> results``.
    """

    def refuse(static, *arguments):
        raise NotImplementedError(
            f"implementation={name!r} has first derivatives in reverse mode alone: for further "
            "ones take implementation='xla', or 'reference', which is exact."
        )

    return with_derivative(function, refuse)


def _zero(array):
    """The tangent of a constant."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def solve(find, p, k, key_mean, ridge, target, precision):
    """Solves the systems of a tile, with the derivatives of the exact solution.

    Args:
      find: the map from right-hand sides to approximate solutions, ``[..., R, H]``; not
        differentiated.
      p, k, key_mean, ridge: see `lla.kernels.tiles`.
      target: right-hand sides ``[..., R, H]``.
    """

    def product(y):
        return tiles.system_product(p, k, key_mean, ridge, y, precision)

    return lax.custom_linear_solve(product, target, lambda _, b: find(b), symmetric=True)
