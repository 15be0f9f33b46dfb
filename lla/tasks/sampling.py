"""Random streams of the tasks, and sampling that is fast inside a compiled step."""

import math

import jax
import jax.numpy as jnp

_DATA_STREAM = 0x64617461  # separates the data from other draws with the same seed
_ROUNDS = 6


def split_key(seed: int | jax.Array, splits: tuple[str, ...], split: str) -> jax.Array:
    """The key of one split of the data with this seed."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), _DATA_STREAM), splits.index(split)
    )


def fold_each(key: jax.Array, data: jax.Array) -> jax.Array:
    """One key [n] for each of the integers `data` [n]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, data)


def fresh_keys(key: jax.Array, step: int | jax.Array, size: int) -> jax.Array:
    """Keys [size] of the sequences of a batch that is new at every step."""
    return fold_each(jax.random.fold_in(key, as_uint32(step)), jnp.arange(size, dtype=jnp.uint32))


def as_uint32(number: int | jax.Array) -> jax.Array:
    """A Python integer, or a traced int32 or uint32, as uint32."""
    return jnp.asarray(number).astype(jnp.uint32)


def distinct(key: jax.Array, populations: tuple[int, ...], count: int) -> jax.Array:
    """Ordered uniform samples without replacement, one from each `range(population)`.

    The i-th entry is uniform among the remaining numbers: its rank among them is drawn, and turned
    into a number by means of the sorted list of those already taken. The cost is `count` steps of
    `count` comparisons for a population of any size, whereas a permutation, or a sort of random
    numbers, would cost its whole size.

    Returns:
      int32 [len(populations), count]
    """
    left = jnp.asarray([[p - i for i in range(count)] for p in populations], jnp.int32)
    ranks = jax.random.randint(key, left.shape, 0, left, jnp.int32)
    slot = jnp.arange(count, dtype=jnp.int32)[None, :]

    def take(taken, rank):
        # There are taken[j] - j remaining numbers below taken[j]; if that is at most the rank,
        # taken[j] lies below the new number.
        below = jnp.sum(taken - slot <= rank, axis=1, keepdims=True, dtype=jnp.int32)
        number = rank + below
        after = jnp.concatenate([taken[:, :1], taken[:, :-1]], axis=1)
        taken = jnp.where(slot < below, taken, jnp.where(slot == below, number, after))
        return taken, number[:, 0]

    empty = jnp.full((len(populations), count), jnp.iinfo(jnp.int32).max, jnp.int32)
    _, numbers = jax.lax.scan(take, empty, ranks.T[:, :, None], unroll=min(4, count))
    return numbers.T


def permuted(key: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """The image of `index` under a random permutation of `range(count)`, which is never stored.

    A Feistel network on pairs of digits in base ceil(sqrt(count)) is a bijection of a set slightly
    larger than `range(count)`. Repeated until the result lies in the range, it is a bijection of
    the range ("cycle walking": Black and Rogaway, 2002); one application is usually enough.

    Args:
      key: chooses the permutation.
      index: uint32 scalar below `count`.
      count: at most 2^31.

    Returns:
      uint32 scalar.
    """
    side = math.isqrt(count - 1) + 1
    base = jnp.uint32(side)
    # Outside the loops, which would compute them again in every iteration.
    keys = fold_each(key, jnp.arange(_ROUNDS, dtype=jnp.uint32))

    def shuffle(number):
        def turn(i, digits):
            left, right = digits
            mixed = jax.random.bits(jax.random.fold_in(keys[i], right), dtype=jnp.uint32)
            return right, (left + mixed % base) % base

        left, right = jax.lax.fori_loop(0, _ROUNDS, turn, (number // base, number % base))
        return left * base + right

    def outside(number):
        return number >= jnp.uint32(count)

    return jax.lax.while_loop(outside, shuffle, shuffle(index))


def from_set(
    key: jax.Array, step: int | jax.Array, size: int, count: int, *, shuffled: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of the examples of a batch from a finite set of examples.

    Args:
      key: of the set.
      step: of the batch; the number of examples up to there must stay below 2^32.
      size: examples per batch.
      count: size of the set, at most 2^31.
      shuffled: whether the set is repeated in epochs, each in a new order; otherwise it is read
        once and in order.

    Returns:
      Keys [size], one per example of the set; bool [size], False beyond the end of a set that is
      read once; and uint32 [size], the indices of the examples in the set.
    """
    order, content = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    index = as_uint32(step) * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
    if not shuffled:
        return fold_each(content, index), index < jnp.uint32(count), index
    epochs = fold_each(order, index // jnp.uint32(count))
    index = jax.vmap(permuted, in_axes=(0, 0, None))(epochs, index % jnp.uint32(count), count)
    return fold_each(content, index), jnp.ones((size,), bool), index
