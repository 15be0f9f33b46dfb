"""The base class of mixers whose state does not grow, and the state they decode from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers.chunks import check_form
from lla.nn.new_tokens import NewTokens, apply_projection, convolution_states
from lla.numerics import compute_dtype
from lla.ops import segments


class State(NamedTuple):
    """The state of a recurrent mixer; the batch is the leading axis of every array.

    Attributes:
      memory: the state of the recurrence, float32 or better.
      convolutions: by the name of a projection, the last inputs of its short convolution.
      lengths: int32 ``[B]``, tokens so far; of packed sequences, those of the last segment.
      segment: int32 ``[B]``, the segment id of the last token; 0 where none was given.
    """

    memory: Any
    convolutions: dict[str, jax.Array]
    lengths: jax.Array
    segment: jax.Array

    def begin(
        self,
        mixer: nnx.Module,
        x: jax.Array,
        new_lengths: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> tuple[State, NewTokens]:
        """The tokens ``x [B, T, width]`` as `NewTokens`, and the state before them.

        That is this state, zeroed where the first token starts a segment.
        """
        tokens = NewTokens(mixer, x, self.convolutions, new_lengths, segment_ids, self.segment)
        state = self
        if tokens.starts is not None:
            memory, lengths = tokens.reset((self.memory, self.lengths))
            state = self._replace(memory=memory, lengths=lengths)
        return state, tokens

    def advance(self, memory: Any, tokens: NewTokens) -> State:
        """The state after `tokens`, where `memory` is that of the recurrence."""
        lengths = tokens.lengths_after(self.lengths)
        return State(memory, tokens.convolutions, lengths, tokens.segment)


def init_state(mixer: nnx.Module, batch: int, shapes: Any, dtype: Any = None) -> State:
    """The state of `mixer` before the first token: zeros.

    Args:
      mixer: has an output projection `out`.
      batch: number of sequences.
      shapes: a pytree of the shapes of the recurrence's state, without the batch.
      dtype: None for the dtype of the mixer; narrower than float32 means float32.
    """
    if dtype is None:
        dtype = mixer.out.param_dtype if mixer.out.dtype is None else mixer.out.dtype
    dtype = compute_dtype(jnp.dtype(dtype))
    return State(
        jax.tree.map(lambda shape: jnp.zeros((batch, *shape), dtype), shapes, is_leaf=_is_shape),
        convolution_states(mixer, batch, dtype),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


class Tokens(Protocol):
    """What `RecurrentMixer.prepare` reads: whole sequences, or the new tokens of decoding."""

    x: jax.Array

    def project(self, name: str) -> jax.Array:
        """The projection `name` of the mixer, applied to `x`."""
        ...


class WholeSequences:
    """Whole sequences ``x [B, T, width]``; short convolutions stay within segments."""

    def __init__(self, mixer: nnx.Module, x: jax.Array, segment_ids: jax.Array | None = None):
        self.x, self._mixer, self._segment_ids = x, mixer, segment_ids

    def project(self, name: str) -> jax.Array:
        """The projection `name` of the mixer, applied to `x`."""
        return apply_projection(getattr(self._mixer, name), self.x, self._segment_ids)

    def positions(self) -> jax.Array:
        """Int32 ``[T]``, the positions of the tokens; ``[B, T]``, within segments, if packed."""
        if self._segment_ids is None:
            return jnp.arange(self.x.shape[1], dtype=jnp.int32)
        return segments.positions(segments.starts(self._segment_ids, self.x.shape[:2]))


class RecurrentMixer(nnx.Module):
    """A mixer around a recurrence; calls and decoding are made of three hooks.

    A subclass sets `recurrence`, gives its instances a `state_shape` and an output projection
    `out`, and defines `prepare` and `finish`, and `recurrence_options` for further options.

    Attributes:
      recurrence: a function with the keyword arguments ``state, segment_ids, form, chunk,
        return_state``, such as `lla.mixers.linear_recurrence`.
      masked: names of the arguments that padding sets to zero, which leaves the state unchanged:
        keys or step sizes, and logarithms of decays.
      state_shape: the shape of the recurrence's state for one sequence, or a pytree of shapes.
    """

    recurrence: ClassVar[Callable[..., Any]]
    masked: ClassVar[tuple[str, ...]] = ("key", "log_decay")
    state_shape: Any

    def __init__(self, state_shape: Any, form: str, chunk: int):
        check_form(form, chunk)
        self.state_shape, self.form, self.chunk = state_shape, form, chunk

    def prepare(self, tokens: Tokens, positions: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """The arguments of the recurrence by name, and anything else that `finish` needs."""
        raise NotImplementedError

    def finish(self, x: jax.Array, out: jax.Array, extra: Any) -> jax.Array:
        """``[B, T, width]`` from the output of the recurrence; `extra` is from `prepare`."""
        raise NotImplementedError

    def recurrence_options(self) -> Mapping[str, Any]:
        """Further arguments of the recurrence."""
        return {"chunk": self.chunk}

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """``[B, T, width] -> [B, T, width]``; see `lla.mixers.Mixer`."""
        tokens = WholeSequences(self, x, segment_ids)
        arguments, extra = self.prepare(tokens, tokens.positions())
        out = type(self).recurrence(
            **arguments, segment_ids=segment_ids, form=self.form, **self.recurrence_options()
        )
        return self.finish(x, out, extra)

    def init_state(self, batch: int, max_length: int, dtype: Any = None) -> State:
        """The state of `decode` before the first token; see `lla.mixers.Mixer`."""
        del max_length
        return init_state(self, batch, self.state_shape, dtype)

    def decode(
        self,
        x: jax.Array,
        state: State,
        new_lengths: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """The next tokens ``[B, T, width]`` of the sequences of `state`; see `lla.mixers.Mixer`."""
        state, tokens = state.begin(self, x, new_lengths, segment_ids)
        arguments, extra = self.prepare(tokens, tokens.positions(state.lengths))
        for name in self.masked:
            if name in arguments:
                arguments[name] = tokens.mask(arguments[name])
        out, memory = type(self).recurrence(
            **arguments,
            state=state.memory,
            segment_ids=tokens.segment_ids,
            form="recurrent" if x.shape[1] == 1 else self.form,  # a single token is a step
            return_state=True,
            **self.recurrence_options(),
        )
        return self.finish(tokens.x, out, extra), state.advance(memory, tokens)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)
