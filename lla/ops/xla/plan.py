"""How the blockwise implementation cuts a problem into tiles."""

from __future__ import annotations

import dataclasses
import math

import jax

from lla.ops.masks import Mask

_MAX_BUCKETS = 8
# Bytes of keys and values, converted to the compute dtype, that a tile of few queries spans.
_KEY_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static tiling of one problem.

    Attributes:
      block_q: queries of a tile (each with all the query heads that share its key head).
      groups: key heads (over batch and heads) that one tile spans.
      segments: runs ``(begin, end, buckets)`` of consecutive tiles, which cover all tiles of a
        group. `buckets` are increasing numbers of keys; a tile works on the smallest one that holds
        the range of keys its queries can see, so that causal masks, windows and lengths save work.
        Where the positions are known in advance and there are tiles enough, every segment has one
        bucket and nothing is decided at run time.
    """

    block_q: int
    groups: int
    segments: tuple[tuple[int, int, tuple[int, ...]], ...]

    @property
    def num_tiles(self) -> int:
        """Tiles per group along the queries."""
        return self.segments[-1][1]


def make_plan(
    shape,
    num_keys: int,
    mask: Mask,
    *,
    direct: bool = False,
    overlap: bool = False,
    platform: str | None = None,
) -> Plan:
    """Tiling for queries of shape ``[B, T, K, G, H]`` against `num_keys` keys.

    `direct` is whether a tile holds the covariances of its rows; `overlap` allows up to eight tiles
    in memory at once where that saves time.

    Block sizes depend on the platform and on the head layout, not on the lengths, so that memory
    grows linearly with the number of keys. The exception is a call of few queries, such as a
    decoding step, that leaves a tile's rows unfilled: its keys outweigh its rows, and the number of
    groups keeps them within 256 MiB.
    """
    b, t, k, g, h = shape
    platform = platform or jax.default_backend()
    if platform == "cpu":
        # One group at a time keeps a tile's weights in the last-level cache.
        rows, spanned = 256, 1
    else:
        rows, spanned = 128, 4096
    if direct:
        # A row's covariance takes H * H numbers.
        rows = max(16, min(rows, (1 << 20) // (h * h)))
        spanned = min(spanned, max(1, (1 << 25) // (h * h)))
    block_q = min(t if t < 8 else _round_up(t, 8), max(8, rows // g))
    num_tiles = math.ceil(t / block_q)
    buckets = _buckets(t, num_keys, block_q, mask)
    groups = max(1, spanned // (block_q * g))
    if block_q * g < rows:
        # Values are taken to be as wide as keys, and both to become float32.
        groups = min(groups, max(1, _KEY_BYTES // (buckets[-1] * 2 * h * 4)))
    groups = largest_divisor(b * k, groups)
    return Plan(block_q, groups, _segments(num_tiles, block_q, buckets, mask, overlap))


def _segments(num_tiles: int, block_q: int, buckets, mask: Mask, overlap: bool):
    known = mask.is_causal and mask.window is None and mask.offset is None and mask.lengths is None
    # Compilers unroll segments of one tile and overlap them, with the weights of all in memory. On
    # a CPU that pays for the short solves of a fixed number of iterations, not for longer ones.
    known &= overlap or num_tiles >= 2 * len(buckets)
    if not known or len(buckets) == 1:
        return ((0, num_tiles, buckets),)
    segments, begin = [], 0
    for size in buckets:
        # Tile i sees the keys before (i + 1) * block_q.
        end = num_tiles if size == buckets[-1] else min(num_tiles, size // block_q)
        if end > begin:
            segments.append((begin, end, (size,)))
            begin = end
    return tuple(segments)


def _buckets(t: int, s: int, block_q: int, mask: Mask) -> tuple[int, ...]:
    longest = s
    if mask.window is not None:
        left, right = mask.window
        longest = min(s, left + (0 if mask.is_causal else right) + block_q)
    ranged = mask.is_causal or mask.lengths is not None
    unit = max(8, block_q)  # a tile of fewer queries is the only one
    if not ranged or longest <= unit:
        return (longest,)
    count = min(_MAX_BUCKETS, math.ceil(longest / unit), max(1, math.ceil(t / block_q)))
    if mask.lengths is not None or mask.offset is not None:
        count = min(_MAX_BUCKETS, math.ceil(longest / unit))
    step = _round_up(math.ceil(longest / count), unit)
    return tuple(sorted({min(longest, step * (i + 1)) for i in range(count)}))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`, 1 if there is none."""
    return max((i for i in range(1, min(n, limit) + 1) if n % i == 0), default=1)
