"""In-context regression: learn the map of the current segment from the pairs seen so far.

The trained counterpart of test-time regression. Zuo et al. (arXiv 2510.01450) publish the
dimensions, d_x = d_y = 32 [paper]; the rest is [ours], with the distribution of
`lla.tasks.test_time_regression`:

    centre    c_s ~ N(0, I)                    one per segment
    map       W_s ~ N(0, 1/dim) per entry      one per segment
    input     x_t = rmsnorm(c_s + spread * eps)
    clean     W_s x_t                          unit variance per coordinate
    output    y_t = W_s x_t + noise * eps

all new in every sequence. A model reads the tokens x_1, y_1, x_2, y_2, ... and predicts y_t at the
token of x_t, from everything up to there. A token is `input_dim` numbers: the coordinates of x or
y, zeros up to the wider of the two, the type (1 for x and 0 for y), then zeros.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lla.tasks import piecewise
from lla.tasks.sampling import fresh_keys, split_key
from lla.tasks.task import Batch, Sums, check_batch, check_integers, check_outputs, span

_SAMPLED = (8, 8)  # batches, and sequences per batch, on which `baselines` are measured


@dataclasses.dataclass(frozen=True)
class InContextRegression:
    """In-context regression; all splits draw new sequences at every step.

    Attributes:
      dim: coordinates of x.
      value_dim: coordinates of y; None for `dim`.
      length: pairs per sequence, with two tokens each.
      segment_length: pairs per segment; the last segment is shorter if length is not a multiple.
      spread: standard deviation of x around its centre, per coordinate, before the norm.
      noise: standard deviation of the noise of y, per coordinate.
      token_dim: numbers per token; None for twice the larger of dim and value_dim.
    """

    dim: int = 32
    value_dim: int | None = None
    length: int = 512
    segment_length: int = 128
    spread: float = 1.0
    noise: float = 0.1
    token_dim: int | None = None

    vocab_size: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "validation")
    primary_metric: ClassVar[str] = "mse"
    metric_mode: ClassVar[str] = "min"

    def __post_init__(self):
        check_integers(1, dim=self.dim, length=self.length, segment_length=self.segment_length)
        if self.value_dim is not None:
            check_integers(1, value_dim=self.value_dim)
        if self.token_dim is not None:
            check_integers(1, token_dim=self.token_dim)
        for name in ("spread", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be >= 0 and finite; got {getattr(self, name)!r}.")
        if self.input_dim <= self._widest:
            raise ValueError(
                f"token_dim must exceed the larger of dim and value_dim, {self._widest}, for the "
                f"type; got {self.token_dim}."
            )

    @property
    def input_dim(self) -> int:
        """Numbers per token."""
        return 2 * self._widest if self.token_dim is None else self.token_dim

    @property
    def _widest(self) -> int:
        return max(self.dim, self.output_dim)

    @property
    def output_dim(self) -> int:
        """Coordinates of a prediction."""
        return self.dim if self.value_dim is None else self.value_dim

    @property
    def max_length(self) -> int:
        """Tokens per sequence."""
        return 2 * self.length

    @property
    def segments(self) -> int:
        """Segments per sequence."""
        return -(-self.length // self.segment_length)

    def batch(
        self, seed: int | jax.Array, step: int | jax.Array, size: int, split: str = "train"
    ) -> Batch:
        """See `lla.tasks.Task`.

        Returns:
          "inputs" float32 [B, 2 * length, input_dim]; "targets", the observed y, and "clean", y
          without noise, float32 [B, length, output_dim].
        """
        check_batch(size, split, self.splits)
        keys = fresh_keys(split_key(seed, self.splits, split), step, size)
        x, y, clean = jax.vmap(self._sequence)(keys)

        def token(array, kind):
            kinds = jnp.full((size, self.length, 1), kind, jnp.float32)
            zeros = self._widest - array.shape[-1]
            array = jnp.pad(array, ((0, 0), (0, 0), (0, zeros)))
            array = jnp.concatenate([array, kinds], axis=-1)
            return jnp.pad(array, ((0, 0), (0, 0), (0, self.input_dim - array.shape[-1])))

        tokens = jnp.stack([token(x, 1.0), token(y, 0.0)], axis=2)
        inputs = tokens.reshape(size, 2 * self.length, self.input_dim)
        return {"inputs": inputs, "targets": y, "clean": clean}

    def _sequence(self, key):
        shapes = {
            "x": (self.length, self.dim),
            "y": (self.length, self.output_dim),
            "centres": (self.segments, self.dim),
            "maps": (self.segments, self.output_dim, self.dim),
        }
        draw = piecewise.draw_normal(key, shapes, jnp.float32)
        centres = draw["centres"][jnp.arange(self.length) // self.segment_length]
        x = piecewise.rms_norm(centres + self.spread * draw["x"])
        clean = piecewise.linear_by_segment(draw["maps"], x, self.segment_length)
        return x, clean + self.noise * draw["y"], clean

    def predictions(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The outputs [B, 2 * length, output_dim] at the tokens of x: float32 [B, length, ·].

        Outputs [B, length, output_dim] are predictions already and are returned in float32.
        """
        if check_outputs(outputs, batch, self.length, self.output_dim):
            outputs = outputs[:, 0::2]
        return outputs.astype(jnp.float32)

    def errors(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Squared errors against the noiseless map, means over coordinates: float32 [B, length]."""
        return _squared_error(self.predictions(outputs, batch), batch["clean"])

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Mean squared error per coordinate against the observed y; see `lla.tasks.Task`.

        The targets are noisy, as real data are, which adds noise^2 to the loss of any model. The
        metrics measure the error against the noiseless map.
        """
        return jnp.mean(_squared_error(self.predictions(outputs, batch), batch["targets"]))

    def metrics(self, outputs: jax.Array, batch: Batch) -> Sums:
        """Per pair: "loss" as above, and "mse", the squared error against the noiseless map.

        "normalised_mse" is "mse" over the mean square of the noiseless values; predicting zero
        gives 1. Slices: "mse/segment_0", "mse/segment_1" and the others, "mse/segment_2-3"; and by
        position in the segment, "mse/position_0-31": the first and second quarter and the second
        half.
        """
        loss = _squared_error(self.predictions(outputs, batch), batch["targets"])
        errors = self.errors(outputs, batch)
        energy = jnp.mean(jnp.square(batch["clean"]), axis=-1)
        size = jnp.float32(errors.size)
        sums = {
            "loss": (jnp.sum(loss), size),
            "mse": (jnp.sum(errors), size),
            "normalised_mse": (jnp.sum(errors), jnp.sum(energy)),
        }
        by_pair = jnp.sum(errors, axis=0)
        for name, inside in self._slices().items():
            weight = jnp.float32(errors.shape[0] * np.count_nonzero(inside))
            sums[f"mse/{name}"] = (jnp.sum(by_pair[np.flatnonzero(inside)]), weight)
        return sums

    def _slices(self):
        segment, position = np.divmod(np.arange(self.length), self.segment_length)
        used = min(self.segment_length, self.length)
        last, quarter = self.segments - 1, used // 4
        spans = {
            "segment": [(0, 0), (1, 1), (2, last)],
            "position": [(0, quarter - 1), (quarter, 2 * quarter - 1), (2 * quarter, used - 1)],
        }
        return {
            f"{kind}_{span(low, high)}": (low <= number) & (number <= high)
            for kind, number in (("segment", segment), ("position", position))
            for low, high in spans[kind]
            if low <= min(high, number.max())
        }

    def oracle(self, batch: Batch) -> jax.Array:
        """Predictions [B, length, output_dim] of the Bayes estimator that knows the segments.

        Ridge regression on the pairs of the segment before t, with a ridge of noise^2 * dim: the
        posterior mean of W_s x_t. No model that has to find the segments has a lower mean error.
        """

        def previous(array):  # moves each pair to the position of the next query
            return jnp.pad(array, ((0, 0), (1, 0), (0, 0)))[:, : self.length]

        # The first query of a segment has no pair before it in the segment.
        later = np.arange(self.length) % self.segment_length > 0
        x = batch["inputs"][:, 0::2, : self.dim]
        keys, values = (
            jnp.where(later[None, :, None], previous(array), 0.0) for array in (x, batch["targets"])
        )
        return piecewise.ridge_by_segment(x, keys, values, self.segment_length, self.noise)

    def baselines(self) -> dict[str, float]:
        """Values of "mse": one in closed form, two measured on 64 sequences of "test" at seed 0.

        "zero": predicting 0 (closed form: 1). "previous": predicting the last y. "oracle": see
        `oracle`, the lower bound.
        """

        @jax.jit
        def measure(step):
            batch = self.batch(0, step, _SAMPLED[1], "test")
            last = jnp.pad(batch["targets"], ((0, 0), (1, 0), (0, 0)))[:, : self.length]
            return [jnp.mean(self.errors(out, batch)) for out in (last, self.oracle(batch))]

        measured = np.mean([measure(step) for step in range(_SAMPLED[0])], axis=0)
        return {"zero": 1.0, "previous": float(measured[0]), "oracle": float(measured[1])}


def _squared_error(predictions, targets):
    return jnp.mean(jnp.square(predictions - targets), axis=-1)
