"""Queries that do not exist: zeros, no gradients, and nothing of theirs is read."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops.mosaic_gpu import hopper
from lla.ops.problem import make_problem
from tests.measure import relative_error
from tests.ops.cases import Shape, make_inputs
from tests.ops.harness import DIFFERENTIABLE, EVERY, REFERENCE, XLA_CG, evaluate

SHAPE = Shape(20, 8, num_keys=24, heads=4, key_heads=2, batch=(2,))
LENGTHS = np.array([20, 13])
BEHIND = np.s_[1, 13:]
# Float32 evaluations of the same numbers.
BOUND = 1e-4
IDS = np.random.default_rng(0).integers(0, 3, (2, 24)).astype(np.int32)
OPTIONS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"local_window_size": 5, "query_offset": np.array([2, 0])},
    "segments": {"segment_ids": (IDS[:, :20], IDS)},
    "any_ids": {
        "segment_ids": (IDS[:, :20].astype(np.int64) * 2**40, IDS.astype(np.int64) * 2**40)
    },
    "lengths": {"key_value_seq_lengths": np.array([24, 9]), "is_causal": False},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("implementation", [REFERENCE, XLA_CG], ids=str)
def test_rows_behind_the_length(implementation, options):
    options = OPTIONS[options]
    inputs = make_inputs(SHAPE)
    cut = {**inputs, "cotangent": inputs["cotangent"].copy()}
    cut["cotangent"][BEHIND] = 0
    want = evaluate(cut, implementation, **options)
    spoiled = {n: a.copy() for n, a in inputs.items()}
    for name in ("query", "ridge", "scale", "cotangent"):
        spoiled[name][BEHIND] = np.nan
    got = evaluate(spoiled, implementation, query_seq_lengths=LENGTHS, **options)
    kept = np.ones((2, 20), bool)
    kept[BEHIND] = False
    assert not got.out[BEHIND].any() and np.isneginf(got.stats.lse[BEHIND]).all()
    assert relative_error(got.out[kept], want.out[kept]) < BOUND
    for name, gradient in want.gradients.items():
        assert relative_error(got.gradients[name], gradient) < BOUND, name


@pytest.mark.parametrize("mechanism", ["softmax", "parallax"])
def test_the_other_mechanisms(mechanism):
    inputs = make_inputs(SHAPE)
    want = evaluate(inputs, XLA_CG, mechanism=mechanism)
    for name in set(DIFFERENTIABLE[mechanism]) - {"key", "value"}:
        inputs[name][BEHIND] = np.nan
    got = evaluate(inputs, XLA_CG, mechanism=mechanism, query_seq_lengths=LENGTHS)
    assert not got.out[BEHIND].any()
    assert relative_error(got.out[0], want.out[0]) < BOUND
    assert all(np.isfinite(gradient).all() for gradient in got.gradients.values())


@pytest.mark.parametrize("implementation", EVERY, ids=str)
def test_nothing_and_everything(implementation):
    inputs = make_inputs(SHAPE)
    got = evaluate(inputs, implementation, query_seq_lengths=np.array([99, -7]))
    want = evaluate(inputs, implementation)
    assert relative_error(got.out[0], want.out[0]) < BOUND and not got.out[1].any()
    assert not any(gradient[1].any() for gradient in got.gradients.values())


@pytest.mark.compat
@pytest.mark.parametrize("large", [2**31, 2**32, 2**40, sys.maxsize, 2**63, 2**70])
def test_lengths_beyond_32_bits(large):
    """They saturate, as those of the keys do: no multiple of 2**32 is taken for zero."""
    array = jnp.ones((2, 6, 1, 8))

    def rows(lengths):
        problem = make_problem("softmax", array, array, array, query_seq_lengths=lengths)
        segments = problem.mask.query_segments
        return np.asarray(segments == problem.mask.key_segments[:, :1]).sum(1).tolist()

    assert rows([large, 4]) == [6, 4] and rows(large) == [6, 6]
    assert rows([-large, 4]) == [0, 4] and rows([large + 3, 2]) == [6, 2]


def test_wide_traced_lengths(float64):
    """Of 64 bits, where x64 is enabled."""
    with float64():
        array = jnp.ones((2, 6, 1, 8), jnp.float32)
        run = jax.jit(lambda n: lla.softmax_attention(array, array, array, query_seq_lengths=n))
        out = np.asarray(run(jnp.array([2**32, 5 - 2**32], jnp.int64)))
    np.testing.assert_array_equal(out.any((2, 3)).sum(1), [6, 0])


@pytest.mark.parametrize("bad", [1.0, np.ones(2), True, np.array(["a"])])
def test_lengths_that_are_no_integers(bad):
    array = jnp.ones((2, 6, 1, 8))
    with pytest.raises(ValueError, match="query_seq_lengths must be an integer array"):
        lla.softmax_attention(array, array, array, query_seq_lengths=bad)


@pytest.mark.parametrize("lowest", [-1, 0, 5, np.iinfo(np.int32).min, np.iinfo(np.int32).max - 23])
def test_no_key_has_the_id_of_a_query_that_does_not_exist(lowest):
    """Whatever ids the keys have, every number near zero and both ends included."""
    ids = (np.arange(24) + lowest).astype(np.int32)
    array = jnp.ones((24, 1, 8))
    mask = make_problem(
        "softmax", array, array, array, segment_ids=(ids, ids), query_seq_lengths=3
    ).mask
    same = np.asarray(mask.query_segments)[0, :, None] == np.asarray(mask.key_segments)[0]
    np.testing.assert_array_equal(same, np.eye(24, dtype=bool) & (np.arange(24) < 3)[:, None])


def test_equals_dot_product_attention():
    inputs = make_inputs(SHAPE)
    arrays = [jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value")]
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    keys = jnp.array([24, 9], jnp.int32)
    options = {"query_seq_lengths": lengths, "key_value_seq_lengths": keys}
    got = jax.jit(lla.softmax_attention, static_argnames="is_causal")(
        *arrays, **options, is_causal=False
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = jax.jit(jax.nn.dot_product_attention)(*arrays, **options)
    kept = np.arange(20)[None] < LENGTHS[:, None]
    assert relative_error(np.asarray(got)[kept], np.asarray(want)[kept]) < 1e-5
    assert not np.asarray(got)[~kept].any()


def test_kernels_serve_it():
    """As segments: the option asks nothing else of a kernel."""
    array = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    problem = make_problem("lla", array, array, array, ridge=1.0, query_seq_lengths=5)
    assert hopper.unsupported_shape(problem) is None
    assert problem.mask.query_segments is not None
