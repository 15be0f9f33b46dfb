"""Permutation state tracking: which item is where after a sequence of swaps.

A sequence is BOS, the initial items at positions 0 .. N-1, T swaps, and then questions:

    token                     ids
    PAD                       0
    BOS                       1
    item a                    2 + a                          a = 0 .. N-1
    swap of positions i < j   2 + N + rank of (i, j)         in lexicographic order, N (N-1) / 2
    question for position i   2 + N + N (N-1) / 2 + i

    BOS p_0 ... p_{N-1}  s_1 ... s_T  q_1 ... q_Q  PAD ... PAD

The initial permutation is uniform, swaps are uniform and independent, and the questions ask for Q
different positions in random order. The label of a question, at its own token, is the item at that
position after all swaps. All of this is [ours]; the paper (arXiv 2510.01450) varies N.
"""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp

from lla.tasks.sampling import distinct, fresh_keys, split_key
from lla.tasks.task import (
    Batch,
    Sums,
    check_batch,
    check_integers,
    span,
    token_loss,
    token_metrics,
)

_PAD, _BOS = 0, 1


@dataclasses.dataclass(frozen=True)
class StateTracking:
    """Permutation state tracking; all splits draw new sequences at every step.

    T is uniform in [min_swaps, max_swaps] in "train", "validation" and "test", and in
    [max_swaps + 1, 2 * max_swaps] in "test_long", longer than any in training. Splits have
    different random streams, but with very small N, T and Q their sequences cannot all differ: two
    items have only two sequences of every length.

    Attributes:
      num_items: N, positions and items.
      min_swaps, max_swaps: range of T in training.
      queries: Q, the number of questions at the end; at most N.
    """

    num_items: int = 5
    min_swaps: int = 16
    max_swaps: int = 64
    queries: int = 1

    input_dim: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "test_long", "validation")
    primary_metric: ClassVar[str] = "accuracy"
    metric_mode: ClassVar[str] = "max"

    def __post_init__(self):
        check_integers(2, num_items=self.num_items)
        check_integers(0, min_swaps=self.min_swaps)
        check_integers(1, max_swaps=self.max_swaps, queries=self.queries)
        if self.min_swaps > self.max_swaps:
            raise ValueError(
                f"min_swaps must be at most max_swaps; got {self.min_swaps} and {self.max_swaps}."
            )
        if self.queries > self.num_items:
            raise ValueError(
                f"queries must be at most num_items, {self.num_items}; got {self.queries}."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens, and logits."""
        return self._first_question + self.num_items

    @property
    def output_dim(self) -> int:
        """Logits per position; labels are the tokens of items."""
        return self.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens per sequence of "test_long"."""
        return self._length("test_long")

    @property
    def _first_question(self) -> int:
        return 2 + self.num_items + self.num_items * (self.num_items - 1) // 2

    def _swaps(self, split: str) -> tuple[int, int]:
        """The fewest and the most swaps."""
        if split == "test_long":
            return self.max_swaps + 1, 2 * self.max_swaps
        return self.min_swaps, self.max_swaps

    def _length(self, split: str) -> int:
        return 1 + self.num_items + self._swaps(split)[1] + self.queries

    def batch(
        self, seed: int | jax.Array, step: int | jax.Array, size: int, split: str = "train"
    ) -> Batch:
        """See `lla.tasks.Task`.

        Returns:
          "inputs" int32 [B, 1 + N + most swaps of the split + Q]; "positions" of the questions and
          "labels", int32 [B, Q]; "weights" float32 [B, Q], all 1; "swaps" int32 [B], T.
        """
        check_batch(size, split, self.splits)
        keys = fresh_keys(split_key(seed, self.splits, split), step, size)
        tokens, positions, labels, swaps = jax.vmap(self._example, in_axes=(0, None))(keys, split)
        return {
            "inputs": tokens,
            "positions": positions,
            "labels": labels,
            "weights": jnp.ones((size, self.queries), jnp.float32),
            "swaps": swaps,
        }

    def _example(self, key, split):
        items, (fewest, most) = self.num_items, self._swaps(split)
        for_order, for_swaps, for_count = jax.random.split(key, 3)
        start, asked = distinct(for_order, (items, items), items)
        asked = asked[: self.queries]
        transpositions = jnp.asarray(_transpositions(items), jnp.int32)
        chosen = jax.random.randint(for_swaps, (most,), 0, len(transpositions), jnp.int32)
        count = jax.random.randint(for_count, (), fewest, most + 1, jnp.int32)

        happens = jnp.arange(most, dtype=jnp.int32) < count
        stay = jnp.broadcast_to(jnp.arange(items, dtype=jnp.int32), (most, items))
        total = _compose(jnp.where(happens[:, None], transpositions[chosen], stay))
        labels = 2 + start[total[asked]]

        positions = 1 + items + count + jnp.arange(self.queries, dtype=jnp.int32)
        head = jnp.concatenate([jnp.full((1,), _BOS, jnp.int32), 2 + start])
        body = jnp.where(happens, 2 + items + chosen, _PAD)
        tokens = jnp.concatenate([head, body, jnp.full((self.queries,), _PAD, jnp.int32)])
        return tokens.at[positions].set(self._first_question + asked), positions, labels, count

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Mean cross entropy in nats over the questions of a batch; see `lla.tasks.Task`."""
        return token_loss(outputs, batch, self.vocab_size)

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """Per question: "loss" in nats, and "accuracy": the largest of all logits is the label's.

        Slices: "accuracy/swaps_16-27", a range of T in four parts.
        """
        long = batch["inputs"].shape[1] == self.max_length
        fewest, most = self._swaps("test_long" if long else "train")
        swaps = jnp.broadcast_to(batch["swaps"][:, None], batch["labels"].shape)
        parts = min(4, most - fewest + 1)
        edges = [fewest + (most - fewest + 1) * i // parts for i in range(parts + 1)]
        slices = {
            f"swaps_{span(low, high - 1)}": (swaps >= low) & (swaps < high)
            for low, high in itertools.pairwise(edges)
        }
        return token_metrics(outputs, batch, self.vocab_size, slices)

    def baselines(self) -> dict[str, float]:
        """Accuracies in closed form.

        "chance": a random item, 1/N. "ignore_swaps": the initial item, also for the split
        "test_long". "tracking": solving the task.
        """
        return {
            "chance": 1.0 / self.num_items,
            "ignore_swaps": self._unmoved("test"),
            "ignore_swaps_test_long": self._unmoved("test_long"),
            "tracking": 1.0,
        }

    def _unmoved(self, split):
        """Probability that an item is at its initial position.

        A swap moves a given item with probability 2/N, to a uniform other position. The second
        eigenvalue of this Markov chain is 1 - 2/(N-1), so after T swaps the item is at its initial
        position with probability 1/N + (1 - 1/N) (1 - 2/(N-1))^T.
        """
        fewest, most = self._swaps(split)
        eigenvalue = 1.0 - 2.0 / (self.num_items - 1)
        mean = sum(eigenvalue**t for t in range(fewest, most + 1)) / (most - fewest + 1)
        return 1.0 / self.num_items + (1.0 - 1.0 / self.num_items) * mean


def _transpositions(items):
    """For each swap, the position that the item at every position comes from."""
    table = []
    for i, j in itertools.combinations(range(items), 2):
        row = list(range(items))
        row[i], row[j] = j, i
        table.append(row)
    return table


def _compose(moves):
    """[T, N] -> [N]: where items come from after all moves, in order.

    Composes neighbours in log2(T) rounds; on a GPU a loop over swaps takes longer than the model.
    """
    while moves.shape[0] > 1:
        paired = moves.shape[0] // 2 * 2
        earlier, later = moves[0:paired:2], moves[1:paired:2]
        both = jnp.take_along_axis(earlier, later, axis=1)
        moves = jnp.concatenate([both, moves[paired:]])
    return moves[0]
