"""Tile sizes by problem size."""

from __future__ import annotations

from lla.kernels.mosaic_tpu.launch import LANES, Blocks

# Rows of a program instance: enough for the products to outweigh the copies of the keys (three
# products an iteration are 3 * 256 operations a byte, where a TPU v6e has 560 a byte of HBM).
_ROWS = 256
_KEYS = 512
_OWN_KEYS = 256
# Few rows, as in decoding, are not padded to a whole register of lanes.
_FEW = 64
_SUBLANES = 16  # of bfloat16; float32 has 8


def choose(rows: int, keys: int) -> Blocks:
    """Tile sizes for so many rows (queries times the query heads of a group) and keys."""
    padded = round_up(rows, _SUBLANES if rows <= _FEW else LANES)
    block = min(_KEYS, round_up(keys, LANES))
    return Blocks(min(_ROWS, padded), block, _OWN_KEYS if block % _OWN_KEYS == 0 else LANES)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple
