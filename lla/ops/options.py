"""The keyword arguments that the public functions share, for their overloads.

An overload says what one value of `return_stats` returns. The arguments that do not matter for that
are collected here, so that they are written down once besides the functions themselves; a test
compares the two.
"""

from __future__ import annotations

from typing import TypedDict

import jax

from lla.ops.backend import Implementation
from lla.ops.solver import Solver


class Shared(TypedDict, total=False):
    """Of attention and of decoding."""

    scale: float | jax.Array | None
    local_window_size: int | tuple[int, int] | None
    bias: jax.Array | None
    implementation: Implementation


class Sequences(Shared, total=False):
    """Of attention between whole sequences."""

    is_causal: bool
    query_offset: int | jax.Array | None
    query_seq_lengths: jax.Array | None
    key_value_seq_lengths: jax.Array | None
    segment_ids: tuple[jax.Array, jax.Array] | None
    mask: jax.Array | None
    context_axis: str | None
    context_balance: bool


class Attention(Sequences, total=False):
    """Of `lla.parallax_attention`."""

    logits_soft_cap: None


class CappedAttention(Sequences, total=False):
    """Of `lla.softmax_attention`, which can bound its logits."""

    logits_soft_cap: float | None


class SolvedAttention(Attention, total=False):
    """Of `lla.local_linear_attention`, except ridge."""

    solver: Solver | None


class Decoding(Shared, total=False):
    """Of `lla.parallax_decode_step`."""

    new_lengths: jax.Array | None


class CappedDecoding(Decoding, total=False):
    """Of `lla.softmax_decode_step`."""

    logits_soft_cap: float | None


class SolvedDecoding(Decoding, total=False):
    """Of `lla.decode_step`, except ridge."""

    solver: Solver | None
