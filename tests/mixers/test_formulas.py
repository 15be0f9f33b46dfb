"""Mixers written out in NumPy with float64: their formulas, options and initial values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lla import mixers
from lla.mixers import parts
from tests.measure import relative_error

WIDTH, HEADS, BATCH, LENGTH = 16, 2, 2, 11


def build(name, **options):
    """A mixer with noise for all its parameters: zeros and ones would hide what they do."""
    mixer = nnx.eval_shape(lambda: mixers.create(name, WIDTH, HEADS, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda leaf: 0.4 * rng.standard_normal(leaf.shape, np.float32),
        nnx.state(mixer, nnx.Param),
    )
    nnx.update(mixer, state)
    return mixer


def tokens():
    return np.random.default_rng(2).standard_normal((BATCH, LENGTH, WIDTH), np.float32)


def check(mixer, expected):
    graph, params = nnx.split(mixer)
    out = jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, tokens())
    assert relative_error(out, expected) < 1e-5


def array(variable):
    return np.asarray(variable.get_value(), np.float64)


def apply(module, x):
    """A projection, with or without a convolution or a bias."""
    if isinstance(module, parts.Projected):
        return convolve(module.convolution, apply(module.projection, x))
    if isinstance(module, parts.LowRank):
        return apply(module.up, apply(module.down, x))
    kernel = array(module.kernel)
    axes = x.ndim - 2 if kernel.ndim == 3 and module.out_features == (WIDTH,) else 1
    y = np.tensordot(x, kernel, axes)
    return y if module.bias is None else y + array(module.bias)


def convolve(convolution, x):
    taps = array(convolution.filter)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for back in range(min(len(taps), t + 1)):
            y[:, t] += taps[len(taps) - 1 - back] * x[:, t - back]
    if convolution.use_bias:
        y += array(convolution.bias)
    return silu(y) if convolution.activation else y


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def rms_norm(norm, x):
    return array(norm.scale) * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


def rotate(x, theta):
    """As complex numbers x_i + i x_(i + H/2)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


def recur(query, key, value, decay):
    """o_i = sum_{j <= i} (q_i . prod_{j < m <= i} a_m k_j) v_j; decay broadcasts to the key."""
    decay = np.broadcast_to(decay, key.shape)
    out = np.zeros(value.shape)
    for b, i, n in np.ndindex(*key.shape[:3]):
        for j in range(i + 1):
            weight = np.prod(decay[b, j + 1 : i + 1, n], axis=0)
            out[b, i, n] += np.sum(query[b, i, n] * weight * key[b, j, n]) * value[b, j, n]
    return out


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(
            feature_map="elu",
            normalize=True,
            out_norm=False,
            qk_norm=True,
            short_conv=3,
            value_dim=5,
            chunk=4,
        ),
        dict(feature_map="relu", rope_theta=50.0, head_dim=6),
    ],
)
def test_linear(options):
    mixer, x = build("linear", **options), tokens()
    query, key, value = (apply(module, x) for module in (mixer.query, mixer.key, mixer.value))
    if options.get("qk_norm"):
        query, key = rms_norm(mixer.query_norm, query), rms_norm(mixer.key_norm, key)
    features = {
        "identity": lambda x: x,
        "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
        "relu": lambda x: np.maximum(x, 0),
    }[options.get("feature_map", "identity")]
    query, key = features(query), features(key)
    if "rope_theta" in options:
        query, key = rotate(query, options["rope_theta"]), rotate(key, options["rope_theta"])
    out = recur(query, key, value, 1.0) / math.sqrt(key.shape[-1])
    if options.get("normalize"):
        total = recur(query, key, np.ones_like(value[..., :1]), 1.0) / math.sqrt(key.shape[-1])
        out = out / (total + 1e-6)
    if options.get("out_norm", True):
        out = rms_norm(mixer.out_norm, out)
    check(mixer, apply(mixer.out, out))


@pytest.mark.parametrize(
    "options", [dict(), dict(rope_theta=None, value_dim=6, head_dim=5, short_conv=4, chunk=4)]
)
def test_retnet(options):
    mixer, x = build("retnet", **options), tokens()
    query, key, value = (apply(module, x) for module in (mixer.query, mixer.key, mixer.value))
    if options.get("rope_theta", 10000.0):
        query, key = rotate(query, 10000.0), rotate(key, 10000.0)
    decay = np.array([1 - 1 / 32, 1 - 1 / 64])[None, None, :, None]
    out = recur(query, key, value, decay) / math.sqrt(key.shape[-1])
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
    check(mixer, apply(mixer.out, out * silu(apply(mixer.gate, x))))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(expand_k=1.0, expand_v=2.0, gate_rank=3, gate_temperature=0.5, short_conv=4, chunk=4),
    ],
)
def test_gla(options):
    mixer, x = build("gla", **options), tokens()
    query, key, value = (apply(module, x) for module in (mixer.query, mixer.key, mixer.value))
    decay = (1 / (1 + np.exp(-apply(mixer.decay, x)))) ** (1 / options.get("gate_temperature", 16))
    out = recur(query, key, value, decay) / math.sqrt(key.shape[-1])
    check(mixer, apply(mixer.out, rms_norm(mixer.norm.norm, out) * silu(apply(mixer.gate, x))))


@pytest.mark.parametrize(
    "options", [dict(), dict(expand=1.5, state_size=5, step_rank=3, short_conv=4, chunk=4)]
)
def test_mamba(options):
    mixer, x = build("mamba", **options), tokens()
    u = silu(apply(mixer.inputs, x))
    step = softplus(apply(mixer.step, u) + array(mixer.dt_bias))
    b, c, rate = apply(mixer.B, u), apply(mixer.C, u), np.exp(array(mixer.A_log))
    y = array(mixer.D) * u
    for i, t, d in np.ndindex(*u.shape):
        for s in range(t + 1):
            decay = np.exp(-rate[d] * step[i, s + 1 : t + 1, d].sum())
            y[i, t, d] += np.sum(c[i, t] * decay * b[i, s]) * step[i, s, d] * u[i, s, d]
    check(mixer, apply(mixer.out, y * silu(apply(mixer.gate, x))))


@pytest.mark.parametrize("options", [dict(state_size=7), dict(expand=1.0, short_conv=4, chunk=4)])
def test_mamba2(options):
    mixer, x = build("mamba2", **options), tokens()
    u, b, c = (silu(apply(module, x)) for module in (mixer.inputs, mixer.B, mixer.C))
    step = softplus(apply(mixer.step, x) + array(mixer.dt_bias))
    decay = np.exp(-step * np.exp(array(mixer.A_log)))[..., None]
    b, c = (np.repeat(a[:, :, None], HEADS, 2) for a in (b, c))
    y = recur(c, b, step[..., None] * u, decay) + array(mixer.D)[:, None] * u
    y = (y * silu(apply(mixer.gate, x))).reshape(BATCH, LENGTH, -1)
    check(mixer, apply(mixer.out, rms_norm(mixer.norm.norm, y).reshape(u.shape)))


@pytest.mark.parametrize("name", ["softmax", "parallax", "lla"])
def test_options_around_the_operator(name):
    """Grouped heads, rotation, convolutions and the scale, in front of a dense evaluation."""
    options = {"ridge": 0.7} if name == "lla" else {}
    mixer = build(
        name, num_kv_heads=1, rope_theta=50.0, short_conv=3, relative_scale=2.0, **options
    )
    x, dim = tokens(), WIDTH // HEADS
    query, key, value = (apply(module, x) for module in (mixer.query, mixer.key, mixer.value))
    query, key = rms_norm(mixer.query_norm, query), rms_norm(mixer.key_norm, key)
    query, key = rotate(query, 50.0), rotate(key, 50.0)
    probe = rotate(apply(mixer.probe, x), 50.0) if name == "parallax" else query
    out = np.zeros(query.shape)
    for b, i, n in np.ndindex(*query.shape[:3]):
        q, keys, values = query[b, i, n], key[b, : i + 1, 0], value[b, : i + 1, 0]
        p = np.exp(2 / math.sqrt(dim) * keys @ q)
        p /= p.sum()
        if name == "parallax":
            p = p * (1 - (keys - p @ keys) @ probe[b, i, n])
        if name == "lla":
            # Normal equations of the ridge regression on (1, k - q), whose first is the intercept.
            design = np.concatenate([np.ones((i + 1, 1)), keys - q], 1)
            penalty = np.diag([0.0] + [0.7] * dim)
            moments = design.T @ (p[:, None] * design) + penalty
            out[b, i, n] = np.linalg.solve(moments, design.T @ (p[:, None] * values))[0]
        else:
            out[b, i, n] = p @ values
    check(mixer, apply(mixer.out, out))


def test_initial_values():
    mamba = mixers.create("mamba", 64, 4, rngs=nnx.Rngs(3))
    np.testing.assert_allclose(
        np.exp(array(mamba.A_log)), np.tile(np.arange(1, 17), (128, 1)), 1e-6
    )
    np.testing.assert_array_equal(array(mamba.D), 1.0)
    assert mamba.step.up.kernel.shape == (4, 128)
    assert 0.4 < np.abs(array(mamba.step.up.kernel)).max() <= 0.5
    mamba2 = mixers.create("mamba2", 64, 128, rngs=nnx.Rngs(4), state_size=1)
    rates = np.exp(array(mamba2.A_log))
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    for mixer in (mamba, mamba2):
        steps = softplus(array(mixer.dt_bias))
        assert 1e-3 * 0.999 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1 * 1.001
        assert abs(np.log(steps).mean() - math.log(1e-2)) < 0.4  # uniform in the logarithm
    convolution = parts.ShortConvolution((64,), 4, use_bias=True, rngs=nnx.Rngs(5))
    for parameter in (convolution.filter, convolution.bias):
        assert 0.45 < np.abs(array(parameter)).max() <= 0.5


def test_l2_normalize():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16)
    np.testing.assert_allclose(
        parts.l2_normalize(x).astype(jnp.float32), [[0.6, 0.8], [0.0, 0.0]], rtol=2.0**-8
    )
    assert parts.l2_normalize(x).dtype == jnp.bfloat16
