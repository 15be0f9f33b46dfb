"""Language modelling: the next token of text files.

The text is tokenised once, see `lla.tasks.corpus`. A split is one long row of tokens, in which the
last token of the vocabulary ends every document, and a sequence is a window of it. Training reads
windows that follow one another without a gap, all of them in every epoch, in an order and with a
first token that are new in every epoch. The other splits are read once and in order: every token
but the first is predicted once. All of this is [ours].
"""

import dataclasses
import itertools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lla.tasks import corpus
from lla.tasks.sampling import as_uint32, fold_each, permuted, split_key
from lla.tasks.task import (
    Batch,
    Sums,
    check_batch,
    check_integers,
    counted_logits,
    span,
    token_loss,
    token_scores,
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Language modelling; files are read when the first batch is drawn, or traced.

    Attributes:
      files: UTF-8 text files, plain or compressed (`.xz`, `.gz`), and folders. Each file is a
        document.
      divided_by: "folder": each of `files` is a folder in which `train`, `validation` and `test`
        are folders, or files such as `train.txt`. "document": every document of `files`, and of
        folders below them, belongs to a split that its content decides.
      validation_fraction, test_fraction: of the documents, for "document".
      vocab_size: tokens of the byte-pair encoding, with the 256 bytes and the end of a document.
      length: tokens in a sequence.
      z_loss: the loss has this times the mean square of the logarithm of the sum of exponentials of
        the logits (arXiv 2204.02311); metrics do not.
    """

    files: tuple[str, ...] = ()
    divided_by: Literal["folder", "document"] = "folder"
    validation_fraction: float = 0.01
    test_fraction: float = 0.01
    vocab_size: int = 8192
    length: int = 1024
    z_loss: float = 0.0

    input_dim: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "validation")
    primary_metric: ClassVar[str] = "loss"
    metric_mode: ClassVar[str] = "min"

    def __post_init__(self):
        check_integers(2, length=self.length)
        check_integers(corpus.BYTES + 2, vocab_size=self.vocab_size)
        if self.divided_by not in ("folder", "document"):
            raise ValueError(f"divided_by must be 'folder' or 'document', got {self.divided_by!r}.")
        if not (
            self.validation_fraction > 0
            and self.test_fraction > 0
            and self.validation_fraction + self.test_fraction < 1
        ):
            raise ValueError(
                "validation_fraction and test_fraction must be > 0 and add up to less than 1, got "
                f"{self.validation_fraction} and {self.test_fraction}."
            )
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be >= 0 and finite, got {self.z_loss}.")

    @property
    def output_dim(self) -> int:
        """Logits per position."""
        return self.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens in a sequence."""
        return self.length

    @property
    def corpus(self) -> corpus.Corpus:
        """The tokens; the first call may have to make them. See `lla.tasks.corpus.load`."""
        return corpus.load(
            self.files,
            self.divided_by,
            self.validation_fraction,
            self.test_fraction,
            self.vocab_size,
        )

    def batch(
        self, seed: int | jax.Array, step: int | jax.Array, size: int, split: str = "train"
    ) -> Batch:
        """See `lla.tasks.Task`. The seed changes the order of training alone.

        Returns:
          "inputs" and "labels", the tokens that follow them, int32 [B, T]; "weights" float32
          [B, T]: 1, or 0 behind the end of a split that is read once.
        """
        check_batch(size, split, self.splits)
        tokens = self.corpus.tokens[split]
        # The number of sequences up to a step stays below 2^32, as in `from_set`.
        index = as_uint32(step) * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
        if split == "train":
            starts = self._training_starts(split_key(seed, self.splits, split), index, len(tokens))
            exists = jnp.ones((size, self.length), bool)
        else:
            windows = max(1, -(-(len(tokens) - 1) // self.length))
            starts = jnp.minimum(index, jnp.uint32(windows - 1)) * jnp.uint32(self.length)
            labels_at = starts[:, None] + jnp.arange(1, self.length + 1, dtype=jnp.uint32)[None]
            inside = (index < jnp.uint32(windows))[:, None]
            exists = (labels_at < jnp.uint32(len(tokens))) & inside
        rows = self._read(starts, split)
        return {
            "inputs": rows[:, :-1],
            "labels": rows[:, 1:],
            "weights": exists.astype(jnp.float32),
        }

    def _training_starts(self, key, index, count):
        """Uint32 [B]: the first token of the windows with these numbers."""
        # All windows of an epoch may begin up to length - 1 tokens later.
        windows = (count - self.length) // self.length
        if windows < 1:
            raise ValueError(
                f"task text: the split 'train' has {count} tokens, length {self.length} needs "
                f"{2 * self.length} or more."
            )
        epochs = fold_each(key, index // jnp.uint32(windows))

        def start(key, number):
            shift = jax.random.randint(jax.random.fold_in(key, 1), (), 0, self.length, jnp.int32)
            window = permuted(jax.random.fold_in(key, 0), number, windows)
            return window * jnp.uint32(self.length) + shift.astype(jnp.uint32)

        return jax.vmap(start)(epochs, index % jnp.uint32(windows))

    def _read(self, starts, split):
        """Int32 [B, T + 1]: tokens from `starts` [B] on, the last one repeated past the end."""
        tokens = self.corpus.tokens[split]
        offsets = np.arange(self.length + 1)

        def read(starts):
            at = np.asarray(starts).astype(np.int64)[..., None] + offsets
            return tokens[np.minimum(at, len(tokens) - 1)].astype(np.int32)

        shape = jax.ShapeDtypeStruct((*starts.shape, self.length + 1), jnp.int32)
        return jax.pure_callback(read, shape, starts, vmap_method="expand_dims")

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Mean cross entropy in nats a token, and the z-loss; see `lla.tasks.Task`."""
        loss = token_loss(outputs, batch, self.vocab_size)
        if self.z_loss:
            logits = counted_logits(outputs, batch, self.vocab_size)
            square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
            weights = batch["weights"]
            mean = jnp.sum(square * weights) / jnp.maximum(jnp.sum(weights), 1.0)
            loss = loss + jnp.float32(self.z_loss) * mean
        return loss

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """ "loss" in nats a token, "accuracy", "bits_per_byte" and "bytes_per_token".

        The end of a document is a token without bytes. Slices: "loss/position_512-1023", places in
        the sequence, of which the last are its second half.
        """
        entropy, correct = token_scores(outputs, batch, self.vocab_size)
        weights, sums = batch["weights"], {}
        lengths = jnp.asarray(self.corpus.token_bytes)[batch["labels"]].astype(jnp.float32)
        count, total = jnp.sum(weights), jnp.sum(entropy * weights)
        bytes_seen = jnp.sum(lengths * weights)
        sums = {
            "loss": (total, count),
            "accuracy": (jnp.sum(correct * weights), count),
            "bits_per_byte": (total / jnp.float32(math.log(2)), bytes_seen),
            "bytes_per_token": (bytes_seen, count),
        }
        edges = sorted({0, self.length // 8, self.length // 4, self.length // 2, self.length})
        for low, high in itertools.pairwise(edges):
            part = weights[:, low:high]
            name = f"loss/position_{span(low, high - 1)}"
            sums[name] = (jnp.sum(entropy[:, low:high] * part), jnp.sum(part))
        return sums

    def baselines(self) -> dict[str, float]:
        """Losses on the test split.

        "uniform": all tokens alike. "unigram": the frequencies of the training split, one added to
        every count.
        """
        data = self.corpus
        counts = np.bincount(data.tokens["train"], minlength=self.vocab_size) + 1.0
        nats = math.log(counts.sum()) - np.log(counts)
        return {
            "uniform": math.log(self.vocab_size),
            "unigram": float(np.mean(nats[data.tokens["test"][1:]])),
        }
