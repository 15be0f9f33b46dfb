"""What the Hopper kernels refuse, and that refusing falls through to XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops import mosaic_gpu
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
        ({"solver": lla.Solver(method="direct")}, "direct"),
    ],
)
def test_reasons(given, reason):
    assert reason in mosaic_gpu.refuse_shape(problem(**given))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_served(dtype, head_dim):
    assert mosaic_gpu.refuse_shape(problem(dtype, head_dim)) is None


def test_named_implementation_says_why():
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    expected = "JAX 0.11" if jax.__version_info__ < (0, 11) else "Hopper"
    with pytest.raises(NotImplementedError, match=expected):
        lla.softmax_attention(query, query, query, implementation="mosaic_gpu")
    out = lla.softmax_attention(query, query, query, implementation=("mosaic_gpu", "xla"))
    assert out.shape == query.shape
    assert expected in lla.explain(query, query, query)["mosaic_gpu"]


@pytest.mark.compat
@pytest.mark.parametrize(
    ("ridge", "forward", "backward", "precise"),
    [(10.0, 1e-3, 3e-3, False), (1.0, 1.5e-3, 5e-3, False), (0.1, 1e-3, 1e-3, True)],
)
def test_tolerances(ridge, forward, backward, precise):
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernels need JAX 0.11")
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    given = make_problem("lla", query, query, query, ridge=ridge)
    found = mosaic_gpu.iterations(given)
    assert [i.tol for i in found] == [forward, backward]
    assert found[0].precise == precise
    fixed = make_problem("lla", query, query, query, ridge=ridge, solver=lla.Solver(num_iters=3))
    assert [(i.tol, i.max_iters) for i in mosaic_gpu.iterations(fixed)] == [(None, 3)] * 2
    asked = make_problem("lla", query, query, query, ridge=ridge, solver=lla.Solver(tol=5e-4))
    found = mosaic_gpu.iterations(asked)
    assert [(i.tol, i.max_iters, i.precise) for i in found] == [
        (5e-4, 256, True),
        (5e-3, 256, True),
    ]
