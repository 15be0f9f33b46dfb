"""What every trained task promises, whatever it draws."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla import tasks
from tests.tasks.sample import SAMPLE

SMALL = {
    "in_context_regression": dict(dim=4, value_dim=3, length=20, segment_length=8),
    "mad": dict(length=24, train_examples=37, test_examples=11, macro_batch=3),
    "mqar": dict(vocab_size=40, length=24, pairs=(2, 5), train_examples=37, test_examples=11),
    "state_tracking": dict(num_items=4, min_swaps=3, max_swaps=9, queries=2),
    "text": dict(files=(str(SAMPLE),), vocab_size=300, length=24),
}
TASKS = {name: tasks.create(name, **SMALL.get(name, {})) for name in tasks.names()}
each = pytest.mark.parametrize("name", TASKS)
SIZE = 6
BATCHES = {
    (name, split): jax.jit(
        lambda seed, step, task=task, split=split: task.batch(seed, step, SIZE, split)
    )
    for name, task in TASKS.items()
    for split in task.splits
}


def outputs_for(task, batch, seed=0):
    shape = (*batch["inputs"].shape[:2], task.output_dim)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def counted(task, batch):
    """Positions whose outputs count, [B, Q]."""
    if "positions" in batch:
        return np.asarray(batch["positions"])
    every = 1 if "labels" in batch else 2
    at = np.arange(0, task.max_length, every)
    return np.broadcast_to(at, (SIZE, len(at)))


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_names_and_options():
    for name in tasks.names():
        task = tasks.create(name)
        assert tasks.create(name, **tasks.options(name)) == task
        assert hash(task) == hash(tasks.create(name))
        assert tasks.options(name) == {
            key: parameter.default
            for key, parameter in inspect.signature(type(task)).parameters.items()
        }


def test_unknown_words_name_the_nearest():
    with pytest.raises(ValueError, match=r"'mqra'.*did you mean 'mqar'"):
        tasks.create("mqra")
    with pytest.raises(ValueError, match=r"'mqar'.*'lenght'.*did you mean 'length'"):
        tasks.create("mqar", lenght=64)
    with pytest.raises(ValueError, match=r"task.*did you mean 'state_tracking'"):
        tasks.options("state_trackin")


@each
def test_shapes_of_every_split(name):
    task = TASKS[name]
    lengths = []
    assert task.splits[:2] == ("train", "test") and task.splits[-1] == "validation"
    assert (task.vocab_size is None) != (task.input_dim is None)
    for split in task.splits:
        batch = BATCHES[name, split](0, 1)
        assert all(array.shape[0] == SIZE for array in batch.values())
        assert {array.dtype for array in batch.values()} <= {np.dtype("f4"), np.dtype("i4")}
        inputs = np.asarray(batch["inputs"])
        lengths.append(inputs.shape[1])
        if task.vocab_size is None:
            assert inputs.shape[2:] == (task.input_dim,) and inputs.dtype == np.float32
        else:
            assert inputs.ndim == 2 and inputs.dtype == np.int32
            assert inputs.min() >= 0 and inputs.max() < task.vocab_size == task.output_dim
    assert max(lengths) == task.max_length


@each
def test_pure_and_new_at_every_step_seed_and_split(name):
    task = TASKS[name]
    drawn = {(split, *at): BATCHES[name, split](*at) for split in task.splits for at in [(3, 1)]}
    drawn["train", 3, 0], drawn["train", 4, 1] = (
        BATCHES[name, "train"](*at) for at in [(3, 0), (4, 1)]
    )
    assert same(drawn["train", 3, 1], BATCHES[name, "train"](3, 1))
    unsigned = BATCHES[name, "train"](jnp.uint32(3), jnp.uint32(1))
    assert same(drawn["train", 3, 1], unsigned)
    seen = [np.asarray(batch["inputs"]) for batch in drawn.values()]
    for i, first in enumerate(seen):
        for second in seen[:i]:
            assert first.shape != second.shape or not np.array_equal(first, second)
    inputs = seen[0]
    assert len(np.unique(inputs.reshape(SIZE, -1), axis=0)) == SIZE


@each
def test_batches_under_vmap_and_in_a_loop(name):
    task = TASKS[name]
    seeds, step = jnp.asarray([3, 9], jnp.uint32), jnp.int32(2)

    def second_of_two(seed):
        def body(step, _):
            return task.batch(seed, step, SIZE)

        return jax.lax.fori_loop(1, 3, body, task.batch(seed, 0, SIZE))

    mapped = jax.jit(jax.vmap(second_of_two))(seeds)
    for i, seed in enumerate((3, 9)):
        alone = BATCHES[name, "train"](seed, step)
        for key, array in alone.items():
            np.testing.assert_allclose(mapped[key][i], array, rtol=1e-6, atol=1e-6)


@each
def test_metrics_add_up_over_batches(name):
    task = TASKS[name]
    metrics = jax.jit(task.metrics)
    batches = [BATCHES[name, "test"](0, step) for step in (0, 1)]
    outputs = [outputs_for(task, batch, step) for step, batch in enumerate(batches)]
    both = metrics(
        jnp.concatenate(outputs), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
    )
    parts = [metrics(*pair) for pair in zip(outputs, batches, strict=True)]
    assert {"loss", task.primary_metric} <= both.keys()
    for key, (total, weight) in both.items():
        assert total.shape == weight.shape == () and total.dtype == weight.dtype == np.float32
        np.testing.assert_allclose(total, sum(part[key][0] for part in parts), rtol=1e-5)
        np.testing.assert_allclose(weight, sum(part[key][1] for part in parts), rtol=1e-6)


@each
def test_slices_are_parts_of_the_metric(name):
    task = TASKS[name]
    for split in task.splits:
        batch = BATCHES[name, split](5, 0)
        sums = task.metrics(outputs_for(task, batch), batch)
        total, weight = sums.pop(task.primary_metric)
        kinds = {key.rsplit("_", 1)[0] for key in sums if "/" in key}
        assert kinds
        for kind in kinds:
            parts = [pair for key, pair in sums.items() if key.rsplit("_", 1)[0] == kind]
            assert len(parts) > 1
            np.testing.assert_allclose(sum(part[0] for part in parts), total, rtol=1e-5)
            np.testing.assert_allclose(sum(part[1] for part in parts), weight, rtol=1e-6)


@each
def test_loss_is_that_of_the_metrics_and_reads_what_counts_alone(name):
    task = TASKS[name]
    batch = BATCHES[name, "test"](0, 1)  # the test set of MQAR ends within this batch
    outputs = outputs_for(task, batch)
    loss, gradient = jax.jit(jax.value_and_grad(task.loss))(outputs, batch)
    total, weight = task.metrics(outputs, batch)["loss"]
    assert loss.shape == () and loss.dtype == np.float32
    np.testing.assert_allclose(loss, total / weight, rtol=1e-6)

    read = np.zeros(outputs.shape[:2], bool)
    weights = np.asarray(batch.get("weights", np.ones_like(counted(task, batch))))
    for b in range(SIZE):
        read[b, counted(task, batch)[b][weights[b] > 0]] = True
    assert (np.abs(gradient).max(axis=-1) > 0).tolist() == read.tolist()

    at_those = jnp.take_along_axis(outputs, jnp.asarray(counted(task, batch))[:, :, None], axis=1)
    np.testing.assert_array_equal(task.loss(at_those, batch), task.loss(outputs, batch))
    for key, pair in task.metrics(at_those, batch).items():
        np.testing.assert_array_equal(pair, task.metrics(outputs, batch)[key])
    low = task.loss(outputs.astype(jnp.bfloat16), batch)
    assert low.dtype == np.float32 and abs(low - loss) < 0.02 * loss


@each
def test_baselines_are_on_the_scale_of_the_metric(name):
    task = TASKS[name]
    found = task.baselines()
    highest = math.log(task.vocab_size) if task.primary_metric == "loss" else 2
    assert found and all(type(number) is float for number in found.values())
    assert all(0 <= number <= highest for number in found.values())


@each
def test_wrong_calls_are_refused(name):
    task = TASKS[name]
    with pytest.raises(ValueError, match=r"'tets'.*did you mean 'test'"):
        task.batch(0, 0, 4, "tets")
    with pytest.raises(ValueError, match="size"):
        task.batch(0, 0, 0)
    batch = BATCHES[name, "train"](0, 0)
    with pytest.raises(ValueError, match="outputs must be"):
        task.loss(outputs_for(task, batch)[:, :, :-1], batch)


@each
def test_batches_are_the_same_in_double_precision(name, float64):
    """`jax_enable_x64` changes what JAX takes for an integer, and no data."""
    task = TASKS[name]
    for split in task.splits:
        expected = jax.device_get(BATCHES[name, split](3, 2))
        with float64():
            draw = jax.jit(lambda seed, step, s=split: task.batch(seed, step, SIZE, s))
            found = jax.device_get(draw(3, 2))
            outputs = outputs_for(task, found)
            sums = [task.loss(outputs, found), *jax.tree.leaves(task.metrics(outputs, found))]
            assert {leaf.dtype.name for leaf in sums} == {"float32"}
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert found[key].dtype == array.dtype, key
            # Numbers are those of the same draw; they may be fused, and so rounded, differently.
            rounding = {} if array.dtype == np.int32 else dict(rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found[key], array, **{"rtol": 0, **rounding}, err_msg=key)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mqar", {"pairs": 1.5}, "pairs must be an integer or a tuple of integers, got 1.5"),
        ("mqar", {"power_a": "a"}, "power_a must be a finite number, got 'a'"),
        ("mqar", {"train_examples": "all"}, "train_examples must be an integer or None, got 'all'"),
        ("in_context_regression", {"noise": None}, "noise must be a finite number, got None"),
        ("in_context_regression", {"spread": float("inf")}, "spread must be a finite number"),
        ("state_tracking", {"queries": (1, 2)}, r"queries must be an integer, got \(1, 2\)"),
    ],
)
def test_options_of_another_type_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.create(name, **options)
