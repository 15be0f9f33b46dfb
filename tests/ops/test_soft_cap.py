"""Softmax attention with bounded logits: values, gradients, and who has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops.mosaic_gpu import hopper
from lla.ops.mosaic_tpu import backend as tpu
from lla.ops.problem import make_problem
from tests.measure import relative_error
from tests.ops.cases import Shape, make_inputs
from tests.ops.harness import double_precision

SHAPE = Shape(70, 8, heads=8, key_heads=1, batch=(2,))
NAMES = ("query", "key", "value", "scale", "bias")
CAP = 1.5


def inputs():
    arrays = make_inputs(SHAPE, "sharp")
    # An offset of all keys, which the cap is not blind to.
    arrays["key"] = arrays["key"] + 0.5
    arrays["bias"] = np.random.default_rng(2).normal(size=(1, 8, 70, 70))
    return arrays


def formula(query, key, value, scale, bias, cap=CAP):
    """The definition, dense: the cap is applied to the scaled product plus the bias."""
    logits = jnp.einsum("btnh,bskh->bnts", query, key) * jnp.swapaxes(scale, 1, 2)[..., None]
    logits = cap * jnp.tanh((logits + bias) / cap)
    seen = jnp.tril(jnp.ones((70, 70), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bskh->btnh", weights, value)


def gradients(function, dtype, **options):
    arrays = inputs()
    given = {n: jnp.asarray(arrays[n], dtype) for n in NAMES}

    def loss(given):
        out = function(**given, **options)
        return (out * jnp.asarray(arrays["cotangent"], dtype)).sum(), out

    result = jax.jit(jax.grad(loss, has_aux=True))(given)
    return jax.tree.map(np.asarray, result)


@functools.cache
def exact():
    with double_precision():
        return gradients(formula, "float64")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_the_definition(implementation, dtype):
    want = exact()
    options = {"implementation": implementation, "logits_soft_cap": CAP}
    if dtype == "float64":
        with double_precision():
            got = gradients(lla.softmax_attention, dtype, **options)
    else:
        got = gradients(lla.softmax_attention, dtype, **options)
    # The table's bound of an output without a solve, and that of gradients.
    output, gradient = {"float32": (1e-5, 1e-4), "float64": (1e-12, 1e-11)}[dtype]
    assert relative_error(got[1], want[1]) < output
    for name in NAMES:
        assert relative_error(got[0][name], want[0][name]) < gradient, name


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_hidden_entry_stays_hidden(implementation):
    """-inf is no logit of ``-cap``."""
    arrays = {n: jnp.asarray(inputs()[n], jnp.float32) for n in ("query", "key", "value")}
    allowed = np.random.default_rng(1).random((70, 70)) < 0.5
    allowed[3] = False
    run = jax.jit(functools.partial(
        lla.softmax_attention, logits_soft_cap=CAP, implementation=implementation
    ))  # fmt: skip
    want = run(**arrays, mask=allowed)
    got = run(**arrays, bias=jnp.where(allowed, 0.0, -jnp.inf))
    assert relative_error(got, want) < 1e-6
    assert not got[:, 3].any()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_large_cap_changes_nothing_and_a_small_one_averages(implementation):
    arrays = {n: jnp.asarray(inputs()[n], jnp.float32) for n in ("query", "key", "value")}
    run = functools.partial(lla.softmax_attention, **arrays, implementation=implementation)
    assert relative_error(run(logits_soft_cap=1e4), run()) < 1e-5
    mean = np.cumsum(np.asarray(arrays["value"]), 1) / np.arange(1, 71)[None, :, None, None]
    assert relative_error(run(logits_soft_cap=1e-6), np.repeat(mean, 8, axis=2)) < 1e-5


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), "high", True, np.ones(2)])
def test_bad_caps(bad):
    array = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match="logits_soft_cap must be"):
        lla.softmax_attention(array, array, array, logits_soft_cap=bad)


def test_the_others_have_no_cap():
    array = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match="logits_soft_cap is defined for softmax attention alone"):
        lla.local_linear_attention(array, array, array, ridge=1.0, logits_soft_cap=5.0)
    with pytest.raises(ValueError, match="logits_soft_cap is defined for softmax attention alone"):
        lla.parallax_attention(array, array, array, array, logits_soft_cap=5.0)


def test_kernels_refuse_by_name():
    array = jnp.ones((1, 4, 1, 64), jnp.bfloat16)
    problem = make_problem("softmax", array, array, array, logits_soft_cap=5)
    for refuse in (hopper.unsupported, hopper.unsupported_shape, tpu.unsupported):
        assert "logits_soft_cap is not supported" in refuse(problem)
    reasons = lla.explain(array, array, array, logits_soft_cap=5.0)
    assert reasons["xla"] is None and reasons["reference"] is None
    assert "logits_soft_cap is not supported" in reasons["mosaic_tpu"]
