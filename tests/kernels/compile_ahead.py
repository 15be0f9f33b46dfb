"""Compiles every Hopper kernel of the configuration table for an H200, without a GPU.

    pip install jax-cuda13-plugin jax-cuda13-pjrt "nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*"
    python tests/kernels/compile_ahead.py

Prints a line ``kernel NAME`` before the messages of the assembler about it (spills, serialized
products). Then lines ``step NAME COUNT``, the number of kernels in a decoding step of one sequence,
and ``layers COUNT BYTES``, the temporary memory of the gradients of layers with the direct solver.
"""

from __future__ import annotations

import itertools
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import compile_mixers
import jax
import jax.numpy as jnp
from jax.experimental import topologies

import lla
from lla.kernels.mosaic_gpu import (
    attend,
    configs,
    decode,
    decode_solve,
    gradients,
    inverse,
    launch,
    solve,
    tile,
)
from lla.ops.mosaic_gpu import hopper as mosaic_gpu

# What XLA needs to know about the card, from its data sheet and the limits of CUDA.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
"""


DECODED = (64, 128)  # head dimensions of the decoding kernels


def call(head_dim: int):
    """Sizes, masks and operands of a call."""
    b, t, n = 2, 512, 4
    shape = launch.Shape(b, t, t, n // 2, 2, head_dim, jnp.dtype(jnp.bfloat16))
    masking = launch.Masking(jax.ShapeDtypeStruct((b, 2), jnp.int32), None, None)
    arrays = shape.queries(), shape.keys(), shape.rows(), shape.queries(jnp.float32)
    return shape, tile.MaskSpec(True, None, False), configs.choose(head_dim), masking, *arrays


def kernels(head_dim: int):
    """Name, function and arguments of every attention kernel."""
    shape, mask, chosen, masking, query, key, row, mean = call(head_dim)
    rows = gradients.Rows(row, row, row)
    directions = gradients.Directions(query, row, query, query, mean)

    marked = jax.ShapeDtypeStruct((*row.shape[:2], row.shape[2] // 64), jnp.int32)

    def solving(mode, adjoint):
        options = solve.CGOptions(3e-3, 32, mode == "bf16x2")
        names = {"bf16x2": "solve_bf16x2", "mixed": "solve_mixed"}
        config = getattr(chosen, names.get(mode, "solve"))
        extra = (solve.Adjoint(key, query, row, row, mean, row),) if adjoint else (None,)
        if mode == "mixed":
            extra = *extra, marked

        def run(*arrays):
            if mode == "mixed":
                *arrays, mark = arrays
                arrays = *arrays, solve.TileOverride(solve.CGOptions(1e-3, 256, True), mark)
            return solve.solve(shape, mask, config, options, *arrays)

        return run, (query, key, row, row, masking, *extra)

    def attending(probe, solved, bf16x2=False):
        config = chosen.attend_bf16x2 if bf16x2 else chosen.attend
        return (
            lambda *a: attend.attend(shape, mask, config, *a, bf16x2=bf16x2),
            (query, key, key, row, masking, probe, solved),
        )

    def keys(config, directions):
        return (
            lambda *a: gradients.key_gradients(shape, mask, config, *a),
            (query, key, key, query, rows, row, directions, masking),
        )

    for mode in ("plain", "bf16x2", "mixed"):
        suffix = "" if mode == "plain" else f"_{mode}"
        yield f"solve{suffix}", *solving(mode, False)
        yield f"adjoint{suffix}", *solving(mode, True)
    yield "softmax", *attending(None, None)
    yield "parallax", *attending(query, None)
    solved = attend.Solved(row, row, query)
    yield "solved", *attending(query, solved)
    yield "solved_bf16x2", *attending(query, solved, bf16x2=True)
    yield "solved_mixed", *attending(query, solved._replace(marked=marked), bf16x2=True)
    yield (
        "query_gradients",
        lambda *a: gradients.query_gradients(shape, mask, chosen.query_gradients, *a),
        (query, key, key, query, rows, directions, masking),
    )
    yield "key_gradients", *keys(chosen.key_gradients, directions)
    split = directions._replace(probe_low=query)
    yield "key_gradients_split", *keys(chosen.key_gradients_split, split)


def direct_kernels(head_dim: int, dim: int):
    """Name, function and arguments of every kernel of the direct solver, for `dim` dimensions."""
    shape, mask, chosen, masking, query, key, row, mean = call(head_dim)
    b, t, n = shape.batch, shape.num_queries, shape.heads
    sums = inverse.num_sums(dim)
    centred = jax.ShapeDtypeStruct((b, key.shape[2], dim, key.shape[1]), jnp.float32)
    yield f"products_{dim}", inverse.key_products, (centred,)
    parts = (jax.ShapeDtypeStruct((b, key.shape[2], sums, key.shape[1]), jnp.bfloat16),) * 2
    yield (
        f"moments_{dim}",
        lambda *a: inverse.moments(shape, mask, chosen.moments, *a),
        (query, key, parts, row, row, masking),
    )
    found = jax.ShapeDtypeStruct((b, n, sums, t), jnp.float32)
    yield f"invert_{dim}", lambda *a: inverse.invert(shape, dim, *a), (found, row)
    inverses = jax.ShapeDtypeStruct((b, n, dim, head_dim, t), jnp.float32)
    options = solve.CGOptions(1e-3, 256, True)
    adjoint = solve.Adjoint(key, query, row, row, mean, row)
    for name, preconditioner, extra in (
        ("solve", solve.Preconditioner(inverses, row, mean), None),
        ("adjoint", solve.Preconditioner(inverses), adjoint),
    ):
        yield (
            f"{name}_direct_{dim}",
            lambda *a: solve.solve(shape, mask, chosen.solve_direct, options, *a),
            (query, key, row, row, masking, extra, None, preconditioner),
        )


def decoding_kernels(head_dim: int, group: int):
    """Name, function and arguments of every decoding kernel.

    For a `group` of more than one, only those that serve its query heads together.
    """
    cache = decode.CacheShape(2, 4096, 8, group, head_dim, jnp.dtype(jnp.bfloat16), 4)
    keys = jax.ShapeDtypeStruct((2, 4096, 8, head_dim), cache.dtype)
    query = jax.ShapeDtypeStruct((2, cache.heads, head_dim), cache.dtype)
    place = jax.ShapeDtypeStruct((2,), jnp.int32)
    suffix = "" if group == 1 else f"_group_{group}"

    def sums(mechanism, bf16x2):
        return lambda *a: decode.sum_over_cache(cache, mechanism, *a, bf16x2=bf16x2)

    arguments = (query, keys, keys, (place, place), cache.per_head())
    for name, mechanism, bf16x2 in (
        ("softmax", "softmax", False),
        ("parallax", "parallax", False),
        ("lla", "lla", False),
        ("lla_bf16x2", "lla", True),
    ):
        if group == 1 or decode.heads_per_program(mechanism, group) > 1:
            extra = (query,) if mechanism == "parallax" else ()
            yield f"decode_{name}{suffix}", sums(mechanism, bf16x2), (*arguments, *extra)
    if group > 1:
        return
    rows, moments = cache.per_head(3, head_dim), cache.per_head(head_dim, 2 * head_dim)
    yield (
        "decode_fit",
        lambda *a: decode_solve.fit(cache, *a, tol=1e-4, max_iters=256),
        (rows, moments, query, keys, place, cache.per_head()),
    )


def step(mechanism):
    """A decoding step of one sequence, with its cache split among instances, and its arguments."""
    cache = jax.eval_shape(lambda: lla.KVCache.create(1, 16384, num_kv_heads=8, head_dim=64))
    tokens = [jax.ShapeDtypeStruct((1, 1, 8, 64), jnp.bfloat16)] * 3
    options = {"implementation": "mosaic_gpu"}
    if mechanism == "lla":
        return lambda cache, *a: lla.decode_step(*a, cache, ridge=1.0, **options), (cache, *tokens)
    return lambda cache, *a: lla.softmax_decode_step(*a, cache, **options), (cache, *tokens)


def layers(count: int):
    """The gradients of `count` layers with the direct solver, and their arguments."""

    def loss(query, key, value):
        for _ in range(count):
            query = lla.local_linear_attention(
                query, key, value, ridge=0.01, solver=lla.Solver("direct"),
                implementation="mosaic_gpu",
            )  # fmt: skip
        return jnp.square(query.astype(jnp.float32)).sum()

    arguments = [jax.ShapeDtypeStruct((1, 1024, 4, 32), jnp.bfloat16)] * 3
    return jax.grad(loss, (0, 1, 2)), arguments


def launches(compiled) -> int:
    """Number of kernels in a compiled program; fused computations contain no calls."""
    return len(re.findall(r" (?:fusion|custom-call|copy)\(", compiled.as_text()))


def main():
    mosaic_gpu._refuse_device = lambda: None
    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", target_config=H200, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P())

    def compile_for_gpu(function, arguments, **options):
        placed = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
        )
        with jax.set_mesh(mesh):
            traced = jax.jit(function, **options).trace(*placed)
            return traced.lower(lowering_platforms=("cuda",)).compile()

    for head_dim in configs.HEAD_DIMS:
        groups = (1, 4) if head_dim in DECODED else ()
        decoding = [decoding_kernels(head_dim, group) for group in groups]
        dims = (16, 32) if head_dim == configs.DIRECT_DIM else ()
        direct = [direct_kernels(head_dim, dim) for dim in dims]
        for name, function, arguments in itertools.chain(kernels(head_dim), *direct, *decoding):
            print(f"kernel {name}_{head_dim}", flush=True)
            compile_for_gpu(function, arguments)
            sys.stdout.flush()
    for name, function, arguments in compile_mixers.kernels():
        print(f"kernel {name}", flush=True)
        compile_for_gpu(function, arguments)
        sys.stdout.flush()
    for mechanism in ("softmax", "lla"):
        compiled = compile_for_gpu(*step(mechanism), donate_argnums=0)
        print(f"step {mechanism} {launches(compiled)}", flush=True)
    for count in (2, 3):
        compiled = compile_for_gpu(*layers(count))
        print(f"layers {count} {compiled.memory_analysis().temp_size_in_bytes}", flush=True)


if __name__ == "__main__":
    main()
