"""Every estimator against formulas written out in NumPy, and the properties all of them share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla import estimators

RECURRENT = {
    "linear_attention": {"relative_rate": 1.5},
    "gated_linear_attention": {"decay": 0.9, "relative_rate": 1.5},
    "deltanet": {"beta": 0.8},
    "gated_deltanet": {"decay": 0.95, "beta": 1.2},
    "mesanet": {"relative_ridge": 0.02},
    "mesanet decay": {"decay": 0.9, "relative_ridge": 0.02},
}
ALL = {"lla": {}, "softmax": {}, **RECURRENT}


def make(label, **options):
    return jax.jit(estimators.create(label.split()[0], **(ALL[label] | options)))


def draw(batch=2, length=37, dim=8, value_dim=5, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=shape)
        return x * np.sqrt(shape[-1] / np.sum(x * x, axis=-1, keepdims=True))

    queries, keys = unit(batch, length, dim), unit(batch, length, dim)
    values = rng.normal(size=(batch, length, value_dim))
    return tuple(x.astype(dtype) for x in (queries, keys, values))


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def naive(label, queries, keys, values):
    """One sequence, float64, as the docstrings of the estimators say it."""
    option = estimators.options(label.split()[0]) | ALL[label]
    decay = option.get("decay", 1.0)
    length, dim = keys.shape
    out = np.zeros(values.shape)
    state = np.zeros((dim, values.shape[1]))
    for t in range(length):
        age = decay ** np.arange(t, -1, -1.0)
        past, known = keys[: t + 1], values[: t + 1]
        if "mesanet" in label:
            moment = (age[:, None] * past).T @ past + option["relative_ridge"] * dim * np.eye(dim)
            out[t] = np.linalg.solve(moment, (age[:, None] * past).T @ known).T @ queries[t]
        elif "linear" in label:
            weights = age * (past @ queries[t]) * option["relative_rate"] / dim
            out[t] = weights @ known / age.sum()
        else:
            state = decay * state
            surprise = values[t] - state.T @ keys[t]
            step = option["beta"] / (keys[t] @ keys[t])
            state = state + step * np.outer(keys[t], surprise)
            out[t] = state.T @ queries[t]
    return out


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("label", RECURRENT)
def test_formula(label, form, float64):
    arrays = draw(dtype=np.float64)
    want = np.stack([naive(label, *(x[b] for x in arrays)) for b in range(2)])
    with float64():
        got = np.asarray(make(label, form=form, chunk=16)(*map(jnp.asarray, arrays)))
    assert got.dtype == np.float64
    assert relative(got, want) < 1e-12


@pytest.mark.parametrize("length", [1, 150])
@pytest.mark.parametrize("label", RECURRENT)
def test_chunked_equals_recurrent_in_float32(label, length):
    arrays = draw(length=length)
    chunked = make(label, form="chunked")(*arrays)
    recurrent = np.asarray(make(label, form="recurrent")(*arrays))
    assert chunked.dtype == jnp.float32
    assert relative(chunked, recurrent) < 1e-4


@pytest.mark.parametrize("label", ["mesanet", "mesanet decay"])
def test_mesanet_is_accurate_in_float32_over_a_long_sequence(label, float64):
    arrays = draw(batch=1, length=512, dim=32, value_dim=4, dtype=np.float64)
    got = make(label, relative_ridge=1e-3)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    with float64():
        want = make(label, relative_ridge=1e-3, form="recurrent")(*map(jnp.asarray, arrays))
        want = np.asarray(want)
    assert relative(got, want) < 1e-3


def test_lla_and_softmax_are_the_operators():
    queries, keys, values = draw(length=40)
    heads = tuple(jnp.asarray(x)[:, :, None] for x in (queries, keys, values))
    scale = 2.0 / np.sqrt(8)
    want = lla.local_linear_attention(
        *heads, ridge=1e-2 * 8, scale=scale, implementation="reference"
    )[:, :, 0]
    got = make("lla", relative_scale=2.0, relative_ridge=1e-2)(queries, keys, values)
    assert relative(got, np.asarray(want, np.float64)) < 1e-4
    scores = np.einsum("bth,bsh->bts", queries, keys).astype(np.float64) * scale
    weights = np.where(np.tril(np.ones((40, 40), bool)), np.exp(scores), 0.0)
    want = weights @ values / weights.sum(-1, keepdims=True)
    got = make("softmax", relative_scale=2.0)(queries, keys, values)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("label", ["lla", "softmax"])
def test_grouping_sequences_changes_nothing(label):
    arrays = draw(batch=5, length=33)
    whole = np.asarray(make(label, sequences_at_once=5)(*arrays))
    parts = make(label, sequences_at_once=2)(*arrays)
    assert relative(parts, whole) < 1e-5


@pytest.mark.parametrize("label", ALL)
def test_the_pair_at_the_position_is_read_and_nothing_later(label):
    queries, keys, values = draw(length=70)
    cut = 41  # inside a chunk and inside a block
    other = draw(length=70, seed=1)
    changed = tuple(
        np.concatenate([old[:, :cut], new[:, cut:]], axis=1)
        for old, new in zip((queries, keys, values), other, strict=True)
    )
    predict = make(label)
    before, after = predict(queries, keys, values), predict(*changed)
    np.testing.assert_allclose(before[:, :cut], after[:, :cut], rtol=1e-5, atol=1e-5)
    assert np.abs(before[:, cut:] - after[:, cut:]).max() > 1e-2
    one_value = values.copy()
    one_value[:, cut] += 1.0
    change = np.abs(predict(queries, keys, one_value) - before)
    assert change[:, :cut].max() < 1e-5
    assert change[:, cut].max() > 1e-4


@pytest.mark.parametrize("label", [label for label in RECURRENT if "delta" in label])
def test_zero_keys_give_finite_predictions(label):
    queries, keys, values = draw()
    assert np.array_equal(make(label)(queries, np.zeros_like(keys), values), np.zeros_like(values))


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'mesanet'"):
        estimators.create("mesnet")
    with pytest.raises(ValueError, match=r"option of estimator 'mesanet': 'deccay'.*'decay'"):
        estimators.create("mesanet", deccay=0.9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mesanet", {"decay": 1.5}),
        ("mesanet", {"relative_ridge": 0.0}),
        ("deltanet", {"beta": 2.0}),
        ("gated_deltanet", {"form": "parallel"}),
        ("softmax", {"relative_scale": -1.0}),
    ],
)
def test_options_out_of_range(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        estimators.create(name, **options)


@pytest.mark.parametrize("name", estimators.names())
def test_bad_shapes_are_named(name):
    queries, keys, values = draw()
    predict = estimators.create(name)
    with pytest.raises(ValueError, match=r"\(2, 36, 8\)"):
        predict(queries[:, 1:], keys, values)
    with pytest.raises(ValueError, match="batch, length, dim"):
        predict(queries[0], keys[0], values[0])
    with pytest.raises(ValueError, match="dtype"):
        predict(queries, keys, values.astype(np.float16))


def test_options_may_be_traced():
    arrays = draw()
    for name, options in {
        "lla": {"relative_ridge": 2e-3, "relative_scale": 0.5},
        "mesanet": {"decay": 0.9, "relative_ridge": 2e-3},
        "gated_deltanet": {"decay": 0.9, "beta": 0.7},
        "gated_linear_attention": {"decay": 1.0, "relative_rate": 0.7},
    }.items():

        @jax.jit
        def traced(options, name=name):
            return estimators.create(name, **options)(*arrays)

        want = np.asarray(make(name, **options)(*arrays))
        assert relative(traced(options), want) < 1e-4


def test_options_lists_defaults():
    assert estimators.options("deltanet") == {"beta": 1.0, "form": "chunked", "chunk": 64}
