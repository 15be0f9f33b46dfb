"""MAD: every law of the benchmark, read back from the sequences."""

import collections
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.tasks import mad_laws
from lla.tasks.mad import BASELINES, KINDS, MAD

SPLITS = ("train", "test", "validation")
RECALLS = ("in_context_recall", "noisy_in_context_recall")
draw = jax.jit(
    lambda task, seed, step, size, split: task.batch(seed, step, size, split),
    static_argnums=(0, 3, 4),
)
each = pytest.mark.parametrize("kind", KINDS)
# A law of each sort is enough in a short run: each of them is compiled for every split.
each_law = pytest.mark.parametrize(
    "kind",
    [
        kind
        if kind in ("fuzzy_in_context_recall", "memorization")
        else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)


def arrays(task, size, split, seed=7, step=0):
    """The batch, with labels [B, T] and whether they count, whatever positions it lists."""
    batch = {name: np.asarray(array) for name, array in draw(task, seed, step, size, split).items()}
    inputs = batch["inputs"]
    at = batch.get("positions", np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape))
    labels, counted = np.full(inputs.shape, -1), np.zeros(inputs.shape, bool)
    np.put_along_axis(labels, at, batch["labels"], axis=1)
    np.put_along_axis(counted, at, batch["weights"] > 0, axis=1)
    return inputs, labels, counted


def near(found, expected, deviation, count):
    """Whether means of `count` values with this deviation are within 5 standard errors."""
    assert np.all(np.abs(found - expected) <= 5 * deviation / np.sqrt(count) + 1e-9), np.max(
        np.abs(found - expected) / (deviation / np.sqrt(count) + 1e-9)
    )


def frequencies(values, count, probability):
    near(np.mean(values, axis=0), probability, np.sqrt(probability * (1 - probability)), count)


# ---------------------------------------------------------------------------------------------
# Settings


def test_baseline_settings():
    sizes = {kind: (MAD(kind=kind).vocab_size, MAD(kind=kind).length) for kind in KINDS}
    assert sizes == {
        "in_context_recall": (16, 128),
        "noisy_in_context_recall": (32, 128),
        "fuzzy_in_context_recall": (16, 128),
        "selective_copying": (16, 256),
        "compression": (16, 32),
        "memorization": (256, 32),
    }
    assert {MAD(kind=kind).test_examples for kind in KINDS} == {1280}
    examples = {kind: MAD(kind=kind).train_examples for kind in KINDS}
    assert examples.pop("memorization") == 256 and set(examples.values()) == {12_800}
    noisy, fuzzy = MAD(kind="noisy_in_context_recall"), MAD(kind="fuzzy_in_context_recall")
    assert (noisy.noise, noisy.noise_vocab, fuzzy.key_motif, fuzzy.value_motif) == (0.2, 16, 3, 3)
    assert MAD(kind="selective_copying").copied == 16
    assert [MAD(kind=kind).readout for kind in KINDS] == ["each"] * 4 + ["last", "each"]


@each
def test_an_option_replaces_the_baseline_and_others_are_refused(kind):
    given = {name: value for name, value in BASELINES[kind].items() if name != "noise"}
    assert MAD(kind=kind, **BASELINES[kind]) == MAD(kind=kind)
    assert MAD(kind=kind, **given | {"vocab_size": 64}).output_dim == 64
    for name in ("noise", "noise_vocab", "key_motif", "value_motif", "copied"):
        if name not in BASELINES[kind]:
            with pytest.raises(ValueError, match=f"{name} is no option of '{kind}'"):
                MAD(kind=kind, **{name: 1})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("kind", dict(kind="copying")),
        ("vocab_size", dict(vocab_size=1)),
        ("vocab_size", dict(kind="noisy_in_context_recall", vocab_size=17)),
        ("vocab_size", dict(kind="fuzzy_in_context_recall", vocab_size=6)),
        ("vocab_size", dict(kind="memorization", vocab_size=2)),
        ("length", dict(length=7)),
        ("length", dict(length=2)),
        ("length", dict(kind="fuzzy_in_context_recall", length=17)),
        ("length", dict(kind="selective_copying", length=33)),
        ("noise", dict(kind="noisy_in_context_recall", noise=1.0)),
        ("copied", dict(kind="selective_copying", copied=0)),
        ("train_examples", dict(train_examples=0)),
        ("test_examples", dict(test_examples=2**31 + 1)),
        ("macro_batch", dict(macro_batch=0)),
    ],
)
def test_wrong_options_are_refused(name, wrong):
    with pytest.raises(ValueError, match=name):
        MAD(**wrong)


# ---------------------------------------------------------------------------------------------
# The sets


@each_law
def test_sets_differ_and_belong_to_the_seed(kind):
    task = MAD(kind=kind)
    seen = {}
    for split, seed, step in itertools.product(SPLITS, (0, 1), (0, 1)):
        batch = draw(task, seed, step, 8, split)
        again = draw(task, jnp.uint32(seed), jnp.uint32(step), 8, split)
        chex.assert_trees_all_equal(batch, again)
        seen[split, seed, step] = {tuple(row) for row in np.asarray(batch["inputs"])}
        assert len(seen[split, seed, step]) == 8
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


@each_law
def test_seeds_under_vmap_draw_what_each_draws_alone(kind):
    task = MAD(kind=kind)
    both = jax.jit(jax.vmap(lambda seed: task.batch(seed, 2, 4)))(jnp.asarray([3, 9], jnp.uint32))
    for i, seed in enumerate((3, 9)):
        alone = draw(task, seed, 2, 4, "train")
        jax.tree.map(
            lambda many, one, i=i: np.testing.assert_array_equal(many[i], one), both, alone
        )


def test_an_epoch_shows_every_training_example_once():
    task = MAD(kind="compression", train_examples=30)
    inputs = np.concatenate([arrays(task, 4, "train", step=step)[0] for step in range(15)])
    epochs = [[tuple(row) for row in inputs[i : i + 30]] for i in (0, 30)]
    assert len(set(epochs[0])) == 30 and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("split", SPLITS[1:])
def test_a_set_that_is_read_counts_once(split):
    task = MAD(kind="compression", test_examples=10)
    counted = [arrays(task, 4, split, step=step)[2] for step in range(4)]
    assert np.concatenate(counted).any(axis=1).tolist() == [True] * 10 + [False] * 6


# ---------------------------------------------------------------------------------------------
# Recall


def whole(inputs, labels):
    """The sequence with the last token, which is a label only."""
    return np.concatenate([inputs, labels[:, -1:]], axis=1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "task", [MAD(kind=kind) for kind in RECALLS] + [MAD(length=10, vocab_size=7)], ids=str
)
def test_recall_is_what_a_dictionary_knows(task, split):
    inputs, labels, counted = arrays(task, 60, split)
    words = task.vocab_size - (task.noise_vocab or 0)
    half = words // 2
    assert inputs.shape == (60, task.length - 1)
    if split == "train":
        assert counted.all()
        np.testing.assert_array_equal(labels[:, :-1], inputs[:, 1:])
    for tokens, asked, counts in zip(whole(inputs, labels), labels, counted, strict=True):
        known = {}
        for key, value, i in zip(tokens[::2], tokens[1::2], range(0, task.length, 2), strict=True):
            if key >= words:
                assert value >= words and value < task.vocab_size
                assert split == "train" or not counts[i]
                continue
            assert key < half and half <= value < words
            assert known.get(key, value) == value
            if split != "train":
                assert counts[i] == (key in known)
                assert asked[i] == value
            last, known[key] = key in known, value
        assert last  # the key of the last pair was there before
        assert split == "train" or not counts[1::2].any()


@pytest.mark.parametrize("kind", RECALLS)
def test_frequencies_of_recall(kind):
    task, count = MAD(kind=kind, train_examples=4000), 4000
    inputs, labels, _ = arrays(task, count, "train")
    tokens = whole(inputs, labels)
    keys, values = tokens[:, ::2], tokens[:, 1::2]
    pairs = task.length // 2
    share = (task.noise or 0.0) * (1 - 1 / pairs)  # one place of `pairs` is spared
    if task.noise:
        frequencies(keys[:, :-1] >= 16, count, np.full(pairs - 1, share))
        noise = tokens[:, :-2][tokens[:, :-2] >= 16]
        near(np.bincount(noise - 16, minlength=16) / noise.size, 1 / 16, 0.25, noise.size)
    assert (keys[:, -1] < 8).all()
    for i in (0, 20):
        for word in range(8):
            frequencies(keys[:, i] == word, count, (1 - share) / 8)
            frequencies(values[:, i] == 8 + word, count, (1 - share) / 8)
    # A new key comes with probability (7/8)^i without noise, and the values of keys are
    # independent: two keys share one with probability 1/8.
    _, _, counted = arrays(MAD(kind=kind, test_examples=4000), count, "test")
    if not task.noise:
        frequencies(counted[:, ::2][:, :-1], count, 1 - (7 / 8) ** np.arange(pairs - 1))
    else:
        # Given that a place is not spared by itself, pairs are real with probability 0.8.
        places = np.arange(pairs - 1)
        real = 1 - task.noise
        seen = 1 - (1 - real / 8) ** places
        # One place of `pairs` is spared; the mean over which is close to this bound.
        assert np.all(np.abs(counted[:, ::2][:, :-1].mean(0) - real * seen) < 0.04)
    first, second = (np.argmax(keys == word, axis=1) for word in (0, 1))
    rows = np.arange(count)
    both = (keys[:, :-1] == 0).any(1) & (keys[:, :-1] == 1).any(1)
    equal = values[rows, first] == values[rows, second]
    near(np.mean(equal[both]), 1 / 8, 0.33, both.sum())


def test_the_last_key_is_uniform_among_those_shown():
    task = MAD(length=6, vocab_size=6, test_examples=6000)
    inputs, _, _ = arrays(task, 6000, "test")
    keys = inputs[:, ::2]
    two = keys[:, 0] != keys[:, 1]
    near(two.mean(), 2 / 3, 0.48, 6000)
    near(np.mean(keys[two, 2] == keys[two, 0]), 0.5, 0.5, two.sum())
    assert (keys[~two, 2] == keys[~two, 0]).all()
    # More often seen is not more likely.
    task = MAD(length=8, vocab_size=4, test_examples=6000)
    keys = arrays(task, 6000, "test")[0][:, ::2]
    odd = (keys[:, :3].sum(1) == 1) | (keys[:, :3].sum(1) == 2)
    major = (keys[:, :3].sum(1) == 2).astype(int)
    near(np.mean(keys[odd, 3] == major[odd]), 0.5, 0.5, odd.sum())


def test_noise_spares_one_pair():
    task = MAD(
        kind="noisy_in_context_recall", length=6, vocab_size=6, noise_vocab=2, noise=0.9,
        train_examples=8000,
    )  # fmt: skip
    inputs, labels, _ = arrays(task, 8000, "train")
    real = whole(inputs, labels)[:, ::2] < 4
    assert real[:, 2].all() and real[:, :2].any(axis=1).all()
    # Two pairs and three places to spare: P(first real) = 1/3 + 2/3 0.1, and a bit more where the
    # third place is spared and both are noise (1/3 0.81), in which case the first is kept.
    near(real[:, 0].mean(), 1 / 3 + 2 / 3 * 0.1 + 0.81 / 3, 0.47, 8000)
    near(real[:, 1].mean(), 1 / 3 + 2 / 3 * 0.1, 0.49, 8000)


# ---------------------------------------------------------------------------------------------
# Fuzzy recall


def motifs(tokens, half, pad):
    """[(key, value, position of the value)]: tokens of keys and of values tell where motifs end."""
    start = int(np.argmax(tokens != pad))
    assert (tokens[:start] == pad).all() and (tokens[start:] < pad).all()
    runs = itertools.groupby(enumerate(tokens[start:], start), key=lambda item: item[1] < half)
    runs = [[(int(i), int(token)) for i, token in run] for _, run in runs]
    return [
        (tuple(token for _, token in key), tuple(token for _, token in value), value[0][0])
        for key, value in zip(runs[::2], runs[1::2], strict=True)
    ]


FUZZY = [
    MAD(kind="fuzzy_in_context_recall"),
    MAD(kind="fuzzy_in_context_recall", length=40, vocab_size=12, key_motif=2, value_motif=3),
    MAD(kind="fuzzy_in_context_recall", length=30, vocab_size=8, key_motif=1, value_motif=1),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", FUZZY, ids=str)
def test_fuzzy_recall_is_what_a_dictionary_knows(task, split):
    inputs, labels, counted = arrays(task, 60, split)
    pad = task.vocab_size - 1
    half = pad // 2
    assert inputs.shape == (60, task.length)
    if split == "train":
        assert counted.all()
        np.testing.assert_array_equal(labels[:, :-1], inputs[:, 1:])
    for tokens, asked, counts in zip(whole(inputs, labels), labels, counted, strict=True):
        found = motifs(tokens, half, pad)
        known, expected = {}, np.zeros(task.length, bool)
        for number, (key, value, place) in enumerate(found):
            assert len(set(key)) == len(key) <= task.key_motif
            assert len(set(value)) == len(value) <= task.value_motif
            assert split == "train" or len(key) == task.key_motif
            assert known.get(key, value) == value
            if key in known or number == len(found) - 1:
                expected[place - 1 : place - 1 + len(value)] = True
            known[key] = value
        if split != "train":
            np.testing.assert_array_equal(counts, expected)
            np.testing.assert_array_equal(asked[counts], tokens[1:][counts])
        # Pairs are drawn until the probe and one more pair have just room.
        probe = len(found[-1][0]) + len(found[-1][1])
        shown = task.length + 1 - int(np.sum(tokens == pad)) - probe
        largest = task.key_motif + task.value_motif
        end = task.length - probe - largest
        assert end <= shown < end + largest
        previous = shown - len(found[-2][0]) - len(found[-2][1])
        assert previous < end


def fuzzy_reference(rng, task, train):
    """(keys and values by pair, the probe last): drawn one after the other, with a dictionary."""
    half = (task.vocab_size - 1) // 2

    def sizes():
        low = 1 if train else task.key_motif
        return rng.integers(low, task.key_motif + 1), rng.integers(1, task.value_motif + 1)

    def key(size):
        return tuple(rng.permutation(half)[:size].tolist())

    def value(size):
        return tuple((half + rng.permutation(task.vocab_size - 1 - half)[:size]).tolist())

    of_key, of_value = sizes()
    probe = key(of_key), value(of_value)
    known, pairs, tokens = {probe[0]: probe[1]}, [], 0
    room = task.length - of_key - of_value
    place, end = rng.integers(room - of_key - of_value), room - task.key_motif - task.value_motif
    waiting = True
    while tokens < end:
        of_key, of_value = sizes()
        if waiting and tokens >= place:
            pair = probe
        else:
            name = key(of_key)
            pair = name, known.setdefault(name, value(of_value))
        waiting &= pair[0] != probe[0]
        pairs.append(pair)
        tokens += len(pair[0]) + len(pair[1])
    return [*pairs, probe]


def fuzzy_statistics(examples):
    """[n, statistics] of sequences of pairs whose last is the probe."""
    rows = []
    for pairs in examples:
        keys, values = [key for key, _ in pairs], [value for _, value in pairs]
        shown = keys[-1] in keys[:-1]
        counts = collections.Counter(keys)
        rows.append(
            [
                len(pairs),
                len(keys[-1]),
                len(values[-1]),
                np.mean([len(key) for key in keys]),
                np.mean([len(value) for value in values]),
                shown,
                keys.index(keys[-1]) if shown else -1,
                counts[keys[-1]],
                sum(n - 1 for n in counts.values()),
                np.mean([key[0] for key in keys]),
                np.mean([value[-1] for value in values]),
                len(set(values)),
                keys[0] == keys[-1],
            ]
        )
    return np.asarray(rows, float)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, dict(length=24, vocab_size=8, key_motif=1, value_motif=2)],
    ids=["baseline", "short"],
)
def test_fuzzy_recall_has_the_law_of_one_pair_after_the_other(options, train):
    count = 3000
    task = MAD(kind="fuzzy_in_context_recall", train_examples=count, test_examples=count, **options)
    inputs, labels, _ = arrays(task, count, "train" if train else "test")
    tokens, pad = whole(inputs, labels), task.vocab_size - 1
    drawn = [[pair[:2] for pair in motifs(row, pad // 2, pad)] for row in tokens]
    found = fuzzy_statistics(drawn)
    rng = np.random.default_rng(0)
    expected = fuzzy_statistics([fuzzy_reference(rng, task, train) for _ in range(count)])
    for power in (1, 2):  # means, and spreads
        a, b = found**power, expected**power
        error = np.sqrt((a.var(0) + b.var(0)) / count)
        assert np.all(np.abs(a.mean(0) - b.mean(0)) <= 4.5 * error + 1e-9)


# ---------------------------------------------------------------------------------------------
# Copying, compression, memorization


@pytest.mark.parametrize("split", SPLITS)
def test_selective_copying(split):
    count = 3000
    task = MAD(kind="selective_copying", train_examples=count, test_examples=count)
    inputs, labels, counted = arrays(task, count, split)
    assert inputs.shape == (count, 256) and (counted == (np.arange(256) >= 240)).all()
    assert (inputs[:, 239] == 15).all() and (inputs[:, 240:] == 14).all()
    data = inputs[:, :239] < 14
    assert (data.sum(1) == 16).all() and data[:, -1].all()  # no blank behind the last one
    tokens = inputs[:, :239][data].reshape(count, 16)
    np.testing.assert_array_equal(tokens, labels[:, 240:])
    near(np.bincount(tokens.ravel(), minlength=14) / tokens.size, 1 / 14, 0.26, tokens.size)
    places = np.nonzero(data)[1].reshape(count, 16)
    blanks = np.diff(places, axis=1, prepend=-1) - 1
    # Each of 223 blanks goes before one of the 16 tokens.
    near(blanks.mean(0), 223 / 16, np.sqrt(223 * 15) / 16, count)
    near(blanks.var(0), 223 * 15 / 256, 223 * 15 / 256 * np.sqrt(2.2), count)
    near(np.mean(blanks[:, 0] * blanks[:, 5]), 223 * 222 / 256, 60.0, count)


@pytest.mark.parametrize("split", SPLITS)
def test_compression(split):
    count = 3000
    task = MAD(kind="compression", train_examples=count, test_examples=count)
    inputs, labels, counted = arrays(task, count, split)
    assert inputs.shape == (count, 32) and counted.all()
    np.testing.assert_array_equal(inputs, labels)
    assert (inputs[:, -1] == 15).all()
    for token in range(15):
        frequencies(inputs[:, :-1] == token, count, np.full(31, 1 / 15))
    near(np.mean(inputs[:, 3] == inputs[:, 4]), 1 / 15, 0.25, count)


def table_of(task, seed):
    known = {}
    for split in SPLITS:
        inputs, labels, counted = arrays(task, 200, split, seed=seed)
        assert (counted == (np.arange(32) % 2 == 1)).all() and (inputs[:, 1::2] == 255).all()
        for key, value in zip(inputs[:, ::2].ravel(), labels[:, 1::2].ravel(), strict=True):
            assert known.setdefault(int(key), int(value)) == value
    return known


def test_memorization_has_one_table_for_a_seed():
    one, other = (table_of(MAD(kind="memorization"), seed) for seed in (0, 1))
    for known in (one, other):
        assert set(known) == set(range(127))
        assert len(set(known.values())) == 127 and set(known.values()) <= set(range(127, 255))
    assert sum(one[key] == other[key] for key in one) < 10  # about one by chance
    count = 3000
    inputs, _, _ = arrays(MAD(kind="memorization", train_examples=count), count, "train")
    keys = inputs[:, ::2].ravel()
    near(np.bincount(keys, minlength=127) / keys.size, 1 / 127, 0.09, keys.size)


def test_tables_are_uniform():
    tables = np.asarray(
        jax.vmap(lambda key: mad_laws.facts(key, 6))(jax.random.split(jax.random.key(0), 6000))
    )
    # Two keys and three values: six tables.
    counts = collections.Counter(map(tuple, tables.tolist()))
    assert set(counts) == set(itertools.permutations((2, 3, 4), 2))
    near(np.asarray(list(counts.values())) / 6000, 1 / 6, 0.38, 6000)
