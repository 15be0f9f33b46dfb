"""A mixer and a task from outside the package, as the tutorials describe them."""

import doctest
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lla
from lla import mixers, tasks, training
from lla.mixers.registry import _MIXERS
from lla.tasks.registry import _TASKS

ROOT = pathlib.Path(__file__).parents[1]


def examples(what):
    """The Python of a tutorial, without the last block, which tries it."""
    text = (ROOT / f"docs/tutorials/write_a_{what}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[:-1]


@pytest.fixture
def registered(monkeypatch):
    """The classes of the examples, under their names until the test is over."""
    for registry in (_MIXERS, _TASKS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    (mixer,), (task, config) = examples("mixer"), examples("task")
    namespace = {}
    exec(compile(mixer, "write_a_mixer.md", "exec"), namespace)
    mixers.register("decaying_mean", namespace["DecayingMean"])
    exec(compile(task + config, "write_a_task.md", "exec"), namespace)
    return namespace


def test_the_mixer_decodes_and_takes_packed_sequences(registered):
    mixer = mixers.create("decaying_mean", 8, 2, decay=0.5, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 7, 8), np.float32)
    value = np.einsum("btw,wnh->btnh", x, mixer.value.kernel[...])
    weights = np.tril(0.5 ** np.subtract.outer(np.arange(7.0), np.arange(7.0)))
    expected = np.einsum("ts,bsnh,nhw->btw", weights, value, mixer.out.kernel[...])
    np.testing.assert_allclose(mixer(x), expected, rtol=1e-4, atol=1e-5)
    first, state = mixer.decode(x[:, :4], mixer.init_state(2, 7))
    rest = [first]
    for t in range(4, 7):
        y, state = mixer.decode(x[:, t : t + 1], state)
        rest.append(y)
    np.testing.assert_allclose(jnp.concatenate(rest, 1), expected, rtol=1e-4, atol=1e-5)
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1, 1]] * 2)
    packed = mixer(x, segment_ids=ids)
    np.testing.assert_allclose(packed[:, 3:], mixer(x[:, 3:]), rtol=1e-4, atol=1e-5)


def test_both_train_by_the_same_config(registered, tmp_path):
    config = registered["get_config"]().to_dict()
    config["model"].update(mixer={"name": "decaying_mean"}, width=8, depth=1, num_heads=2)
    config["mixers"]["decaying_mean"]["decay"] = 0.25
    config["training"].update(steps=2, log_every=2, eval_every=2, checkpoint_every=2)
    config["training"].update(batch_size=4, eval_batches=1)
    config["sharding"]["data"] = 1
    result = training.train(training.Trainer(training.resolve(config)), tmp_path / "run")
    assert result["status"] == "finished" and set(result["test"]) == {"test/accuracy"}
    record = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert record["model"]["mixer"] == {"name": "decaying_mean", "decay": 0.25}
    with pytest.raises(ValueError, match=r"config.mixers.decaying_mean.decays.*\.decay\?"):
        training.resolve({**config, "mixers": {"decaying_mean": {"decays": 0.1}}})
    with pytest.raises(ValueError, match=r"config.task.shift must be an integer, got 'a'"):
        training.resolve({**config, "task": {"name": "shifted", "shift": "a"}})


def run(script, *arguments, path):
    return subprocess.run(
        [sys.executable, ROOT / f"experiments/{script}.py", *arguments],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_an_entry_point_is_found_by_every_command(tmp_path):
    package = tmp_path / "installed"
    folder = package / "outside-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1\n")
    (folder / "entry_points.txt").write_text(
        "[lla.mixers]\ndecaying_mean = decaying_mean:DecayingMean\n"
        "[lla.tasks]\nshifted = shifted:Shifted\n"
    )
    (package / "decaying_mean.py").write_text(examples("mixer")[0])
    (package / "shifted.py").write_text(examples("task")[0])
    mixer = ("--config.model.mixer.name=decaying_mean", "--config.mixers.decaying_mean.decay=0.5")
    work = f"--workdir={tmp_path / 'run'}"
    done = run("train", "--config=configs/mqar.py:smoke", work, *mixer, path=package)
    assert done.returncode == 0, done.stderr
    assert "finished at step 8" in done.stdout
    answered = run("generate", work, path=package)
    assert answered.returncode == 0 and "logits differ by" in answered.stdout, answered.stderr
    own = tmp_path / "own.py"
    own.write_text(examples("task")[1].replace('tasks.register("shifted", Shifted)\n', ""))
    sizes = ("width=8", "num_heads=2", "depth=1")
    flags = [f"--config.model.{size}" for size in sizes]
    flags += [
        "--config.training.steps=10",
        "--config.task.shift=2",
        "--config.training.batch_size=4",
    ]
    done = run(
        "train", f"--config={own}", f"--workdir={tmp_path / 'own'}", *mixer, *flags, path=package
    )
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in done.stdout


def test_the_example_in_the_docstring(registered):
    failed, attempted = doctest.testmod(lla.mixers.registry)
    assert attempted > 3 and failed == 0
    assert mixers.options("short") == {"taps": 4}


def test_what_cannot_be_registered(registered):
    class Incomplete:
        def __init__(self, width, num_heads, *, rate=b"0.1", rngs):
            pass

        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match="already a mixer 'gla'"):
        mixers.register("gla", registered["DecayingMean"])
    with pytest.raises(ValueError, match="identifier, got 'my-mixer'"):
        mixers.register("my-mixer", registered["DecayingMean"])
    with pytest.raises(TypeError, match="'other': Incomplete lacks init_state, decode"):
        mixers.register("other", Incomplete)
    Incomplete.init_state = Incomplete.decode = Incomplete.__call__
    with pytest.raises(TypeError, match="option 'rate' of Incomplete needs a default"):
        mixers.register("other", Incomplete)
    with pytest.raises(TypeError, match="Incomplete lacks batch, loss"):
        tasks.register("other", Incomplete)
    assert "other" not in mixers.names() + tasks.names()
    assert jax.tree.leaves(tasks.options("shifted")) == [16, 1, 8]
