"""How the blockwise implementation cuts a problem into tiles."""

import dataclasses

import jax.numpy as jnp
import pytest

from lla.ops.masks import Mask
from lla.ops.plan import make_plan

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
