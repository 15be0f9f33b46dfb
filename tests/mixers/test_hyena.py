"""Hyena against its formula, evaluated in NumPy with float64 from the module's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from lla.mixers.hyena import HyenaFilter
from tests.measure import relative_error

WIDTH, LENGTH = 16, 50


def doubles(array):
    return np.asarray(array, np.float64)


def direct_filter(module, length, features, frequency):
    """h(t) = mlp(t, cos, sin) exp(-r t), tap by tap, for a filter of `module.length` tokens."""
    bands = (features - 1) // 2
    kernels = [doubles(layer.kernel[...]) for layer in module.layers]
    biases = [doubles(layer.bias[...]) for layer in module.layers[:-1]]
    width = kernels[-1].shape[1]
    slow, fast = np.log(100) / 1.5, np.log(100) / 0.3
    rates = [slow + (fast - slow) * c / (width - 1) for c in range(width)]
    taps = []
    for t in range(length):
        position = t / module.length
        angles = [
            2 * np.pi * position * (1e-4 + (bands - 1 - 1e-4) * b / max(bands - 1, 1))
            for b in range(bands)
        ]
        h = np.array([position, *np.cos(angles), *(-np.sin(angles))])
        for kernel, bias in zip(kernels, biases, strict=False):
            h = np.sin(frequency * (h @ kernel + bias))
        taps.append(h @ kernels[-1] * np.exp(-np.array(rates) * position))
    return np.stack(taps)


@pytest.mark.parametrize("features", [3, 9])
def test_filter_is_its_formula(features):
    module = HyenaFilter(
        WIDTH,
        length=40,
        hidden=8,
        features=features,
        frequency=10.0,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    taps = jax.jit(module, static_argnums=0)(LENGTH)  # longer than the 40 of its period
    assert taps.dtype == jnp.float32
    # Three layers of sin(10 z) amplify the rounding of float32 by up to 10 each.
    assert relative_error(taps, direct_filter(module, LENGTH, features, 10.0)) < 1e-4
    np.testing.assert_array_equal(module(7), module(LENGTH)[:7])


@pytest.mark.parametrize("short_conv", [0, 3])
def test_module_is_its_formula(short_conv):
    module = mixers.create(
        "hyena", WIDTH, 2, short_conv=short_conv, filter_length=40, rngs=nnx.Rngs(1)
    )
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    part = module.inputs.projection if short_conv else module.inputs
    projected = np.einsum("btw,wpc->btpc", doubles(x), doubles(part.kernel[...]))
    projected = projected + doubles(part.bias[...])
    if short_conv:
        taps = doubles(module.inputs.convolution.filter[...])
        padded = np.pad(projected, [(0, 0), (2, 0), (0, 0), (0, 0)])
        projected = sum(taps[i] * padded[:, i : i + LENGTH] for i in range(3))
    v, x1, x2 = np.moveaxis(projected, 2, 0)
    u = v * x1
    h = direct_filter(module.filter, LENGTH, 33, 14.0)
    y = doubles(module.D[...]) * u
    for t in range(LENGTH):
        for s in range(t + 1):
            y[:, t] += h[s] * u[:, t - s]
    expected = (x2 * y) @ doubles(module.out.kernel[...]) + doubles(module.out.bias[...])
    assert relative_error(nnx.jit(module)(x), expected) < 1e-4


def test_a_prefix_has_the_outputs_of_the_whole():
    """The filter depends on the position in tokens, not on the length of the sequence."""
    module = mixers.create("hyena", WIDTH, 2, filter_length=20, rngs=nnx.Rngs(2))
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    run = nnx.jit(module)
    np.testing.assert_allclose(run(x)[:, :31], run(x[:, :31]), atol=1e-5)


def test_errors_name_what_is_wrong():
    for option, value in (("filter_length", 0), ("filter_features", 4), ("form", "fft")):
        with pytest.raises(ValueError, match=option):
            mixers.create("hyena", WIDTH, 2, **{option: value}, rngs=nnx.Rngs(0))
