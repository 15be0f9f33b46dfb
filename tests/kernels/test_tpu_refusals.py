"""What the TPU kernels do not support, and that such calls fall through to XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops import backend as dispatch
from lla.ops.mosaic_tpu import backend as mosaic_tpu
from lla.ops.problem import make_problem


def problem(dtype=jnp.bfloat16, head_dim=64, value_dim=64, **options):
    query = jnp.zeros((1, 8, 2, head_dim), dtype)
    value = jnp.zeros((1, 8, 2, value_dim), dtype)
    return make_problem("lla", query, query, value, ridge=1.0, **options)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": jnp.float16}, "float16"),
        ({"head_dim": 264}, "264"),
        ({"value_dim": 300}, "300"),
        ({"mask": np.ones((8, 8), bool)}, "mask"),
        ({"solver": lla.Solver(method="direct")}, "direct"),
    ],
)
def test_reasons(given, reason):
    assert reason in mosaic_tpu.unsupported_shape(problem(**given))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [16, 256])
def test_served(dtype, head_dim):
    assert mosaic_tpu.unsupported_shape(problem(dtype, head_dim)) is None


def test_named_implementation_says_why():
    query = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="need a TPU, the platform is cpu"):
        lla.softmax_attention(query, query, query, implementation="mosaic_tpu")
    out = lla.softmax_attention(query, query, query, implementation=("mosaic_tpu", "xla"))
    assert out.shape == query.shape
    assert "TPU" in lla.explain(query, query, query)["mosaic_tpu"]


def test_kernels_are_opt_in_on_a_tpu(monkeypatch):
    """They have never run on hardware."""
    monkeypatch.setattr(dispatch.jax, "default_backend", lambda: "tpu")
    assert dispatch.preference() == ("xla",)


def test_second_derivatives():
    def loss(query):
        given = problem()
        given = dataclasses.replace(given, query=query)
        return mosaic_tpu.attend_shielded(given, interpret=True)[0].astype(jnp.float32).sum()

    def second(query):
        return jax.jvp(jax.grad(loss), (query,), (query,))[1]

    with pytest.raises(NotImplementedError, match=r"mosaic_tpu.*reference"):
        jax.eval_shape(second, problem().query)
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu.*reference"):
        jax.eval_shape(jax.grad(lambda q: jax.grad(loss)(q).sum()), problem().query)
