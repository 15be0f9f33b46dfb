"""Named shapes, masks and data regimes, shared by the tests and the benchmarks; NumPy only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call, named as in the public interface."""

    num_queries: int
    head_dim: int
    num_keys: int | None = None  # None: as many as queries
    value_dim: int | None = None  # None: as head_dim
    heads: int = 1
    key_heads: int = 1
    batch: tuple[int, ...] = (1,)

    @property
    def query(self) -> tuple[int, ...]:
        return (*self.batch, self.num_queries, self.heads, self.head_dim)

    @property
    def key(self) -> tuple[int, ...]:
        return (*self.batch, self.num_keys or self.num_queries, self.key_heads, self.head_dim)

    @property
    def value(self) -> tuple[int, ...]:
        return (*self.key[:-1], self.value_dim or self.head_dim)

    @property
    def output(self) -> tuple[int, ...]:
        return (*self.query[:-1], self.value[-1])

    @property
    def rows(self) -> tuple[int, ...]:
        return self.query[:-1]


SHAPES: dict[str, Shape] = {
    "one_token": Shape(1, 16),
    "length_37": Shape(37, 16, heads=2, key_heads=2),
    "length_63": Shape(63, 16, value_dim=8),
    "length_100": Shape(100, 16),
    "length_129": Shape(129, 16),
    "length_500": Shape(500, 16),
    "dim_16": Shape(40, 16),
    "dim_32": Shape(40, 32),
    "dim_48": Shape(40, 48),
    "dim_64": Shape(80, 64),
    "dim_96": Shape(40, 96),
    "dim_128": Shape(40, 128),
    "dim_256": Shape(20, 256),
    "wide_value": Shape(40, 16, value_dim=48),
    "grouped_heads": Shape(50, 16, heads=6, key_heads=2, batch=(2,)),
    "one_key_head": Shape(50, 16, heads=4, key_heads=1, batch=(2,)),
    "no_leading_axis": Shape(20, 8, heads=2, key_heads=1, batch=()),
    "two_leading_axes": Shape(20, 8, heads=2, key_heads=1, batch=(2, 3)),
    "more_keys": Shape(30, 8, num_keys=75, heads=2, key_heads=1, batch=(2,)),
    "more_queries": Shape(75, 8, num_keys=30, heads=2, key_heads=1, batch=(2,)),
}
"""Every length, head dimension and head layout that an implementation is tested with."""

BENCHMARK_SHAPES: dict[str, Shape] = {
    f"n{n}_d{d}": Shape(n, d) for d in (32, 64, 128) for n in (256, 512, 1024, 2048, 4096, 8192)
}
"""One head; time and memory scale with batch and heads."""


@dataclasses.dataclass(frozen=True)
class MaskCase:
    """Masking options of a call as a function of its shape; arrays are NumPy."""

    shape: str
    options: Callable[[Shape], dict]


def _lengths(shape: Shape) -> np.ndarray:
    """A full sequence first, then shorter ones; int32 ``[*B]``."""
    keys, count = shape.key[-3], math.prod(shape.batch)
    return (keys - np.arange(count) * (keys // 2)).astype(np.int32).reshape(shape.batch)


def _segments(length: int, shape: Shape) -> np.ndarray:
    """Three packed segments whose borders differ between sequences; int32 ``[*B, length]``."""
    shift = np.arange(math.prod(shape.batch)).reshape(*shape.batch, 1) * 3
    return ((np.arange(length) + shift) // (1 + length // 3)).astype(np.int32)


def _dense(shape: Shape, *, full: bool) -> np.ndarray:
    """Random, with one query row that sees nothing; bool, ``[*B, N, T, S]`` or ``[T, S]``."""
    lead = (*shape.batch, shape.heads) if full else ()
    allowed = np.random.default_rng(7).random((*lead, shape.num_queries, shape.key[-3])) < 0.6
    allowed[..., 3, :] = False
    return allowed


def _offsets(shape: Shape) -> np.ndarray:
    """A different position per sequence; int32 ``[*B]``."""
    return (5 + 17 * np.arange(math.prod(shape.batch))).astype(np.int32).reshape(shape.batch)


MASKS: dict[str, MaskCase] = {
    "causal": MaskCase("grouped_heads", lambda s: {}),
    "full": MaskCase("grouped_heads", lambda s: {"is_causal": False}),
    "causal_more_keys": MaskCase("more_keys", lambda s: {}),
    "causal_more_queries": MaskCase("more_queries", lambda s: {}),
    "full_more_keys": MaskCase("more_keys", lambda s: {"is_causal": False}),
    "offset": MaskCase("more_keys", lambda s: {"query_offset": 45}),
    "negative_offset": MaskCase("more_keys", lambda s: {"query_offset": -7}),
    "offset_per_sequence": MaskCase("more_keys", lambda s: {"query_offset": _offsets(s)}),
    "lengths": MaskCase(
        "grouped_heads", lambda s: {"is_causal": False, "key_value_seq_lengths": _lengths(s)}
    ),
    "empty_sequence": MaskCase(
        "grouped_heads", lambda s: {"key_value_seq_lengths": np.array([0, 20], np.int32)}
    ),
    "segments": MaskCase(
        "grouped_heads",
        lambda s: {"segment_ids": (_segments(s.num_queries, s), _segments(s.key[-3], s))},
    ),
    "window": MaskCase("length_129", lambda s: {"local_window_size": 9}),
    "window_pair": MaskCase(
        "length_129", lambda s: {"is_causal": False, "local_window_size": (11, 4)}
    ),
    "dense": MaskCase(
        "grouped_heads", lambda s: {"is_causal": False, "mask": _dense(s, full=True)}
    ),
    "dense_broadcast": MaskCase("grouped_heads", lambda s: {"mask": _dense(s, full=False)}),
    "everything_but_dense": MaskCase(
        "more_keys",
        lambda s: {
            "query_offset": _offsets(s),
            "key_value_seq_lengths": _lengths(s),
            "segment_ids": (_segments(s.num_queries, s) + 1, _segments(s.key[-3], s)),
            "local_window_size": (40, 0),
        },
    ),
    "everything": MaskCase(
        "more_keys",
        lambda s: {
            "query_offset": _offsets(s),
            "key_value_seq_lengths": _lengths(s),
            "segment_ids": (_segments(s.num_queries, s) + 1, _segments(s.key[-3], s)),
            "local_window_size": (40, 0),
            "mask": _dense(s, full=True),
        },
    ),
}


Arrays = dict[str, np.ndarray]


def _normal(rng, shape: Shape) -> Arrays:
    names = {"query": shape.query, "key": shape.key, "value": shape.value}
    return {name: rng.normal(size=size) for name, size in names.items()}


def _anisotropic(rng, shape: Shape) -> Arrays:
    """Key and query covariance of condition number 1e4, unit mean variance, random axes."""
    arrays, d = _normal(rng, shape), shape.head_dim
    deviation = np.logspace(0, -2, d)
    deviation /= np.sqrt(np.mean(deviation**2))
    factor = deviation[:, None] * np.linalg.qr(rng.normal(size=(d, d)))[0]
    return {**arrays, "query": arrays["query"] @ factor, "key": arrays["key"] @ factor}


def _clustered(rng, shape: Shape) -> Arrays:
    """Eight unit-variance centres shared by queries and keys, spread 0.1 around them."""
    arrays, centres = _normal(rng, shape), rng.normal(size=(8, shape.head_dim))
    for name in ("query", "key"):
        centre = centres[rng.integers(8, size=arrays[name].shape[:-1])]
        arrays[name] = centre + 0.1 * arrays[name]
    return arrays


def _offset(rng, shape: Shape) -> Arrays:
    """Keys that share an offset of 10 standard deviations in every coordinate."""
    arrays = _normal(rng, shape)
    return {**arrays, "key": arrays["key"] + 10}


def _sharp(rng, shape: Shape) -> Arrays:
    """Logits of standard deviation 4: few keys carry the weight."""
    return {**_normal(rng, shape), "scale": np.asarray(4 / math.sqrt(shape.head_dim))}


def _qk_norm(rng, shape: Shape) -> Arrays:
    """Queries and keys of unit length, logits between -10 and 10."""
    arrays = _normal(rng, shape)
    for name in ("query", "key"):
        arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    return {**arrays, "scale": np.asarray(10.0)}


REGIMES: dict[str, Callable[[np.random.Generator, Shape], Arrays]] = {
    "normal": _normal,
    "anisotropic": _anisotropic,
    "clustered": _clustered,
    "offset": _offset,
    "sharp": _sharp,
    "qk_norm": _qk_norm,
}


def make_inputs(shape: Shape, regime: str = "normal", ridge=1.0, seed: int = 0) -> Arrays:
    """Float64 query, key, value, ridge, scale (both ``[*B, T, N]``), probe and a cotangent."""
    rng = np.random.default_rng(seed)
    arrays = REGIMES[regime](rng, shape)
    arrays.setdefault("scale", np.asarray(1 / math.sqrt(shape.head_dim)))
    arrays["ridge"] = np.asarray(ridge, np.float64)
    for name in ("ridge", "scale"):
        arrays[name] = np.broadcast_to(arrays[name], shape.rows).copy()
    arrays["probe"] = rng.normal(size=shape.query) / math.sqrt(shape.head_dim)
    arrays["cotangent"] = rng.normal(size=shape.output)
    return arrays
