"""Checkpoints that are damaged, and readers beside a run."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lla.runs import WorkdirError
from lla.training.checkpoint import Checkpoints
from lla.training.trainer import TrainState


def state(step):
    params = {"a": jnp.full((3, 2), step, jnp.float32), "b": jnp.arange(5, dtype=jnp.float32)}
    numbers = {field.name: jnp.int32(-1) for field in dataclasses.fields(TrainState)}
    given = {"step": jnp.int32(step), "params": params, "opt_state": (jnp.zeros((3, 2)),)}
    return TrainState(**numbers | given)


def like():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state(0)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the checkpoints 2, 4 and 6."""
    path = tmp_path_factory.mktemp("whole") / "checkpoints"
    with Checkpoints(path) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(state(step))
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoints")


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def without_arrays(checkpoint):
    for file in checkpoint.rglob("d/*"):
        file.unlink()


def without_item(checkpoint):
    shutil.rmtree(checkpoint / "default")


def without_index(checkpoint):
    for file in checkpoint.rglob("manifest.ocdbt"):
        file.unlink()


def cut(checkpoint):
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = (empty, without_arrays, without_item, without_index, cut)


def contents(path):
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.is_file() and file.read_bytes())
        for file in path.rglob("*")
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_can_be_written_again(folder, damage):
    damage(folder / "6")
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.warns(
            RuntimeWarning, match=r"6 cannot be read .*using that of step 4.*damaged_6"
        ):
            found = checkpoints.restore(like())
        assert int(found.step) == 4
        np.testing.assert_array_equal(found.params["a"], state(4).params["a"])
        assert checkpoints.steps() == [2, 4] and (folder / "damaged_6").is_dir()
        checkpoints.save(state(6))
    with Checkpoints(folder, keep=2) as checkpoints:
        assert int(checkpoints.restore(like()).step) == 6  # without a warning
        assert checkpoints.steps() == [4, 6]


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_all_are_damaged_the_error_says_so_and_leaves_them(folder, damage):
    for step in (2, 4, 6):
        damage(folder / str(step))
    before = contents(folder)
    for read_only in (True, False):
        with Checkpoints(folder, read_only=read_only) as checkpoints:
            with pytest.raises(WorkdirError, match=r"6 cannot be read, and .*Delete .*checkpoints"):
                checkpoints.restore(like())
            with pytest.raises(WorkdirError, match="4 cannot be read"):
                checkpoints.restore(like(), 4)
    assert before == contents(folder)


def test_the_error_and_the_warning_are_a_line(folder):
    without_arrays(folder / "6")
    with Checkpoints(folder, read_only=True) as checkpoints, pytest.warns(RuntimeWarning) as found:
        checkpoints.restore(like())
    assert [str(entry.message).count("\n") for entry in found] == [0]


def test_a_reader_changes_nothing(folder):
    half = folder / "8.orbax-checkpoint-tmp-1"  # what a process that writes has at some moment
    half.mkdir()
    (half / "data").write_text("half")
    empty(folder / "6")
    before = contents(folder)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]
        with pytest.warns(RuntimeWarning, match="using that of step 4"):
            assert int(checkpoints.restore(like()).step) == 4
        checkpoints.save(state(9))
    assert before == contents(folder)
    nowhere = folder.parent / "nowhere"
    with Checkpoints(nowhere, read_only=True) as checkpoints:
        assert checkpoints.restore(like()) is None
    assert not nowhere.exists()


def test_a_reader_follows_a_run_that_replaces_its_checkpoints(folder):
    with Checkpoints(folder, read_only=True) as reader:
        with Checkpoints(folder, keep=1) as writer:
            writer.save(state(8))
        assert not (folder / "6").exists()
        assert int(reader.restore(like()).step) == 8


def test_no_checkpoint_is_no_error(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(like()) is None


def test_the_layout_on_disk_stays(tmp_path):
    """Checkpoints hold the optimiser's state under "moments", as the first ones did."""
    expected = state(3)
    tree = {field.name: getattr(expected, field.name) for field in dataclasses.fields(TrainState)}
    tree["moments"] = tree.pop("opt_state")
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(like()), expected)
