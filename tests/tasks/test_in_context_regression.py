"""In-context regression: what tokens hold, what counts, and that the oracle is a floor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla import estimators
from lla.tasks.in_context_regression import InContextRegression

draw = jax.jit(
    lambda task, seed, step, size, split="train": task.batch(seed, step, size, split),
    static_argnums=(0, 3, 4),
)
TASK = InContextRegression(dim=6, value_dim=4, length=50, segment_length=20)


def as_numpy(batch):
    return {key: np.asarray(array) for key, array in batch.items()}


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        InContextRegression(dim=3, value_dim=5, length=10, segment_length=4, token_dim=6),
        InContextRegression(length=8),
    ],
    ids=["narrow_values", "wide_values", "paper_dim"],
)
def test_tokens(task):
    batch = as_numpy(draw(task, 1, 2, 3))
    dim, value_dim = task.dim, task.output_dim
    widest = max(dim, value_dim)
    inputs = batch["inputs"]
    assert inputs.shape == (3, 2 * task.length, task.input_dim)
    assert batch["targets"].shape == batch["clean"].shape == (3, task.length, value_dim)
    x, y = inputs[:, 0::2], inputs[:, 1::2]
    np.testing.assert_allclose(np.sum(x[..., :dim] ** 2, axis=-1), dim, rtol=1e-5)
    np.testing.assert_array_equal(y[..., :value_dim], batch["targets"])
    assert (x[..., widest] == 1).all() and (y[..., widest] == 0).all()
    assert not x[..., dim:widest].any() and not y[..., value_dim:widest].any()
    assert not inputs[..., widest + 1 :].any()


def test_paper_dimensions():
    task = InContextRegression()
    assert (task.input_dim, task.output_dim, task.max_length) == (64, 32, 1024)
    assert dataclasses.replace(task, dim=16).input_dim == 32


def test_one_map_a_segment_fresh_in_every_sequence():
    batch = as_numpy(draw(TASK, 0, 0, 2))
    maps = []
    for b in range(2):
        for segment in range(3):
            inside = np.arange(50) // 20 == segment
            x, clean = batch["inputs"][b, 0::2, :6][inside], batch["clean"][b, inside]
            found = np.linalg.lstsq(x.astype(np.float64), clean, rcond=None)[0]
            np.testing.assert_allclose(x @ found, clean, atol=1e-5)
            maps.append(found)
    for i, one in enumerate(maps):
        assert all(np.abs(one - other).max() > 0.1 for other in maps[:i])
    centres = [batch["inputs"][0, 2 * i : 2 * (i + 20) : 2, :6].mean(axis=0) for i in (0, 20)]
    assert np.abs(centres[0] - centres[1]).max() > 0.2


def test_scale_and_noise():
    task = InContextRegression(dim=16, length=128, segment_length=32, noise=0.5)
    batch = as_numpy(draw(task, 3, 0, 32))
    assert abs(np.mean(batch["clean"] ** 2) - 1.0) < 0.05
    noise = batch["targets"] - batch["clean"]
    np.testing.assert_allclose(np.std(noise), 0.5, rtol=0.02)
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.02
    exact = as_numpy(draw(dataclasses.replace(task, noise=0.0), 3, 0, 32))
    np.testing.assert_array_equal(exact["targets"], exact["clean"])
    np.testing.assert_allclose(exact["clean"], batch["clean"], atol=1e-6)


def ridge_of_the_past(task, batch):
    """The oracle, pair by pair in float64."""
    x = batch["inputs"][:, 0::2, : task.dim].astype(np.float64)
    y = batch["targets"].astype(np.float64)
    out = np.zeros(y.shape)
    for b in range(len(x)):
        for t in range(task.length):
            start = t // task.segment_length * task.segment_length
            past, values = x[b, start:t], y[b, start:t]
            moment = past.T @ past + task.noise**2 * task.dim * np.eye(task.dim)
            out[b, t] = x[b, t] @ np.linalg.solve(moment, past.T @ values)
    return out


def test_oracle_is_ridge_on_the_past_of_the_segment():
    batch = draw(TASK, 2, 0, 3)
    found = jax.jit(TASK.oracle)(batch)
    exact = ridge_of_the_past(TASK, as_numpy(batch))
    # The condition of the systems is at most 20 / 0.01 = 2e3: float32 keeps three digits.
    np.testing.assert_allclose(found, exact, atol=1e-3)
    assert not exact[:, ::20].any() and not found[:, ::20].any()
    # Neither y_t nor anything later is read at t, and no other segment.
    changed = dict(batch, targets=batch["targets"].at[:, 30:].add(5.0))
    again = np.asarray(jax.jit(TASK.oracle)(changed))
    np.testing.assert_array_equal(again[:, :31], found[:, :31])
    assert np.abs(again[:, 31:40] - found[:, 31:40]).max() > 0.1
    assert np.abs(again[:, 40:] - found[:, 40:]).max() > 0.1
    earlier = dict(batch, targets=batch["targets"].at[:, :20].add(5.0))
    np.testing.assert_array_equal(jax.jit(TASK.oracle)(earlier)[:, 20:], found[:, 20:])


def test_oracle_is_a_floor():
    task = InContextRegression(dim=8, length=96, segment_length=32, noise=0.3)
    batch = draw(task, 0, 0, 64)
    x, y = batch["inputs"][:, 0::2, :8], batch["targets"]

    def shift(array):
        return jnp.pad(array, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    def error(out):  # by sequence
        return np.mean(np.asarray(task.errors(out, batch)), axis=1)

    floor = error(jax.jit(task.oracle)(batch))
    rivals = {
        f"{name} {options}": jax.jit(estimators.create(name, **options))(x, shift(x), shift(y))
        for name, options in (
            ("mesanet", {"relative_ridge": 0.09}),
            ("mesanet", {"relative_ridge": 0.09, "decay": 0.9}),
            ("softmax", {}),
            ("lla", {}),
            ("deltanet", {}),
        )
    }
    rivals["zero"], rivals["previous"] = jnp.zeros_like(y), shift(y)
    for strength in (0.1, 10.0):  # the same estimator with other ridges
        other = dataclasses.replace(task, noise=task.noise * strength**0.5)
        rivals[f"ridge times {strength}"] = jax.jit(other.oracle)(batch)
    for name, out in rivals.items():
        more = error(out) - floor
        assert more.mean() > 3 * more.std() / 8, name
    assert abs(error(rivals["zero"]).mean() - 1.0) < 0.05


def test_metrics_by_segment_and_position():
    batch = draw(TASK, 4, 0, 5, "test")
    out = np.random.default_rng(0).normal(size=(5, 100, 4)).astype(np.float32)
    sums = TASK.metrics(jnp.asarray(out), batch)
    predicted, arrays = out[:, 0::2].astype(np.float64), as_numpy(batch)
    errors = np.mean((predicted - arrays["clean"]) ** 2, axis=-1)
    observed = np.mean((predicted - arrays["targets"]) ** 2, axis=-1)
    pair = np.arange(50)
    slices = {
        "segment_0": pair < 20,
        "segment_1": (pair >= 20) & (pair < 40),
        "segment_2": pair >= 40,
        "position_0-4": pair % 20 < 5,
        "position_5-9": (pair % 20 >= 5) & (pair % 20 < 10),
        "position_10-19": pair % 20 >= 10,
    }
    expected = {
        f"mse/{name}": (errors[:, inside].sum(), 5 * inside.sum())
        for name, inside in slices.items()
    }
    expected["mse"] = (errors.sum(), 250)
    expected["loss"] = (observed.sum(), 250)
    expected["normalised_mse"] = (errors.sum(), np.mean(arrays["clean"] ** 2, axis=-1).sum())
    assert sums.keys() == expected.keys()
    for name, numbers in expected.items():
        np.testing.assert_allclose(sums[name], numbers, rtol=1e-5)
    np.testing.assert_allclose(TASK.errors(jnp.asarray(out), batch), errors, rtol=1e-5)
    zero = TASK.metrics(jnp.zeros((5, 50, 4)), batch)["normalised_mse"]
    np.testing.assert_allclose(zero[0], zero[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            dict(length=32, segment_length=4),
            {"segment_0", "segment_1", "segment_2-7", "position_0", "position_1", "position_2-3"},
        ),
        (dict(length=3, segment_length=8), {"segment_0", "position_0-2"}),
        (
            dict(length=16, segment_length=8),
            {"segment_0", "segment_1", "position_0-1", "position_2-3", "position_4-7"},
        ),
    ],
)
def test_names_of_slices(options, names):
    task = InContextRegression(dim=2, **options)
    sums = task.metrics(jnp.zeros((1, task.length, 2)), draw(task, 0, 0, 1))
    assert {name.removeprefix("mse/") for name in sums if "/" in name} == names


def test_baselines():
    found = InContextRegression(dim=8, length=64, segment_length=32).baselines()
    assert found.keys() == {"zero", "previous", "oracle"}
    assert found["oracle"] < 0.5 < found["zero"] == 1.0
    # Orthogonal inputs would give 2 + noise^2; these share a centre.
    assert 0.8 < found["previous"] < 1.4
    task = InContextRegression(dim=8, length=64, segment_length=32)
    exact = []
    for step in range(8):
        batch = as_numpy(draw(task, 0, step, 8, "test"))
        exact.append(np.mean((ridge_of_the_past(task, batch) - batch["clean"]) ** 2))
    np.testing.assert_allclose(found["oracle"], np.mean(exact), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dim", dict(dim=0)),
        ("value_dim", dict(value_dim=-3)),
        ("length", dict(length=1.5)),
        ("segment_length", dict(segment_length=0)),
        ("spread", dict(spread=-1.0)),
        ("noise", dict(noise=float("nan"))),
        ("token_dim", dict(dim=8, token_dim=8)),
    ],
)
def test_wrong_options_are_refused(name, wrong):
    with pytest.raises(ValueError, match=name):
        InContextRegression(**wrong)
