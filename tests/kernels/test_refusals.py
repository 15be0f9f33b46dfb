"""What the Hopper kernels do not support, and that such calls fall through to XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops import solver as policy
from lla.ops.mosaic_gpu import hopper, precision
from lla.ops.problem import make_problem


def problem(dtype=jnp.bfloat16, head_dim=64, value_dim=64, **options):
    query = jnp.zeros((1, 8, 2, head_dim), dtype)
    value = jnp.zeros((1, 8, 2, value_dim), dtype)
    return make_problem("lla", query, query, value, ridge=1.0, **options)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"head_dim": 256}, "256"),
        ({"value_dim": 160}, "160"),
        ({"mask": np.ones((8, 8), bool)}, "mask"),
        ({"solver": lla.Solver(method="direct")}, "directly with head dimensions up to 32"),
        ({"solver": lla.Solver(method="direct"), "head_dim": 32}, "query has 32 and value 64"),
    ],
)
def test_reasons(given, reason):
    assert reason in hopper.unsupported_shape(problem(**given))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_served(dtype, head_dim):
    assert hopper.unsupported_shape(problem(dtype, head_dim)) is None


@pytest.mark.parametrize("head_dim", [4, 16, 32])
def test_served_directly(head_dim):
    small = problem(head_dim=head_dim, value_dim=head_dim, solver=lla.Solver(method="direct"))
    assert hopper.unsupported_shape(small) is None
    assert hopper.use_direct(small)
    assert not hopper.use_direct(problem(head_dim=64))


def test_auto_uses_the_crossings_of_the_kernels(monkeypatch):
    table = {"mosaic_gpu": {"bfloat16": {16: 2.0, 32: 0.5}}, "cpu": {"bfloat16": {32: 9.0}}}
    monkeypatch.setattr(policy, "CROSSINGS", table)
    usual = {"value_dim": 16, "head_dim": 16}
    assert hopper.use_direct(problem(**usual))  # ridge 1
    assert not hopper.use_direct(problem(head_dim=32, value_dim=32))
    assert not hopper.use_direct(problem(**usual, solver=lla.Solver("cg")))
    # Kernels for wider values have no direct solver.
    assert not hopper.use_direct(problem(head_dim=16, value_dim=64))


def test_auto_avoids_large_inverses(monkeypatch):
    monkeypatch.setattr(policy, "CROSSINGS", {"mosaic_gpu": {"bfloat16": {32: 2.0}}})
    given = problem(head_dim=32, value_dim=32)
    needed = hopper._inverse_bytes(32, given.query.shape[1] * 2)  # of a sequence with two heads
    monkeypatch.setattr(hopper, "_INVERSE_BYTES", needed)
    assert hopper.use_direct(given)
    monkeypatch.setattr(hopper, "_INVERSE_BYTES", needed - 1)
    assert not hopper.use_direct(given)
    assert hopper.use_direct(problem(head_dim=32, value_dim=32, solver=lla.Solver("direct")))


def test_named_implementation_says_why():
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    expected = "Python 3.12 or later" if jax.__version_info__ < (0, 11) else "Hopper"
    with pytest.raises(NotImplementedError, match=expected):
        lla.softmax_attention(query, query, query, implementation="mosaic_gpu")
    out = lla.softmax_attention(query, query, query, implementation=("mosaic_gpu", "xla"))
    assert out.shape == query.shape
    assert expected in lla.explain(query, query, query)["mosaic_gpu"]


@pytest.mark.compat
@pytest.mark.parametrize(
    ("ridge", "forward", "backward", "bf16x2"),
    [(10.0, 1e-3, 3e-3, False), (1.0, 1.5e-3, 5e-3, False), (0.1, 1e-3, 1e-3, True)],
)
def test_tolerances(ridge, forward, backward, bf16x2):
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernels need JAX 0.11")
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    given = make_problem("lla", query, query, query, ridge=ridge)
    found = precision.iterations(given, precise=False)
    assert [i.tol for i in found] == [forward, backward]
    assert found[0].bf16x2 == bf16x2
    # With a preconditioner, a tighter tolerance costs little.
    found = precision.iterations(given, precise=True, direct=True)
    assert [(i.tol, i.bf16x2) for i in found] == [(1e-3, True), (1e-4, True)]
    fixed = make_problem("lla", query, query, query, ridge=ridge, solver=lla.Solver(num_iters=3))
    found = precision.iterations(fixed, precise=False)
    assert [(i.tol, i.max_iters) for i in found] == [(None, 3)] * 2
    asked = make_problem("lla", query, query, query, ridge=ridge, solver=lla.Solver(tol=5e-4))
    found = precision.iterations(asked, precise=False)
    assert [(i.tol, i.max_iters, i.bf16x2) for i in found] == [
        (5e-4, 256, True),
        (5e-3, 256, True),
    ]


@pytest.mark.compat
def test_when_tiles_choose_their_precision():
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernels need JAX 0.11")
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)

    def chosen(ridge, **options):
        solver = lla.Solver(**options) if options else None
        return precision.choose_by_tile(
            make_problem("lla", query, query, query, ridge=ridge, solver=solver)
        )

    assert chosen(jnp.ones((1, 8, 2))) and chosen(1.0) and chosen(1.0, num_iters=3)
    # bf16x2 in all tiles, whatever the keys are; or a ridge that is large for any usual keys.
    assert not chosen(0.1) and not chosen(jnp.ones((1, 8, 2)), tol=5e-4) and not chosen(10.0)
    assert not precision.choose_by_tile(make_problem("softmax", query, query, query))


def mark(ridge, key, *, offset=(0, 0), length=(192, 192), is_causal=True):
    numbers = jnp.stack([jnp.array(offset), jnp.array(length)], axis=1).astype(jnp.int32)
    heads, rows = ridge.shape[1], key.shape[1]
    found = precision.mark_small(ridge, key, numbers, is_causal, key.shape[-1], (heads, rows))
    return np.asarray(found)


def test_tiles_with_a_small_ridge_are_marked():
    key = jnp.ones((2, 192, 2, 16), jnp.bfloat16)  # mean square 1: ridges below 0.5 are small
    ridge = np.ones((2, 4, 192), np.float32)
    ridge[0, 1, 70] = 0.4
    ridge[1, 3] = 0.6
    expected = np.zeros((2, 4, 3), np.int32)
    expected[0, 1, 1] = 1
    np.testing.assert_array_equal(mark(ridge, key), expected)
    # Heads 2 and 3 share keys with mean square 4, for which a ridge of 1 is small.
    scale = jnp.array([1, 2], key.dtype)[None, None, :, None]
    expected[:, 2:] = 1
    np.testing.assert_array_equal(mark(ridge, key * scale), expected)
    # One ridge for all rows of a head.
    ridge = np.array([0.4, 0.6, 1.9, 2.1], np.float32)[None, :, None]
    expected = np.broadcast_to(np.array([1, 0, 1, 0])[None, :, None], expected.shape)
    np.testing.assert_array_equal(mark(ridge, key * scale), expected)


def test_marks_depend_only_on_visible_keys():
    large = np.ones((2, 192, 1, 16), np.float32)
    large[:, 64:] = 2.0
    key, ridge = jnp.asarray(large, jnp.bfloat16), jnp.ones((2, 1, 192))
    # The mean squares up to the end of each tile are 1, 2.5 and 3.
    np.testing.assert_array_equal(mark(ridge, key), [[[0, 1, 1]]] * 2)
    np.testing.assert_array_equal(mark(ridge, key, is_causal=False), [[[1, 1, 1]]] * 2)
    np.testing.assert_array_equal(mark(ridge, key, offset=(0, 64)), [[[0, 1, 1]], [[1, 1, 1]]])
    # Keys beyond the length may hold anything.
    garbage = jnp.asarray(np.where(large > 1, np.nan, large), jnp.bfloat16)
    np.testing.assert_array_equal(mark(ridge, garbage, length=(64, 0)), [[[0, 0, 0]]] * 2)
