"""MAD: the benchmark's accuracy, averaged over classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.tasks.mad import MAD
from tests.tasks.test_mad import arrays, draw, each


def macro(answers, labels, counted, group):
    """The benchmark's accuracy, class by class: the sum over groups, and its weight."""
    total, weight = 0.0, 0
    for start in range(0, len(labels), group):
        rows = slice(start, start + group)
        mask = counted[rows]
        asked, given = labels[rows][mask], answers[rows][mask]
        if not asked.size:
            continue
        classes = sorted(set(asked) | set(given))
        parts = [np.mean(given[asked == c] == c) if (asked == c).any() else 0.0 for c in classes]
        examples = int(mask.any(axis=1).sum())
        total, weight = total + examples * np.mean(parts), weight + examples
    return total, weight


@each
@pytest.mark.parametrize("split", ["train", "test"])
def test_scores_of_a_known_model(kind, split):
    task = MAD(kind=kind, test_examples=13, macro_batch=5)
    batch = draw(task, 0, 1, 8, split)  # of the test set the last five examples, and three beyond
    inputs, labels, counted = arrays(task, 8, split, seed=0, step=1)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*inputs.shape, task.vocab_size)).astype(np.float32)
    right = counted & (rng.random(counted.shape) < 0.6)
    logits[(*np.nonzero(right), labels[right])] = 9.0
    answers = logits.argmax(-1)
    sums = task.metrics(jnp.asarray(logits), batch)
    z = logits[counted].astype(float)
    entropy = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels[counted]]
    np.testing.assert_allclose(sums["loss"], (entropy.sum(), counted.sum()), rtol=1e-5)
    correct = (answers == labels)[counted]
    np.testing.assert_allclose(sums["accuracy"], (correct.sum(), counted.sum()), rtol=1e-6)
    np.testing.assert_allclose(
        sums["macro_accuracy"], macro(answers, labels, counted, 5), rtol=1e-5
    )
    parts = [pair for name, pair in sums.items() if name.startswith("macro_accuracy/")]
    np.testing.assert_allclose(np.sum(parts, axis=0), sums["macro_accuracy"], rtol=1e-5)
    np.testing.assert_allclose(task.loss(jnp.asarray(logits), batch), entropy.mean(), rtol=1e-5)


def test_an_answer_that_is_never_a_label_is_a_class_with_nothing_right():
    task = MAD(kind="selective_copying", vocab_size=5, length=8, copied=3, macro_batch=2)
    batch = {
        "inputs": jnp.zeros((2, 8), jnp.int32),
        "positions": jnp.asarray([[5, 6, 7]] * 2),
        "labels": jnp.asarray([[0, 0, 1], [1, 1, 1]]),
        "weights": jnp.ones((2, 3)),
    }

    def score(answers):
        logits = jax.nn.one_hot(jnp.asarray(answers), 5)
        total, weight = task.metrics(logits, batch)["macro_accuracy"]
        return float(total / weight)

    assert score([[0, 0, 1], [1, 1, 1]]) == 1.0
    assert score([[0, 1, 1], [1, 1, 1]]) == pytest.approx((1 / 2 + 1) / 2)
    assert score([[0, 3, 1], [1, 1, 1]]) == pytest.approx((1 / 2 + 1 + 0) / 3)


@each
def test_chance_is_what_guessing_gives(kind):
    task = MAD(kind=kind, macro_batch=400)
    batch = draw(task, 0, 0, 400, "test")
    _, labels, counted = arrays(task, 400, "test", seed=0)
    values = np.unique(labels[counted])
    rng = np.random.default_rng(0)
    shape = np.asarray(batch["labels"]).shape
    if kind == "compression":
        values = values[:-1]
    answers = rng.choice(values, shape)
    if kind == "compression":
        answers[:, -1] = task.vocab_size - 1
    logits = jnp.asarray(answers)[:, :, None] == jnp.arange(task.vocab_size)[None, None]
    total, weight = task.metrics(logits.astype(jnp.float32), batch)["macro_accuracy"]
    assert weight == pytest.approx(400)
    assert abs(total / weight - task.baselines()["chance"]) < 0.03
