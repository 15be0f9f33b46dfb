"""The interface of mixers."""

from typing import Any, Protocol

import jax


class Mixer(Protocol):
    """A causal token mixer, for whole sequences and for decoding.

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
          segment_ids: int ``[B, T]``, of packed sequences: outputs and gradients are those of
            separate calls for the segments. A segment is a run of equal ids: it starts where the id
            changes, and an id that returns later is another segment. Positions, if the mixer uses
            them, count from 0 in every segment. Recurrences multiply the state by zero at the start
            of a segment, so NaN or infinity in one segment does reach later ones. None for one
            sequence.

        Raises:
          ValueError: `segment_ids` is not an integer array ``[B, T]``.
        """
        ...

    def init_state(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """The state of `decode` before the first token.

        Args:
          batch: number of sequences.
          max_length: capacity in tokens per sequence. Mixers whose state does not grow ignore it.
          dtype: of cached keys and values; None means the dtype of the computation. States of
            recurrences are float32, or float64 for float64.

        Returns:
          A pytree of arrays, each with a leading axis `batch`.

        Raises:
          ValueError: `max_length` is below 1 and the state grows.
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
        """The outputs of the next T tokens, equal to those of a call on the whole sequence.

        A single token is a step of the recurrence; several use the form of whole sequences.

        Args:
          x: ``[B, T, width]``.
          state: from `init_state` or the previous call. Donate it to a compiled step to reuse its
            memory.
          new_lengths: int ``[B]``, in 0 ... T: how many of the T tokens of a sequence exist. The
            others are padding: they do not change the state, and their outputs have no meaning.
            None for all.
          segment_ids: int ``[B, T]``, as in a call; they must fit into int32. The state keeps the
            last id (0 if none was given): the first token continues that segment if it has the same
            id, and starts another one otherwise. None: all tokens continue that segment. Afterwards
            the state is that of the last segment only, but a state that grows needs room for all T
            tokens.

        Returns:
          ``[B, T, width]`` and the state after these tokens. Once a sequence exceeds the capacity,
          its outputs are NaN.

        Raises:
          ValueError: for arguments of the wrong shape, or more tokens than there is room for where
            lengths are known.
        """
        ...
