"""Lowered Hopper kernels that are kept on disk, on a machine without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11"),
]


@pytest.fixture
def folder(tmp_path):
    """A folder for JAX's compilation cache; yields that of the kernels."""
    from lla.kernels import lowered

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "lla-kernels"
    jax.config.update("jax_compilation_cache_dir", before)
    lowered._find.cache_clear()


def forget():
    """What a new process does not know."""
    from lla.kernels import lowered

    lowered._find.cache_clear()
    jax.clear_caches()


def softmax(rows=128, batch=()):
    """Softmax attention by one kernel, and the shapes of its arguments."""
    from lla.kernels.mosaic_gpu import attend, configs, launch, tile

    shape = launch.Shape(1, rows, rows, 2, 1, 64, jnp.dtype(jnp.bfloat16))
    mask = tile.MaskSpec(True, None, False)
    masking = launch.Masking(jax.ShapeDtypeStruct((1, 2), jnp.int32), None, None)
    arguments = shape.queries(), shape.keys(), shape.keys(), shape.rows(), masking
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct((*batch, *a.shape), a.dtype), arguments)
    return functools.partial(attend.attend, shape, mask, configs.choose(64).attend), arguments


def lower(function, arguments):
    """Lowered under jit, by a function that JAX has not seen."""
    call = jax.jit(lambda *arrays: function(*arrays))
    return call.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text):
    return text.count("@mosaic_gpu_v2")


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    from lla.kernels import lowered

    monkeypatch.setattr(lowered, "_find", None)
    assert count_kernels(lower(*softmax())) == 1
    monkeypatch.undo()


def test_a_second_process_does_not_lower(folder, monkeypatch):
    from lla.kernels import lowered

    function, arguments = softmax()
    expected = [a.shape for a in jax.tree.leaves(jax.eval_shape(function, *arguments))]
    forget()
    first = lower(function, arguments)
    assert count_kernels(first) == 1 and len(list(folder.iterdir())) == 1
    forget()
    monkeypatch.setattr(lowered, "_lower", None)
    # The same text is the same key of JAX's own cache.
    assert lower(function, arguments) == first
    forget()
    assert [a.shape for a in jax.tree.leaves(jax.eval_shape(function, *arguments))] == expected


def test_a_program_contains_a_kernel_once(folder):
    function, arguments = softmax()

    def twice(query, *others):
        return function(function(query, *others).out, *others)

    assert count_kernels(lower(twice, arguments)) == 1
    assert len(list(folder.iterdir())) == 1


def test_other_shapes_and_versions_are_other_kernels(folder, monkeypatch):
    from lla.kernels import lowered

    lower(*softmax())
    lower(*softmax(rows=256))
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(lowered, "_sources", lambda: "edited")
    lower(*softmax())
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_replaced(folder, damage):
    from lla.kernels import lowered

    lower(*softmax())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    half = len(whole) // 2
    changed = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    file.write_bytes({"cut": whole[:half], "changed": changed, "empty": b""}[damage])
    assert lowered._read(file) is None
    forget()
    # The module is not the same again: JAX numbers the kernels of a process.
    assert count_kernels(lower(*softmax())) == 1
    assert lowered._read(file) is not None and list(folder.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_to(folder):
    folder.parent.joinpath("lla-kernels").write_text("a file")
    assert count_kernels(lower(*softmax())) == 1


def test_batches(folder):
    function, arguments = softmax(batch=(3,))
    assert count_kernels(lower(jax.vmap(function), arguments)) == 1
    found = jax.eval_shape(jax.vmap(function), *arguments)
    assert found.out.shape == (3, 1, 128, 2, 64) and found.log_sum_exp.shape == (3, 1, 2, 128)


def test_programs_for_several_devices_are_lowered_as_before(folder):
    mesh = jax.sharding.AbstractMesh((2,), ("x",))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda *a: softmax()[0](*a), *softmax()[1])
    assert not folder.exists()
    jax.eval_shape(lambda *a: softmax()[0](*a), *softmax()[1])
    assert folder.exists()


def test_the_interpreter_keeps_nothing(folder):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    function, arguments = softmax()
    arrays = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), arguments)
    masking = arrays[4]._replace(numbers=jnp.array([[0, 128]], jnp.int32))
    result = function(*arrays[:4], masking, interpret=plgpu.InterpretGPUParams())
    np.testing.assert_array_equal(np.asarray(result.out, np.float32), 0)
    assert not folder.exists()
