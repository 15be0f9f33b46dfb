"""Multi-query associative recall (MQAR), as in Zoology, arXiv 2312.04927.

A sequence of N tokens shows D pairs and then asks for each of them once:

    vocabulary    V tokens: filler 0, keys 1 .. V/2 - 1, values V/2 .. V - 1
    context       k_1 v_1 ... k_D v_D, with different keys and different values
    query of k_i  at token 2 D + 2 g_i, with the label v_i; all other tokens are 0
    gap g_i       the i-th of D draws without replacement from 0 .. R - 1, R = (N - 2 D) / 2, with
                  probabilities p(g) = a r^(a-1) / sum over r' = 1 .. R of a r'^(a-1), r = g + 1

Drawing without replacement means successive sampling: at each draw the probabilities of the
remaining gaps are rescaled to sum to 1. The order of log p + Gumbel noise, largest first, has
exactly this distribution (Yellott, 1977), so a single sort replaces D dependent draws. Only the
labels at the queries count. [paper] V = 8192, a = 0.01, 100 000 training and 3 000 test examples.

With random fillers the tokens that are 0 above are uniform among all V, the default of Zoology's
code. Some of them are keys of the context, queried without a label, and some are 0.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lla.tasks.sampling import as_uint32, distinct, fresh_keys, from_set, split_key
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
    """Multi-query associative recall.

    The training set is finite unless `train_examples` is None. Every epoch has a new order, and a
    batch may cross from one epoch into the next [ours]; the number of examples drawn must stay
    below 2^32. "validation", for selection, and "test", for reporting, are further sets [ours],
    read in order. Examples of a batch beyond the end of its set have weight 0, so that the batches
    from step 0 on count every example once [ours]. The seed determines all three sets.

    Attributes:
      vocab_size: V, tokens and logits.
      length: N, tokens per sequence; even. Or a tuple, with one length for each of `pairs` (or for
        the same number of pairs): like Zoology's training on several lengths, but in one batch
        [ours]. Shorter sequences are padded with 0 at the end, without labels.
      pairs: D, or a tuple that examples cycle through [ours]; metrics distinguish them.
      power_a: exponent a of the distribution of the gaps, > 0; 1 makes it uniform.
      train_examples: size of the training set; None draws new examples at every step [ours].
      test_examples: size of the test set and of the validation set.
      random_fillers: whether filler tokens are random rather than 0.
    """

    vocab_size: int = 8192
    length: int | tuple[int, ...] = 64
    pairs: int | tuple[int, ...] = 4
    power_a: float = 0.01
    train_examples: int | None = 100_000
    test_examples: int = 3_000
    random_fillers: bool = False

    input_dim: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "validation")
    primary_metric: ClassVar[str] = "accuracy"
    metric_mode: ClassVar[str] = "max"

    def __post_init__(self):
        for name in ("length", "pairs"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_cases()
        check_integers(4, vocab_size=self.vocab_size)
        check_integers(1, test_examples=self.test_examples)
        if self.train_examples is not None:
            check_integers(1, train_examples=self.train_examples)
        for name in ("train_examples", "test_examples"):
            if (getattr(self, name) or 0) > 2**31:
                raise ValueError(f"{name} must be at most 2^31; got {getattr(self, name)}.")
        if not isinstance(self.random_fillers, bool):
            raise ValueError(f"random_fillers must be a bool; got {self.random_fillers!r}.")
        if self._most > self.vocab_size // 2 - 1:
            raise ValueError(
                f"pairs must be at most vocab_size / 2 - 1, the number of keys; got {self.pairs!r} "
                f"with vocab_size {self.vocab_size}."
            )
        if not 0 < self.power_a < float("inf"):
            raise ValueError(f"power_a must be > 0 and finite; got {self.power_a!r}.")

    def _check_cases(self):
        lengths, pairs = self.length, self.pairs
        if isinstance(lengths, tuple):
            numbers = pairs if isinstance(pairs, tuple) else (pairs,) * len(lengths)
            if not lengths or len(lengths) != len(numbers):
                raise ValueError(
                    f"length must be a number, or as many as pairs has; got {lengths!r} and "
                    f"pairs {pairs!r}."
                )
            if len(set(self._cases)) < len(lengths):
                raise ValueError(
                    f"length and pairs must make different cases; got {lengths!r} and {pairs!r}."
                )
        elif isinstance(pairs, tuple) and (not pairs or len(set(pairs)) < len(pairs)):
            raise ValueError(f"pairs must be a number or different numbers; got {pairs!r}.")
        for length, number in self._cases:
            check_integers(1, pairs=number)
            check_integers(4, length=length)
            if length % 2:
                raise ValueError(f"length must be even; got {lengths!r}.")
            if 4 * number > length:
                raise ValueError(
                    f"pairs must be at most length / 4, or queries do not fit; got {number} at "
                    f"length {length}."
                )

    @property
    def output_dim(self) -> int:
        """Logits per position."""
        return self.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens per sequence."""
        return max(length for length, _ in self._cases)

    @property
    def _cases(self) -> tuple[tuple[int, int], ...]:
        """The pairs (N, D) that examples cycle through."""
        many = [len(each) for each in (self.length, self.pairs) if isinstance(each, tuple)]
        lengths, pairs = (
            each if isinstance(each, tuple) else (each,) * (many[0] if many else 1)
            for each in (self.length, self.pairs)
        )
        return tuple(zip(lengths, pairs, strict=True))

    @property
    def _most(self) -> int:
        """The largest number of pairs."""
        return max(pairs for _, pairs in self._cases)

    @property
    def _rooms(self) -> int:
        """The largest number of slots for queries."""
        return max((length - 2 * pairs) // 2 for length, pairs in self._cases)

    def batch(
        self, seed: int | jax.Array, step: int | jax.Array, size: int, split: str = "train"
    ) -> Batch:
        """See `lla.tasks.Task`; D below is the largest of `pairs`.

        Returns:
          "inputs" int32 [B, N], with the largest N; "positions" and "labels" int32 [B, D], of the
          query of each pair in the order of the context; "weights" float32 [B, D], 0 for pairs
          beyond those of the example; "pairs" int32 [B]; "lengths" int32 [B] if there are several.
        """
        check_batch(size, split, self.splits)
        key = split_key(seed, self.splits, split)
        train = split == "train"
        if train and self.train_examples is None:
            keys = fresh_keys(jax.random.fold_in(key, 1), step, size)
            index = as_uint32(step) * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
            counted = jnp.ones((size,), bool)
        else:
            count = self.train_examples if train else self.test_examples
            keys, counted, index = from_set(key, step, size, count, shuffled=train)
        cases = jnp.asarray(self._cases, jnp.int32)
        lengths, pairs = jnp.moveaxis(cases[index % jnp.uint32(len(self._cases))], 1, 0)
        tokens, positions, labels, exists = jax.vmap(self._example)(keys, lengths, pairs)
        more = {"lengths": lengths} if isinstance(self.length, tuple) else {}
        return more | {
            "inputs": tokens,
            "positions": positions,
            "labels": labels,
            "weights": (exists & counted[:, None]).astype(jnp.float32),
            "pairs": pairs,
        }

    def _example(self, key, length, pairs):
        """Tokens [N]; positions, labels and whether the pair exists [D].

        `length` and `pairs` are traced; N and D are their maxima.
        """
        most, half = self._most, self.vocab_size // 2
        for_words, for_gaps = jax.random.split(key)
        words = distinct(for_words, (half - 1, self.vocab_size - half), most)
        exists = jnp.arange(most, dtype=jnp.int32) < pairs
        keys = jnp.where(exists, 1 + words[0], 0)
        values = jnp.where(exists, half + words[1], 0)

        rooms = self._rooms
        slot = jnp.arange(rooms, dtype=jnp.int32)
        log_p = (self.power_a - 1.0) * jnp.log1p(slot.astype(jnp.float32))
        noisy = log_p + jax.random.gumbel(for_gaps, (rooms,), jnp.float32)
        room = length // 2 - pairs
        nowhere = jnp.full_like(noisy, jnp.finfo(jnp.float32).min)
        _, gaps = jax.lax.top_k(jnp.where(slot < room, noisy, nowhere), most)

        # Pairs that do not exist read token 0 with weight 0 and write no token.
        positions = jnp.where(exists, 2 * (pairs + gaps), 0)
        context = jnp.stack([keys, values], axis=1).reshape(2 * most)
        tokens = jnp.pad(context, (0, self.max_length - 2 * most))
        tokens = tokens.at[jnp.where(exists, positions, self.max_length)].set(keys, mode="drop")
        if self.random_fillers:
            fillers = jax.random.randint(
                jax.random.fold_in(key, 2), tokens.shape, 0, self.vocab_size, dtype=jnp.int32
            )
            inside = jnp.arange(self.max_length, dtype=jnp.int32) < length
            tokens = jnp.where((tokens == 0) & inside, fillers, tokens)
        return tokens, positions, values, exists

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Mean cross entropy in nats over the queries of a batch; see `lla.tasks.Task`."""
        return token_loss(outputs, batch, self.vocab_size)

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """Per query: "loss" in nats, and "accuracy": the largest of all logits is the label's.

        Slices: "accuracy/gap_4-15", by gap; where there are several, "accuracy/pairs_8" by `pairs`
        and "accuracy/length_128" by `length`.
        """
        gaps = batch["positions"] // 2 - batch["pairs"][:, None]
        slices = {
            f"gap_{span(low, high)}": (gaps >= low) & (gaps <= high)
            for low, high in self._gap_spans()
        }
        for name, entry, which in (("length", "lengths", 0), ("pairs", "pairs", 1)):
            values = sorted({case[which] for case in self._cases})
            for value in values if len(values) > 1 else ():
                here = batch[entry] == value
                slices[f"{name}_{value}"] = jnp.broadcast_to(here[:, None], gaps.shape)
        return token_metrics(outputs, batch, self.vocab_size, slices)

    def _gap_spans(self):
        """Gaps 0, 1-3, 4-15, 16-63, ...: about equally likely for small a, with p near 1 / r."""
        rooms, low, spans = self._rooms, 0, []
        while low < rooms:
            high = min(4 * low, rooms) - 1 if low else 0
            spans.append((low, high))
            low = high + 1
        return spans

    def baselines(self) -> dict[str, float]:
        """Accuracies in closed form.

        "chance": a random value. "context": a random value of the example, the best without
        knowing which key it belongs to. "recall": solving the task.
        """
        return {
            "chance": 1.0 / (self.vocab_size - self.vocab_size // 2),
            "context": len(self._cases) / sum(pairs for _, pairs in self._cases),
            "recall": 1.0,
        }
