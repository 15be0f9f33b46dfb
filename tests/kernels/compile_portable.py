"""Compiles the kernels of all NVIDIA GPUs since Ampere ahead of time, without a GPU.

    pip install "jax-cuda13-plugin" "jax-cuda13-pjrt" "nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*"
    python tests/kernels/compile_portable.py 8.0 9.0 ... [--only NAME] [--table FILE]

Prints a line ``kernel CAPABILITY NAME``, the shared memory of a program instance, and what the
assembler says of it (registers, spills).
``--table FILE`` compiles in processes of one card each and writes what `read` finds to FILE.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import utils

from lla.kernels.mosaic_gpu.attend import Solved
from lla.kernels.mosaic_gpu.gradients import Directions, Rows
from lla.kernels.mosaic_gpu.launch import Masking, Shape
from lla.kernels.mosaic_gpu.solve import Adjoint, TileOverride
from lla.kernels.mosaic_gpu.solve_rows import CGOptions
from lla.kernels.mosaic_gpu.tile import MaskSpec
from lla.kernels.mosaic_gpu_mma import attend, configs, gradients, launch, solve

# Multiprocessors and a name; XLA wants to know what it compiles for.
CARDS = {
    (8, 0): (108, "NVIDIA A100-SXM4-80GB"),
    (8, 6): (82, "NVIDIA GeForce RTX 3090"),
    (8, 9): (128, "NVIDIA GeForce RTX 4090"),
    (9, 0): (132, "NVIDIA H200"),
    (10, 0): (148, "NVIDIA B200"),
    (10, 3): (148, "NVIDIA B300"),
    (12, 0): (170, "NVIDIA GeForce RTX 5090"),
}

CARD = """
gpu_device_info {
  cuda_compute_capability { major: %d minor: %d%s }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: %d
  shared_memory_per_block_optin: %d
  threads_per_core_limit: 2048
  core_count: %d
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 2000000000000
  l2_cache_size: 41943040
  clock_rate_ghz: 1.5
  device_memory_size: 24000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "%s"
"""


def kernels(head_dim: int, capability, dtype=jnp.bfloat16):
    """Name, function and arguments of every kernel."""
    b, t, n = 2, 512, 4
    shape = Shape(b, t, t, n // 2, 2, head_dim, jnp.dtype(dtype))
    mask = MaskSpec(True, None, False)
    chosen = configs.choose(head_dim, capability)
    masking = Masking(jax.ShapeDtypeStruct((b, 2), jnp.int32), None, None)
    query, key, row, mean = shape.queries(), shape.keys(), shape.rows(), shape.queries(jnp.float32)
    rows = Rows(row, row, row)
    directions = Directions(query, row, query, query, mean)
    marked = jax.ShapeDtypeStruct((*row.shape[:2], t // 64), jnp.int32)

    def solving(mode, adjoint):
        iteration = CGOptions(3e-3, 32, mode == "bf16x2")
        config = chosen.solve if mode == "plain" else chosen.solve_bf16x2
        extra = (Adjoint(key, query, row, row, mean, row),) if adjoint else (None,)
        if mode == "mixed":
            extra = *extra, marked

        def run(*arrays):
            if mode == "mixed":
                *arrays, mark = arrays
                arrays = *arrays, TileOverride(CGOptions(1e-3, 256, True), mark)
            return solve.solve(shape, mask, config, iteration, *arrays)

        return run, (query, key, row, row, masking, *extra)

    def attending(probe, solved, bf16x2=False):
        config = chosen.attend if probe is None or solved else chosen.attend_probed
        config = chosen.attend_bf16x2 if bf16x2 else config
        return (
            lambda *a: attend.attend(shape, mask, config, *a, bf16x2=bf16x2),
            (query, key, key, row, masking, probe, solved),
        )

    def by_query(directions):
        return (
            lambda *a: gradients.query_gradients(shape, mask, chosen.query_gradients, *a),
            (query, key, key, query, rows, directions, masking),
        )

    def by_key(config, directions):
        return (
            lambda *a: gradients.key_gradients(shape, mask, config, *a),
            (query, key, key, query, rows, row, directions, masking),
        )

    none = Directions()
    parallax = Directions(probe=query, probe_shift=row, key_mean=mean)
    yield "softmax", *attending(None, None)
    yield "softmax_query_gradients", *by_query(none)
    yield "softmax_key_gradients", *by_key(chosen.key_gradients, none)
    yield "solve", *solving("plain", False)
    yield "solved", *attending(query, Solved(row, row, query))
    yield "adjoint", *solving("plain", True)
    yield "query_gradients", *by_query(directions)
    yield "key_gradients", *by_key(chosen.key_gradients, directions)
    yield "parallax", *attending(query, None)
    yield "parallax_query_gradients", *by_query(parallax)
    yield "parallax_key_gradients", *by_key(chosen.key_gradients, parallax)
    for mode in ("bf16x2", "mixed"):
        yield f"solve_{mode}", *solving(mode, False)
        yield f"adjoint_{mode}", *solving(mode, True)
    solved = Solved(row, row, query)
    yield "solved_bf16x2", *attending(query, solved, bf16x2=True)
    yield "solved_mixed", *attending(query, solved._replace(marked=marked), bf16x2=True)
    split = directions._replace(probe_low=query)
    yield "key_gradients_split", *by_key(chosen.key_gradients_split, split)


def compiler(capability):
    """A function that compiles for a card of some capability."""
    memory = launch.SHARED_MEMORY[capability]
    cores, name = CARDS[capability]
    # Mosaic asks for the instructions of one architecture alone from Hopper on.
    feature = " feature_extension: ACCELERATED_FEATURES" if capability >= (9, 0) else ""
    text = CARD % (*capability, feature, memory + 1024, memory, cores, name)
    topology = topologies.get_topology_desc(
        topology_name="card", platform="cuda", target_config=text, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    # JAX asks the devices of this process.
    utils._infer_arch = lambda: capability

    def compile_for_card(function, arguments):
        placed = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
        )
        with jax.set_mesh(mesh):
            traced = jax.jit(function).trace(*placed)
            return traced.lower(lowering_platforms=("cuda",)).compile()

    return compile_for_card


@contextlib.contextmanager
def recorded_shared_bytes():
    """Yields a list to which every kernel that is traced adds its bytes of shared memory."""
    found, shared_bytes = [], launch.shared_bytes

    def record(scratch):
        found.append(shared_bytes(scratch))
        return found[-1]

    launch.shared_bytes = record
    try:
        yield found
    finally:
        launch.shared_bytes = shared_bytes


def read(said: str) -> dict[str, dict[str, int]]:
    """Registers of a thread, bytes of its spills, and shared memory, from what `main` prints."""
    found = {}
    for part in re.split(r"^kernel ", said, flags=re.MULTILINE)[1:]:
        registers = re.findall(r"Used (\d+) registers", part)
        spills = re.findall(r"(\d+) bytes spill stores", part)
        shared = re.findall(r"^shared (\d+)", part, flags=re.MULTILINE)
        if not (registers and spills and shared):
            raise ValueError(part[-2000:])
        name = " ".join(part.split()[:2])
        found[name] = {
            "registers": int(registers[-1]), "spills": max(map(int, spills)),
            "shared": int(shared[-1]),
        }  # fmt: skip
    return found


def trace(function, arguments):
    jax.eval_shape(function, *arguments)


def write_table(options) -> int:
    """Adds the cards of `options` to a table, which may hold others."""
    path = pathlib.Path(options.table)
    table = json.loads(path.read_text()) if path.exists() else {"kernels": {}}
    for capability in options.capabilities:
        command = [
            sys.executable, __file__, capability,
            "--head_dims", *map(str, options.head_dims),
            *(["--only", *options.only] if options.only else []),
        ]  # fmt: skip
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print(done.stdout[-3000:])
            return done.returncode
        table["kernels"] |= read(done.stdout)
        table["jax"] = jax.__version__
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="+")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--head_dims", type=int, nargs="+", default=list(configs.HEAD_DIMS))
    parser.add_argument("--table")
    parser.add_argument("--trace", action="store_true", help="print shared memory alone")
    options = parser.parse_args()
    if options.table:
        return write_table(options)
    failed = False
    for text in options.capabilities:
        capability = tuple(int(part) for part in text.split("."))
        compile_for_card = trace if options.trace else compiler(capability)
        for head_dim in options.head_dims:
            if not configs.fits(head_dim, capability):
                continue
            for name, function, arguments in kernels(head_dim, capability):
                if options.only and name not in options.only:
                    continue
                print(f"kernel {text} {name}_{head_dim}", flush=True)
                try:
                    with recorded_shared_bytes() as shared:
                        compile_for_card(function, arguments)
                    print("shared", max(shared), flush=True)
                except Exception as error:
                    if len(options.only or ()) == 1:
                        raise
                    failed = True
                    print("failed", type(error).__name__, str(error)[:500], flush=True)
                sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
