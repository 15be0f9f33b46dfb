"""The exact implementation against oracles that are not ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statsmodels.nonparametric.kernel_regression import KernelReg

import lla
from lla.ops.masks import dense_mask
from lla.ops.problem import make_problem
from tests.measure import relative_error
from tests.ops import oracles
from tests.ops.cases import MASKS, SHAPES, Shape, make_inputs
from tests.ops.harness import FAST, REFERENCE, double_precision, evaluate, exact

SMALL = Shape(40, 6, value_dim=3, heads=4, key_heads=2, batch=(2,))


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_equals_weighted_least_squares(ridge):
    inputs = make_inputs(SMALL, ridge=ridge)
    out = exact(inputs, rounded="float64").out
    expected = oracles.weighted_least_squares(inputs, oracles.visible(SMALL))
    # float64 with condition numbers up to about |k|^2 / ridge = 1e5.
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_equals_published_form(ridge):
    inputs = make_inputs(SMALL, ridge=ridge)
    out = exact(inputs, rounded="float64").out
    expected = oracles.published_form(inputs, oracles.visible(SMALL))
    # The published denominator omega - mu.rho falls with the ridge and amplifies rounding.
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9)


# statsmodels 0.15 announces a change of a default of its own.
@pytest.mark.filterwarnings("ignore:After 0.17:FutureWarning")
def test_equals_local_linear_kernel_regression():
    """On a sphere ``|q - k|^2 = 2 r^2 - 2 q.k``: a Gaussian kernel is the operator's weight."""
    rng, radius, bandwidth, n = np.random.default_rng(0), 1.5, 0.9, 60
    points = rng.normal(size=(2 * n, 3))
    points *= radius / np.linalg.norm(points, axis=-1, keepdims=True)
    key, query = points[:n], points[n:]
    value = np.sin(2 * key[:, 0]) + key[:, 1] * key[:, 2] + 0.1 * rng.normal(size=n)
    expected, _ = KernelReg(value, key, "ccc", reg_type="ll", bw=[bandwidth] * 3).fit(query)
    with double_precision():
        out = lla.local_linear_attention(
            jnp.asarray(query[:, None]),
            jnp.asarray(key[:, None]),
            jnp.asarray(value[:, None, None]),
            ridge=1e-8,
            scale=1 / bandwidth**2,
            is_causal=False,
            implementation="reference",
        )
        out = np.asarray(out)[:, 0, 0]
    # The ridge of 1e-8 against covariances of about 0.3 is what is left.
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    # Not a comparison of two smooth averages: the kernel-weighted mean is far from both.
    constant, _ = KernelReg(value, key, "ccc", reg_type="lc", bw=[bandwidth] * 3).fit(query)
    assert relative_error(constant, expected) > 0.05


@pytest.mark.parametrize("implementation", (REFERENCE, *FAST), ids=str)
def test_scale_zero_is_ridge_regression(implementation):
    inputs = make_inputs(SMALL, ridge=0.3)
    inputs["scale"] = np.zeros_like(inputs["scale"])
    expected = oracles.ridge_regression(inputs, oracles.visible(SMALL))
    result = evaluate(inputs, implementation)
    assert relative_error(result.out, expected) < 1e-5


@pytest.mark.parametrize("name", MASKS)
def test_mask_equals_its_definition(name):
    """What the implementations build equals a loop over pairs."""
    shape, options = SHAPES[MASKS[name].shape], MASKS[name].options(SHAPES[MASKS[name].shape])
    inputs = make_inputs(shape)
    query, key, value = (jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value"))
    problem = make_problem("softmax", query, key, value, **options)
    batch = int(np.prod(shape.batch))
    built = dense_mask(problem.mask, batch, shape.num_queries, shape.key[-3])
    expected = oracles.visible(shape, **options)
    full = (batch, *expected.shape[-3:])
    np.testing.assert_array_equal(np.broadcast_to(built, full), expected.reshape(full))
    assert expected.any()
    assert expected.all() == name.startswith("full")


@pytest.mark.parametrize("name", ["everything", "dense", "negative_offset", "empty_sequence"])
def test_masked_output_equals_weighted_least_squares(name):
    shape, options = SHAPES[MASKS[name].shape], MASKS[name].options(SHAPES[MASKS[name].shape])
    inputs = make_inputs(shape, ridge=0.5)
    out = exact(inputs, rounded="float64", **options).out
    expected = oracles.weighted_least_squares(inputs, oracles.visible(shape, **options))
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-11)


SOFTMAX_OPTIONS = {
    "full": {"is_causal": False},
    "causal": {"is_causal": True},
    "window": {"is_causal": False, "local_window_size": (6, 2)},
    "causal_window": {"is_causal": True, "local_window_size": (6, 0)},
    "lengths": {"is_causal": False, "key_value_seq_lengths": np.array([70, 31], np.int32)},
}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", ["grouped_heads", "more_keys"])
@pytest.mark.parametrize("options", SOFTMAX_OPTIONS.values(), ids=SOFTMAX_OPTIONS.keys())
def test_softmax_mechanism_follows_jax_conventions(options, shape, implementation):
    inputs = make_inputs(SHAPES[shape])
    arrays = [jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value")]
    options = dict(options)
    lengths = options.pop("key_value_seq_lengths", None)
    if lengths is not None:
        options["key_value_seq_lengths"] = jnp.asarray(np.minimum(lengths, arrays[1].shape[1]))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = jax.nn.dot_product_attention(*arrays, **options)
    out = lla.softmax_attention(*arrays, **options, implementation=implementation)
    # Two float32 softmaxes of up to 75 terms.
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
