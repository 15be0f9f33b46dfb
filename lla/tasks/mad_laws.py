"""One example of each task of MAD (arXiv 2403.17844, athms/mad-lab), as a function of a key.

Each function returns a `Drawn`. The distributions are those of the benchmark's code, which builds a
sequence token by token with a dictionary of keys. Here all choices are drawn at once, and a key has
the value of its first occurrence, which is equivalent.
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
    """Int32 [n], the index of the first True in each row of bool [n, n]."""
    return jnp.argmax(same, axis=1).astype(jnp.int32)


def recall(
    key: jax.Array, *, vocab_size: int, length: int, noise_vocab: int, noise: float, train: bool
) -> Drawn:
    """Key-value pairs, with repeated keys, and noise pairs among them.

    Half of the ``vocab_size - noise_vocab`` words are keys, the other half values; noise tokens
    come after them. Each of the first ``length / 2 - 1`` pairs is noise with probability `noise`,
    except one of ``length / 2`` places, drawn uniformly, which is never noise (the last of these
    places is the final pair, which is never noise anyway). A noise pair consists of two noise
    tokens. Other pairs have a uniform key and its value, which is drawn uniformly per key and
    example. The final pair has a uniform key among those that occurred.

    In training the labels are all next tokens; otherwise the values of keys that occurred before,
    including that of the final pair.
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
        # With no pair at all the benchmark's code fails; here the first place is a pair then.
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

    The last token of the vocabulary is padding. Of the others, half (rounded down) are key tokens
    and the rest value tokens. The size of a motif is uniform up to its maximum, except that keys
    always have the maximum in evaluation; given its size, a motif is a uniform ordered choice of
    different tokens. Every key has one value in an example.

    First the probe is drawn, the pair to ask for at the end, and a place for it, uniform below
    ``length - 2 probe``, where `probe` is its number of tokens. Then pairs are drawn until there
    are ``length - probe - key_motif - value_motif`` tokens. The first pair at or after the place is
    the probe, unless it occurred before by chance. The sequence ends with the probe, and is padded
    at the front to ``length + 1`` tokens. If the place is not reached, the probe does not occur
    before it is asked for, as in the benchmark.

    In training the labels are all next tokens, including padding; otherwise the tokens of values
    whose keys occurred before, and of the probe's value at the end.
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
    # Keys are equal if all their tokens are; shorter keys are filled up with -1.
    inside = jnp.arange(key_motif, dtype=jnp.int32)[None] < key_sizes[:, None]
    key_tokens = jnp.where(inside, key_tokens, -1)

    probe = key_sizes[-1] + value_sizes[-1]
    end = length - probe - key_motif - value_motif
    place = _integers(draws[4], (), 0, length - 2 * probe)
    number = jnp.arange(most, dtype=jnp.int32)

    def arranged(motif):
        """For pairs with the keys `motif` [most]: where each starts, the first pair with the same
        key (or the probe), and whether its key is that of the probe."""
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

    # From pairs to tokens: the pair at a position, and the offset in it.
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
    """The largest number of pairs before the probe in fuzzy recall; below 1 if none fits."""
    smallest = (1 if train else key_motif) + 1
    return -(-(length - smallest - key_motif - value_motif) // smallest)


def selective_copying(key: jax.Array, *, vocab_size: int, length: int, copied: int) -> Drawn:
    """Tokens among blanks, a copy token, and blanks at which to repeat the tokens in order.

    The last token of the vocabulary is the copy token, the one before it is blank. Each of the
    ``length - 2 copied - 1`` blanks is placed before a token that is drawn uniformly.
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
    """Uniform tokens and a last token, from which all are to be decoded; the labels are the inputs.

    The last token is a label as well.
    """
    tokens = _integers(key, (length - 1,), 0, vocab_size - 1)
    tokens = jnp.append(tokens, jnp.int32(vocab_size - 1))
    return _everywhere(tokens, tokens)


def memorization(key: jax.Array, table: jax.Array, *, vocab_size: int, length: int) -> Drawn:
    """Uniform keys, each followed by the last token of the vocabulary, whose label is the value.

    `table` is from `facts`.
    """
    keys = _integers(key, (length // 2,), 0, table.shape[0])
    asked = jnp.full(keys.shape, vocab_size - 1, jnp.int32)
    inputs = jnp.stack([keys, asked], axis=1).reshape(2 * (length // 2))
    positions = 1 + 2 * jnp.arange(length // 2, dtype=jnp.int32)
    return Drawn(inputs, positions, table[keys], jnp.ones(keys.shape, bool))


def facts(key: jax.Array, vocab_size: int) -> jax.Array:
    """The value of every key, int32 [(vocab_size - 1) // 2]: uniform without repetition."""
    words = vocab_size - 1
    half = words // 2
    values = jax.random.permutation(key, jnp.arange(half, words, dtype=jnp.int32))
    return values[:half]
