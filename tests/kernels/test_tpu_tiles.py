"""The tile arithmetic and tile ranges of the TPU kernels, against NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.kernels.mosaic_tpu import configs, launch, tile
from lla.kernels.mosaic_tpu.tile import Arithmetic, MaskSpec, SequenceMask

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def test_rounding_is_that_of_bfloat16_except_for_ties():
    array = normal(1000) * 10.0 ** jnp.asarray(RNG.integers(-20, 20, 1000), jnp.float32)
    expected = array.astype(jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(tile.round_to_bfloat16)(array), expected)
    special = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0], jnp.float32)
    np.testing.assert_array_equal(tile.round_to_bfloat16(special), special)


@pytest.mark.parametrize(("bf16x2", "error"), [(False, 2.0**-8), (True, 2.0**-16)])
def test_parts(bf16x2, error):
    """Compiled, since a compiler might remove a pair of conversions."""
    array, arithmetic = normal(64, 64), Arithmetic(jnp.dtype(jnp.bfloat16), bf16x2)
    parts = jax.jit(arithmetic.parts)(array)
    assert len(parts) == (2 if bf16x2 else 1) and all(p.dtype == jnp.bfloat16 for p in parts)
    total = sum(np.asarray(p, np.float64) for p in parts)
    assert np.abs(total - np.asarray(array)).max() <= error * np.abs(array).max()
    assert np.abs(total - np.asarray(array)).max() > error / 100
    np.testing.assert_array_equal(total, jax.jit(arithmetic.rounded)(array))
    exact = Arithmetic(jnp.dtype(jnp.float32), bf16x2)
    assert exact.parts(array) == (array,) and exact.rounded(array) is array


@pytest.mark.parametrize("count", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_product_of_parts(count):
    a, b = normal(32, 48), normal(16, 48)
    bf16x2 = [Arithmetic(jnp.dtype(jnp.bfloat16), n == 2) for n in count]
    parts = [arithmetic.parts(x) for arithmetic, x in zip(bf16x2, (a, b), strict=True)]
    found = tile.product(*parts, tile.NT)
    represented = [sum(np.asarray(p, np.float64) for p in x) for x in parts]
    expected = represented[0] @ represented[1].T
    assert np.abs(found - expected).max() < 3 * 2.0**-16 * 7
    assert found.dtype == jnp.float32


def test_weighted_sum_sums_the_rounded_weights():
    """The second result is the sum of the weights as the first one uses them."""
    weights, ones = abs(normal(8, 64)), jnp.ones((64, 4), jnp.bfloat16)
    sums, total = Arithmetic(jnp.dtype(jnp.bfloat16), False).weighted_sum(weights, ones)
    np.testing.assert_allclose(sums, jnp.broadcast_to(total, sums.shape), rtol=1e-6)
    assert np.abs(total[:, 0] - weights.sum(1)).max() > 1e-4


def test_rows_and_columns():
    row = normal(1, 40).at[0, 3].set(-jnp.inf).at[0, 5].set(jnp.inf)
    np.testing.assert_array_equal(tile.to_column(row), row.T)
    np.testing.assert_array_equal(tile.to_row(row.T), row)
    ids = jnp.asarray(RNG.integers(-(2**31), 2**31, (1, 40)), jnp.int32)
    np.testing.assert_array_equal(tile.ids_to_column(ids), ids.T)


MASKS = [
    MaskSpec(is_causal, window, False)
    for is_causal in (True, False)
    for window in (None, (0, 0), (9, 0), (20, 7))
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_tiles_that_see_each_other(mask):
    """Ranges contain every visible pair, and their first and last tiles contain at least one."""
    queries, keys, size = 50, 64, 16
    for group, offset, length in itertools.product((1, 3), (-20, 0, 13, 90), (0, 5, 64)):
        sequence = SequenceMask(jnp.int32(offset), jnp.int32(length))
        positions = np.arange(queries * group, dtype=np.int32)[:, None] // group + offset
        seen = tile.visible(mask, length, positions, np.arange(keys, dtype=np.int32)[None])
        seen = np.broadcast_to(seen, (queries * group, keys))
        first = np.arange(0, queries * group, size, dtype=np.int32)
        last = np.minimum(first + size, queries * group) - 1
        found = jax.vmap(functools.partial(tile.key_tiles, mask, sequence, size=size))(
            first // group, last // group
        )
        for f, low, high in zip(first, *found, strict=True):
            check_range(seen[f : f + size].any(0), low, high, size)
        first = np.arange(0, keys, size, dtype=np.int32)
        found = jax.vmap(
            lambda f, s=sequence, g=group: tile.row_tiles(mask, s, f, size, queries, g, size)
        )(first)
        for f, low, high in zip(first, *found, strict=True):
            check_range(seen[:, f : f + size].any(1), low, high, size)


def check_range(seen, low, high, size):
    low, high = int(low), int(high)
    places = np.flatnonzero(seen)
    assert 0 <= low <= high <= -(-seen.size // size)
    if places.size:
        assert (low, high) == (places[0] // size, places[-1] // size + 1)
    else:
        assert high - low <= 1


def test_segments_restrict_what_is_visible():
    mask, ids = MaskSpec(False, None, True), jnp.asarray([0, 0, 1, 2], jnp.int32)
    positions = jnp.arange(4, dtype=jnp.int32)
    seen = tile.visible(mask, 3, positions[:, None], positions[None], ids[:, None], ids[None])
    expected = np.equal.outer(ids, ids) & (np.arange(4) < 3)
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("rows", [1, 8, 64, 65, 200, 5000])
@pytest.mark.parametrize("keys", [1, 128, 300, 384, 513, 4096])
def test_tile_sizes(rows, keys):
    blocks = configs.choose(rows, keys)
    assert blocks.rows % (16 if rows <= 64 else 128) == 0 and blocks.rows <= 256
    assert blocks.keys % 128 == 0 and blocks.own_keys % 128 == 0
    assert blocks.keys % blocks.own_keys == 0


def test_few_rows_are_padded_for_the_key_gradients():
    shape = launch.Shape(1, 1, 1, 5, 16, 128, 128, 128, jnp.float32, configs.choose(5, 128))
    whole = shape.with_whole_lanes()
    assert (whole.num_rows, whole.blocks.rows) == (128, 128)
    assert whole.with_whole_lanes() is whole
