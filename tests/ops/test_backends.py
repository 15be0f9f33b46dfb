"""A back end that is added from outside of the package is served, listed and refused like ours."""

import types

import chex
import jax
import jax.numpy as jnp
import pytest

import lla
from lla.ops import BACKENDS, Backend, Decoder, register_backend
from lla.ops.mosaic_gpu import backend as gpu
from lla.ops.shield import shield

pytestmark = pytest.mark.compat


REASON = "the toy is for causal softmax attention"


def unsupported(problem):
    if problem.mechanism != "softmax" or problem.mask.arrays() or problem.mask.window is not None:
        return REASON
    return None


def attend(problem, with_stats):
    """Causal or full softmax attention by `jax.nn`, as a plug-in would write it."""
    del with_stats
    problem, restore = shield(problem)
    query = (
        problem.query * (problem.by_row(problem.scale) * problem.query.shape[-1] ** 0.5)[..., None]
    )
    out, lse = jax.nn.dot_product_attention(
        query, problem.key, problem.value, is_causal=problem.mask.is_causal, return_residual=True
    )
    zeros = jnp.zeros_like(lse)
    return restore(out, lla.Stats(lse, zeros.astype(jnp.int32), zeros))


@pytest.fixture
def toy(monkeypatch):
    """`BACKENDS` with one row more, for the time of a test."""
    monkeypatch.setattr("lla.ops.backend.BACKENDS", dict(BACKENDS))
    backend = Backend("toy", unsupported, attend)
    register_backend(backend)
    return backend


def inputs(tokens=12):
    return jax.random.normal(jax.random.key(0), (3, 2, tokens, 4, 8))


def test_it_serves_by_name_with_gradients_and_statistics(toy):
    query, key, value = inputs()
    options = {"scale": 0.2, "return_stats": True}

    def run(name):
        def call(query, key, value):
            out, stats = lla.softmax_attention(query, key, value, implementation=name, **options)
            return jnp.sin(out).sum(), (out, stats)

        return jax.value_and_grad(call, argnums=(0, 1, 2), has_aux=True)(
            query, key[:, :, :2], value[:, :, :2]
        )

    chex.assert_trees_all_close(run("toy"), run("reference"), atol=2e-5)


def test_it_is_explained_and_refused(toy):
    query, key, value = inputs()
    assert lla.explain(query, key, value)["toy"] == REASON
    with pytest.raises(NotImplementedError, match=f"toy: {REASON}"):
        lla.local_linear_attention(query, key, value, ridge=1.0, implementation="toy")
    out = lla.local_linear_attention(query, key, value, ridge=1.0, implementation=("toy", "xla"))
    want = lla.local_linear_attention(query, key, value, ridge=1.0, implementation="xla")
    chex.assert_trees_all_equal(out, want)


def test_it_is_tried_by_default_where_it_says_so(monkeypatch):
    served = []

    def run(problem, with_stats):
        served.append(problem.mechanism)
        return attend(problem, with_stats)

    monkeypatch.setattr("lla.ops.backend.BACKENDS", dict(BACKENDS))
    register_backend(Backend("toy", unsupported, run, default_on=(jax.default_backend(),)))
    query, key, value = inputs()
    lla.softmax_attention(query, key, value)
    lla.local_linear_attention(query, key, value, ridge=1.0)
    assert served == ["softmax"]


def test_its_decoder_serves_the_steps_that_it_supports(monkeypatch):
    """The others go to the back end itself, and `explain` tells which."""
    served = []

    def kind(name):
        def run(problem, with_stats):
            served.append((name, problem.query.shape[1]))
            return BACKENDS["reference"].attend(problem, with_stats)

        return run

    one_token = Decoder(
        lambda problem: None if problem.query.shape[1] == 1 else "one token at a time", kind("step")
    )
    monkeypatch.setattr("lla.ops.backend.BACKENDS", dict(BACKENDS))
    register_backend(Backend("toy", lambda problem: None, kind("whole"), decode=one_token))
    query, key, value = inputs(4)
    cache = lla.KVCache.create(2, 16, num_kv_heads=4, head_dim=8, dtype=jnp.float32)
    want = lla.softmax_attention(query, key, value, implementation="reference")
    outs = []
    for rows in (slice(0, 3), slice(3, 4)):
        tokens = [a[:, rows] for a in (query, key, value)]
        reasons = lla.explain(*tokens, cache=cache, implementation="toy")
        assert reasons == {
            "toy": None, "toy:decode": None if rows.start == 3 else "one token at a time"
        }  # fmt: skip
        out, cache = lla.softmax_decode_step(*tokens, cache, implementation="toy")
        outs.append(out)
    assert served == [("whole", 3), ("step", 1)]
    chex.assert_trees_all_close(jnp.concatenate(outs, axis=1), want, atol=1e-6)


def test_names_are_taken_once(toy):
    with pytest.raises(ValueError, match="'toy' already"):
        register_backend(toy)
    with pytest.raises(ValueError, match="'xla' already"):
        register_backend(Backend("xla", unsupported, attend))


def test_every_back_end_explains_decoding():
    query, key, value = inputs(1)
    cache = lla.KVCache.create(2, 16, num_kv_heads=4, head_dim=8, dtype=jnp.float32)
    reasons = lla.explain(query, key, value, cache=jax.eval_shape(lambda: cache))
    assert {name for name, reason in reasons.items() if reason is None} == {
        "reference", "xla", "xla:decode"
    }  # fmt: skip
    assert reasons["mosaic_gpu:decode"] == reasons["mosaic_gpu"] is not None
    with pytest.raises(ValueError, match="key must have shape"):
        lla.explain(query, key[..., :4], value, cache=cache)


def test_the_first_family_of_gpu_kernels_that_can_serve_does(monkeypatch):
    """The second family has no kernels for decoding."""
    served = []

    def family(name, mechanisms):
        def run(problem, with_stats):
            served.append(name)
            return BACKENDS["reference"].attend(problem, with_stats)

        reason = f"{name} has {mechanisms} alone"
        return types.SimpleNamespace(
            unsupported=lambda problem: None if problem.mechanism in mechanisms else reason,
            attend=run,
        )

    first, decoding = family("new", ["softmax"]), family("step", ["softmax"])
    families = ((first, decoding), (family("old", ["softmax", "parallax"]), None))
    monkeypatch.setattr(gpu, "FAMILIES", families)
    query, key, value = inputs(1)
    cache = lla.KVCache.create(2, 16, num_kv_heads=4, head_dim=8, dtype=jnp.float32)
    lla.softmax_attention(query, key, value, implementation="mosaic_gpu")
    lla.parallax_attention(query, query, key, value, implementation="mosaic_gpu")
    lla.softmax_decode_step(query, key, value, cache, implementation="mosaic_gpu")
    lla.parallax_decode_step(query, query, key, value, cache, implementation="mosaic_gpu")
    assert served == ["new", "old", "step", "old"]
    with pytest.raises(NotImplementedError, match=r"new has .* alone; old has"):
        lla.local_linear_attention(query, key, value, ridge=1.0, implementation="mosaic_gpu")
