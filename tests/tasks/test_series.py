"""Real series: shapes, alignment, and that nothing leaks from the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla import estimators
from lla.tasks import series


@pytest.mark.parametrize(("name", "length"), [("sunspots", 309), ("elnino", 732)])
def test_shapes(name, length):
    loaded = series.load(name)
    assert loaded.values.shape == loaded.times.shape == (length,)
    assert np.isfinite(loaded.values).all() and (np.diff(loaded.times) > 0).all()
    problem = series.pairs(loaded.values, delays=6, statistics=60)
    assert problem.keys.shape == problem.queries.shape == (length - 7, 7)
    assert problem.values.shape == problem.targets.shape == problem.last.shape == (length - 7, 1)
    assert problem.target_index[-1] == length - 1


def test_alignment():
    values = np.arange(20.0) ** 2
    problem = series.pairs(values, delays=3, statistics=5)
    z = (values - values[:5].mean()) / values[:5].std()
    i = 4
    target = problem.target_index[i]
    np.testing.assert_allclose(problem.targets[i], z[target])
    np.testing.assert_allclose(problem.queries[i], [*z[target - 1 : target - 4 : -1], 1.0])
    np.testing.assert_allclose(problem.keys[i], [*z[target - 2 : target - 5 : -1], 1.0])
    np.testing.assert_allclose(problem.values[i], z[target - 1])
    np.testing.assert_allclose(problem.last[i], z[target - 1])
    np.testing.assert_allclose(problem.mean + problem.unit * problem.targets[i], values[target])


PREDICT = [jax.jit(estimators.create(name)) for name in ("mesanet", "deltanet", "softmax")]


@pytest.mark.parametrize("embedding", ["plain", "sphere"])
def test_no_prediction_depends_on_its_target_or_later(embedding):
    values = series.load("sunspots").values
    cut = 200  # values from here on are replaced
    changed = values.copy()
    changed[cut:] = np.random.default_rng(0).uniform(0, 100, len(values) - cut)
    predictions = []
    for each in (values, changed):
        problem = series.pairs(each, delays=4, statistics=60, embedding=embedding)
        arrays = [jnp.asarray(x[None], jnp.float32) for x in problem[:3]]
        outs = [predict(*arrays)[0] for predict in PREDICT]
        predictions.append([*outs, series.autoregression(problem), problem.last])
    known = problem.target_index <= cut  # the target at `cut` is the first replaced value
    for before, after in zip(*predictions, strict=True):
        np.testing.assert_allclose(before[known], after[known], rtol=1e-4, atol=1e-4)
        assert np.abs(before[~known] - after[~known]).max() > 0.1


def test_sphere_has_one_norm_and_keeps_the_amplitude():
    values = series.load("sunspots").values
    plain = series.pairs(values, delays=4, statistics=60)
    sphere = series.pairs(values, delays=4, statistics=60, embedding="sphere")
    np.testing.assert_allclose(np.sum(sphere.keys**2, axis=1), 5.0)
    back = sphere.keys[:, :4] / sphere.keys[:, 4:] * 2.0
    np.testing.assert_allclose(back, plain.keys[:, :4], rtol=1e-9, atol=1e-9)


def test_autoregression_is_least_squares_of_the_past():
    values = np.random.default_rng(0).normal(size=60)
    problem = series.pairs(values, delays=3, statistics=30)
    out = series.autoregression(problem)
    coefficients, *_ = np.linalg.lstsq(problem.keys[:41], problem.values[:41], rcond=None)
    np.testing.assert_allclose(out[40], problem.queries[40] @ coefficients, rtol=1e-5)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="sunspots"):
        series.load("moonspots")
    with pytest.raises(ValueError, match="delays"):
        series.pairs(np.ones(5), delays=5, statistics=3)
    with pytest.raises(ValueError, match="embedding"):
        series.pairs(np.arange(9.0), delays=2, statistics=3, embedding="torus")
