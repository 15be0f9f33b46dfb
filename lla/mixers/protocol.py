"""What every mixer can do."""

from typing import Any, Protocol

import jax


class Mixer(Protocol):
    """A causal mechanism: on whole sequences, and on sequences that arrive in pieces.

    Example::

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from lla import mixers
        >>> mixer, x = mixers.create("gla", 64, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 10, 64))
        >>> state = mixer.init_state(2, max_length=10)
        >>> prompt, state = mixer.decode(x[:, :9], state)
        >>> last, state = mixer.decode(x[:, 9:], state)
        >>> bool(jnp.allclose(last, mixer(x)[:, 9:], atol=1e-5))
        True
    """

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """``[B, T, width] -> [B, T, width]``; an output depends on tokens up to its own.

        Args:
          x: ``[B, T, width]``.
          segment_ids: int ``[B, T]``, where sequences are packed one behind the other: outputs and
            gradients are those of the segments in calls of their own. A segment is a run of equal
            ids, it starts where the id changes, and an id that comes back later stands for another
            one. Positions, where a mixer uses them, count from 0 in every segment. Recurrences
            multiply the state by zero before a segment, so that what is not a number in one segment
            reaches the later ones. None for one sequence.

        Raises:
          ValueError: `segment_ids` is no integer array ``[B, T]``.
        """
        ...

    def init_state(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """The state of `decode` before the first token.

        Args:
          batch: number of sequences.
          max_length: tokens of each sequence that there has to be room for. Recurrences, whose
            state does not grow, take any number of them.
          dtype: of what is kept of single tokens, keys and values; None means that of the
            mixer's computation. States of recurrences are float32, or float64 for float64.

        Returns:
          A pytree of arrays, each with a leading axis `batch`.

        Raises:
          ValueError: `max_length` is below 1, where it matters.
        """
        ...

    def decode(
        self,
        x: jax.Array,
        state: Any,
        new_lengths: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The outputs of the next T tokens, equal to theirs in ``self(whole sequence)``.

        One token is a step of the recurrence, several are computed in the form that the mixer
        computes whole sequences in.

        Args:
          x: ``[B, T, width]``.
          state: from `init_state`, or from the call before. It is not changed; donate it to a
            compiled step to have its memory used again.
          new_lengths: int ``[B]``, in 0 ... T: how many of the T tokens of a sequence exist. The
            others pad it and leave no trace in the state; their outputs have no meaning. None for
            all.
          segment_ids: int ``[B, T]``, as in a call; numbers that int32 holds. The state keeps the
            last one: the first token goes on with the segment of the last token before if its id is
            the same (0 where none was given), and starts another one otherwise. None: all tokens go
            on with that segment. Behind the call the state is that of the last segment alone. One
            that grows needs room for all T tokens until then.

        Returns:
          ``[B, T, width]`` and the state behind these tokens. More tokens than there is room for
          are a ValueError where lengths are known; otherwise outputs of such a sequence are NaN
          from then on.

        Raises:
          ValueError: for arguments of wrong shape, or tokens that are known not to fit.
        """
        ...
