"""One example of each task of MAD (arXiv 2403.17844, athms/mad-lab), as a function of a key.

Each function returns a `Drawn`. The laws are those of the benchmark's code, in closed form: it
builds a sequence token by token with a dictionary of the keys so far; here all choices are drawn
at once, and a key has the value of its first occurrence, which is the same law.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lla.tasks.sampling import distinct


class Drawn(NamedTuple):
    """One example.

    Attributes:
      inputs: int32 [T].
      positions: int32 [Q] whose outputs have a label; None for all T.
      labels: int32 [Q].
      counted: bool [Q], whether the label counts.
    """

    inputs: jax.Array
    positions: jax.Array | None
    labels: jax.Array
    counted: jax.Array


def _everywhere(inputs: jax.Array, labels: jax.Array) -> Drawn:
    return Drawn(inputs, None, labels, jnp.ones(labels.shape, bool))


def _integers(key, shape, low, high):
    return jax.random.randint(key, shape, low, high, dtype=jnp.int32)


def _count(mask, axis):
    return jnp.sum(mask, axis=axis, dtype=jnp.int32)


def _first(same):
    """Int32 [n], where each row of bool [n, n] has its first true entry."""
    return jnp.argmax(same, axis=1).astype(jnp.int32)


def recall(
    key: jax.Array, *, vocab_size: int, length: int, noise_vocab: int, noise: float, train: bool
) -> Drawn:
    """Pairs of keys and values, in any order and again and again; noise pairs between them.

    Of the ``vocab_size - noise_vocab`` words one half are keys, the other values; noise tokens
    come after them. Each of the ``length / 2 - 1`` first pairs is noise with probability `noise`,
    but for one of ``length / 2`` places, uniform, which is spared (the last of these places is no
    such pair: it is spared in any case). A noise pair is two noise tokens; any other has a uniform
    key, and its value, which is uniform and new for every key in every example. The last pair has
    one of the keys that were there, uniform among these.

    In training the labels are the next tokens, all of them; otherwise the values of keys that were
    there before, the last pair's included.
    """
    pairs, words = length // 2, vocab_size - noise_vocab
    half = words // 2
    for_keys, for_values, for_noise, for_spared, for_tokens, for_last = jax.random.split(key, 6)
    keys = _integers(for_keys, (pairs - 1,), 0, half)
    place = jnp.arange(pairs - 1, dtype=jnp.int32)
    real = jnp.ones((pairs - 1,), bool)
    if noise:
        spared = _integers(for_spared, (), 0, pairs)
        real = jax.random.uniform(for_noise, (pairs - 1,), jnp.float32) >= noise
        real |= place == spared
        # Without any pair the benchmark's code fails: the first one is spared then.
        real |= (place == 0) & ~jnp.any(real)

    word = jnp.arange(half, dtype=jnp.int32)
    shown = jnp.any((keys[:, None] == word[None]) & real[:, None], axis=0)
    order = jax.random.uniform(for_last, (half,), jnp.float32)
    last = jnp.argmax(jnp.where(shown, order, -1.0)).astype(jnp.int32)
    keys, real = jnp.append(keys, last), jnp.append(real, True)
    values = _integers(for_values, (half,), half, words)[keys]
    tokens = jnp.stack([keys, values], axis=1)
    if noise:
        fill = _integers(for_tokens, (pairs, 2), words, vocab_size)
        tokens = jnp.where(real[:, None], tokens, fill)
    tokens = tokens.reshape(2 * pairs)
    if train:
        return _everywhere(tokens[:-1], tokens[1:])
    same = (keys[:, None] == keys[None]) & real[:, None] & real[None]
    before = _first(same) < jnp.arange(pairs, dtype=jnp.int32)
    positions = 2 * jnp.arange(pairs, dtype=jnp.int32)
    return Drawn(tokens[:-1], positions, values, before & real)


def fuzzy_recall(
    key: jax.Array, *, vocab_size: int, length: int, key_motif: int, value_motif: int, train: bool
) -> Drawn:
    """Recall in which keys and values are motifs of several different tokens.

    The last token of the vocabulary pads; of the others, one half (the smaller, if they differ) are
    tokens of keys and the rest of values. A motif's size is uniform up to the largest one, but keys
    have the largest one where labels are asked for; a motif of a size is uniform among the ordered
    choices of that many different tokens. Every key has one value in an example.

    A pair to be asked for, the probe, is drawn first, and a place for it, uniform below
    ``length - 2 probe``, with `probe` its number of tokens. Then pairs are drawn until there are
    ``length - probe - key_motif - value_motif`` tokens, the probe itself for the first pair at or
    behind its place, unless it came up by chance before. At the end comes the probe, and padding in
    front of it all, to ``length + 1`` tokens. A probe whose place is not reached is not shown
    before it is asked for, as in the benchmark.

    In training the labels are the next tokens, all of them, padding included; otherwise the tokens
    of values of keys that were there before, and the probe's at the end.
    """
    words = vocab_size - 1
    half = words // 2
    low = 1 if train else key_motif  # the smallest key
    most = max_pairs(length, key_motif, value_motif, train)
    draws = jax.random.split(key, 5)
    # The last of the motifs is the probe.
    key_tokens = distinct(draws[0], (half,) * (most + 1), key_motif)
    value_tokens = half + distinct(draws[1], (words - half,) * (most + 1), value_motif)
    key_sizes = _integers(draws[2], (most + 1,), low, key_motif + 1)
    value_sizes = _integers(draws[3], (most + 1,), 1, value_motif + 1)
    # Two keys are equal if all of their tokens are, of which there may be different numbers.
    inside = jnp.arange(key_motif, dtype=jnp.int32)[None] < key_sizes[:, None]
    key_tokens = jnp.where(inside, key_tokens, -1)

    probe = key_sizes[-1] + value_sizes[-1]
    end = length - probe - key_motif - value_motif
    place = _integers(draws[4], (), 0, length - 2 * probe)
    number = jnp.arange(most, dtype=jnp.int32)

    def arranged(motif):
        """Of pairs whose keys are those of `motif` [most]: where each starts, and the first one
        with the same key, or the probe; whether it is the probe's."""
        mine = key_tokens[motif]
        is_probe = jnp.all(mine == key_tokens[-1:], axis=1)
        first = motif[_first(jnp.all(mine[:, None] == mine[None], axis=2))]
        owner = jnp.where(is_probe, most, first)
        sizes = key_sizes[motif] + value_sizes[owner]
        starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
        return starts, owner, is_probe

    starts, _, is_probe = arranged(number)
    behind = starts >= place
    there = jnp.argmax(behind).astype(jnp.int32)
    shown = jnp.any(is_probe & (number < there))
    put = jnp.any(behind) & (starts[there] < end) & ~shown
    motif = jnp.where((number == there) & put, most, number)
    starts, owner, is_probe = arranged(motif)

    kept = starts < end
    sizes = key_sizes[motif] + value_sizes[owner]
    total = jnp.max(jnp.where(kept, starts + sizes, 0))
    starts = jnp.append(jnp.where(kept, starts, length + 1), total)
    again = jnp.append(_first(owner[:, None] == owner[None]) < number, True)
    motif, owner = (jnp.append(array, jnp.int32(most)) for array in (motif, owner))

    # From pairs to tokens: which pair is at a position, and how far inside it.
    at = jnp.arange(length + 1, dtype=jnp.int32) - (length + 1 - total - probe)
    pair = _count(starts[None, :-1] <= at[:, None], axis=1) - 1
    pair = jnp.where(at >= total, most, jnp.maximum(pair, 0))
    offset = at - starts[pair]
    in_value = offset - key_sizes[motif[pair]]
    key_token = key_tokens[motif[pair], jnp.clip(offset, 0, key_motif - 1)]
    value_token = value_tokens[owner[pair], jnp.clip(in_value, 0, value_motif - 1)]
    tokens = jnp.where(in_value >= 0, value_token, key_token)
    tokens = jnp.where(at >= 0, tokens, vocab_size - 1)
    if train:
        return _everywhere(tokens[:-1], tokens[1:])
    counted = (at >= 0) & (in_value >= 0) & again[pair]
    return Drawn(tokens[:-1], None, tokens[1:], counted[1:])


def max_pairs(length: int, key_motif: int, value_motif: int, train: bool) -> int:
    """How many pairs a sequence of fuzzy recall may have before the last one; below 1 for none."""
    smallest = (1 if train else key_motif) + 1
    return -(-(length - smallest - key_motif - value_motif) // smallest)


def selective_copying(key: jax.Array, *, vocab_size: int, length: int, copied: int) -> Drawn:
    """Tokens among blanks, a token that asks for them, and blanks to write them to, in order.

    The last token of the vocabulary asks, the one before it is blank. Each of the
    ``length - 2 copied - 1`` blanks goes before a token that is uniform and independent.
    """
    blanks = length - 2 * copied - 1
    for_tokens, for_blanks = jax.random.split(key)
    tokens = _integers(for_tokens, (copied,), 0, vocab_size - 2)
    before = _integers(for_blanks, (blanks,), 0, copied)
    number = jnp.arange(copied, dtype=jnp.int32)
    places = number + _count(before[None] <= number[:, None], axis=1)
    inputs = jnp.full((length,), vocab_size - 2, jnp.int32)
    inputs = inputs.at[places].set(tokens).at[length - copied - 1].set(vocab_size - 1)
    positions = length - copied + number
    return Drawn(inputs, positions, tokens, jnp.ones((copied,), bool))


def compression(key: jax.Array, *, vocab_size: int, length: int) -> Drawn:
    """Uniform tokens and, as the last, the token that has to hold them; the labels are the inputs.

    That last token is a label, too.
    """
    tokens = _integers(key, (length - 1,), 0, vocab_size - 1)
    tokens = jnp.append(tokens, jnp.int32(vocab_size - 1))
    return _everywhere(tokens, tokens)


def memorization(key: jax.Array, table: jax.Array, *, vocab_size: int, length: int) -> Drawn:
    """Uniform keys, each followed by the last token of the vocabulary, where the value is asked.

    `table` is from `facts`.
    """
    keys = _integers(key, (length // 2,), 0, table.shape[0])
    asked = jnp.full(keys.shape, vocab_size - 1, jnp.int32)
    inputs = jnp.stack([keys, asked], axis=1).reshape(2 * (length // 2))
    positions = 1 + 2 * jnp.arange(length // 2, dtype=jnp.int32)
    return Drawn(inputs, positions, table[keys], jnp.ones(keys.shape, bool))


def facts(key: jax.Array, vocab_size: int) -> jax.Array:
    """The value of every key, int32 [(vocab_size - 1) // 2]: values differ, all choices alike."""
    words = vocab_size - 1
    half = words // 2
    values = jax.random.permutation(key, jnp.arange(half, words, dtype=jnp.int32))
    return values[:half]
