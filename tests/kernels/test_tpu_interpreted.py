"""The TPU kernels in Pallas's interpreters against the exact reference.

The plain interpreter turns a kernel into XLA operations. The other one simulates copies and cores,
and detects races. Neither has the rounding or the memory layout of hardware.
"""

import dataclasses
import functools

import chex
import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops import BACKENDS, Backend
from lla.ops.mosaic_tpu import backend as mosaic_tpu
from tests.kernels.tpu_cases import SMALL, evaluate
from tests.ops import harness
from tests.ops.cases import REGIMES, Shape, make_inputs
from tests.ops.harness import Implementation, errors, exact
from tests.ops.suite import MECHANISMS, Suite
from tests.ops.test_accuracy import CONTRACT

GROUPED = Shape(70, 32, num_keys=150, value_dim=48, heads=4, key_heads=2, batch=(2,))
OFFSETS = {"query_offset": np.array([80, 3], np.int32)}
LONG = Shape(300, 16, heads=2)


def check(inputs, got, want, dtype="float32", ridge=1.0):
    """Float32 errors are bounded by `CONTRACT`, bfloat16 errors by twice the rounding error."""
    rounded = want._replace(
        out=want.out.astype(got.out.dtype),
        gradients={n: g.astype(got.out.dtype) for n, g in want.gradients.items()},
    )
    floor = errors(rounded, want)
    for name, error in errors(got, want).items():
        if dtype == "bfloat16":
            bound = 2 * floor[name]
        else:
            bound = CONTRACT[ridge] * (1 if name == "out" else 10)
        assert error <= bound, (name, error, bound)
    lse = np.isfinite(want.stats.lse)
    np.testing.assert_array_equal(np.isfinite(got.stats.lse), lse)
    np.testing.assert_allclose(got.stats.lse[lse], want.stats.lse[lse], atol=2e-2, rtol=1e-5)
    assert (got.out[~lse] == 0).all()
    assert (got.gradients["query"][~lse] == 0).all()


def compare(shape, *, mechanism="lla", dtype="float32", ridge=1.0, regime="normal", **options):
    inputs = make_inputs(shape, regime, ridge)
    want = exact(inputs, rounded=dtype, mechanism=mechanism, **options)
    check(inputs, evaluate(inputs, mechanism=mechanism, dtype=dtype, **options), want, dtype, ridge)


def test_grouped_heads_with_offsets():
    """With another value dimension, more keys than queries, and padding of every axis."""
    compare(GROUPED, dtype="bfloat16", **OFFSETS)


def test_window_at_a_small_ridge():
    compare(LONG, ridge=0.01, is_causal=False, local_window_size=(30, 20))


@pytest.mark.compat
@pytest.mark.parametrize(
    "mechanism",
    ["parallax", *(pytest.param(m, marks=pytest.mark.slow) for m in ("softmax", "lla"))],
)
def test_lengths_and_segments(mechanism):
    """One sequence without keys; packed segments that cross the borders of tiles."""
    shape = Shape(140, 16, heads=2, key_heads=1, batch=(3,))
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (3, 140))).astype(np.int32)
    options = {
        "is_causal": False,
        "key_value_seq_lengths": np.array([140, 70, 0], np.int32),
        "segment_ids": (ids, ids),
    }
    compare(shape, mechanism=mechanism, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_grouped_heads_of_every_mechanism(mechanism, dtype):
    compare(GROUPED, mechanism=mechanism, dtype=dtype, **OFFSETS)
    compare(LONG, mechanism=mechanism, dtype=dtype)


@pytest.mark.slow
def test_few_queries():
    """A decoding step: the heads of a group are the rows of one small tile."""
    shape = Shape(1, 16, num_keys=300, heads=6, key_heads=2, batch=(2,))
    options = {
        "query_offset": np.array([299, 40], np.int32),
        "key_value_seq_lengths": np.array([300, 41], np.int32),
    }
    inputs = make_inputs(shape)
    want = exact(inputs, **options)
    check(inputs, evaluate(inputs, blocks=None, **options), want)


@pytest.mark.slow
def test_two_runs_are_equal_and_rows_do_not_depend_on_later_ones():
    shape = dataclasses.replace(LONG, num_queries=200, heads=1)
    arrays = make_inputs(shape)
    changed = {name: array.copy() for name, array in arrays.items()}
    for name in ("query", "key", "value"):
        changed[name][:, 150] = 5 - 3 * changed[name][:, 150]
    first, second, other = (evaluate(a) for a in (arrays, arrays, changed))
    chex.assert_trees_all_equal(first, second)
    np.testing.assert_array_equal(first.out[:, :150], other.out[:, :150])
    np.testing.assert_array_equal(first.stats.lse[:, :150], other.stats.lse[:, :150])
    assert (first.out[:, 150:] != other.out[:, 150:]).any()


# ---------------------------------------------------------------------------------------------
# The suite of all back ends, and other data


class TestSuite(Suite):
    implementation = Implementation("mosaic_tpu_interpreted")
    unsupported = frozenset({"mask:dense", "mask:dense_broadcast", "mask:everything", "float16"})
    mechanisms = MECHANISMS
    other_mechanisms = ()  # they run with every shape and mask
    quick = frozenset({"dense", "dense_broadcast", "everything", "float16", "one_token"})
    backend = Backend(
        implementation.name,
        mosaic_tpu.unsupported_shape,
        functools.partial(mosaic_tpu.attend, blocks=SMALL, interpret=True),
    )


@pytest.mark.slow
@pytest.mark.parametrize("ridge", CONTRACT)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(regime, ridge):
    compare(Shape(160, 32), ridge=ridge, regime=regime)


@pytest.mark.slow
@pytest.mark.parametrize("ridge", [10.0, 1.0, 0.1])
@pytest.mark.parametrize("regime", ["normal", "qk_norm", "clustered"])
def test_bfloat16(regime, ridge):
    compare(Shape(160, 32), ridge=ridge, regime=regime, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_tiles_as_compiled(mechanism, head_dim, dtype):
    """With the tile sizes for hardware, and several tiles.

    Compares with the XLA implementation in float64, since the reference would take too much memory.
    """
    inputs = make_inputs(Shape(700, head_dim), ridge=1.0)
    rounded = {
        name: np.asarray(
            np.asarray(array, np.float32 if name in ("ridge", "scale") else jnp.dtype(dtype)),
            np.float64,
        )
        for name, array in inputs.items()
    }
    want = harness.evaluate(rounded, harness.XLA_CG, mechanism=mechanism, dtype="float64")
    got = evaluate(inputs, mechanism=mechanism, dtype=dtype, blocks=None)
    check(inputs, got, want, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ridge_known_to_be_large(dtype):
    """Numbers then have a single part."""
    inputs = make_inputs(Shape(200, 32, heads=2), ridge=10.0)
    want = exact(inputs, rounded=dtype)
    got = evaluate(inputs, dtype=dtype, static_ridge=10.0)
    want.gradients.pop("ridge")
    factor = {"float32": 1, "bfloat16": 2}[dtype]
    for name, error in errors(got, want).items():
        bound = 1e-4 if dtype == "float32" else factor * 2.0**-8
        assert error <= bound, (name, error)


@pytest.mark.slow
def test_fixed_number_of_iterations():
    inputs = make_inputs(Shape(100, 16), ridge=1.0)
    got = evaluate(inputs, solver=lla.Solver(num_iters=3))
    assert (got.stats.iterations[:, 5:] == 3).all()
    close = evaluate(inputs, solver=lla.Solver(num_iters=16))
    assert max(errors(close, exact(inputs)).values()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("ridge", [1e-4, 1e4, np.nan, -1.0])
def test_extreme_ridges(ridge):
    """Finite for any positive ridge; NaN in just those rows where the ridge is not positive."""
    inputs = make_inputs(Shape(40, 16, heads=2), ridge=1.0)
    inputs["ridge"][:, 7] = ridge
    got = evaluate(inputs)
    bad = np.zeros(got.out.shape[:3], bool)
    bad[:, 7] = not ridge > 0
    np.testing.assert_array_equal(np.isnan(got.out).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(got.gradients["query"]).all(-1), bad)
    assert np.isfinite(got.out[~bad]).all()


# ---------------------------------------------------------------------------------------------
# Through the public functions, with the kernels accepted on this machine


@pytest.fixture
def accepted(monkeypatch):
    """Accepts the kernels on this machine, and interprets them."""
    run = functools.partial(mosaic_tpu.attend, interpret=True)
    backend = Backend("mosaic_tpu", mosaic_tpu.unsupported_shape, run)
    monkeypatch.setitem(BACKENDS, "mosaic_tpu", backend)


@pytest.mark.slow
def test_decoding_equals_the_whole_sequence(accepted):
    """A prompt, then token by token, with grouped heads."""
    arrays = make_inputs(Shape(12, 16, heads=4, key_heads=2, batch=(2,)))
    query, key, value = (jnp.asarray(arrays[n], jnp.float32) for n in ("query", "key", "value"))
    want = lla.local_linear_attention(query, key, value, ridge=1.0, implementation="reference")
    cache = lla.KVCache.create(2, 140, num_kv_heads=2, head_dim=16, dtype=jnp.float32)
    step = jax.jit(functools.partial(lla.decode_step, ridge=1.0, implementation="mosaic_tpu"))
    outs = []
    for rows in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        out, cache = step(query[:, rows], key[:, rows], value[:, rows], cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=2e-5)


@pytest.mark.slow
def test_vmap_with_shared_keys_and_an_offset_each(accepted):
    """Outputs and gradients of nested maps equal those of the reference."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((3, 2, 1, 20, 2, 16)), jnp.float32)
    key, value = (jnp.asarray(rng.standard_normal((3, 1, 30, 1, 16)), jnp.float32) for _ in "kv")
    offset, ridge = jnp.array([0, 5, 9], jnp.int32), jnp.array([1.0, 0.5], jnp.float32)

    def run(implementation):
        def one(query, key, value, offset, ridge):
            return lla.local_linear_attention(
                query, key, value, ridge=ridge, query_offset=offset, implementation=implementation
            )

        inner = jax.vmap(one, (0, None, None, None, 0))
        both = jax.vmap(inner, (0, 0, 0, 0, None))

        def loss(query, key, value, ridge):
            out = both(query, key, value, offset, ridge)
            return jnp.sin(out).sum(), out

        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        (_, out), gradients = jax.jit(gradient)(query, key, value, ridge)
        return out, gradients

    for got, want in zip(*map(jax.tree.leaves, map(run, ("mosaic_tpu", "reference"))), strict=True):
        assert harness.relative_error(got, want) < 3e-5


# ---------------------------------------------------------------------------------------------
# Races


def run_for_races(mechanism, **options):
    """Several tiles of rows and keys on two cores."""
    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    inputs = make_inputs(Shape(150, 16, heads=2, key_heads=1))
    got = evaluate(inputs, mechanism=mechanism, interpret=parameters, **options)
    plain = evaluate(inputs, mechanism=mechanism, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, plain)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_no_races(mechanism, capfd):
    run_for_races(mechanism)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_no_races_with_segments(capfd):
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (1, 150))).astype(np.int32)
    run_for_races("lla", dtype="bfloat16", segment_ids=(ids, ids))
    assert "RACE" not in capfd.readouterr().out


def test_the_detector_sees_a_race(capfd):
    """A kernel that reads a buffer before its copy is done."""

    def body(source, out, buffer, semaphore):
        copy = pltpu.make_async_copy(source, buffer, semaphore)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    array = jnp.ones((8, 128), jnp.float32)
    report = ""
    try:
        jax.block_until_ready(
            pl.pallas_call(
                body,
                out_shape=jax.ShapeDtypeStruct(array.shape, array.dtype),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                scratch_shapes=[pltpu.VMEM(array.shape, array.dtype), pltpu.SemaphoreType.DMA],
                interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager"),
            )(array)
        )
    except jax.errors.JaxRuntimeError as error:  # from JAX 0.12 on; before, it only prints
        report = str(error)
    assert "RACE DETECTED" in report + capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_hidden_tokens_do_not_matter(mechanism):
    """Other segments, and tokens beyond the lengths, may hold anything."""
    shape = Shape(200, 16, heads=2, key_heads=1)
    ids = (np.arange(200) >= 70).astype(np.int32)[None]
    cases = [
        ({"segment_ids": (ids, ids)}, np.r_[0:70], np.r_[70:200]),
        ({"key_value_seq_lengths": np.array([150])}, np.r_[150:200], np.r_[0:150]),
    ]
    for options, hidden, rest in cases:
        inputs = make_inputs(shape)
        want = evaluate(inputs, mechanism=mechanism, **options)
        for value in (np.nan, np.inf, 1e30):
            spoiled = {name: array.copy() for name, array in inputs.items()}
            for name in ("key", "value"):
                spoiled[name][:, hidden] = value
            got = evaluate(spoiled, mechanism=mechanism, **options)
            assert harness.relative_error(got.out[:, rest], want.out[:, rest]) < 1e-4
            for name, gradient in want.gradients.items():
                error = harness.relative_error(got.gradients[name][:, rest], gradient[:, rest])
                assert error < 1e-4, (name, value)
