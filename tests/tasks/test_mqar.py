"""MQAR: Zoology's contract, example by example, and its sampling laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.tasks.mqar import MQAR
from lla.tasks.sampling import distinct, permuted

draw = jax.jit(
    lambda task, seed, step, size, split: task.batch(seed, step, size, split),
    static_argnums=(0, 3, 4),
)
# Probability that a statistic with this many degrees of freedom exceeds the bound: 1e-4.
CHI_SQUARED = {4: 23.5, 11: 37.4, 23: 53.0, 59: 105.6}


def statistic(counts, probabilities):
    expected = np.sum(counts) * np.asarray(probabilities)
    return np.sum((counts - expected) ** 2 / expected)


@pytest.mark.parametrize(
    "task",
    [
        MQAR(),
        MQAR(length=512, pairs=64),
        MQAR(length=16, pairs=4, vocab_size=10),  # every key and every place is used
        MQAR(length=40, pairs=(3, 10, 5), vocab_size=25, train_examples=None),
    ],
    ids=["paper_64", "paper_512", "full", "mixed"],
)
@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_contract(task, split):
    batch = {key: np.asarray(array) for key, array in draw(task, 7, 3, 60, split).items()}
    first_value = task.vocab_size // 2
    seen = set()
    for b in range(60):
        tokens, pairs = batch["inputs"][b], int(batch["pairs"][b])
        seen.add(pairs)
        assert tokens.shape == (task.length,)
        # Read the context, then find the queries without the help of `positions`.
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < first_value
        assert values.min() >= first_value and values.max() < task.vocab_size
        (asked,) = np.nonzero(tokens[2 * pairs :])
        assert len(asked) == pairs and (asked % 2 == 0).all()
        assert asked.max() // 2 < (task.length - 2 * pairs) // 2
        assert sorted(tokens[2 * pairs + asked]) == sorted(keys)

        exists = np.arange(batch["weights"].shape[1]) < pairs
        np.testing.assert_array_equal(batch["weights"][b], exists)
        positions, labels = batch["positions"][b][exists], batch["labels"][b][exists]
        assert set(positions) == set(2 * pairs + asked)
        told = dict(zip(keys, values, strict=True))
        np.testing.assert_array_equal(tokens[positions], keys)
        np.testing.assert_array_equal(labels, [told[key] for key in tokens[positions]])
    assert seen == set(task.pairs if isinstance(task.pairs, tuple) else [task.pairs])


@pytest.mark.parametrize("fillers", [False, True])
def test_several_lengths_are_taken_in_turn(fillers):
    cases = [(16, 2), (40, 2), (24, 5)]
    lengths, pairs = zip(*cases, strict=True)
    task = MQAR(
        length=lengths, pairs=pairs, vocab_size=25, train_examples=None, random_fillers=fillers
    )
    assert task.max_length == 40
    batch = {key: np.asarray(array) for key, array in draw(task, 7, 3, 60, "train").items()}
    assert batch["inputs"].shape == (60, 40) and batch["labels"].shape == (60, 5)
    seen = list(zip(batch["lengths"].tolist(), batch["pairs"].tolist(), strict=True))
    assert sorted(seen) == sorted(cases * 20)
    for b, (length, count) in enumerate(seen):
        tokens = batch["inputs"][b]
        assert (tokens[length:] == 0).all()
        exists = np.arange(5) < count
        np.testing.assert_array_equal(batch["weights"][b], exists)
        told = dict(zip(tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2], strict=True))
        positions = batch["positions"][b][exists]
        assert len(set(positions)) == len(told) == count
        assert positions.min() >= 2 * count and positions.max() < length
        np.testing.assert_array_equal(
            batch["labels"][b][exists], [told[key] for key in tokens[positions]]
        )
        rest = np.setdiff1d(np.arange(2 * count, length), positions)
        assert fillers or (tokens[rest] == 0).all()


def test_one_number_of_pairs_serves_all_lengths():
    task = MQAR(length=(16, 8), pairs=2, vocab_size=25)
    assert task == MQAR(length=[16, 8], pairs=2, vocab_size=25)
    batch = draw(task, 0, 0, 8, "test")
    assert set(np.asarray(batch["lengths"]).tolist()) == {8, 16}
    assert (np.asarray(batch["pairs"]) == 2).all()
    alone = draw(MQAR(length=16, pairs=2, vocab_size=25), 0, 0, 8, "test")
    assert alone.keys() == batch.keys() - {"lengths"}
    assert set(task.metrics(jnp.ones((8, 16, 25)), batch)) >= {
        "accuracy/length_8",
        "accuracy/length_16",
    }


def test_gaps_of_a_shorter_sequence_have_the_law_of_its_own_room():
    task = MQAR(length=(24, 10), pairs=1, train_examples=None)
    batch = draw(task, 1, 0, 20_000, "train")
    gaps = np.asarray(batch["positions"])[:, 0] // 2 - 1
    for length, places in ((24, 11), (10, 4)):
        law = np.arange(1, places + 1) ** (0.01 - 1)
        counts = np.bincount(gaps[np.asarray(batch["lengths"]) == length], minlength=places)
        assert len(counts) == places and counts.sum() == 10_000
        assert statistic(counts, law / law.sum()) < CHI_SQUARED[11]


def test_random_fillers_are_uniform_and_change_nothing_else():
    options = dict(length=24, pairs=(2, 4), vocab_size=12, train_examples=None)
    plain, filled = (
        {
            key: np.asarray(array)
            for key, array in draw(
                MQAR(random_fillers=fillers, **options), 3, 0, 4000, "train"
            ).items()
        }
        for fillers in (False, True)
    )
    empty = plain["inputs"] == 0
    np.testing.assert_array_equal(plain["inputs"][~empty], filled["inputs"][~empty])
    for key in plain.keys() - {"inputs"}:
        np.testing.assert_array_equal(plain[key], filled[key])
    drawn = filled["inputs"][empty]
    counts = np.bincount(drawn, minlength=12)
    assert len(counts) == 12 and statistic(counts, np.full(12, 1 / 12)) < CHI_SQUARED[11]
    # Independent of one another: neighbours are equal as often as chance has it.
    both = empty[:, :-1] & empty[:, 1:]
    equal = (filled["inputs"][:, :-1] == filled["inputs"][:, 1:])[both]
    assert abs(equal.mean() - 1 / 12) < 5 * np.sqrt(1 / 12 / equal.size)


def gaps_of(task, size):
    batch = draw(task, 1, 0, size, "train")
    return np.asarray(batch["positions"]) // 2 - np.asarray(batch["pairs"])[:, None]


def successive(law, order):
    """Probability of drawing `order` one after the other, without replacement."""
    left, product = 1.0, 1.0
    for item in order:
        product *= law[item] / left
        left -= law[item]
    return product


@pytest.mark.parametrize("power_a", [0.01, 0.6])
def test_gaps_follow_successive_sampling(power_a):
    # Two gaps of four, in order: 12 outcomes, all of whose probabilities are known.
    gaps = gaps_of(MQAR(length=12, pairs=2, power_a=power_a, train_examples=None), 20_000)
    outcomes = list(itertools.permutations(range(4), 2))
    counts = np.asarray([np.sum((gaps == outcome).all(axis=1)) for outcome in outcomes])
    assert counts.sum() == 20_000

    def law(a):
        weights = a * np.arange(1, 5) ** (a - 1)
        return weights / weights.sum()

    exact = [successive(law(power_a), outcome) for outcome in outcomes]
    np.testing.assert_allclose(sum(exact), 1.0)
    assert statistic(counts, exact) < CHI_SQUARED[11]
    # The test sees a law that starts at r = 2, and one that is a little off.
    shifted = np.arange(2, 6) ** (power_a - 1)
    for wrong in (shifted / shifted.sum(), law(power_a + 0.15)):
        assert statistic(counts, [successive(wrong, outcome) for outcome in outcomes]) > 60


def test_gaps_of_mixed_pairs_have_the_law_of_their_own_room():
    task = MQAR(length=12, pairs=(1, 3), train_examples=None)
    batch = draw(task, 1, 0, 20_000, "train")
    gaps = np.asarray(batch["positions"])[:, 0] // 2 - np.asarray(batch["pairs"])
    for pairs, places in ((1, 5), (3, 3)):
        law = np.arange(1, places + 1) ** (0.01 - 1)
        first = gaps[np.asarray(batch["pairs"]) == pairs]
        counts = np.bincount(first, minlength=places)
        assert len(counts) == places and counts.sum() == 10_000
        assert statistic(counts, law / law.sum()) < CHI_SQUARED[4]


def test_distinct_numbers_are_uniform_over_all_orders():
    keys = jax.random.split(jax.random.key(0), 20_000)
    samples = np.asarray(jax.jit(jax.vmap(lambda key: distinct(key, (4, 5), 3)))(keys))
    for row, population in enumerate((4, 5)):
        orders = list(itertools.permutations(range(population), 3))
        code = samples[:, row] @ [25, 5, 1]
        counts = np.asarray([np.sum(code == np.dot(order, [25, 5, 1])) for order in orders])
        assert counts.sum() == 20_000  # nothing else occurs
        uniform = np.full(len(orders), 1 / len(orders))
        assert statistic(counts, uniform) < CHI_SQUARED[len(orders) - 1]


@pytest.mark.parametrize("count", [1, 2, 5, 17, 1000])
def test_permuted_is_a_permutation_and_depends_on_the_key(count):
    send = jax.jit(jax.vmap(lambda key, index: permuted(key, index, count), in_axes=(None, 0)))
    index = jnp.arange(count, dtype=jnp.uint32)
    images = np.asarray([send(jax.random.key(i), index) for i in range(3)])
    for image in images:
        np.testing.assert_array_equal(np.sort(image), np.arange(count))
    if count > 5:
        for image, other in itertools.pairwise(images):
            assert np.mean(image == other) < 0.3  # 1 / count on average
            assert abs(np.corrcoef(image, np.arange(count))[0, 1]) < 0.6


def test_permuted_sends_an_index_everywhere():
    keys = jax.random.split(jax.random.key(1), 5000)
    images = jax.jit(jax.vmap(lambda key: permuted(key, jnp.uint32(2), 5)))(keys)
    assert statistic(np.bincount(images, minlength=5), np.full(5, 0.2)) < CHI_SQUARED[4]


def rows(task, steps, size, split="train"):
    batches = [draw(task, 2, step, size, split) for step in range(steps)]
    return {
        key: np.concatenate([np.asarray(batch[key]) for batch in batches]) for key in batches[0]
    }


@pytest.mark.parametrize("pairs", [2, (1, 2)])
def test_an_epoch_shows_every_training_example_once(pairs):
    task = MQAR(length=16, pairs=pairs, train_examples=30)
    shown = rows(task, 15, 4)  # two epochs, and no batch ends where the first one does
    epochs = [[tuple(row) for row in shown["inputs"][i : i + 30]] for i in (0, 30)]
    assert len(set(epochs[0])) == 30
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    if pairs == (1, 2):
        assert np.sum(shown["pairs"][:30] == 1) == 15


def test_new_examples_at_every_step_without_a_training_set():
    task = MQAR(length=16, pairs=2, train_examples=None)
    assert len(np.unique(rows(task, 15, 4)["inputs"], axis=0)) == 60


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_set_counts_once_whatever_the_batches(split):
    task = MQAR(length=16, pairs=2, test_examples=10, train_examples=10)
    by_four, by_five = rows(task, 4, 4, split), rows(task, 2, 5, split)
    assert by_four["weights"].sum() == by_five["weights"].sum() == 20
    np.testing.assert_array_equal(by_four["weights"][:, 0], np.arange(16) < 10)
    for key in by_four:
        np.testing.assert_array_equal(by_four[key][:10], by_five[key])
    shown = {tuple(row) for row in rows(task, 3, 4)["inputs"]}
    assert not shown & {tuple(row) for row in by_five["inputs"]}
    nothing = draw(task, 2, 9, 4, split)
    outputs = jnp.ones((4, 16, task.vocab_size))
    assert task.loss(outputs, nothing) == 0.0
    np.testing.assert_array_equal(task.metrics(outputs, nothing)["accuracy"], (0.0, 0.0))


def test_scores_of_a_known_model():
    task = MQAR(length=24, pairs=(2, 5), vocab_size=40)
    batch = {key: np.asarray(array) for key, array in draw(task, 0, 0, 8, "train").items()}
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 24, 40))
    right, entropy = {}, []
    for b, q in zip(*np.nonzero(batch["weights"]), strict=True):
        pairs, position, label = batch["pairs"][b], batch["positions"][b, q], batch["labels"][b, q]
        gap = (position - 2 * pairs) // 2
        if rng.random() < 0.5:
            logits[b, position, label] = 9.0
        z = logits[b, position]
        entropy.append(np.log(np.exp(z).sum()) - z[label])
        slices = [
            "",
            f"/pairs_{pairs}",
            "/gap_" + ("0" if gap == 0 else "1-3" if gap < 4 else "4-9"),
        ]
        for name in slices:
            right.setdefault(f"accuracy{name}", []).append(np.argmax(z) == label)
    batch = jax.tree.map(jnp.asarray, batch)
    sums = task.metrics(jnp.asarray(logits, jnp.float32), batch)
    assert sums.keys() == {"loss", *right}
    np.testing.assert_allclose(sums["loss"][0], np.sum(entropy), rtol=1e-5)
    for name, scores in right.items():
        np.testing.assert_array_equal(sums[name], (np.sum(scores), len(scores)))
    assert 0.2 < np.mean(right["accuracy"]) < 0.9


def test_baselines():
    assert MQAR(pairs=4).baselines() == {"chance": 1 / 4096, "context": 0.25, "recall": 1.0}
    task = MQAR(length=24, pairs=(2, 5), vocab_size=40, train_examples=None)
    batch = {key: np.asarray(array) for key, array in draw(task, 0, 0, 4000, "train").items()}
    rng = np.random.default_rng(0)
    guess = rng.integers(batch["pairs"])  # the value of one pair of the context, for every query
    guessed = np.take_along_axis(batch["labels"], guess[:, None], axis=1)
    accuracy = np.average(batch["labels"] == guessed, weights=batch["weights"])
    assert abs(accuracy - task.baselines()["context"]) < 0.02


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("length", dict(length=65)),
        ("pairs", dict(length=64, pairs=17)),
        ("pairs", dict(pairs=0)),
        ("pairs", dict(pairs=())),
        ("pairs", dict(pairs=(4, 4))),
        ("length", dict(length=(64, 63), pairs=4)),
        ("length", dict(length=())),
        ("length", dict(length=(64, 128), pairs=(4, 8, 16))),
        ("length", dict(length=(64, 64), pairs=(4, 4))),
        ("pairs", dict(length=(64, 16), pairs=(4, 8))),
        ("random_fillers", dict(random_fillers=1)),
        ("pairs", dict(vocab_size=8, pairs=4)),
        ("vocab_size", dict(vocab_size=2)),
        ("power_a", dict(power_a=0.0)),
        ("train_examples", dict(train_examples=0)),
        ("test_examples", dict(test_examples=1.5)),
    ],
)
def test_wrong_options_are_refused(name, wrong):
    with pytest.raises(ValueError, match=name):
        MQAR(**wrong)
