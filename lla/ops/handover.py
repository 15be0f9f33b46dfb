"""Hands the results of a forward pass from one function to another that computes its gradient.

Where forward and backward pass are functions of their own, each with its own copy per device, what
the first one saves has to leave it as a result and enter the second one as an argument.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lla.ops.solver import Stats

_CURRENT = contextvars.ContextVar("lla_handover", default=None)


def current_handover() -> Handover | None:
    """That of the enclosing `Handover.active`."""
    return _CURRENT.get()


@dataclasses.dataclass
class Handover:
    """Filled in by a forward pass, or given to a backward pass.

    Attributes:
      batch: sequences of the call.
      arrays: what is saved, the log-sum-exp first; every array leads with the batch.
      dims: for each of them the field of the residuals that it belongs to, and its axes behind the
        first in the letters of `lla.ops.placement`; a ``q`` is the axis of queries padded to whole
        tiles.
      tree: the structure of log-sum-exp and residuals.
      given: whether this is for a backward pass.
    """

    batch: int
    arrays: tuple = ()
    dims: tuple[tuple[int, str], ...] = ()
    tree: Any = None
    given: bool = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the one call of a back end hands over."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def attend(self, results, gradients, axes: Mapping[int, str], spec, operands, constants):
        """Runs a back end between `results` and `gradients`, see `lla.ops.differentiation`."""
        if not self.given:
            residuals, stats = results(spec, operands, constants)
            leaves, self.tree = jax.tree.flatten((stats.lse, residuals))
            fields = (1, *(i for i, f in enumerate(residuals) for _ in jax.tree.leaves(f)))
            self.dims = tuple((i, axes[a.ndim]) for i, a in zip(fields, leaves, strict=True))
            self.arrays = tuple(self._by_batch(a) for a in leaves)
            return residuals.out, stats
        # Groups of sequences and key heads come as one axis, query heads of a group as the next.
        grouped = operands.query.shape[0] != self.batch or "q" not in "".join(
            dims for _, dims in self.dims
        )
        first = operands.query.shape[:2]
        arrays = (a.reshape(*first, *a.shape[2:]) if grouped else a for a in self.arrays)
        lse, residuals = jax.tree.unflatten(self.tree, arrays)
        out = _given(gradients, spec, operands, constants, residuals)
        zeros = jnp.zeros_like(lse)
        return out, Stats(lse, zeros.astype(jnp.int32), zeros)

    def _by_batch(self, array: jax.Array) -> jax.Array:
        if array.shape[0] == self.batch and "q" in "".join(dims for _, dims in self.dims):
            return array
        return array.reshape(self.batch, -1, *array.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _given(gradients, spec, operands, constants, residuals):
    del gradients, spec, operands, constants
    return residuals.out


def _given_fwd(gradients, spec, operands, constants, residuals):
    del gradients, spec
    return residuals.out, (operands, constants, residuals)


def _given_bwd(gradients, spec, saved, cotangent):
    return gradients(spec, *saved, cotangent), None, None


_given.defvjp(_given_fwd, _given_bwd)
