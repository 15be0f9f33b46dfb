"""JAX's debugging modes find nothing where there is no NaN or infinity, operation by operation."""

import subprocess
import sys

import pytest

# In processes of their own, as the modes change what is compiled.
SETUP = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lla

jax.config.update("{mode}", True)
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


T = 6
query, probe, key, value = (normal(2, T, heads, 4) for heads in (2, 2, 1, 1))
ids = np.repeat([[0, 1, 2]], 2, 1).repeat(2, 0)
dense = np.arange(T)[:, None] > np.full((1, T), 2)
MASKS = [
    {{}}, {{"is_causal": False, "key_value_seq_lengths": np.array([0, 4])}}, {{"query_offset": -3}},
    {{"segment_ids": (ids, ids + 1)}}, {{"local_window_size": 2}}, {{"mask": dense}},
]
"""

OPERATOR = """
for options in MASKS:
    for implementation, solver in (
        ("reference", None), ("xla", lla.Solver("cg")), ("xla", lla.Solver("direct")),
    ):
        def loss(query, key, value):
            return lla.local_linear_attention(
                query, key, value, ridge=jnp.full((2, T, 2), 0.5), implementation=implementation,
                solver=solver, **options,
            ).sum()
        loss(query, key, value)
        if options in (MASKS[0], MASKS[2]):
            jax.grad(loss, (0, 1, 2))(query, key, value)
    for implementation in ("reference", "xla"):
        lla.parallax_attention(query, probe, key, value, implementation=implementation, **options)
        lla.softmax_attention(query, key, value, implementation=implementation, **options)
jax.jit(lambda ridge: lla.local_linear_attention(query, key, value, ridge=ridge))(0.5)
"""

QUICK = """
options = MASKS[2]
lla.local_linear_attention(query, key, value, ridge=0.5, **options)
jax.grad(lambda q: lla.softmax_attention(q, key, value, **options).sum())(query)
cache = lla.KVCache.create(2, 16, 1, 4, dtype=jnp.float32)
lla.softmax_decode_step(query[:, :1], key[:, :1], value[:, :1], cache)
"""

DECODING = """
for implementation in ("reference", "xla"):
    for tokens in (1, 3):
        cache = lla.KVCache.create(2, 16, 1, 4, dtype=jnp.float32)
        new = tuple(a[:, :tokens] for a in (query, key, value))
        _, cache = lla.decode_step(*new, cache, ridge=0.5, implementation=implementation)
        lengths = jnp.asarray([tokens, 0])
        _, cache = lla.decode_step(
            *new, cache, ridge=0.5, implementation=implementation, new_lengths=lengths
        )
        _, cache = lla.softmax_decode_step(
            *new, cache, implementation=implementation, local_window_size=2
        )
        lla.parallax_decode_step(new[0], probe[:, :tokens], *new[1:], cache,
                                 implementation=implementation)
"""

LAYERS = """
x = normal(2, T, 8)
layer = lla.nn.LocalLinearAttention(2, 8, rngs=nnx.Rngs(0))
layer(x, segment_ids=jnp.asarray(ids))
nnx.grad(lambda layer: layer(x).sum())(layer)
attention = nnx.MultiHeadAttention(
    2, 8, rngs=nnx.Rngs(0), attention_fn=lla.nn.attention_fn(ridge=1.0), decode=False
)
attention(x, mask=jnp.asarray(np.tril(np.ones((1, 1, T, T), bool), -1)))
mixer = lla.mixers.create("hyena", 8, 2, rngs=nnx.Rngs(0), filter_length=8)
state = mixer.init_state(2, 8)
for tokens in (3, 1):
    _, state = mixer.decode(x[:, :tokens], state)
"""


def run(mode, code):
    program = SETUP.format(mode=mode) + "import lla.mixers\nimport lla.nn\n" + code
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("mode", ["jax_debug_nans", "jax_debug_infs"])
@pytest.mark.parametrize(
    "code",
    [QUICK, *(pytest.param(code, marks=pytest.mark.slow) for code in (OPERATOR, DECODING, LAYERS))],
    ids=["quick", "operator", "decoding", "layers"],
)
def test_no_false_alarm(code, mode):
    done = run(mode, code)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_nan_of_the_caller_is_found():
    code = "lla.softmax_attention(np.full((2, T, 2, 4), np.nan, np.float32), key, value)"
    done = run("jax_debug_nans", code)
    assert "FloatingPointError" in done.stderr, done.stderr[-3000:]
