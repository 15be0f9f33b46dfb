"""Sampling from a model, token by token."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # importing Flax takes longer than all the rest
    from flax import nnx


class Generated(NamedTuple):
    """The result of `generate`.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``; the padding token after the end of a sequence.
      lengths: int32 ``[B]``, the number of generated tokens, including the end token.
    """

    tokens: jax.Array
    lengths: jax.Array


def generate(
    model: nnx.Module,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    prompt_lengths: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
) -> Generated:
    """Samples continuations of prompts.

    One compiled function reads the whole prompt and then generates token by token. It is compiled
    again for another model, shape or choice of options, but not for other values of `temperature`
    and `top_p`. It ends early once every sequence has its end token.

    Example::

        >>> import jax.numpy as jnp, lla
        >>> from flax import nnx
        >>> from lla.models import ModelConfig, SequenceModel
        >>> config = ModelConfig(
        ...     width=16, depth=1, num_heads=2, mixer="gla", mixer_options={}, vocab_size=11,
        ...     input_dim=None, output_dim=11, max_length=32,
        ... )
        >>> model = SequenceModel(config, rngs=nnx.Rngs(0))
        >>> prompt = jnp.array([[1, 2, 3], [4, 5, 0]])
        >>> found = lla.generate(
        ...     model, prompt, max_new_tokens=4, prompt_lengths=jnp.array([3, 2])
        ... )
        >>> found.tokens.shape, found.lengths.tolist()
        ((2, 4), [4, 4])

    Args:
      model: a Flax module with ``init_state(batch, max_length) -> state`` and
        ``decode(tokens [B, T], state, new_lengths=None) -> (logits [B, T, vocab], state)``, such as
        `lla.models.SequenceModel`. Its attribute `length_limit`, if any, bounds the tokens of a
        sequence, and `vocab_size` their ids.
      prompt: int ``[B, P]``, P >= 1. Under `jax.jit` tokens are not checked; those outside the
        vocabulary give meaningless results.
      max_new_tokens: tokens to generate.
      prompt_lengths: int ``[B]``, in 1 ... P: tokens at or beyond it are padding and not read. None
        for P.
      temperature: divisor of the logits; 0 is greedy decoding.
      top_k: samples from the k most likely tokens (and those that tie with the last of them).
      top_p: samples from the most likely tokens that together reach this probability, in (0, 1].
      key: a `jax.random.key` for sampling; needed for a temperature above 0.
      eos_id: the token that ends a sequence; None for none.
      pad_id: the token after the end.

    Returns:
      `Generated`.

    Raises:
      ValueError: for arguments of the wrong shape, dtype or value, a missing key, `top_k` or
        `top_p` without a temperature, or sequences that are too long for the model.

    Source of top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration",
    arXiv 1904.09751.
    """
    given, prompt = prompt, jnp.asarray(prompt)
    if prompt.ndim != 2 or 0 in prompt.shape or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt must be integers of shape [B, P], not empty, got {prompt.dtype} "
            f"{prompt.shape}."
        )
    if operator.index(max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    prompt_lengths = _check_lengths(prompt_lengths, prompt)
    _check_sampling(temperature, top_k, top_p, key)
    _check_vocabulary(getattr(model, "vocab_size", None), given, prompt_lengths, eos_id)
    # The last token is returned but not read.
    longest = prompt.shape[1] + max_new_tokens - 1
    limit = getattr(model, "length_limit", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"prompt {prompt.shape} and max_new_tokens ({max_new_tokens}) make sequences of "
            f"{longest} tokens to read, and the model reads at most {limit}."
        )
    from flax import nnx

    graph, variables = nnx.split(model)
    numbers = {}
    if temperature > 0:
        numbers = {"temperature": jnp.float32(temperature), "key": key}
        if top_p is not None:
            numbers["top_p"] = jnp.float32(top_p)
    return _generate(
        graph, longest, max_new_tokens, top_k, eos_id, pad_id, variables,
        prompt.astype(jnp.int32), prompt_lengths, numbers,
    )  # fmt: skip


def _check_vocabulary(vocab_size, prompt, lengths, eos_id):
    """Raises ValueError for tokens outside the vocabulary, where they are known; skips padding."""
    if vocab_size is None:
        return
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(
            f"eos_id must lie in 0 ... {vocab_size - 1}, the vocabulary, got {eos_id}."
        )
    if isinstance(prompt, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return
    tokens = np.asarray(prompt)
    read = np.arange(tokens.shape[1]) < (
        tokens.shape[1] if lengths is None else np.asarray(lengths)[:, None]
    )
    outside = read & ((tokens < 0) | (tokens >= vocab_size))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"prompt {tokens.shape} must hold tokens in 0 ... {vocab_size - 1}, the vocabulary of "
            f"the model, got {tokens[row, column]} at [{row}, {column}]."
        )


def _check_lengths(lengths, prompt):
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != prompt.shape[:1]:
        raise ValueError(
            f"prompt_lengths must be integers of shape [B] = {prompt.shape[:1]}, got "
            f"{lengths.dtype} {lengths.shape}."
        )
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        if values.min() < 1 or values.max() > prompt.shape[1]:
            raise ValueError(
                f"prompt_lengths must lie in 1 ... {prompt.shape[1]}, the width of prompt "
                f"{prompt.shape}, got {values}."
            )
    return lengths.astype(jnp.int32)


def _check_sampling(temperature, top_k, top_p, key):
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}.")
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise ValueError(
            "top_k and top_p need a temperature above 0; got top_k "
            f"{top_k} and top_p {top_p} at temperature 0."
        )
    if temperature > 0 and key is None:
        raise ValueError(f"key is required to sample, at temperature {temperature}.")
    if top_k is not None and operator.index(top_k) < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")


@functools.partial(jax.jit, static_argnums=range(6))
def _generate(
    graph,
    longest,
    max_new_tokens,
    top_k,
    eos_id,
    pad_id,
    variables,
    prompt,
    prompt_lengths,
    numbers,
):
    from flax import nnx

    model = nnx.merge(graph, variables)
    batch, width = prompt.shape
    logits, state = model.decode(prompt, model.init_state(batch, longest), prompt_lengths)
    last = jnp.full((batch,), width) if prompt_lengths is None else prompt_lengths
    logits = jnp.take_along_axis(logits, last[:, None, None].astype(jnp.int32) - 1, axis=1)[:, 0]

    def choose(step, logits, done):
        token = _choose(logits.astype(jnp.float32), step, top_k, **numbers)
        token = jnp.where(done, jnp.int32(pad_id), token)
        return token, done if eos_id is None else done | (token == eos_id)

    def unfinished(carry):
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~done.all()

    def advance(carry):
        step, token, done, tokens, lengths, state = carry
        logits, state = model.decode(token[:, None], state)
        before = done
        token, done = choose(step, logits[:, 0], done)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, token, done, tokens, lengths + (~before).astype(jnp.int32), state

    nobody = jnp.zeros((batch,), bool)
    token, done = choose(jnp.int32(0), logits, nobody)
    tokens = jnp.full((batch, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, done, tokens, jnp.ones((batch,), jnp.int32), state)
    _, _, _, tokens, lengths, _ = jax.lax.while_loop(unfinished, advance, carry)
    return Generated(tokens, lengths)


def _choose(logits, step, top_k, temperature=None, key=None, top_p=None):
    """Int32 ``[B]``: one token for each row of float32 logits ``[B, vocab]``."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it have not reached top_p yet; the first one always stays.
        stays = jnp.cumsum(share, axis=-1) - share < top_p
        smallest = jnp.where(stays, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    drawn = jax.random.categorical(jax.random.fold_in(key, step), logits, axis=-1)
    return drawn.astype(jnp.int32)
