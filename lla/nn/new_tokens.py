"""The next tokens of sequences that arrive in pieces, for modules that decode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.ops import segments
from lla.ops.cache import exists, token_counts


class Piece:
    """The next tokens of some sequences: which of them exist, and projections that go on with them.

    Args:
      mixer: the module whose projections are meant.
      x: ``[*B, T, width]``.
      convolutions: the last inputs of its short convolutions, from `convolution_states`.
      new_lengths: int ``[*B]``, in 0 ... T: how many of the T tokens exist; None for all.
      segment_ids: int ``[*B, T]``, of packed sequences; None for one.
      segment: int32 ``[*B]``, the id of the last token in front of these.

    Raises:
      ValueError: arguments whose shapes do not fit.

    Attributes:
      x: the tokens, zeros where they only pad.
      counts: int32 ``[*B]``, the number of tokens that exist.
      convolutions: after each `project`, the new last inputs.
      starts: bool ``[*B, T]``, which of the tokens that exist are the first of a segment, and None
        without segment ids.
      runs: int32 ``[*B, T]``, segment ids that never come back; tokens that only pad are of the
        last segment. None without segment ids.
      segment: int32 ``[*B]``, the id of the last token of these.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        x: jax.Array,
        convolutions,
        new_lengths,
        segment_ids=None,
        segment=None,
    ):
        *leading, length, _ = x.shape
        if segment is not None and segment.shape != tuple(leading):
            raise ValueError(
                f"x must have the leading axes {segment.shape} of the state, got {x.shape}."
            )
        self.counts = token_counts(new_lengths, tuple(leading), length)
        self.convolutions = dict(convolutions)
        self._mixer = mixer
        self._ragged = new_lengths is not None
        self._real = exists(self.counts, length)
        self.x = self.keep(x)
        self.segment, self.starts, self.runs = segment, None, None
        if segment_ids is not None:
            starts = segments.starts(segment_ids, x.shape[:-1], segment)
            self.starts = starts & self._real
            self.runs = segments.runs(self.starts)
            self.convolutions = self.restarted(self.convolutions)
            last = jnp.clip(self.counts - 1, 0)[..., None]
            last = jnp.take_along_axis(segments.narrowed(segment_ids), last, axis=-1)[..., 0]
            self.segment = jnp.where(self.counts > 0, last, segment)

    def restarted(self, tree: Any) -> Any:
        """Arrays ``[*B, ...]`` with zeros where the first token is that of a new segment."""
        return segments.cleared(tree, self.starts[..., 0])

    def positions(self, lengths: jax.Array) -> jax.Array:
        """Int32 ``[*B, T]``, those of the tokens in their segments.

        `lengths`, int32 ``[*B]``, are the tokens in front of the first one, in its segment.
        """
        starts = jnp.zeros_like(self._real) if self.starts is None else self.starts
        return segments.positions(starts, lengths)

    def lengths_behind(self, lengths: jax.Array) -> jax.Array:
        """Int32 ``[*B]``: the tokens of the last segment behind these, of `lengths` before them."""
        if self.starts is None:
            return lengths + self.counts
        # Tokens that only pad count as the last segment's.
        last = self.positions(lengths)[..., -1]
        return last + 1 - (self._real.shape[-1] - self.counts)

    def keep(self, array: jax.Array) -> jax.Array:
        """`array` ``[*B, T, ...]`` with zeros for the tokens that only pad."""
        if not self._ragged:
            return array
        real = self._real.reshape(*self._real.shape, *(1,) * (array.ndim - self._real.ndim))
        return jnp.where(jnp.broadcast_to(real, array.shape), array, jnp.zeros_like(array))

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """What the projection `name` of the mixer makes of ``x [*B, T, width]``."""
        module = getattr(self._mixer, name)
        if name not in self.convolutions:
            return module(x)
        counts = self.counts if self._ragged else None
        y, self.convolutions[name] = module.decode(x, self.convolutions[name], counts, self.starts)
        return y


def apply_projection(module: nnx.Module, x: jax.Array, segment_ids=None) -> jax.Array:
    """``module(x)``, which does not look across segments if it has a short convolution."""
    if segment_ids is None or not hasattr(module, "convolution"):
        return module(x)
    return module(x, segment_ids)


def convolution_states(mixer: nnx.Module, batch: int, dtype) -> dict[str, jax.Array]:
    """The inputs before the first token, zeros, of every short convolution of `mixer`, by name."""
    return {
        name: child.init_state(batch, dtype)
        for name, child in vars(mixer).items()
        if isinstance(child, nnx.Module) and hasattr(child, "init_state")
    }
