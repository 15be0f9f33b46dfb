"""Multi-query associative recall (MQAR): the contract of Zoology, arXiv 2312.04927.

A sequence of N tokens shows D pairs and then asks for each of them once:

    vocabulary    V tokens: 0 for nothing, keys 1 .. V/2 - 1, values V/2 .. V - 1
    context       k_1 v_1 ... k_D v_D; no key and no value twice in an example
    query of k_i  at token 2 D + 2 g_i, its label v_i; all other tokens are 0
    gap g_i       the i-th of D draws without replacement from 0 .. R - 1, R = (N - 2 D) / 2, with
                  probabilities p(g) = a r^(a-1) / sum over r' = 1 .. R of a r'^(a-1), r = g + 1

"The i-th of D draws without replacement" is successive sampling: at each draw the probabilities of
what is left are scaled to sum to 1. The order of log p + Gumbel noise, largest first, has exactly
this law (Yellott, 1977), so a single sort replaces D dependent draws. Labels count at the queries
alone. [paper] V = 8192, a = 0.01, 100 000 training and 3 000 test examples.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lla.tasks.sampling import as_uint32, distinct, fold_each, fresh_keys, permuted, split_key
from lla.tasks.task import (
    Batch,
    Sums,
    check_batch,
    check_integers,
    span,
    token_loss,
    token_metrics,
)


@dataclasses.dataclass(frozen=True)
class MQAR:
    """What to draw.

    The training set is finite unless `train_examples` is None: batches run through it in an order
    that is new in every epoch, without a shorter batch at its end [ours]; the count of examples
    shown must stay below 2^32. "validation", for what is chosen, and "test", for what is reported,
    are sets of their own [ours], read in order, step by step; what a batch has beyond the end of
    its set has weight 0, so that enough batches from step 0 on count every example once [ours].
    All three sets belong to the seed.

    Attributes:
      vocab_size: V, tokens and logits.
      length: N, tokens per sequence; even.
      pairs: D; or several of them, which the examples of all sets take in turn [ours] and which
        metrics tell apart.
      power_a: a of the law of the gaps, > 0; 1 makes it uniform.
      train_examples: size of the training set; None draws new examples at every step [ours].
      test_examples: size of the test set, and of the validation set.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int | tuple[int, ...] = 4
    power_a: float = 0.01
    train_examples: int | None = 100_000
    test_examples: int = 3_000

    input_dim: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "validation")
    headline: ClassVar[str] = "accuracy"
    headline_mode: ClassVar[str] = "max"

    def __post_init__(self):
        if isinstance(self.pairs, list):
            object.__setattr__(self, "pairs", tuple(self.pairs))
        if isinstance(self.pairs, tuple) and (
            not self.pairs or len(set(self.pairs)) < len(self.pairs)
        ):
            raise ValueError(f"pairs must be a number or different numbers; got {self.pairs!r}.")
        for pairs in self._cases:
            check_integers(1, pairs=pairs)
        check_integers(4, vocab_size=self.vocab_size, length=self.length)
        check_integers(1, test_examples=self.test_examples)
        if self.train_examples is not None:
            check_integers(1, train_examples=self.train_examples)
        for name in ("train_examples", "test_examples"):
            if (getattr(self, name) or 0) > 2**31:
                raise ValueError(f"{name} must be at most 2^31; got {getattr(self, name)}.")
        if self.length % 2:
            raise ValueError(f"length must be even; got {self.length}.")
        if 4 * max(self._cases) > self.length:
            raise ValueError(
                f"pairs must be at most length / 4, or queries do not fit; got {self.pairs!r} at "
                f"length {self.length}."
            )
        if max(self._cases) > self.vocab_size // 2 - 1:
            raise ValueError(
                f"pairs must be at most vocab_size / 2 - 1, the number of keys; got {self.pairs!r} "
                f"with vocab_size {self.vocab_size}."
            )
        if not 0 < self.power_a < float("inf"):
            raise ValueError(f"power_a must be > 0 and finite; got {self.power_a!r}.")

    @property
    def output_dim(self) -> int:
        """Logits per position."""
        return self.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens per sequence."""
        return self.length

    @property
    def _cases(self) -> tuple[int, ...]:
        return self.pairs if isinstance(self.pairs, tuple) else (self.pairs,)

    def batch(
        self, seed: int | jax.Array, step: int | jax.Array, size: int, split: str = "train"
    ) -> Batch:
        """See `lla.tasks.Task`; D below is the largest of `pairs`.

        Returns:
          "inputs" int32 [B, N]; "positions" and "labels" int32 [B, D], of the query of each pair in
          the order of the context; "weights" float32 [B, D], 0 for pairs that an example does not
          have; "pairs" int32 [B].
        """
        check_batch(size, split, self.splits)
        key = split_key(seed, self.splits, split)
        order, content = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        index = as_uint32(step) * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
        counted = jnp.ones((size,), bool)
        if split != "train":
            counted = index < jnp.uint32(self.test_examples)
            keys = fold_each(content, index)
        elif self.train_examples is None:
            keys = fresh_keys(content, step, size)
        else:
            count = jnp.uint32(self.train_examples)
            epochs = fold_each(order, index // count)
            index = jax.vmap(permuted, in_axes=(0, 0, None))(
                epochs, index % count, self.train_examples
            )
            keys = fold_each(content, index)
        cases = jnp.asarray(self._cases, jnp.int32)
        pairs = cases[index % jnp.uint32(len(self._cases))]
        tokens, positions, labels, exists = jax.vmap(self._example)(keys, pairs)
        return {
            "inputs": tokens,
            "positions": positions,
            "labels": labels,
            "weights": (exists & counted[:, None]).astype(jnp.float32),
            "pairs": pairs,
        }

    def _example(self, key, pairs):
        """Tokens [N]; positions, labels and whether the pair exists [D], for the traced `pairs`."""
        most, half = max(self._cases), self.vocab_size // 2
        for_words, for_gaps = jax.random.split(key)
        words = distinct(for_words, (half - 1, self.vocab_size - half), most)
        exists = jnp.arange(most, dtype=jnp.int32) < pairs
        keys = jnp.where(exists, 1 + words[0], 0)
        values = jnp.where(exists, half + words[1], 0)

        rooms = (self.length - 2 * min(self._cases)) // 2
        slot = jnp.arange(rooms, dtype=jnp.int32)
        log_p = (self.power_a - 1.0) * jnp.log1p(slot.astype(jnp.float32))
        noisy = log_p + jax.random.gumbel(for_gaps, (rooms,), jnp.float32)
        room = self.length // 2 - pairs
        _, gaps = jax.lax.top_k(jnp.where(slot < room, noisy, -jnp.inf), most)

        # Pairs that do not exist read token 0, with weight 0, and write nowhere.
        positions = jnp.where(exists, 2 * (pairs + gaps), 0)
        context = jnp.stack([keys, values], axis=1).reshape(2 * most)
        tokens = jnp.pad(context, (0, self.length - 2 * most))
        tokens = tokens.at[jnp.where(exists, positions, self.length)].set(keys, mode="drop")
        return tokens, positions, values, exists

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Mean cross entropy in nats over the queries of a batch; see `lla.tasks.Task`."""
        return token_loss(outputs, batch, self.vocab_size)

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """Per query: "loss" in nats, and "accuracy": the largest of all logits is the label's.

        Slices: "accuracy/gap_4-15", by gap, and "accuracy/pairs_8" where there are several `pairs`.
        """
        gaps = batch["positions"] // 2 - batch["pairs"][:, None]
        slices = {
            f"gap_{span(low, high)}": (gaps >= low) & (gaps <= high)
            for low, high in self._gap_spans()
        }
        if len(self._cases) > 1:
            for pairs in self._cases:
                inside = jnp.broadcast_to(batch["pairs"][:, None] == pairs, gaps.shape)
                slices[f"pairs_{pairs}"] = inside
        return token_metrics(outputs, batch, self.vocab_size, slices)

    def _gap_spans(self):
        """Gaps 0, 1-3, 4-15, 16-63, ...: of like probability at small a, where p is about 1 / r."""
        rooms, low, spans = (self.length - 2 * min(self._cases)) // 2, 0, []
        while low < rooms:
            high = min(4 * low, rooms) - 1 if low else 0
            spans.append((low, high))
            low = high + 1
        return spans

    def baselines(self) -> dict[str, float]:
        """Accuracies in closed form.

        "chance": a value at random. "context": one of the values of the example at random, the best
        without knowing which belongs to which key. "recall": what solving the task gives.
        """
        return {
            "chance": 1.0 / (self.vocab_size - self.vocab_size // 2),
            "context": len(self._cases) / sum(self._cases),
            "recall": 1.0,
        }
