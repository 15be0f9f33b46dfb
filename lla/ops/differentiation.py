"""The derivatives that blockwise back ends share.

`attention` is their one `jax.custom_vjp`: it runs a forward pass, keeps `Residuals` under the names
`RESIDUAL_NAMES`, and calls a hand-written backward pass. Both passes have derivatives of their own
where a back end gives a form that JAX can differentiate any number of times, and refuse them by
name where it does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lla.compat import match_varying
from lla.ops.handover import current_handover
from lla.ops.problem import Operands
from lla.ops.solver import Stats

RESIDUAL_NAMES = ("lla_output", "lla_log_sum_exp", "lla_probe", "lla_key_mean")
"""Names of the forward results that the backward pass needs, for checkpoint policies."""


class Residuals(NamedTuple):
    """What the backward pass needs beside the operands, in the layout of the back end.

    `RESIDUAL_NAMES` holds the names in the order of the fields. A field may be None, or several
    arrays.
    """

    out: jax.Array
    log_sum_exp: Any = None
    probe: Any = None
    key_mean: Any = None


def attention(
    name: str,
    forward: Callable,
    backward: Callable,
    output: Callable | None = None,
    axes: Mapping[int, str] | None = None,
) -> Callable:
    """A differentiable function ``(spec, operands, constants) -> (out, Stats)``.

    Args:
      name: of the back end, for errors.
      forward: ``(spec, operands, constants) -> (Residuals, Stats)``. `spec` is static and hashable,
        `operands` are `Operands`, and `constants` any pytree of arrays without a gradient.
      backward: ``(spec, operands, constants, residuals, cotangent) -> Operands``, the gradients.
      output: ``(spec, operands, constants) -> out``, equal to that of `forward` and differentiable
        by JAX; None if there is none, and no further derivatives.
      axes: for `lla.ops.handover`, by the rank of a residual or statistic its axes behind the
        first one, in the letters of `lla.ops.placement`; None if the compiler cannot divide it.
    """
    if output is None:
        results, gradients = (refuse_derivative(f, name) for f in (forward, backward))
    else:

        def differentiable_results(spec, operands, constants):
            return Residuals(output(spec, operands, constants)), Stats(None, None, None)

        def differentiable_gradients(spec, operands, constants, residuals, cotangent):
            del residuals  # they follow from the operands
            pullback = jax.vjp(lambda operands: output(spec, operands, constants), operands)[1]
            return pullback(cotangent)[0]

        results = with_derivative(forward, differentiable_results)
        gradients = with_derivative(backward, differentiable_gradients)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(spec, operands: Operands, constants) -> tuple[jax.Array, Stats]:
        residuals, stats = results(spec, operands, constants)
        return residuals.out, stats

    def attend_fwd(spec, operands, constants):
        residuals, stats = results(spec, operands, constants)
        named = (
            jax.tree.map(functools.partial(checkpoint_name, name=name), field)
            for field, name in zip(residuals, RESIDUAL_NAMES, strict=True)
        )
        residuals = Residuals(*named)
        return (residuals.out, stats), (operands, constants, residuals)

    def attend_bwd(spec, saved, cotangents):
        operands, constants, residuals = saved
        return gradients(spec, operands, constants, residuals, cotangents[0]), None

    attend.defvjp(attend_fwd, attend_bwd)

    def call(spec, operands: Operands, constants) -> tuple[jax.Array, Stats]:
        leaves, tree = jax.tree.flatten((operands, constants))
        operands, constants = jax.tree.unflatten(tree, match_varying(*leaves))
        handover = current_handover()
        if handover is not None:
            return handover.attend(results, gradients, axes, spec, operands, constants)
        return attend(spec, operands, constants)

    return call


def with_derivative(function, differentiable):
    """`function`, whose derivative is that of `differentiable`.

    Args:
      function: ``(static, *arguments) -> results``, pytrees of arrays.
      differentiable: the same, but None for results that count as constants.
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
