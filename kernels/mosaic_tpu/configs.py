"""Block sizes by problem size."""

from __future__ import annotations

from lla.kernels.mosaic_tpu.launch import LANES, BlockSizes

# Rows of a program instance. Enough for the products to outweigh the copies of the keys: the three
# products of an iteration are 3 * 256 operations per byte, a TPU v6e has 560 per byte of HBM.
_ROWS = 256
_KEYS = 512
_OWN_KEYS = 256
# Up to so many rows (decoding) are padded to whole sublanes only, not to 128 lanes.
_FEW = 64
_SUBLANES = 16  # of bfloat16; float32 has 8


def choose(rows: int, keys: int) -> BlockSizes:
    """Block sizes for numbers of rows (queries times the query heads of a group) and keys."""
    padded = round_up(rows, _SUBLANES if rows <= _FEW else LANES)
    block = min(_KEYS, round_up(keys, LANES))
    return BlockSizes(min(_ROWS, padded), block, _OWN_KEYS if block % _OWN_KEYS == 0 else LANES)


def round_up(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple
