"""What a user writes, for the type checker: every result has the type that it says."""

from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx

import lla
import lla.nn

query = key = value = probe = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))

# One array, which needs no cast before it is used.
out = lla.local_linear_attention(query, key, value, ridge=1.0)
assert_type(out, jax.Array)
assert_type(jnp.square(out), jax.Array)
assert_type(lla.parallax_attention(query, probe, key, value, is_causal=False), jax.Array)
assert_type(lla.softmax_attention(query, key, value, logits_soft_cap=30.0), jax.Array)

# An array and the statistics of the solves.
out, stats = lla.local_linear_attention(
    query, key, value, ridge=1.0, solver=lla.Solver(tol=1e-4), return_stats=True
)
assert_type(stats, lla.Stats)
assert_type(stats.iterations, jax.Array)
_, stats = lla.parallax_attention(query, probe, key, value, scale=0.5, return_stats=True)
assert_type(stats, lla.Stats)
_, stats = lla.softmax_attention(query, key, value, local_window_size=(4, 0), return_stats=True)
assert_type(stats, lla.Stats)


def either(wanted: bool) -> jax.Array:
    found = lla.local_linear_attention(query, key, value, ridge=1.0, return_stats=wanted)
    assert_type(found, jax.Array | tuple[jax.Array, lla.Stats])
    return found[0] if isinstance(found, tuple) else found


# Decoding.
cache = lla.KVCache.create(1, 64, num_kv_heads=2, head_dim=16, dtype=jnp.float32)
assert_type(cache, lla.KVCache)
out, cache = lla.decode_step(query, key, value, cache, ridge=jnp.square(out[..., 0]) + 1.0)
assert_type(out, jax.Array)
assert_type(cache, lla.KVCache)
out, cache, stats = lla.decode_step(query, key, value, cache, ridge=1.0, return_stats=True)
assert_type(stats, lla.Stats)
out, cache = lla.parallax_decode_step(query, probe, key, value, cache)
out, cache, stats = lla.softmax_decode_step(query, key, value, cache, return_stats=True)
assert_type(cache.lengths, jax.Array)

# Layers and mixers.
layer = lla.nn.LocalLinearAttention(num_heads=2, in_features=32, ridge=1.0, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (1, 8, 32))
assert_type(layer(x), jax.Array)
out, stats = layer(x, return_stats=True)
assert_type(stats, lla.Stats)
state = layer.init_state(1, 16)
out, state = layer.decode(x, state)
assert_type(out, jax.Array)
mixer: nnx.Module = lla.mixers.create("gla", 32, 2, rngs=nnx.Rngs(0))

# A model that writes.
config = lla.models.ModelConfig(
    width=16,
    depth=1,
    num_heads=2,
    mixer="lla",
    mixer_options={},
    vocab_size=11,
    input_dim=None,
    output_dim=11,
    max_length=32,
)
model = lla.models.SequenceModel(config, rngs=nnx.Rngs(0))
prompt = jax.random.randint(jax.random.key(2), (2, 3), 0, 11)
assert_type(model(prompt), jax.Array)
written = lla.generate(model, prompt, max_new_tokens=4)
assert_type(written, lla.Generated)
assert_type(written.tokens, jax.Array)

# The rest of the package.
for name, reason in lla.explain(query, key, value).items():
    assert_type(name, str)
    assert_type(reason, str | None)
assert_type(lla.__version__, str)
names: tuple[str, ...] = lla.RESIDUAL_NAMES
