"""The synthetic task: its contract, sequence by sequence."""

import dataclasses

import jax
import numpy as np
import pytest

from lla import estimators
from lla.tasks.test_time_regression import Task, generate, oracle

draw = jax.jit(generate, static_argnums=(1, 2))  # much quicker to compile than op by op
TASK = Task(dim=8, length=96, segment_length=32, noise=0.0)


def fit(keys, values):
    return np.linalg.lstsq(np.asarray(keys, np.float64), values, rcond=None)[0]


@pytest.mark.parametrize("target", ["piecewise_linear", "smooth"])
def test_shapes_norms_and_segments(target):
    task = dataclasses.replace(TASK, target=target, length=100)
    batch = draw(0, 3, task)
    for array in batch[:4]:
        assert array.shape == (3, 100, 8)
        assert array.dtype == np.float32
    for array in (batch.keys, batch.queries):
        np.testing.assert_allclose(np.sum(np.square(array), -1), 8.0, rtol=1e-5)
    np.testing.assert_array_equal(batch.segments, np.arange(100) // 32)
    assert not np.isin(np.asarray(batch.queries), np.asarray(batch.keys)).any()


def test_one_linear_map_a_segment_and_not_one_for_all():
    batch = jax.tree.map(np.asarray, draw(0, 2, TASK))
    maps = []
    for segment in range(3):
        inside = batch.segments == segment
        weights = fit(batch.keys[0, inside], batch.values[0, inside])
        maps.append(weights)
        # Without noise the map found from the pairs gives the targets of the fresh queries.
        np.testing.assert_allclose(
            batch.queries[0, inside] @ weights, batch.targets[0, inside], atol=1e-4
        )
    assert np.abs(maps[0] - maps[1]).max() > 0.1
    everywhere = batch.keys[0] @ fit(batch.keys[0], batch.values[0]) - batch.values[0]
    assert np.mean(everywhere**2) > 0.1


def test_targets_have_unit_variance_and_noise_is_as_asked():
    task = Task(dim=16, length=256, segment_length=64, noise=0.5)
    noisy, clean = draw(3, 32, task), draw(3, 32, dataclasses.replace(task, noise=0.0))
    assert abs(np.var(noisy.targets) - 1.0) < 0.1
    np.testing.assert_allclose(np.std(noisy.values - clean.values), 0.5, rtol=0.02)
    np.testing.assert_array_equal(noisy.keys, clean.keys)


def test_smooth_target_is_one_nonlinear_map():
    task = dataclasses.replace(TASK, target="smooth", length=256, segment_length=64)
    batch = jax.tree.map(np.asarray, draw(0, 1, task))
    inside = batch.segments == 0
    left = batch.keys[0, inside] @ fit(batch.keys[0, inside], batch.values[0, inside])
    assert np.mean((left - batch.values[0, inside]) ** 2) > 1e-3
    # The map does not change at a border, only the law of the keys does.
    same = dataclasses.replace(task, segment_length=256, iid_keys=True)
    other = dataclasses.replace(task, iid_keys=True)
    np.testing.assert_allclose(draw(0, 1, same).values, draw(0, 1, other).values, atol=1e-5)


def test_centres_differ_between_segments_unless_keys_are_iid():
    task = Task(dim=32, length=512, segment_length=256)
    for iid, expected in ((False, False), (True, True)):
        batch = draw(1, 1, dataclasses.replace(task, iid_keys=iid))
        first, second = np.asarray(batch.keys[0]).reshape(2, 256, 32).mean(axis=1)
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert (cosine > 0.9) == expected


def test_pure_in_the_seed_and_sequences_do_not_depend_on_their_number():
    few, again, many = draw(5, 2, TASK), generate(5, 2, TASK), draw(5, 4, TASK)
    other = draw(6, 2, TASK)
    for a, b, c, d in zip(few[:4], again[:4], many[:4], other[:4], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # outside jit, fused otherwise
        np.testing.assert_array_equal(a, c[:2])
        assert np.abs(a - d).max() > 0.1
    assert np.abs(few.keys[0] - few.keys[1]).max() > 0.1


def test_oracle_knows_the_segments():
    task = dataclasses.replace(TASK, noise=0.1, length=100)  # the last segment is cut short
    batch = draw(0, 16, task)
    out = jax.jit(oracle, static_argnums=1)(batch, task)
    assert out.shape == batch.targets.shape
    told = np.mean(np.square(out - batch.targets), axis=(0, 2))
    plain = jax.jit(estimators.create("mesanet"))(batch.queries, batch.keys, batch.values)
    untold = np.mean(np.square(plain - batch.targets), axis=(0, 2))
    np.testing.assert_allclose(out[:, :32], plain[:, :32], atol=1e-4)  # same ridge, one segment
    assert told[40:].mean() < 0.5 * untold[40:].mean()
    assert told[28:32].mean() < 0.1 < told[32:36].mean()  # it starts afresh
    with pytest.raises(ValueError, match="piecewise_linear"):
        oracle(batch, dataclasses.replace(task, target="smooth"))


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"segment_length": -1}, {"noise": -0.1}, {"target": "cubic"}]
)
def test_wrong_tasks_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Task(**wrong)


def test_published_ordering_at_the_central_point():
    """LLA below softmax and below MesaNet without decay at d = 64, S = 256."""
    batch = draw(11, 4, Task(dim=64, segment_length=256))
    error = {
        name: float(
            np.mean(np.square(jax.jit(estimators.create(name))(*batch[:3]) - batch.targets))
        )
        for name in ("lla", "softmax", "mesanet")
    }
    assert error["lla"] < 0.5 * error["softmax"]
    assert error["lla"] < 0.5 * error["mesanet"]
