"""Compiles the TPU kernels for real chips, without one.

    pip install "jax[tpu]"
    python -m tests.kernels.tpu_compile_ahead

Prints a line of JSON for each program: its name, the chip, its temporary memory, and the bytes of
vector memory of each of its kernels. Nothing is run.
"""

from __future__ import annotations

import json
import os

# Keeps libtpu from looking for a machine in Google Cloud.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lla.experiments.benchmarks.tpu_costs import vector_memory
from tests.kernels.tpu_cases import program

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
LONG = {"queries": 65536, "batch": 1, "heads": 2}
PROGRAMS = {
    "lla_bfloat16": ("lla", 128, {}),
    "lla_float32": ("lla", 128, {"dtype": jnp.float32}),
    "lla_ridge_10": ("lla", 64, {"ridge": 10.0}),
    "lla_segments": ("lla", 64, {"mask": "segments", "dtype": jnp.float32}),
    "lla_window_and_widest": ("lla", 256, {"mask": "window", "dtype": jnp.float32}),
    "lla_other_dims": ("lla", 48, {"value_dim": 200, "mask": "lengths"}),
    "lla_few_queries": ("lla", 64, {"queries": 5, "keys": 3000, "heads": 6, "mask": "lengths"}),
    "lla_decoding": ("lla", 128, {
        "queries": 1, "keys": 4096, "heads": 16, "mask": "lengths", "forward_only": True
    }),
    "lla_long": ("lla", 128, LONG),
    "parallax": ("parallax", 128, {}),
    "parallax_float32": ("parallax", 64, {"dtype": jnp.float32, "mask": "full"}),
    "softmax": ("softmax", 128, {}),
    "softmax_float32": ("softmax", 64, {"dtype": jnp.float32, "mask": "segments"}),
    "softmax_long": ("softmax", 128, LONG),
}  # fmt: skip
SHARDED = "lla_sharded"


def compiled(function, arguments, mesh):
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def main():
    for chip, topology in CHIPS.items():
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
        mesh = jax.sharding.Mesh(devices[:1], ("x",))
        for name, (mechanism, head_dim, options) in PROGRAMS.items():
            sharding = jax.sharding.NamedSharding(mesh, jax.P())
            function, arguments = program(mechanism, head_dim, sharding=sharding, **options)
            report(name, chip, compiled(function, arguments, mesh))
        # The sequences of a batch on the four chips of the topology.
        mesh = jax.sharding.Mesh(devices, ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.P("x"))
        function, arguments = program("lla", 64, batch=1, ridge=1.0)
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((4, *a.shape[1:]), a.dtype, sharding=sharding),  # noqa: B023
            arguments,
        )
        spread = jax.shard_map(
            function, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")
        )  # fmt: skip
        report(SHARDED, chip, compiled(spread, arguments, mesh))


def report(name: str, chip: str, program):
    memory = vector_memory(program.as_text())
    temporary = program.memory_analysis().temp_size_in_bytes
    line = {"name": name, "chip": chip, "vmem_bytes": memory, "temp_bytes": temporary}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
