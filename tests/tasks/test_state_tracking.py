"""State tracking: sequences read and simulated by themselves."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.tasks.state_tracking import StateTracking

draw = jax.jit(
    lambda task, seed, step, size, split: task.batch(seed, step, size, split),
    static_argnums=(0, 3, 4),
)


def read(task, tokens):
    """Start, swaps, questions and padding of one sequence, by the documented vocabulary."""
    n = task.num_items
    swaps = list(itertools.combinations(range(n), 2))
    assert tokens[0] == 1
    start = [int(token) - 2 for token in tokens[1 : 1 + n]]
    rest = [int(token) for token in tokens[1 + n :]]
    first_swap, first_question = 2 + n, 2 + n + len(swaps)
    body = [token for token in rest if first_swap <= token < first_question]
    asked = [token - first_question for token in rest[len(body) :] if token]
    padding = rest[len(body) + len(asked) :]
    # In this order and nothing else.
    assert rest[: len(body)] == body and set(padding) <= {0}
    return start, [swaps[token - first_swap] for token in body], asked


@pytest.mark.parametrize(
    "task",
    [
        StateTracking(num_items=2, min_swaps=0, max_swaps=3),
        StateTracking(num_items=5),
        StateTracking(num_items=8, min_swaps=7, max_swaps=7, queries=8),
    ],
    ids=["two", "default", "eight"],
)
@pytest.mark.parametrize("split", ["train", "test", "test_long", "validation"])
def test_labels_are_those_of_a_simulation(task, split):
    size = 100
    batch = {key: np.asarray(array) for key, array in draw(task, 3, 5, size, split).items()}
    low, high = task.min_swaps, task.max_swaps
    if split == "test_long":
        low, high = high + 1, 2 * high
    assert batch["inputs"].shape == (size, 1 + task.num_items + high + task.queries)
    assert batch["positions"].shape == batch["labels"].shape == (size, task.queries)
    counts = set()
    for b in range(size):
        start, swaps, asked = read(task, batch["inputs"][b])
        assert sorted(start) == list(range(task.num_items))
        assert len(set(asked)) == len(asked) == task.queries
        state = list(start)
        for i, j in swaps:
            state[i], state[j] = state[j], state[i]
        for q, position in enumerate(asked):
            assert batch["labels"][b, q] == 2 + state[position]
            assert batch["positions"][b, q] == 1 + task.num_items + len(swaps) + q
        assert batch["swaps"][b] == len(swaps)
        counts.add(len(swaps))
    assert min(counts) >= low and max(counts) <= high
    assert len(counts) >= min(4, high - low + 1)


def test_everything_is_uniform():
    task = StateTracking(num_items=3, min_swaps=2, max_swaps=5)
    batch = {key: np.asarray(array) for key, array in draw(task, 0, 0, 6000, "train").items()}
    tokens = batch["inputs"]
    asked = np.take_along_axis(tokens, batch["positions"], axis=1)[:, 0]
    for found, kinds in (
        (tokens[:, 1] * 100 + tokens[:, 2] * 10 + tokens[:, 3], 6),  # starts
        (tokens[:, 4], 3),  # first swaps
        (batch["swaps"], 4),
        (asked, 3),
        (batch["labels"][:, 0], 3),
    ):
        values, counts = np.unique(found, return_counts=True)
        assert len(values) == kinds
        np.testing.assert_allclose(counts / 6000, 1 / kinds, atol=4 * math.sqrt(0.25 / 6000))


@pytest.mark.parametrize(("items", "low", "high"), [(2, 2, 4), (3, 1, 2), (4, 2, 3)])
def test_baselines_against_counting(items, low, high):
    task = StateTracking(num_items=items, min_swaps=low, max_swaps=high)
    found = task.baselines()
    assert found["chance"] == 1 / items and found["tracking"] == 1.0
    swaps = list(itertools.combinations(range(items), 2))

    def unmoved(counts):
        shares = []
        for count in counts:  # all series of swaps there are
            series = list(itertools.product(swaps, repeat=count))
            stayed = 0
            for each in series:
                state = list(range(items))
                for i, j in each:
                    state[i], state[j] = state[j], state[i]
                stayed += sum(item == position for position, item in enumerate(state))
            shares.append(stayed / len(series) / items)
        return np.mean(shares)

    np.testing.assert_allclose(found["ignore_swaps"], unmoved(range(low, high + 1)), atol=1e-12)
    long = range(high + 1, min(2 * high, 6) + 1)
    if len(long) == high:
        np.testing.assert_allclose(found["ignore_swaps_test_long"], unmoved(long), atol=1e-12)


def test_baseline_of_ignoring_swaps_against_the_data():
    task = StateTracking(num_items=8, min_swaps=1, max_swaps=6, queries=8)
    batch = {key: np.asarray(array) for key, array in draw(task, 1, 0, 2000, "test").items()}
    first_question = task.vocab_size - 8
    asked = np.take_along_axis(batch["inputs"], batch["positions"], axis=1) - first_question
    at_start = np.take_along_axis(batch["inputs"], 1 + asked, axis=1)
    assert abs(np.mean(at_start == batch["labels"]) - task.baselines()["ignore_swaps"]) < 0.02


def test_metrics_by_number_of_swaps():
    task = StateTracking(num_items=3, min_swaps=16, max_swaps=64)
    for split, names in (
        ("test", ["16-27", "28-39", "40-51", "52-64"]),
        ("test_long", ["65-80", "81-96", "97-112", "113-128"]),
    ):
        batch = draw(task, 0, 0, 64, split)
        right = np.random.default_rng(0).random(64) < 0.5
        logits = np.zeros((64, 1, task.vocab_size), np.float32)
        label = np.where(right, batch["labels"][:, 0], 0)
        np.put_along_axis(logits, label[:, None, None], 1.0, axis=2)
        sums = task.metrics(jnp.asarray(logits), batch)
        assert sums.keys() == {"loss", "accuracy", *(f"accuracy/swaps_{name}" for name in names)}
        for name in names:
            low, high = map(int, name.split("-"))
            inside = (np.asarray(batch["swaps"]) >= low) & (np.asarray(batch["swaps"]) <= high)
            expected = np.sum(right & inside), np.sum(inside)
            np.testing.assert_array_equal(sums[f"accuracy/swaps_{name}"], expected)
            assert inside.any()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("num_items", dict(num_items=1)),
        ("min_swaps", dict(min_swaps=-1)),
        ("min_swaps", dict(min_swaps=65)),
        ("max_swaps", dict(min_swaps=0, max_swaps=0)),
        ("queries", dict(queries=6)),
        ("queries", dict(queries=0)),
    ],
)
def test_wrong_options_are_refused(name, wrong):
    with pytest.raises(ValueError, match=name):
        StateTracking(**wrong)
