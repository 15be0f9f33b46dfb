"""How the blockwise implementation cuts a problem into tiles."""

import dataclasses

import jax.numpy as jnp
import pytest

from lla.ops.masks import Mask
from lla.ops.xla.plan import make_plan

CAUSAL = Mask(True, None, None, None, None, None, None)
MASKS = {
    "causal": CAUSAL,
    "full": dataclasses.replace(CAUSAL, is_causal=False),
    "window": dataclasses.replace(CAUSAL, window=(100, 0)),
    "offset": dataclasses.replace(CAUSAL, offset=jnp.array([5], jnp.int32)),
    "lengths": dataclasses.replace(CAUSAL, lengths=jnp.array([5], jnp.int32)),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("num_keys", [1, 255, 2048, 2100, 5000])
@pytest.mark.parametrize("num_queries", [1, 256, 300, 2048, 5000])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_tile_has_room_for_its_keys(mask, num_queries, num_keys, platform, overlap):
    shape = (1, num_queries, 2, 3, 16)
    plan = make_plan(shape, num_keys, mask, overlap=overlap, platform=platform)
    assert plan.num_tiles * plan.block_q >= num_queries
    expected = 0
    for begin, end, buckets in plan.segments:
        assert begin == expected < end
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] <= num_keys
        last_query = min(end * plan.block_q, num_queries) - 1
        if mask is CAUSAL:
            assert len(buckets) == 1 or not overlap
            assert buckets[-1] >= min(last_query + 1, num_keys)
        elif mask.window is not None:
            assert buckets[-1] >= min(plan.block_q + 100, num_keys)
        else:
            assert buckets[-1] == num_keys
        expected = end
    assert expected == plan.num_tiles


def test_causal_tiles_share_the_work_of_the_triangle():
    """At most 1/8 more pairs of queries and keys than the causal half needs, for long sequences."""
    num_tokens = 8192
    plan = make_plan((1, num_tokens, 1, 1, 64), num_tokens, CAUSAL, platform="cpu")
    pairs = sum((end - begin) * plan.block_q * size for begin, end, (size,) in plan.segments)
    assert pairs <= (1 + 1 / 8) * num_tokens**2 / 2


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("num_queries, block", [(1, 1), (3, 3), (7, 7), (8, 8), (9, 16)])
def test_few_queries_fill_a_tile_of_their_own(num_queries, block, platform):
    mask = dataclasses.replace(MASKS["offset"], lengths=MASKS["lengths"].lengths)
    plan = make_plan((2, num_queries, 2, 3, 16), 4096, mask, platform=platform)
    assert plan.block_q == block
    # Work follows the length of the cache, not its room: at most an eighth of it more.
    ((begin, end, buckets),) = plan.segments
    assert (begin, end) == (0, 1)
    for length in (1, 700, 4096):
        assert min(size for size in buckets if size >= length) <= length + 4096 / 8


@pytest.mark.parametrize("num_keys", [64, 4096, 1 << 17, 1 << 24])
def test_keys_of_a_tile_of_few_queries_are_bounded_on_accelerators(num_keys):
    shape = (64, 1, 8, 4, 128)
    plan = make_plan(shape, num_keys, MASKS["offset"], platform="gpu")
    group = num_keys * 2 * 128 * 4  # bytes of its keys and values in float32
    assert plan.groups == 1 or plan.groups * group <= 256 * 2**20
    # All are powers of two: twice as many would not fit, or there are no more.
    assert plan.groups == 64 * 8 or 2 * plan.groups * group > 256 * 2**20
    # Tiles full of rows are bounded by their rows, whatever the keys.
    full = make_plan((64, 128, 8, 4, 128), num_keys, MASKS["offset"], platform="gpu")
    assert full.groups * full.block_q * 4 <= 4096
