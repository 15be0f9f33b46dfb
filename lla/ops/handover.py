"""Hands the results of a forward pass from one function to another that computes its gradient.

Where forward and backward pass are functions of their own, each with its own copy per device, what
the first one saves has to leave it as a result and enter the second one as an argument.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lla.ops.options import Stats


@dataclasses.dataclass
class Handover:
    """Filled in by a forward pass, or given to a backward pass.

    Attributes:
      lse: log-sum-exp, ``[B, T, K, G]``.
      arrays: what an implementation saved; every array leads with ``B``.
      dims: for each of them its checkpoint name and its axes behind ``B`` in the letters of
        `lla.ops.placement`; a ``q`` is the axis of queries padded to whole tiles.
      given: whether this is for a backward pass.
    """

    lse: Any = None
    arrays: tuple = ()
    dims: tuple[tuple[str, str], ...] = ()
    given: bool = False

    def attend(self, results, gradients, pack, unpack, spec, operands, rest):
        """Runs an implementation between `results` and `gradients`.

        Args:
          results: ``(spec, operands, *rest) -> (saved, stats)``.
          gradients: ``(spec, operands, *rest, saved, cotangent) -> gradients of operands``.
          pack: ``saved -> (arrays, dims)`` as above.
          unpack: ``arrays -> saved``.
          spec, operands, rest: of the call. ``operands.scale`` has the shape of statistics.

        Returns:
          ``saved.out`` and the statistics, which are empty for a backward pass.
        """
        if not self.given:
            saved, stats = results(spec, operands, *rest)
            self.arrays, self.dims = pack(saved)
            return saved.out, stats
        saved = unpack(self.arrays)
        out = _given(gradients, spec, operands, rest, saved)
        zeros = jnp.zeros_like(operands.scale)
        return out, Stats(zeros, zeros.astype(jnp.int32), zeros)

    def bind(self, results, gradients, kind, fields):
        """`attend` of ``spec, operands, rest`` where the saved arrays leave as they are.

        Args:
          results, gradients: as for `attend`.
          kind: the named tuple that the arrays are in, whose fields may be None.
          fields: ``(checkpoint name, axes)`` for each.
        """

        def pack(saved):
            present = [i for i, array in enumerate(saved) if array is not None]
            return tuple(saved[i] for i in present), tuple(fields[i] for i in present)

        def unpack(arrays):
            # The fields are in order, and the axes and names of those that are there are known.
            saved, left = [], list(zip(arrays, self.dims, strict=True))
            for field in fields:
                saved.append(left.pop(0)[0] if left and left[0][1] == field else None)
            return kind(*saved)

        return functools.partial(self.attend, results, gradients, pack, unpack)


def fields(names, dims: str) -> tuple[tuple[str, str], ...]:
    """Checkpoint name and axes of saved arrays; `dims` are separated by spaces."""
    return tuple(zip(names, dims.split(), strict=True))


def named(saved, fields) -> tuple:
    """Saved arrays with their checkpoint names."""
    pairs = zip(saved, fields, strict=True)
    return tuple(None if a is None else checkpoint_name(a, name) for a, (name, _) in pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _given(gradients, spec, operands, rest, saved):
    del gradients, spec, operands, rest
    return saved.out


def _given_fwd(gradients, spec, operands, rest, saved):
    del gradients, spec
    return saved.out, (operands, rest, saved)


def _given_bwd(gradients, spec, residuals, cotangent):
    operands, rest, saved = residuals
    return gradients(spec, operands, *rest, saved, cotangent), None, None


_given.defvjp(_given_fwd, _given_bwd)
