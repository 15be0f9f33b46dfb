"""The new tokens of a call of `decode`, and projections that continue from a state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.ops import segments
from lla.ops.cache import exists, token_counts


class NewTokens:
    """The next tokens of a batch of sequences, some of which may be padding.

    Args:
      module: its projections are those that `project` applies.
      x: ``[*B, T, width]``.
      convolutions: the last inputs of its short convolutions, from `convolution_states`.
      new_lengths: int ``[*B]``, in 0 ... T: how many of the T tokens exist; None for all.
      segment_ids: int ``[*B, T]``, of packed sequences; None for one sequence.
      segment: int32 ``[*B]``, the segment id of the last token before these.

    Raises:
      ValueError: shapes that do not fit.

    Attributes:
      x: the tokens, with zeros for padding.
      counts: int32 ``[*B]``, the number of tokens that exist.
      convolutions: the last inputs after these tokens, once `project` has been called.
      starts: bool ``[*B, T]``, whether a token exists and is the first of its segment; None without
        segment ids.
      segment_ids: int32 ``[*B, T]``, ids that no two segments share; padding belongs to the last
        segment. None without segment ids.
      segment: int32 ``[*B]``, the segment id of the last of these tokens.
    """

    def __init__(
        self,
        module: nnx.Module,
        x: jax.Array,
        convolutions: dict[str, jax.Array],
        new_lengths: jax.Array | None,
        segment_ids: jax.Array | None = None,
        segment: jax.Array | None = None,
    ):
        *leading, length, _ = x.shape
        if segment is not None and segment.shape != tuple(leading):
            raise ValueError(
                f"x must have the leading axes {segment.shape} of the state, got {x.shape}."
            )
        self.counts = token_counts(new_lengths, tuple(leading), length)
        self.convolutions = dict(convolutions)
        self._module = module
        self._padded = new_lengths is not None
        self._exists = exists(self.counts, length)
        self.x = self.mask(x)
        self.segment, self.starts, self.segment_ids = segment, None, None
        if segment_ids is not None:
            starts = segments.starts(segment_ids, x.shape[:-1], segment)
            self.starts = starts & self._exists
            self.segment_ids = segments.runs(self.starts)
            self.convolutions = self.reset(self.convolutions)
            last = jnp.clip(self.counts - 1, 0)[..., None]
            last = jnp.take_along_axis(segments.narrowed(segment_ids), last, axis=-1)[..., 0]
            self.segment = jnp.where(self.counts > 0, last, segment)

    def reset(self, tree: Any) -> Any:
        """Arrays ``[*B, ...]``, zeroed where the first token starts a segment."""
        return segments.cleared(tree, self.starts[..., 0])

    def positions(self, lengths: jax.Array) -> jax.Array:
        """Int32 ``[*B, T]``, the positions of the tokens in their segments.

        `lengths`, int32 ``[*B]``, counts the tokens of the current segment before these.
        """
        starts = jnp.zeros_like(self._exists) if self.starts is None else self.starts
        return segments.positions(starts, lengths)

    def lengths_after(self, lengths: jax.Array) -> jax.Array:
        """Int32 ``[*B]``: the length of the last segment, which was `lengths` before these."""
        if self.starts is None:
            return lengths + self.counts
        # Padding counts towards the last segment and is subtracted again.
        last = self.positions(lengths)[..., -1]
        return last + 1 - (self._exists.shape[-1] - self.counts)

    def mask(self, array: jax.Array) -> jax.Array:
        """`array` ``[*B, T, ...]`` with zeros for padding."""
        if not self._padded:
            return array
        mask = self._exists.reshape(*self._exists.shape, *(1,) * (array.ndim - self._exists.ndim))
        return jnp.where(jnp.broadcast_to(mask, array.shape), array, jnp.zeros_like(array))

    def project(self, name: str) -> jax.Array:
        """The projection `name` of the module, applied to `x`."""
        module = getattr(self._module, name)
        if name not in self.convolutions:
            return module(self.x)
        counts = self.counts if self._padded else None
        state = self.convolutions[name]
        y, self.convolutions[name] = module.decode(self.x, state, counts, self.starts)
        return y


def apply_projection(module: nnx.Module, x: jax.Array, segment_ids=None) -> jax.Array:
    """``module(x)``; a short convolution in it stays within segments."""
    if segment_ids is None or not hasattr(module, "convolution"):
        return module(x)
    return module(x, segment_ids)


def convolution_states(module: nnx.Module, batch: int, dtype) -> dict[str, jax.Array]:
    """By name, the initial states, zeros, of the short convolutions of `module`."""
    return {
        name: child.init_state(batch, dtype)
        for name, child in vars(module).items()
        if isinstance(child, nnx.Module) and hasattr(child, "init_state")
    }
