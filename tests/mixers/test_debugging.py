"""JAX's debugging modes raise no false alarm in any mixer, eagerly, in a process of its own."""

import subprocess
import sys

import pytest

from lla import mixers

# Eagerly, since the modes look at the results of single operations. Few, short calls: the first
# use of every operation compiles it.
PROGRAM = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

mode, name = sys.argv[1:]
jax.config.update(mode, True)

from lla import mixers

x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 8)), jnp.float32)
ids = jnp.asarray([[0, 0, 1, 1, 1, 2]] * 2)
references = {"form": "recurrent", "implementation": "reference", "solver": "exact"}
if name == "lla":
    del references["solver"]
for options in ({}, {k: v for k, v in references.items() if k in mixers.options(name)}):
    mixer = mixers.create(name, 8, 2, rngs=nnx.Rngs(0), **options)
    nnx.grad(lambda mixer, x: mixer(x, segment_ids=ids).sum(), argnums=(0, 1))(mixer, x)
    y, state = mixer.decode(x[:, :3], mixer.init_state(2, 8), jnp.asarray([3, 0]))
    y, state = mixer.decode(x[:, 3:4], state)
    y, state = mixer.decode(x[:, 4:6], state, segment_ids=ids[:, 4:6])
print("done")
"""
QUICK = ("gated_deltanet",)


@pytest.mark.parametrize("mode", ["jax_debug_nans", "jax_debug_infs"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in mixers.names()
    ],
)
def test_no_false_alarm(name, mode):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, name],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]
