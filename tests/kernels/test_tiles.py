"""Which tiles a block of rows visits, and which of them need no mask, against a dense mask."""

import itertools

import jax
import numpy as np
import pytest

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11"),
]

SIZE, ROWS, QUERIES, KEYS = 8, 16, 64, 80
MASKS = [(True, None), (False, None), (True, (20, 0)), (False, (5, 11)), (True, (3, 9))]


def dense(is_causal, window, offset, length):
    rows = np.arange(QUERIES)[:, None] + offset
    keys = np.arange(KEYS)[None]
    valid = np.broadcast_to(keys < length, (QUERIES, KEYS)).copy()
    if is_causal:
        valid &= keys <= rows
    if window is not None:
        valid &= (keys >= rows - window[0]) & (keys <= rows + window[1])
    return valid


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("is_causal", "window"), MASKS)
def test_ranges(is_causal, window, transposed):
    from lla.kernels.mosaic_gpu import tile

    spec = tile.MaskSpec(is_causal, window, False)
    for offset, length in itertools.product((0, 7, 16, -9), (KEYS, 33, 0)):
        mask = tile.SequenceMask(np.int32(offset), np.int32(length))
        valid = dense(is_causal, window, offset, length)
        if transposed:
            valid = valid.T
        for first in range(0, valid.shape[0], ROWS):
            if transposed:
                found = tile.query_tiles(spec, mask, np.int32(first), ROWS, SIZE, QUERIES)
            else:
                found = tile.key_tiles(spec, mask, np.int32(first), ROWS, SIZE)
            low, high, full_low, full_high = map(int, found)
            assert 0 <= low <= full_low <= full_high <= high <= valid.shape[1] // SIZE
            block = valid[first : first + ROWS]
            seen = np.flatnonzero(block.any(0)) // SIZE
            assert set(seen) <= set(range(low, high))
            full = block[:, full_low * SIZE : full_high * SIZE]
            assert full.all()


def test_ranges_are_tight():
    from lla.kernels.mosaic_gpu import tile

    spec = tile.MaskSpec(True, None, False)
    mask = tile.SequenceMask(np.int32(0), np.int32(KEYS))
    assert tuple(map(int, tile.key_tiles(spec, mask, np.int32(32), ROWS, SIZE))) == (0, 6, 0, 4)
    found = tile.query_tiles(spec, mask, np.int32(32), ROWS, SIZE, QUERIES)
    assert tuple(map(int, found)) == (4, 8, 6, 8)
