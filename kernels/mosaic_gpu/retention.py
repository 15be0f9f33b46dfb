"""Linear attention with one decay for each head and token, on Hopper.

One warpgroup walks over the chunks of 64 tokens of one head, for 64 coordinates of its values. Keys
have one or two blocks of 64 coordinates. The state has as many 64 x 64 blocks, which stay in
registers in float32. Heads may share queries and keys. See `lla.mixers.linear_recurrence` for the
formulas. The operands of products are rounded to 16 bits once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lla.kernels.mosaic_gpu.chunk import (
    CHUNK,
    DECAY_VECTORS,
    ChunkMath,
    DoubleBuffer,
    ProgramSlices,
    Transposed,
    gated_operands,
    load_tiles,
    narrow_tiles,
)
from lla.kernels.mosaic_gpu.launch import Config, launch
from lla.kernels.mosaic_gpu.tile import Arithmetic

_DTYPE = jnp.bfloat16

VECTORS = DECAY_VECTORS
"""Per-token sums that `backward` returns, float32 ``[B, N, T]``."""


class Gates(NamedTuple):
    """The gates of all chunks, float32 ``[B, N, T]``; `total` is ``[B, N, M]`` for M chunks.

    `upper` and `lower` are the parts of `lla.mixers.chunks.Sums`.
    """

    upper: jax.Array
    lower: jax.Array
    start: jax.Array
    end: jax.Array
    total: jax.Array


@functools.partial(jax.jit, static_argnames=("save", "interpret"))
def forward(query, key, value, gates: Gates, state, *, save: bool, interpret: Any = None):
    """Outputs ``[B, T, N, 64]``, the last state, and with `save` the states before every chunk.

    Args:
      query, key: bfloat16 ``[B, T, K, H]``, H 64 or 128, T a multiple of 64, K a divisor of N.
      value: bfloat16 ``[B, T, N, 64]``.
      gates: of the tokens.
      state: float32 ``[B, N, H, 64]``.
    """
    b, t, n, _ = value.shape
    kv_heads, dim = key.shape[2:]
    blocks, count = dim // CHUNK, t // CHUNK
    outputs = {
        "out": jax.ShapeDtypeStruct(value.shape, _DTYPE),
        "state": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if save:
        outputs["states"] = jax.ShapeDtypeStruct((b, n, count, dim, CHUNK), _DTYPE)
    scratch = {
        "inputs": [narrow_tiles(2) for _ in range(2 * blocks + 1)],
        "states": [narrow_tiles() for _ in range(blocks)],
        "work": [narrow_tiles() for _ in range(2)],
        "loaded": plgpu.Barrier(num_arrivals=2 * blocks + 1, num_barriers=2),
    }
    math = ChunkMath(Arithmetic(interpret is not None))
    found = launch(
        functools.partial(_forward_body, math, (n, n // kv_heads, blocks), count, save), outputs,
        scratch, gated_operands(query, key, value, gates, state=state), programs=b * n,
        config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    return found["out"], found["state"], found.get("states")


def _forward_body(math: ChunkMath, sizes, count: int, save: bool, given, out, scratch):
    slices, blocks = ProgramSlices(*sizes), sizes[-1]
    gates, states = given["gates"], scratch["states"]
    written, result = scratch["work"]

    inputs = DoubleBuffer(
        lambda c: slices.inputs(given, c), scratch["inputs"], scratch["loaded"], count
    )

    def advance(c, state):
        slot = inputs.slot(c)
        for tile, part in zip(states, state, strict=True):
            tile[...] = part.astype(_DTYPE)
        plgpu.commit_smem()
        if save:
            for tile, target in zip(states, slices.states(out["states"], c), strict=True):
                plgpu.copy_smem_to_gmem(tile, target)
        inputs.wait(c, slot)
        *keys, value = (target.at[slot] for target in scratch["inputs"])
        queries, keys = keys[:blocks], keys[blocks:]

        scores, incoming = math.multiply(
            [(q, Transposed(k)) for q, k in zip(queries, keys, strict=True)],
            list(zip(queries, states, strict=True)),
        )
        pair = math.pair(*slices.sums(math, given, c), transposed=False)
        weights = (scores * pair).astype(_DTYPE)
        incoming = slices.row(math, gates.start, c) * incoming
        (rows,) = math.multiply([(weights, value)], start=(incoming,))
        result[...] = rows.astype(_DTYPE)
        end = slices.row(math, gates.end, c)
        written[...] = (end * math.load(value)).astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, slices.values(out["out"], c))
        total = gates.total[slices.b, slices.h, c]
        state = tuple(
            math.multiply([(Transposed(k), written)], start=(total * part,))[0]
            for k, part in zip(keys, state, strict=True)
        )
        plgpu.wait_smem_to_gmem(0)
        return state

    inputs.start()
    slices.walk(math, count, advance, given["state"], out["state"])


@functools.partial(jax.jit, static_argnames=("interpret",))
def backward(query, key, value, gates: Gates, states, d_out, d_state, *, interpret: Any = None):
    """Cotangents by name: "query" and "key" of every head, "value", "state"; and the `VECTORS`."""
    b, t, n, _ = value.shape
    kv_heads, dim = key.shape[2:]
    blocks = dim // CHUNK
    by_head = jax.ShapeDtypeStruct((b, t, n, dim), _DTYPE)
    outputs = {
        "query": by_head,
        "key": by_head,
        "value": jax.ShapeDtypeStruct(value.shape, _DTYPE),
        "state": jax.ShapeDtypeStruct(d_state.shape, jnp.float32),
        "vectors": jax.ShapeDtypeStruct((len(VECTORS), b, n, t), jnp.float32),
    }
    scratch = {
        "inputs": [narrow_tiles() for _ in range(3 * blocks + 2)],
        "d_states": [narrow_tiles() for _ in range(blocks)],
        "work": [narrow_tiles() for _ in range(4)],
        "vectors": plgpu.SMEM((len(VECTORS), CHUNK), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=3 * blocks + 2),
    }
    math = ChunkMath(Arithmetic(interpret is not None))
    found = launch(
        functools.partial(_backward_body, math, (n, n // kv_heads, blocks), t // CHUNK), outputs,
        scratch,
        gated_operands(query, key, value, gates, states=states, d_out=d_out, d_state=d_state),
        programs=b * n, config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    return found | dict(zip(VECTORS, found.pop("vectors"), strict=True))


def _backward_body(math: ChunkMath, sizes, count: int, given, out, scratch):
    slices, blocks = ProgramSlices(*sizes), sizes[-1]
    gates, d_states = given["gates"], scratch["d_states"]
    scored, read, *results = scratch["work"]
    value, d_out, *tiles = scratch["inputs"]
    queries, keys, states = (tiles[i * blocks : (i + 1) * blocks] for i in range(3))

    def fetch(c):
        sources = [slices.values(given["value"], c), slices.values(given["d_out"], c)]
        sources += slices.keys(given["query"], c) + slices.keys(given["key"], c)
        sources += slices.states(given["states"], c)
        load_tiles(sources, scratch["inputs"], scratch["loaded"])

    def advance(i, d_state):
        c = count - 1 - i
        through = None
        for tile, part in zip(d_states, d_state, strict=True):
            tile[...] = part.astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.barrier_wait(scratch["loaded"])

        scores_t, outgoing = math.multiply(
            [(k, Transposed(q)) for q, k in zip(queries, keys, strict=True)],
            list(zip(keys, d_states, strict=True)),
        )
        sums = slices.sums(math, given, c)
        weights = (scores_t * math.pair(*sums, transposed=True)).astype(_DTYPE)
        end, start = (slices.row(math, array, c) for array in (gates.end, gates.start))
        outgoing = end * outgoing
        leaving = (outgoing * math.load(value)).sum(axis=1)
        (d_value,) = math.multiply([(weights, d_out)], start=(outgoing,))
        results[0][...] = d_value.astype(_DTYPE)
        read[...] = (start * math.load(d_out)).astype(_DTYPE)
        (d_scores,) = math.multiply([(d_out, Transposed(value))])
        d_scores = (d_scores * math.pair(*sums, transposed=False)).astype(_DTYPE)
        scored[...] = d_scores
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(results[0], slices.values(out["value"], c))
        plgpu.wait_smem_to_gmem(0)

        total = gates.total[slices.b, slices.h, c]
        targets = zip(
            slices.keys(out["query"], c, False), slices.keys(out["key"], c, False), strict=True
        )
        entering, inside, new = None, None, []
        for j, (query_target, key_target) in enumerate(targets):
            query, key, state = queries[j], keys[j], states[j]
            gone = (d_state[j] * math.load(state)).sum(axis=1)
            through = gone if through is None else through + gone
            d_query, incoming = math.multiply([(d_scores, key)], [(d_out, Transposed(state))])
            incoming = start * incoming
            came = (incoming * math.load(query)).sum(axis=1)
            entering = came if entering is None else entering + came
            between = (d_query * math.load(query)).sum(axis=1)
            results[0][...] = (d_query + incoming).astype(_DTYPE)
            d_key, written = math.multiply(
                [(Transposed(scored), query)], [(value, Transposed(d_states[j]))]
            )
            between = between - (d_key * math.load(key)).sum(axis=1)
            inside = between if inside is None else inside + between
            results[1][...] = (d_key + end * written).astype(_DTYPE)
            (part,) = math.multiply([(Transposed(query), read)], start=(total * d_state[j],))
            new.append(part)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(results[0], query_target)
            plgpu.copy_smem_to_gmem(results[1], key_target)
            plgpu.wait_smem_to_gmem(0)
        pl.when(c > 0)(lambda: fetch(c - 1))  # all inputs of this chunk have been read
        vectors = (entering, leaving, inside, through)
        slices.store_vectors(vectors, scratch["vectors"], out["vectors"], c)
        plgpu.wait_smem_to_gmem(0)
        return tuple(new)

    fetch(count - 1)
    slices.walk(math, count, advance, given["d_state"], out["state"])
