"""MAD, six small tasks on tokens: the benchmark of arXiv 2403.17844 (athms/mad-lab).

    in_context_recall        the values of keys that occurred before, among key-value pairs
    noisy_in_context_recall  the same with noise tokens between the pairs
    fuzzy_in_context_recall  the same with keys and values of one to three tokens
    selective_copying        tokens among blanks, to be repeated in order
    compression              all tokens, decoded from the model's state at the last one
    memorization             the value of a key, the same in all examples

`lla/tasks/mad_laws.py` draws the examples. Defaults are the benchmark's baseline setting of each
task; its levels of difficulty change one option at a time.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from lla.tasks import mad_laws
from lla.tasks.sampling import from_set, split_key
from lla.tasks.task import (
    Batch,
    Sums,
    check_batch,
    check_integers,
    counted_logits,
    span,
    token_loss,
    token_metrics,
)

KINDS = (
    "in_context_recall",
    "noisy_in_context_recall",
    "fuzzy_in_context_recall",
    "selective_copying",
    "compression",
    "memorization",
)
_RECALL, _NOISY, _FUZZY, _COPYING, _COMPRESSION, _MEMORIZATION = KINDS
# The benchmark's baseline settings; a kind has the options that are listed here.
BASELINES = {
    _RECALL: dict(vocab_size=16, length=128, train_examples=12_800),
    _NOISY: dict(vocab_size=32, length=128, train_examples=12_800, noise_vocab=16, noise=0.2),
    _FUZZY: dict(vocab_size=16, length=128, train_examples=12_800, key_motif=3, value_motif=3),
    _COPYING: dict(vocab_size=16, length=256, train_examples=12_800, copied=16),
    _COMPRESSION: dict(vocab_size=16, length=32, train_examples=12_800),
    _MEMORIZATION: dict(vocab_size=256, length=32, train_examples=256),
}
_FACTS_STREAM = 0x66616374  # separates the table of memorization from the examples


@dataclasses.dataclass(frozen=True)
class MAD:
    """One of the six tasks of MAD.

    The training set is finite, and every epoch has a new order. The test set is read in order, and
    examples of a batch beyond its end have weight 0. "validation" is a further set, with the size
    and distribution of "test"; the benchmark has none and selects on the test set. The seed
    determines all sets and the table of "memorization".

    Attributes:
      kind: the task, one of `KINDS`. For the options below None means the baseline setting of the
        kind, `BASELINES`; options that a kind does not have must be None.
      vocab_size: tokens and logits, including special and noise tokens.
      length: tokens of an example. In recall the last token is only a label, and sequences are one
        token shorter.
      train_examples: size of the training set.
      test_examples: size of the test set, and of the validation set.
      noise_vocab: noise tokens, of noisy recall.
      noise: probability that a pair is noise, of noisy recall.
      key_motif, value_motif: the largest number of tokens of a key and of a value, of fuzzy recall.
      copied: tokens to copy, of selective copying.
      macro_batch: examples over which "macro_accuracy" averages classes; the benchmark has batches
        of 128.
    """

    kind: Literal[
        "in_context_recall",
        "noisy_in_context_recall",
        "fuzzy_in_context_recall",
        "selective_copying",
        "compression",
        "memorization",
    ] = "in_context_recall"
    vocab_size: int | None = None
    length: int | None = None
    train_examples: int | None = None
    test_examples: int = 1_280
    noise_vocab: int | None = None
    noise: float | None = None
    key_motif: int | None = None
    value_motif: int | None = None
    copied: int | None = None
    macro_batch: int = 128

    input_dim: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "validation")
    primary_metric: ClassVar[str] = "macro_accuracy"
    metric_mode: ClassVar[str] = "max"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        baseline = BASELINES[self.kind]
        for field in dataclasses.fields(self):
            if field.default is not None:
                continue
            given = getattr(self, field.name)
            if given is None:
                object.__setattr__(self, field.name, baseline.get(field.name))
            elif field.name not in baseline:
                raise ValueError(
                    f"{field.name} is no option of {self.kind!r}: it must be None; got {given!r}."
                )
        check_integers(1, test_examples=self.test_examples, macro_batch=self.macro_batch)
        check_integers(1, **{name: getattr(self, name) for name in baseline if name != "noise"})
        for name in ("train_examples", "test_examples"):
            if getattr(self, name) > 2**31:
                raise ValueError(f"{name} must be at most 2^31; got {getattr(self, name)}.")
        if self.noise is not None and not 0 <= self.noise < 1:
            raise ValueError(f"noise must be >= 0 and < 1; got {self.noise!r}.")
        if self.length % 2 and self.kind in (_RECALL, _NOISY, _MEMORIZATION):
            raise ValueError(f"length must be even for {self.kind!r}; got {self.length}.")
        for name, least in self._least().items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least} for this {self.kind!r}; got "
                    f"{getattr(self, name)}."
                )

    def _least(self):
        """The smallest vocabulary and length that an example fits into."""
        if self.kind == _FUZZY:
            vocab_size = 1 + 2 * max(self.key_motif, self.value_motif)
            # Room for the probe twice, and for a pair before it.
            length = 3 * (self.key_motif + self.value_motif)
            return {"vocab_size": vocab_size, "length": length}
        if self.kind == _COPYING:
            return {"vocab_size": 3, "length": 2 * self.copied + 2}
        return {
            _RECALL: {"vocab_size": 2, "length": 4},
            _NOISY: {"vocab_size": 2 + (self.noise_vocab or 0), "length": 4},
            _COMPRESSION: {"vocab_size": 2, "length": 2},
            _MEMORIZATION: {"vocab_size": 3, "length": 2},
        }[self.kind]

    @property
    def output_dim(self) -> int:
        """Logits per position."""
        return self.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens per sequence."""
        return self.length - (self.kind in (_RECALL, _NOISY))

    @property
    def readout(self) -> str:
        """ "last" for compression, whose outputs are computed from the last token."""
        return "last" if self.kind == _COMPRESSION else "each"

    def batch(
        self, seed: int | jax.Array, step: int | jax.Array, size: int, split: str = "train"
    ) -> Batch:
        """See `lla.tasks.Task`.

        Returns:
          "inputs" int32 [B, T]; "labels" int32 [B, Q] and "weights" float32 [B, Q], of the outputs
          at "positions" int32 [B, Q], or at all T positions if there is no such entry. That and Q
          depend on the kind and on whether the split is "train": recall trains on all next tokens
          and is tested on the values of keys that occurred before.
        """
        check_batch(size, split, self.splits)
        train = split == "train"
        key = split_key(seed, self.splits, split)
        count = self.train_examples if train else self.test_examples
        keys, exists, _ = from_set(key, step, size, count, shuffled=train)
        drawn = jax.vmap(self._law(seed, train))(keys)
        batch = {
            "inputs": drawn.inputs,
            "labels": drawn.labels,
            "weights": (drawn.counted & exists[:, None]).astype(jnp.float32),
        }
        return batch if drawn.positions is None else batch | {"positions": drawn.positions}

    def _law(self, seed, train):
        """Key -> one example."""
        sizes = {"vocab_size": self.vocab_size, "length": self.length}
        if self.kind in (_RECALL, _NOISY):
            sizes |= {"noise_vocab": self.noise_vocab or 0, "noise": self.noise or 0.0}
            law = functools.partial(mad_laws.recall, train=train)
        elif self.kind == _FUZZY:
            sizes |= {"key_motif": self.key_motif, "value_motif": self.value_motif}
            law = functools.partial(mad_laws.fuzzy_recall, train=train)
        elif self.kind == _COPYING:
            law = functools.partial(mad_laws.selective_copying, copied=self.copied)
        elif self.kind == _COMPRESSION:
            law = mad_laws.compression
        else:
            of_seed = split_key(seed, self.splits, "train")
            table = mad_laws.facts(jax.random.fold_in(of_seed, _FACTS_STREAM), self.vocab_size)
            law = functools.partial(mad_laws.memorization, table=table)
        return functools.partial(law, **sizes)

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Mean cross entropy in nats over the labels that count; see `lla.tasks.Task`."""
        return token_loss(outputs, batch, self.vocab_size)

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """ "loss" in nats and "accuracy" per label that counts, and "macro_accuracy".

        The latter is the benchmark's metric. In every group of `macro_batch` examples it is the
        accuracy per class (a token), averaged over the classes that occur as a label or an answer;
        a class that is answered but never a label has accuracy 0. It adds up over batches of a
        multiple of `macro_batch` examples; a remainder is a group of its own.

        Slices: "macro_accuracy/token_4-7", over the classes from 4 to 7.
        """
        weights = batch["weights"]
        sums = token_metrics(outputs, batch, self.vocab_size, {})
        answers = jnp.argmax(counted_logits(outputs, batch, self.vocab_size), axis=-1)
        answers = answers.astype(jnp.int32)
        scores, shares = self._by_class(answers, batch["labels"], weights > 0)
        sums[self.primary_metric] = (jnp.sum(scores), jnp.sum(shares))
        for low in range(0, self.vocab_size, self._slice):
            high = min(low + self._slice, self.vocab_size)
            part = (jnp.sum(scores[:, low:high]), jnp.sum(shares[:, low:high]))
            sums[f"{self.primary_metric}/token_{span(low, high - 1)}"] = part
        return sums

    @property
    def _slice(self):
        """Classes per slice: a quarter of them."""
        return -(-self.vocab_size // 4)

    def _by_class(self, answers, labels, counted):
        """Float32 [groups, V]: contributions of classes to "macro_accuracy", and to its weight.

        The weight of a group is its number of examples, divided equally among its classes.
        """
        size = labels.shape[0]
        groups = -(-size // self.macro_batch)
        pad = ((0, groups * self.macro_batch - size), (0, 0))

        def per_class(tokens, mask):
            classes = jnp.arange(self.vocab_size, dtype=tokens.dtype)
            tokens, mask = jnp.pad(tokens, pad), jnp.pad(mask, pad)
            tokens, mask = tokens.reshape(groups, -1), mask.reshape(groups, -1)
            here = (tokens[:, :, None] == classes[None, None]) & mask[:, :, None]
            return jnp.sum(here, axis=1, dtype=jnp.float32)

        right = per_class(labels, counted & (answers == labels))
        asked, answered = per_class(labels, counted), per_class(answers, counted)
        there = (asked + answered > 0).astype(jnp.float32)
        examples = jnp.pad(jnp.any(counted, axis=1), pad[0]).reshape(groups, -1)
        weight = jnp.sum(examples, axis=1, keepdims=True, dtype=jnp.float32)
        share = there * (weight / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1.0))
        return share * right / jnp.maximum(asked, 1.0), share

    def baselines(self) -> dict[str, float]:
        """Macro accuracies in closed form.

        "chance": a random possible value. "solved": solving the task; for fuzzy recall an upper
        bound, as a few of its probes did not occur before.
        """
        words = self.vocab_size - (self.noise_vocab or 0)
        if self.kind == _COMPRESSION:
            chance = 2.0 / self.vocab_size  # the last class is known, the others are guessed
        elif self.kind == _COPYING:
            chance = 1.0 / (words - 2)
        elif self.kind == _MEMORIZATION:
            chance = 1.0 / ((words - 1) // 2)
        else:
            words -= self.kind == _FUZZY
            chance = 1.0 / (words - words // 2)
        return {"chance": chance, "solved": 1.0}
