"""What a trained task is, and the checks and scores that tasks share."""

import difflib
import numbers
from collections.abc import Mapping
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Task(Protocol):
    """A task that a sequence model is trained on: a frozen dataclass, its fields the options.

    Attributes:
      vocab_size: token ids of the inputs, or None where they are continuous.
      input_dim: width of continuous inputs, or None where they are tokens.
      output_dim: logits, or numbers to predict, per position.
      max_length: longest sequence that `batch` returns, over all splits.
      splits: names of the streams of data: "train" first; "test", for what is reported and read
        once; possibly further ones to report; and "validation", for everything that is chosen: when
        to stop, and which learning rate. A stream depends on its place: new ones go to the end.
      readout: where a model takes its outputs from, as `lla.models.ModelConfig` has it; a task
        without this attribute has "each".
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
          size: sequences, B.
          split: one of `splits`. Different splits draw from different random streams.

        Returns:
          Arrays with leading axis B, "inputs" among them: int32 [B, T] or float32
          [B, T, input_dim]. T depends on the split alone. Where there is "positions" [B, Q], these
          are the only positions whose outputs count.

        Raises:
          ValueError: an unknown split, or a size below 1.
        """
        ...

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The mean loss, a float32 scalar, of outputs [B, T, output_dim].

        Outputs at the positions that count alone, [B, Q, output_dim], are accepted as well: a model
        need not compute the others.
        """
        ...

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """Name -> (weighted sum, weight), float32 scalars, for the outputs that `loss` takes.

        Sums and weights of several batches add up to those of the batches together. Besides "loss"
        and `headline` there are slices of the latter, such as "accuracy/gap_1-3". A slice that a
        batch does not reach has weight 0.
        """
        ...

    def baselines(self) -> dict[str, float]:
        """Values of the headline metric that need no training, by name: chance, trivial, best."""
        ...


def check_integers(low: int, **given) -> None:
    """Raises ValueError for the first value that is no integer or lies below `low`."""
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
    """Whether outputs are those of all T positions, not of the `counted` positions alone.

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
        # Before anything is computed: there are few of them, and many logits at each.
        outputs = jnp.take_along_axis(outputs, batch["positions"][:, :, None], axis=1)
    return outputs.astype(jnp.float32)


def token_scores(outputs: jax.Array, batch: Batch, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Cross entropy and correctness at the positions that count.

    Args:
      outputs: logits [B, T, vocab_size], or [B, Q, vocab_size] at `batch["positions"]` alone.
      batch: with "positions" and "labels", int32 [B, Q]; without "positions" all T count, and
        "labels" are [B, T].
      vocab_size: number of logits.

    Returns:
      Cross entropy in nats, and 1.0 where the largest logit is that of the label; float32 [B, Q].
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
    """ "3" or "3-7": how slices call the integers from first to last."""
    return str(first) if first == last else f"{first}-{last}"
