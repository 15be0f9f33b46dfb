"""The interface of trained tasks, and the checks, losses and metrics that they share."""

import difflib
import numbers
from collections.abc import Mapping
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Task(Protocol):
    """A task for training sequence models: a frozen dataclass whose fields are its options.

    Attributes:
      vocab_size: number of token ids, or None for continuous inputs.
      input_dim: width of continuous inputs, or None for tokens.
      output_dim: logits, or numbers to predict, per position.
      max_length: longest sequence that `batch` returns, over all splits.
      splits: "train" first; "test", which is read once and reported; possibly more splits to
        report; and "validation", for early stopping and for selecting the learning rate. The random
        stream of a split depends on its index, so append new ones.
      readout: see `lla.models.ModelConfig`; "each" for a task without this attribute.
      primary_metric: name of the metric that models are compared by.
      metric_mode: "max" or "min", whichever is better.
    """

    vocab_size: int | None
    input_dim: int | None
    output_dim: int
    max_length: int
    splits: tuple[str, ...]
    primary_metric: str
    metric_mode: Literal["max", "min"]

    def batch(
        self, seed: int | jax.Array, step: int | jax.Array, size: int, split: str = "train"
    ) -> Batch:
        """Draws a batch: a pure function of its arguments, the same on every device.

        Args:
          seed, step: non-negative; may be traced int32 or uint32, under `jax.vmap` as well.
          size: number of sequences, B.
          split: one of `splits`, each of which has its own random stream.

        Returns:
          Arrays with leading axis B, including "inputs": int32 [B, T] or float32
          [B, T, input_dim]. T depends only on the split. If there is an entry "positions" [B, Q],
          only the outputs at these positions count.

        Raises:
          ValueError: an unknown split, or a size below 1.
        """
        ...

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The mean loss, a float32 scalar, of outputs [B, T, output_dim].

        Also accepts outputs at the positions that count only, [B, Q, output_dim], so that a model
        need not compute the others.
        """
        ...

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """Name -> (weighted sum, weight), float32 scalars, for the outputs that `loss` takes.

        Sums and weights add up over batches. Besides "loss" and the primary metric there are slices
        of the latter, such as "accuracy/gap_1-3", which may have weight 0 in a batch.
        """
        ...

    def baselines(self) -> dict[str, float]:
        """Values of the primary metric without training, by name: chance, trivial, best."""
        ...


def check_integers(low: int, **given) -> None:
    """Raises ValueError for the first value that is not an integer >= `low`."""
    for name, value in given.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be an integer >= {low}; got {value!r}.")


def check_batch(size: int, split: str, splits: tuple[str, ...]) -> None:
    """Raises ValueError for a size below 1 or a split that the task does not have."""
    check_integers(1, size=size)
    if split not in splits:
        near = difflib.get_close_matches(str(split), splits, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown split: {split!r}; did you mean {near[0]!r}? Valid: {', '.join(splits)}."
        )


def check_outputs(outputs: jax.Array, batch: Batch, counted: int, output_dim: int) -> bool:
    """Whether outputs are given at all T positions rather than at the `counted` ones only.

    Raises:
      ValueError: outputs of another shape.
    """
    size, length = batch["inputs"].shape[:2]
    valid = [(size, length, output_dim), (size, counted, output_dim)]
    if outputs.shape not in valid:
        raise ValueError(f"outputs must be {valid[0]} or {valid[1]}; got {outputs.shape}.")
    return outputs.shape == valid[0]


def counted_logits(outputs: jax.Array, batch: Batch, vocab_size: int) -> jax.Array:
    """Float32 logits [B, Q, vocab_size] at the positions that count; see `token_scores`."""
    count = batch["labels"].shape[1]
    if check_outputs(outputs, batch, count, vocab_size) and "positions" in batch:
        # First of all, since there are few such positions and many logits at each.
        outputs = jnp.take_along_axis(outputs, batch["positions"][:, :, None], axis=1)
    return outputs.astype(jnp.float32)


def token_scores(outputs: jax.Array, batch: Batch, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Cross entropy and correctness at the positions that count.

    Args:
      outputs: logits [B, T, vocab_size], or [B, Q, vocab_size] at `batch["positions"]`.
      batch: has "labels" and "positions", int32 [B, Q]. Without "positions" all T positions count
        and "labels" is [B, T].
      vocab_size: number of logits.

    Returns:
      Cross entropy in nats, and 1.0 where the label has the largest logit; float32 [B, Q].
    """
    labels = batch["labels"]
    logits = counted_logits(outputs, batch, vocab_size)
    at_label = jnp.take_along_axis(logits, labels[:, :, None], axis=2)[..., 0]
    entropy = jax.nn.logsumexp(logits, axis=-1) - at_label
    correct = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return entropy, correct.astype(jnp.float32)


def token_loss(outputs: jax.Array, batch: Batch, vocab_size: int) -> jax.Array:
    """Mean cross entropy over `batch["weights"]` [B, Q]; 0 where all weights are 0."""
    entropy, _ = token_scores(outputs, batch, vocab_size)
    weights = batch["weights"]
    return jnp.sum(entropy * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def token_metrics(
    outputs: jax.Array, batch: Batch, vocab_size: int, slices: Mapping[str, jax.Array]
) -> Sums:
    """ "loss", "accuracy" and "accuracy/<slice>"; `slices` are boolean [B, Q]."""
    entropy, correct = token_scores(outputs, batch, vocab_size)
    weights = batch["weights"]
    sums = {
        "loss": (jnp.sum(entropy * weights), jnp.sum(weights)),
        "accuracy": (jnp.sum(correct * weights), jnp.sum(weights)),
    }
    for name, inside in slices.items():
        part = jnp.where(inside, weights, 0.0)
        sums[f"accuracy/{name}"] = (jnp.sum(correct * part), jnp.sum(part))
    return sums


def span(first: int, last: int) -> str:
    """ "3" or "3-7", the name of a slice of the integers from first to last."""
    return str(first) if first == last else f"{first}-{last}"
