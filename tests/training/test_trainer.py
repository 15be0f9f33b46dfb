"""Compiled steps: they learn, stay finite with every mixer, and do not depend on the devices."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla import mixers, tasks, training
from lla.training.settings import override
from lla.training.trainer import means
from tests.tasks.sample import SAMPLE

SMALL = {
    "mad": {"length": 8, "train_examples": 16, "test_examples": 8, "macro_batch": 4},
    "mqar": {"vocab_size": 16, "length": 8, "pairs": 2, "train_examples": None},
    "in_context_regression": {"dim": 3, "length": 6, "segment_length": 3},
    "state_tracking": {"num_items": 3, "min_swaps": 1, "max_swaps": 3},
    "text": {"files": (str(SAMPLE),), "vocab_size": 270, "length": 8},
}


def resolve(task_name="mqar", mixer="linear", options=None, **sections):
    """Settings of a small model on one device; `sections` override them."""
    base = override(
        training.defaults(task_name),
        {
            "task": SMALL.get(task_name, {}),
            "model": {"mixer": {"name": mixer}, "width": 16, "num_heads": 2, "depth": 1},
            "mixers": {mixer: options or {}},
            "training": {
                "steps": 8,
                "batch_size": 8,
                "log_every": 2,
                "eval_every": 4,
                "eval_batches": 2,
                "checkpoint_every": 4,
                "steps_per_call": 2,
            },
            "sharding": {"data": 1},
        },
    )
    return training.resolve(override(base, sections))


def run(trainer, count=8):
    """State after `count` steps, and the means of their metrics."""
    state, metrics = trainer.advance(trainer.init(), np.int32(count))
    return state, means(jax.device_get(metrics["sums"]))


def assert_finite_and_changed(settings):
    trainer = training.Trainer(settings)
    before = jax.device_get(trainer.init().params)
    state, values = run(trainer, 1)
    assert int(state.step) == 1 and int(state.failed_at) == -1
    for name in ("loss", "gradient_norm"):
        assert np.isfinite(values[name]) and values[name] > 0
    for path, leaf in jax.device_get(state.params).items():
        assert np.isfinite(leaf).all(), path
        # A biased table may hold rows that no token asks for, but every array takes part.
        assert np.any(leaf != before[path]), path


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [name for name in mixers.names() if name != "lla"])
def test_a_step_is_finite_with_every_mixer(mixer):
    assert_finite_and_changed(resolve(mixer=mixer))


@pytest.mark.parametrize("task", tasks.names())
def test_a_step_is_finite_in_every_task(task):
    assert_finite_and_changed(resolve(task, "lla"))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", mixers.names())
@pytest.mark.parametrize("task", tasks.names())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_finite_with_every_mixer_in_every_task(task, mixer, dtype):
    assert_finite_and_changed(resolve(task, mixer, model={"depth": 2, "dtype": dtype}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_learns(name):
    # Two items and no swaps: the answer stands in the input.
    settings = resolve(
        "state_tracking",
        "softmax",
        task={"num_items": 2, "min_swaps": 0, "max_swaps": 1},
        training={"steps": 150, "batch_size": 32},
        optimizer={"name": name, "learning_rate": 1e-2},
        model={"depth": 2},
    )
    trainer = training.Trainer(settings)
    chance = means(jax.device_get(trainer.evaluate(trainer.init().params)))
    state, _ = run(trainer, 150)
    after = means(jax.device_get(trainer.evaluate(state.params)))
    assert chance["validation/loss"] > 0.6
    assert after["validation/loss"] < 0.5 * chance["validation/loss"]
    assert after["validation/accuracy"] > 0.85


def test_the_number_of_steps_in_a_call_changes_nothing():
    trainer = training.Trainer(resolve())
    at_once, _ = run(trainer, 6)
    state = trainer.init()
    for count in (1, 2, 3):
        state, _ = trainer.advance(state, np.int32(count))
    chex.assert_trees_all_equal(at_once, state)


def test_a_step_is_the_rule_written_out():
    """One update by hand: the batch of step 0, the loss of the task, AdamW's first step."""
    settings = resolve(optimizer={"learning_rate": 1e-2, "warmup_fraction": 0.0, "clip_norm": 0.0})
    trainer = training.Trainer(settings)
    task, state = trainer.task, trainer.init()
    batch = task.batch(0, 0, 8)

    def loss(params):
        return task.loss(trainer.model(params)(batch["inputs"]), batch)

    params = jax.device_get(state.params)
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    after, values = run(trainer, 1)
    np.testing.assert_allclose(values["loss"], value, rtol=1e-5)
    rate = 1e-2 * 0.5 * (1 + np.cos(np.pi / 9))
    np.testing.assert_allclose(values["learning_rate"], rate, rtol=1e-5)
    for path, gradient in gradients.items():
        step = gradient / (np.abs(gradient) + 1e-8)
        decay = 0.1 * params[path] if path.endswith(".kernel") else np.zeros_like(params[path])
        expected = params[path] - rate * (step + decay)
        # Where a gradient is rounding noise its sign is, too.
        sure = np.abs(gradient) > 1e-6
        np.testing.assert_allclose(
            np.asarray(after.params[path])[sure], np.asarray(expected)[sure], atol=2e-6
        )


@pytest.mark.slow
def test_evaluation_is_the_mean_over_all_batches():
    trainer = training.Trainer(resolve(training={"eval_batches": 3, "eval_batch_size": 4}))
    params = trainer.init().params
    model = trainer.model(params)
    for split, call in (("validation", trainer.evaluate), ("test", trainer.test)):
        found, losses = means(jax.device_get(call(params))), []
        for index in range(3):
            batch = trainer.task.batch(0, index, 4, split)
            losses.append(float(trainer.task.loss(model(batch["inputs"]), batch)))
        np.testing.assert_allclose(found[f"{split}/loss"], np.mean(losses), rtol=1e-5)
        assert all(name.startswith(f"{split}/") for name in found)
    assert trainer.primary_metric == "validation/accuracy"


@pytest.mark.parametrize(
    "mixer, data, fsdp",
    [
        pytest.param("linear", 2, 4, marks=pytest.mark.compat),
        pytest.param("linear", 8, 1, marks=pytest.mark.slow),
        pytest.param("lla", -1, 2, marks=pytest.mark.slow),
        pytest.param("gla", 1, 8, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_does(mixer, data, fsdp):
    single = training.Trainer(resolve(mixer=mixer))
    sharded = training.Trainer(resolve(mixer=mixer, sharding={"data": data, "fsdp": fsdp}))
    assert sharded.mesh.size == 8
    one, values = run(single, 3)
    many, others = run(sharded, 3)
    for path, leaf in jax.device_get(one.params).items():
        np.testing.assert_allclose(jax.device_get(many.params)[path], leaf, atol=1e-5, err_msg=path)
    for name, value in values.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    evaluation = means(jax.device_get(single.evaluate(one.params)))
    for name, value in means(jax.device_get(sharded.evaluate(many.params))).items():
        np.testing.assert_allclose(value, evaluation[name], rtol=1e-5, atol=1e-5, err_msg=name)
    # Parameters and opt_state are really split.
    query = many.params["blocks.0.mixer.query.kernel"]
    shard = query.addressable_shards[0].data
    assert query.size == shard.size * sharded.mesh.shape["fsdp"]
    opt_state = {
        leaf.sharding for leaf in jax.tree.leaves(many.opt_state) if leaf.shape == query.shape
    }
    assert opt_state == {query.sharding}


def test_meshes_that_do_not_fit_are_errors():
    for sharding, message in (
        ({"data": 16}, "needs 16 devices, 8 are visible"),
        ({"data": -1, "fsdp": 3}, "cannot be split into groups of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            training.Trainer(resolve(sharding=sharding))
    with pytest.raises(ValueError, match="mesh of one device"):
        runs = training.Runs((0,), (1e-3,))
        training.Trainer(resolve(sharding={"data": 2}), runs=runs)


def test_a_failed_update_is_not_made():
    # The first update makes the parameters so large that the second has no finite loss.
    settings = resolve(optimizer={"learning_rate": 1e38, "warmup_fraction": 0.0})
    trainer = training.Trainer(settings)
    state, metrics = trainer.advance(trainer.init(), np.int32(5))
    failed = int(state.failed_at)
    assert 0 < failed < 5 and int(metrics["failed_at"]) == failed and int(state.step) == 5
    before, _ = trainer.advance(trainer.init(), np.int32(failed))
    chex.assert_trees_all_equal(before.params, state.params)
    chex.assert_trees_all_equal(before.opt_state, state.opt_state)
    # Sums are of the updates that were made.
    assert float(metrics["sums"]["learning_rate"][1]) == failed
    again = dataclasses.replace(before, failed_at=jnp.int32(-1))
    again, _ = trainer.advance(again, np.int32(1))
    assert int(again.failed_at) == failed


def test_a_run_that_has_stopped_stays_as_it_is():
    trainer = training.Trainer(resolve(), runs=training.Runs(seeds=(0, 1), learning_rates=(1e-2,)))
    state, _ = trainer.advance(trainer.init(), np.int32(2))
    state = dataclasses.replace(state, stopped_at=jnp.asarray([[-1], [2]], jnp.int32))
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = trainer.advance(state, np.int32(2))
    after = jax.device_get((state.params, state.opt_state))
    stopped, going = (
        [jax.tree.map(lambda a, i=i: a[i], t) for t in (before, after)] for i in (1, 0)
    )
    chex.assert_trees_all_equal(*stopped)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(*going)
    assert np.asarray(metrics["sums"]["learning_rate"][1]).tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_some_seeds_are_updated_as_all_are(optimizer):
    runs = training.Runs(seeds=(0, 1, 2, 3), learning_rates=(1e-2, 1e-3))
    trainer = training.Trainer(resolve(optimizer={"name": optimizer}), runs=runs)
    places = np.asarray([1, 3], np.int32)

    def updated(*given):
        state, _ = trainer.advance(trainer.init(), np.int32(1))
        state = dataclasses.replace(state, stopped_at=state.stopped_at.at[3].set(1))
        before = jax.device_get((state.params, state.opt_state))
        state, metrics = trainer.advance(state, np.int32(2), *given)
        return before, *jax.device_get((state, metrics["sums"]))

    before, state, sums = updated(places)
    _, expected, expected_sums = updated()
    assert int(state.step) == 3
    found = state.params, state.opt_state
    for i, wanted in ((0, before), (1, (expected.params, expected.opt_state)), (2, before)):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b[i], rtol=1e-4, atol=1e-5),
            found,
            wanted,
        )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[3], b[3]), found, before)
    for name, (total, weight) in sums.items():
        np.testing.assert_allclose(total[1], expected_sums[name][0][1], rtol=1e-4, err_msg=name)
        np.testing.assert_array_equal(weight[1], expected_sums[name][1][1], err_msg=name)
        assert not np.any(weight[[0, 2, 3]]), name


def test_a_program_compiled_ahead_trains_at_other_rates():
    ahead = training.Trainer(resolve(), runs=training.Runs((0, 1), (1e-3,)))
    ahead.compile()
    ahead.runs = dataclasses.replace(ahead.runs, learning_rates=(1e-2,))
    usual = training.Trainer(resolve(), runs=training.Runs((0, 1), (1e-2,)))
    states = [trainer.advance(trainer.init(), np.int32(3))[0] for trainer in (ahead, usual)]
    chex.assert_trees_all_equal(*states)
    found, expected = (
        jax.device_get((trainer.evaluate(state.params), trainer.test(state.params)))
        for trainer, state in zip((ahead, usual), states, strict=True)
    )
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", SMALL)
def test_double_precision_is_traced_with_the_same_state(name, optimizer, float64):
    """`jax_enable_x64` makes no state wider: steps can be repeated, and checkpoints be read."""
    settings = resolve(name, optimizer={"name": optimizer})
    expected = training.Trainer(settings).abstract_state
    with float64():
        trainer = training.Trainer(settings)
        trainer.check()
        new, _ = jax.eval_shape(trainer.advance, trainer.abstract_state, np.int32(1))
    for state in (trainer.abstract_state, new):
        chex.assert_trees_all_equal_dtypes(state, expected)


def test_a_run_in_double_precision_is_the_run(float64):
    expected = run(training.Trainer(resolve()), 2)
    with float64():
        found = jax.device_get(run(training.Trainer(resolve()), 2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_what_the_model_refuses_is_raised_before_the_first_step():
    trainer = training.Trainer(resolve(mixer="lla", options={"scale": -1.0}))
    with pytest.raises(ValueError, match="scale must be non-negative"):
        trainer.check()


_KINDS = {
    "noisy_in_context_recall": {"noise": 0.3},
    "fuzzy_in_context_recall": {"length": 18},
    "selective_copying": {"length": 12, "copied": 3},
    "compression": {},
    "memorization": {"vocab_size": 9},
}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "compression" else pytest.param(kind, marks=pytest.mark.slow)
        for kind in _KINDS
    ],
)
def test_a_step_is_finite_in_every_kind_of_mad(kind):
    assert_finite_and_changed(resolve("mad", "softmax", task={"kind": kind, **_KINDS[kind]}))


@pytest.mark.slow
def test_seeds_at_once_are_those_alone_across_the_end_of_an_epoch():
    settings = resolve(
        "mad",
        "softmax",
        task={"kind": "compression"},
        model={"mlp_ratio": 2.0, "mlp_type": "swiglu", "embedding_std": 0.02, "head_bias": True},
        optimizer={"learning_rate": 1e-2},
    )
    runs = training.Trainer(settings, runs=training.Runs((0, 1), (1e-2,)))
    many, _ = run(runs, 5)  # an epoch has two batches
    found = means(jax.device_get(runs.test(many.params)))
    for index, seed in enumerate((0, 1)):
        one = training.Trainer(override_seed(settings, seed))
        state = one.init()
        for count in (1, 4):
            state, _ = one.advance(state, np.int32(count))
        for path, leaf in jax.device_get(state.params).items():
            several = np.asarray(many.params[path])[index, 0]
            np.testing.assert_allclose(several, leaf, atol=2e-4, err_msg=path)
        for name, value in means(jax.device_get(one.test(state.params))).items():
            np.testing.assert_allclose(found[name][index, 0], value, rtol=1e-2, atol=1e-6)


def override_seed(settings, seed):
    """The same settings with another seed."""
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, seed=seed))


@pytest.mark.parametrize("task", ["mqar", "in_context_regression"])
def test_micro_batches_are_the_whole_batch(task):
    """Also where parts have different numbers of labels."""
    found = []
    for count in (1, 4):
        settings = resolve(task, training={"micro_batches": count})
        trainer = training.Trainer(settings)
        batch = dict(trainer.task.batch(0, 0, 8))
        if "weights" in batch:
            batch["weights"] = batch["weights"].at[1, 1:].set(0.0).at[4].set(0.0)
        found.append(jax.jit(trainer._gradients)(trainer.init().params, batch))
    chex.assert_trees_all_close(*found, rtol=2e-4, atol=1e-6)


def test_micro_batches_on_a_mesh_and_their_limits():
    split = resolve(training={"micro_batches": 2}, sharding={"data": 4})
    state, values = run(training.Trainer(split), 2)
    alone, expected = run(training.Trainer(resolve()), 2)
    np.testing.assert_allclose(values["loss"], expected["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"micro_batches \(4\) leaves parts of 2 sequences"):
        training.Trainer(resolve(training={"micro_batches": 4}, sharding={"data": 4}))
    with pytest.raises(ValueError, match=r"multiple of training\.micro_batches, got 8 and 3"):
        resolve(training={"micro_batches": 3})


def test_text_on_a_mesh_is_the_text_on_one_device():
    found = [
        run(training.Trainer(resolve("text", sharding={"data": devices})), 2)[1]
        for devices in (1, 4)
    ]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, err_msg=name)


def test_runs_at_once_read_the_text_of_their_seeds():
    settings = resolve("text", optimizer={"learning_rate": 1e-2})
    many = training.Trainer(settings, runs=training.Runs((0, 5), (1e-2,)))
    _, values = run(many, 2)
    for i, seed in enumerate((0, 5)):
        alone = resolve("text", optimizer={"learning_rate": 1e-2}, training={"seed": seed})
        _, expected = run(training.Trainer(alone), 2)
        np.testing.assert_allclose(values["loss"][i, 0], expected["loss"], rtol=1e-5)
