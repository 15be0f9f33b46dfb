"""Test-time regression: pairs whose distribution changes from segment to segment.

The task is that of Zuo et al. (arXiv 2510.01450). Its generator was not published, so that every
choice here is [ours]:

    centre        c_s ~ N(0, I)                       one per segment
    map           W_s ~ N(0, 1/dim) per entry         one per segment
    key           k = rmsnorm(c_s + spread * eps)     so that |k|^2 = dim
    query         drawn like a key, independently     never equal to a key
    value         v = W_s k + noise * eps
    target        W_s q                               the exact value at the query

Keys and targets have unit variance per coordinate. Position t of a sequence holds the pair
(k_t, v_t) and the query q_t of one segment; a predictor may use the pairs at positions <= t.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lla.tasks import piecewise


@dataclasses.dataclass(frozen=True)
class Task:
    """The task and its sizes.

    Attributes:
      dim: dimension of keys, queries and values.
      length: pairs per sequence.
      segment_length: pairs per segment; the last segment is shorter if length is not a multiple.
      spread: standard deviation of a key around its centre, per coordinate, before the norm.
      noise: standard deviation of the values around the map, per coordinate.
      target: "piecewise_linear" as above, or "smooth": one nonlinear map for the whole sequence,
        f(x) = sqrt(2) A cos(B x + phase) with 4 * dim random features and B x of variance
        `frequency^2`; then only the distribution of keys changes from segment to segment.
      frequency: of the smooth target, in radians per unit of a coordinate's standard deviation.
      iid_keys: whether all segments share one centre, so that keys do not reveal the segment.
    """

    dim: int = 64
    length: int = 1024
    segment_length: int = 256
    spread: float = 1.0
    noise: float = 0.1
    target: Literal["piecewise_linear", "smooth"] = "piecewise_linear"
    frequency: float = 1.0
    iid_keys: bool = False

    def __post_init__(self):
        for name in ("dim", "length", "segment_length", "frequency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0; got {getattr(self, name)}.")
        for name in ("spread", "noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}.")
        if self.target not in _MAPS:
            raise ValueError(f"target must be one of {', '.join(_MAPS)}; got {self.target!r}.")

    @property
    def segments(self) -> int:
        """Segments per sequence."""
        return -(-self.length // self.segment_length)


class Batch(NamedTuple):
    """Sequences of one task, [B, T, dim] each; `segments` is int32 [T]."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    targets: jax.Array
    segments: jax.Array


def generate(seed: int | jax.Array, sequences: int, task: Task, dtype=jnp.float32) -> Batch:
    """Draws `sequences` sequences: a pure function of its arguments, safe under `jax.jit`.

    Sequence i depends only on (seed, i, task): drawing more sequences does not change the first.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(seed), jnp.arange(sequences)
    )
    drawn = jax.vmap(lambda key: _sequence(key, task, dtype))(keys)
    return Batch(*drawn, jnp.arange(task.length, dtype=jnp.int32) // task.segment_length)


def oracle(batch: Batch, task: Task) -> jax.Array:
    """Predictions [B, T, dim] of the Bayes estimator that knows where segments begin.

    Ridge regression within the segment with a ridge of noise^2 * dim: the posterior mean of W_s. No
    estimator that has to find the segments has a lower expected error on the piecewise-linear
    target.

    Raises:
      ValueError: the target is the smooth one, which has no such estimator.
    """
    if task.target != "piecewise_linear":
        raise ValueError("the oracle exists for target='piecewise_linear' only.")
    return piecewise.ridge_by_segment(
        batch.queries, batch.keys, batch.values, task.segment_length, task.noise
    )


def _sequence(key, task, dtype):
    shapes = {
        "pairs": (3, task.length, task.dim),
        "centres": (1 if task.iid_keys else task.segments, task.dim),
        **_MAPS[task.target][0](task),
    }
    draw = piecewise.draw_normal(key, shapes, dtype)
    segment = jnp.arange(task.length) // task.segment_length
    centres = jnp.broadcast_to(draw["centres"], (task.segments, task.dim))[segment]
    for_key, for_query, for_value = draw["pairs"]
    keys = piecewise.rms_norm(centres + task.spread * for_key)
    queries = piecewise.rms_norm(centres + task.spread * for_query)
    apply = _MAPS[task.target][1]
    targets, clean = apply(draw, task, queries), apply(draw, task, keys)
    return queries, keys, clean + task.noise * for_value, targets


def _piecewise_linear_shapes(task):
    return {"maps": (task.segments, task.dim, task.dim)}


def _piecewise_linear(draw, task, x):
    return piecewise.linear_by_segment(draw["maps"], x, task.segment_length)


def _smooth_shapes(task):
    features = 4 * task.dim
    return {
        "inner": (task.dim, features),
        "outer": (features, task.dim),
        "phase": (1, features),
    }


def _smooth(draw, task, x):
    phase = 2.0 * math.pi * jax.scipy.stats.norm.cdf(draw["phase"])  # uniform
    inner = draw["inner"] * (task.frequency / math.sqrt(task.dim))
    outer = draw["outer"] * math.sqrt(2.0 / draw["outer"].shape[0])
    angle = jnp.matmul(x, inner, precision="highest") + phase
    return jnp.matmul(jnp.cos(angle), outer, precision="highest")


_MAPS = {
    "piecewise_linear": (_piecewise_linear_shapes, _piecewise_linear),
    "smooth": (_smooth_shapes, _smooth),
}
