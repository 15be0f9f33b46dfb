"""Decoding from a cache equals the operator on the whole sequence."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops.xla import decode
from tests.measure import relative_error
from tests.ops.harness import FUNCTIONS

BATCH, LENGTH, HEADS, KV_HEADS, DIM, VALUE_DIM = 3, 13, 4, 2, 8, 6
STEPS = {
    "lla": lla.decode_step,
    "parallax": lla.parallax_decode_step,
    "softmax": lla.softmax_decode_step,
}
CASES = [("lla", 1.0), ("lla", 0.1), ("parallax", None), ("softmax", None)]
mechanisms = pytest.mark.parametrize("mechanism, ridge", CASES, ids=lambda case: str(case))


def inputs(mechanism="lla", length=LENGTH, seed=0, dtype=np.float32):
    """query, (probe,) key, value."""
    rng = np.random.default_rng(seed)
    widths = [(HEADS, DIM), (HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)]
    arrays = [rng.standard_normal((BATCH, length, *width)).astype(dtype) for width in widths]
    return [jnp.asarray(a) for i, a in enumerate(arrays) if i != 1 or mechanism == "parallax"]


def options(ridge, **more):
    return more if ridge is None else {"ridge": ridge, **more}


def empty(length=LENGTH, batch=BATCH, dtype=jnp.float32):
    return lla.KVCache.create(batch, length, KV_HEADS, DIM, VALUE_DIM, dtype)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("local_window_size", "implementation")
)
def whole(mechanism, *arrays, **more):
    return FUNCTIONS[mechanism](*arrays, **more)


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("local_window_size", "implementation", "return_stats"),
)
def step(mechanism, cache, *arrays, **more):
    return STEPS[mechanism](*arrays, cache, **more)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("local_window_size",))
def token_by_token(mechanism, cache, *arrays, **more):
    """All tokens by a scan over steps of one."""

    def advance(cache, token):
        out, cache = STEPS[mechanism](*(a[:, None] for a in token), cache, **more)
        return cache, out[:, 0]

    cache, out = jax.lax.scan(advance, cache, [jnp.moveaxis(a, 1, 0) for a in arrays])
    return jnp.moveaxis(out, 0, 1), cache


@pytest.mark.compat
@mechanisms
def test_token_by_token_equals_the_operator_at_every_length(mechanism, ridge):
    arrays = inputs(mechanism)
    expected = whole(mechanism, *arrays, **options(ridge))
    out, cache = token_by_token(mechanism, empty(), *arrays, **options(ridge))
    for position in range(LENGTH):
        assert relative_error(out[:, position], expected[:, position]) < 1e-5
    np.testing.assert_array_equal(cache.key, arrays[-2])
    np.testing.assert_array_equal(cache.value, arrays[-1])
    assert cache.lengths.tolist() == [LENGTH] * BATCH and not cache.overflowed.any()


@pytest.mark.parametrize(
    "window, room",
    [
        (2, 40),
        ((4, 1), LENGTH),
        *(pytest.param(w, r, marks=pytest.mark.slow) for w in (0, 3, 20) for r in (LENGTH, 40)),
    ],
)
def test_window(window, room):
    arrays = inputs()
    more = dict(ridge=1.0, local_window_size=window)
    out, _ = token_by_token("lla", empty(room), *arrays, **more)
    assert relative_error(out, whole("lla", *arrays, **more)) < 1e-5


@mechanisms
@pytest.mark.parametrize(
    "chunk", [5, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 9, LENGTH))]
)
def test_chunks_of_a_prompt_equal_the_operator(mechanism, ridge, chunk):
    arrays, cache, parts = inputs(mechanism), empty(LENGTH + 7), []
    for first in range(0, LENGTH, chunk):
        part = [a[:, first : first + chunk] for a in arrays]
        out, cache = step(mechanism, cache, *part, **options(ridge))
        parts.append(out)
    expected = whole(mechanism, *arrays, **options(ridge))
    assert relative_error(jnp.concatenate(parts, axis=1), expected) < 1e-5


@pytest.mark.slow
def test_a_window_with_chunks_of_a_prompt():
    arrays, cache, parts = inputs(), empty(50), []
    more = dict(ridge=0.5, local_window_size=(3, 0))
    for first in range(0, LENGTH, 4):
        out, cache = step("lla", cache, *(a[:, first : first + 4] for a in arrays), **more)
        parts.append(out)
    expected = whole("lla", *arrays, **more)
    assert relative_error(jnp.concatenate(parts, axis=1), expected) < 1e-5


@mechanisms
def test_ragged_batches(mechanism, ridge):
    """Steps of up to 4 tokens, as many as the sequence is given; what pads them is not a number."""
    arrays, cache = inputs(mechanism), empty()
    expected = np.asarray(whole(mechanism, *arrays, **options(ridge)))
    out = np.full_like(expected, np.nan)
    done = np.zeros(BATCH, int)
    for counts in ([4, 0, 1], [2, 4, 3], [0, 4, 0], [4, 1, 4], [3, 4, 4]):
        new = []
        for array in arrays:
            padded = np.full((BATCH, 4, *array.shape[2:]), np.nan, np.float32)
            for i, count in enumerate(counts):
                padded[i, :count] = array[i, done[i] : done[i] + count]
            new.append(jnp.asarray(padded))
        new_lengths = jnp.array(counts, jnp.int32)
        rows, cache = step(mechanism, cache, *new, new_lengths=new_lengths, **options(ridge))
        for i, count in enumerate(counts):
            out[i, done[i] : done[i] + count] = rows[i, :count]
            np.testing.assert_array_equal(rows[i, count:], 0.0)
        done += counts
        assert cache.lengths.tolist() == done.tolist()
    assert done.tolist() == [LENGTH, LENGTH, 12]
    for i, length in enumerate(done):
        assert relative_error(out[i, :length], expected[i, :length]) < 1e-5
        np.testing.assert_array_equal(cache.key[i, :length], arrays[-2][i, :length])
        np.testing.assert_array_equal(cache.key[i, length:], 0.0)


def test_arrays_of_ridge_and_scale_belong_to_the_new_tokens():
    arrays = inputs()
    ridge = jnp.asarray(
        np.random.default_rng(5).uniform(0.5, 2, (BATCH, LENGTH, HEADS)), jnp.float32
    )
    scale = 0.5 / ridge
    expected = whole("lla", *arrays, ridge=ridge, scale=scale)
    rows = slice(5, 9)
    _, cache = step("lla", empty(), *(a[:, :5] for a in arrays), ridge=ridge[:, :5])
    out, _ = step(
        "lla", cache, *(a[:, rows] for a in arrays), ridge=ridge[:, rows], scale=scale[:, rows]
    )
    assert relative_error(out, expected[:, rows]) < 1e-5


@pytest.mark.parametrize("leading", [pytest.param((), marks=pytest.mark.slow), (2, 3)])
def test_any_number_of_leading_axes(leading):
    rng = np.random.default_rng(3)
    query, key, value = (
        jnp.asarray(rng.standard_normal((*leading, 6, 2, 8)), jnp.float32) for _ in range(3)
    )
    cache = lla.KVCache.create(leading, 6, 2, 8, dtype=jnp.float32)
    out, cache = step(
        "lla", cache, query[..., :4, :, :], key[..., :4, :, :], value[..., :4, :, :], ridge=1.0
    )
    last, cache = step(
        "lla", cache, query[..., 4:, :, :], key[..., 4:, :, :], value[..., 4:, :, :], ridge=1.0
    )
    assert cache.lengths.shape == leading
    expected = whole("lla", query, key, value, ridge=1.0)
    assert relative_error(jnp.concatenate([out, last], axis=-3), expected) < 1e-5


def test_no_sequences():
    arrays = [a[:0] for a in inputs(length=2)]
    out, cache = step("lla", empty(batch=0), *arrays, ridge=1.0)
    assert out.shape == (0, 2, HEADS, VALUE_DIM) and cache.lengths.shape == (0,)


def test_too_many_tokens_are_an_error_where_lengths_are_known():
    arrays = inputs()
    cache = empty(5).append(*(a[:, :4] for a in arrays[1:]))
    with pytest.raises(ValueError, match=r"max_length is 5, lengths are \[4 4 4\] and \[2 2 2\]"):
        lla.decode_step(*(a[:, 4:6] for a in arrays), cache, ridge=1.0)
    counts = jnp.array([1, 0, 2], jnp.int32)
    with pytest.raises(ValueError, match=r"the cache is full"):
        cache.append(arrays[1][:, 4:6], arrays[2][:, 4:6], counts)
    assert cache.append(arrays[1][:, 4:6], arrays[2][:, 4:6], counts.clip(0, 1)).max_length == 5


def test_too_many_tokens_are_nan_and_overwrite_nothing_where_lengths_are_traced():
    arrays = inputs()
    _, cache = step("lla", empty(5), *(a[:, :4] for a in arrays), ridge=1.0)
    counts = jnp.array([1, 2, 0], jnp.int32)
    rows = [a[:, 4:6] for a in arrays]
    out, after = step("lla", cache, *rows, ridge=1.0, new_lengths=counts)
    expected = whole("lla", *arrays, ridge=1.0)
    assert after.lengths.tolist() == [5, 6, 4] and after.overflowed.tolist() == [False, True, False]
    assert relative_error(out[0, 0], expected[0, 4]) < 1e-5
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[0, 1], 0.0)
    np.testing.assert_array_equal(out[2], 0.0)
    for new, array in ((after.key, arrays[1]), (after.value, arrays[2])):
        np.testing.assert_array_equal(new[:2], array[:2, :5])  # what fitted is there
        np.testing.assert_array_equal(new[2, :4], array[2, :4])
        np.testing.assert_array_equal(new[2, 4], 0.0)
    out, last = step("lla", after, *(a[:, 6:7] for a in arrays), ridge=1.0)
    np.testing.assert_array_equal(np.isnan(out).all(axis=(1, 2, 3)), [True, True, False])
    assert last.lengths.tolist() == [6, 7, 5]
    np.testing.assert_array_equal(last.key[:2], after.key[:2])
    np.testing.assert_array_equal(last.key[2, :4], after.key[2, :4])


@mechanisms
def test_bfloat16_is_within_twice_the_rounding_of_the_exact_result(mechanism, ridge, float64):
    arrays = [a.astype(jnp.bfloat16) for a in inputs(mechanism, seed=4)]
    out, cache = token_by_token(mechanism, empty(dtype=jnp.bfloat16), *arrays, **options(ridge))
    assert out.dtype == cache.key.dtype == jnp.bfloat16
    with float64():
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
        exact = np.asarray(whole(mechanism, *wide, implementation="reference", **options(ridge)))
    rounding = relative_error(exact.astype(jnp.bfloat16), exact)
    assert 0 < relative_error(out, exact) < 2 * rounding


# XLA for CPUs in JAX 0.10 converts 16-bit buffers to float32 around a scatter.
DTYPES = [jnp.float32] + ([jnp.bfloat16] if jax.__version_info__ >= (0, 11) else [])


@pytest.mark.compat
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_memory_is_a_donated_cache_and_a_bounded_amount(monkeypatch, length, dtype):
    cache = empty(2048, 4 * BATCH, dtype)
    arrays = [jnp.concatenate([a.astype(dtype)] * 4) for a in inputs(length=length)]
    size = cache.key.nbytes + cache.value.nbytes

    def compiled(**jit_options):
        def call(cache, *arrays):
            return lla.decode_step(*arrays, cache, ridge=1.0)

        return jax.jit(call, **jit_options).lower(cache, *arrays).compile().memory_analysis()

    monkeypatch.setattr(decode, "_sizes", lambda room: (room,))  # to compile once, not 8 times
    monkeypatch.setattr(decode, "_CHUNK_BYTES", 1)  # one head of one sequence
    donated = compiled(donate_argnums=0)
    assert donated.alias_size_in_bytes >= size > donated.temp_size_in_bytes
    monkeypatch.setattr(decode, "_CHUNK_BYTES", 1 << 28)
    assert compiled(donate_argnums=0).temp_size_in_bytes > size  # it can fail


@pytest.mark.parametrize("heads_at_once", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_chunks_of_sequences_and_heads_do_not_change_the_result(monkeypatch, heads_at_once):
    """One head, one sequence of two heads, and (4 is no multiple of 3) one sequence again."""
    arrays = inputs()
    _, cache = step("lla", empty(), *(a[:, :5] for a in arrays), ridge=1.0)
    last, counts = [a[:, 5:8] for a in arrays], jnp.array([1, 3, 2], jnp.int32)
    more = dict(ridge=1.0, new_lengths=counts, return_stats=True)
    expected = jax.jit(lambda c, *a: lla.decode_step(*a, c, **more))(cache, *last)
    monkeypatch.setattr(decode, "_CHUNK_BYTES", heads_at_once * LENGTH * (DIM + VALUE_DIM) * 8)
    found = jax.jit(lambda c, *a: lla.decode_step(*a, c, **more))(cache, *last)
    assert relative_error(found[0], expected[0]) < 1e-6
    np.testing.assert_allclose(found[2].lse, expected[2].lse, rtol=1e-6)


def test_statistics_are_those_of_the_operator_and_empty_where_a_token_pads():
    arrays = inputs()
    _, cache = step("lla", empty(), *(a[:, :5] for a in arrays), ridge=0.1)
    expected = jax.jit(functools.partial(lla.local_linear_attention, return_stats=True))(
        *arrays, ridge=0.1
    )[1]
    counts = jnp.array([2, 0, 1], jnp.int32)
    rows = [a[:, 5:7] for a in arrays]
    out, after, stats = step("lla", cache, *rows, ridge=0.1, new_lengths=counts, return_stats=True)
    assert isinstance(after, lla.KVCache) and out.shape == (BATCH, 2, HEADS, VALUE_DIM)
    np.testing.assert_allclose(stats.lse[0], expected.lse[0, 5:7], rtol=1e-5)
    assert (stats.iterations[0] > 0).all() and (stats.residual[0] < 1e-4).all()
    for rows in (slice(1, 2), slice(2, 3)):
        pads = jax.tree.map(lambda a, rows=rows: a[rows, 1:], stats)
        assert (
            (pads.lse == -jnp.inf).all() and not pads.iterations.any() and not pads.residual.any()
        )


def test_implementations_are_those_of_the_operator():
    arrays = [a[:, :1] for a in inputs()]
    out, _ = step("lla", empty(), *arrays, ridge=1.0)
    exact, _ = step("lla", empty(), *arrays, ridge=1.0, implementation="reference")
    assert relative_error(out, exact) < 1e-5
    listed, _ = step("lla", empty(), *arrays, ridge=1.0, implementation=("mosaic_tpu", "xla"))
    np.testing.assert_array_equal(listed, out)
    with pytest.raises(NotImplementedError, match="mosaic_tpu: the kernels need a TPU"):
        lla.decode_step(*arrays, empty(), ridge=1.0, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="implementation must be"):
        lla.softmax_decode_step(*arrays, empty(), implementation="fast")
    fixed = lla.Solver(num_iters=3)
    with pytest.raises(NotImplementedError, match="num_iters"):
        lla.decode_step(*arrays, empty(), ridge=1.0, solver=fixed, implementation="reference")


QUERY, KEY, VALUE = inputs()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(key=KEY[:, :, :1]), r"key must have shape .* \(3, 13, 2, 8\) .* got \(3, 13, 1, 8\)"),
        (dict(key=KEY[:2]), r"key must have shape .* got \(2, 13, 2, 8\)"),
        (dict(key=KEY[0]), r"key must have shape .* got \(13, 2, 8\)"),
        (dict(value=VALUE[..., :5]), r"value must have shape .* got \(3, 13, 2, 5\)"),
        (dict(value=VALUE[:, :4]), r"key and value must have equal lengths"),
        (dict(key=KEY.astype(jnp.bfloat16)), r"key must have the cache's dtype float32.*bfloat16"),
        (dict(value=VALUE.astype(jnp.float16)), r"value must have the cache's dtype float32"),
        (dict(query=QUERY.astype(jnp.float16)), r"must share one dtype"),
        (dict(query=QUERY[:, :3]), r"query must have .* length of key.*\(3, 3, 4, 8\)"),
        (dict(query=QUERY[:, :, :3]), r"must be a multiple of that of key heads"),
        (dict(cache=(KEY, VALUE)), r"cache must be an lla.KVCache, got tuple"),
        (dict(ridge=0.0), r"ridge must be positive"),
        (dict(new_lengths=jnp.array([1, 2])), r"new_lengths must .* shape \[\*B\] = \(3,\)"),
        (dict(new_lengths=jnp.ones(3)), r"new_lengths must be an integer array.*float32"),
        (dict(new_lengths=jnp.array([0, 14, 1])), r"must lie in 0 ... 13, .* got \[ 0 14  1\]"),
        (dict(new_lengths=jnp.array([0, -1, 1])), r"must lie in 0 ... 13"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes, message):
    arguments = dict(query=QUERY, key=KEY, value=VALUE, cache=empty(), ridge=1.0) | changes
    with pytest.raises(ValueError, match=message):
        lla.decode_step(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 0, 1, 4), "max_length must be at least 1, got 0"),
        ((2, 4, 0, 4), "num_kv_heads must be at least 1"),
        ((2, 4, 1, 0), "head_dim must be at least 1"),
        ((2, 4, 1, 4, 0), "value_dim must be at least 1"),
        ((-1, 4, 1, 4), "batch must not be negative"),
        ((2, 4, 1, 4, 4, jnp.int32), "dtype must be a floating point type, got int32"),
    ],
)
def test_impossible_caches_are_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lla.KVCache.create(*arguments)
