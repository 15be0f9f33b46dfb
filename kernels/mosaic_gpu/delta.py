"""The gated delta rule on Hopper: one warpgroup walks over the chunks of one head.

With chunks of 64 tokens, 64 coordinates of the values, and keys in one or two blocks of 64
coordinates, every matrix is 64 x 64, a tile of one warpgroup. The state stays in its registers in
float32. See `lla.mixers.delta_rule` for the formulas. Here a chunk knows the state S before it, so
that its corrections u have a single right-hand side,

    u = T beta (v - start k S),  T = (1 + A)^-1;  o = start q S + L u;  S' = total S + k^T end u

and no difference of two rounded products occurs. A, its inverse, the right-hand side, and the state
in ``k S`` have two 16-bit parts. q, k and v are exact, and other operands of products are rounded
once. The forward pass saves S, u and T of every chunk. The backward pass visits the chunks in
reverse:

    du = L^T do + end k dS';  p = T^T du;  r = -p S^T;  dA = -p u^T
    dS = total dS' + q^T (start do) - k^T (start beta p)
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
    SQUARE,
    ChunkMath,
    DoubleBuffer,
    ProgramSlices,
    Transposed,
    gated_operands,
    load_tiles,
    narrow_tiles,
    products_of_parts,
    store_parts,
)
from lla.kernels.mosaic_gpu.launch import Config, launch
from lla.kernels.mosaic_gpu.tile import Arithmetic

_DTYPE = jnp.bfloat16  # of the operands of products


class Gates(NamedTuple):
    """The gates of all chunks, float32 ``[B, N, T]``; `total` is ``[B, N, M]`` for M chunks.

    `upper` and `lower` are the parts of `lla.mixers.chunks.Sums`.
    """

    beta: jax.Array
    upper: jax.Array
    lower: jax.Array
    start: jax.Array
    end: jax.Array
    total: jax.Array


class Saved(NamedTuple):
    """Residuals of the backward pass, in bfloat16.

    Attributes:
      states: S before every chunk, ``[B, N, M, H, 64]``.
      solvers: T of every chunk, ``[B, N, M, 64, 64]``.
      updates: u, shaped like the value.
    """

    states: jax.Array
    solvers: jax.Array
    updates: jax.Array


@functools.partial(jax.jit, static_argnames=("save", "interpret"))
def forward(query, key, value, gates: Gates, state, *, save: bool, interpret: Any = None):
    """Outputs ``[B, T, N, 64]``, the last state, and with `save` the residuals of `backward`.

    Args:
      query, key: bfloat16 ``[B, T, N, H]``, H 64 or 128, T a multiple of 64.
      value: bfloat16 ``[B, T, N, 64]``.
      gates: of the tokens.
      state: float32 ``[B, N, H, 64]``.
    """
    b, t, n, dim = key.shape
    blocks, count = dim // CHUNK, t // CHUNK
    outputs = {
        "out": jax.ShapeDtypeStruct(value.shape, _DTYPE),
        "state": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if save:
        outputs["states"] = jax.ShapeDtypeStruct((b, n, count, dim, CHUNK), _DTYPE)
        outputs["solvers"] = jax.ShapeDtypeStruct((b, n, count, *SQUARE), _DTYPE)
        outputs["updates"] = jax.ShapeDtypeStruct(value.shape, _DTYPE)
    scratch = {
        "inputs": [narrow_tiles(2) for _ in range(2 * blocks + 1)],
        "states": [[narrow_tiles() for _ in range(2)] for _ in range(blocks)],
        "update": narrow_tiles(),
        "work": [narrow_tiles() for _ in range(4)],
        "loaded": plgpu.Barrier(num_arrivals=2 * blocks + 1, num_barriers=2),
    }
    math = ChunkMath(Arithmetic(interpret is not None))
    found = launch(
        functools.partial(_forward_body, math, (n, 1, blocks), count, save), outputs, scratch,
        gated_operands(query, key, value, gates, state=state), programs=b * n, config=Config(),
        interpret=interpret, threads=1,
    )  # fmt: skip
    saved = Saved(found["states"], found["solvers"], found["updates"]) if save else None
    return found["out"], found["state"], saved


def _forward_body(math: ChunkMath, sizes, count: int, save: bool, given, out, scratch):
    slices, blocks = ProgramSlices(*sizes), sizes[-1]
    gates, states = given["gates"], scratch["states"]
    update, work = scratch["update"], scratch["work"]

    inputs = DoubleBuffer(
        lambda c: slices.inputs(given, c), scratch["inputs"], scratch["loaded"], count
    )

    def advance(c, state):
        slot = inputs.slot(c)
        inputs.wait(c, slot)
        *keys, value = (target.at[slot] for target in scratch["inputs"])
        queries, keys = keys[:blocks], keys[blocks:]
        beta, start, end = (
            slices.row(math, array, c) for array in (gates.beta, gates.start, gates.end)
        )
        for part, tiles in zip(state, states, strict=True):
            store_parts(part, tiles)
        plgpu.commit_smem()
        if save:
            for tiles, target in zip(states, slices.states(out["states"], c), strict=True):
                plgpu.copy_smem_to_gmem(tiles[0], target)

        pair = math.pair(*slices.sums(math, given, c), transposed=False)
        (overlap,) = math.multiply([(k, Transposed(k)) for k in keys])
        strict = math.index(0) > math.index(1)
        solver = math.inverse(jnp.where(strict, beta * overlap * pair, 0.0), work)
        solver = math.parts(solver)

        reads = [(k, tile) for k, tiles in zip(keys, states, strict=True) for tile in tiles]
        (known,) = math.multiply(reads)
        right = beta * (math.load(value) - start * known)
        store_parts(right, work[:2])
        work[2][...] = solver[0]
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(work[2], out["solvers"].at[slices.b, slices.h, c])
        (updates,) = math.multiply(products_of_parts(solver, work[:2]))
        update[...] = updates.astype(_DTYPE)
        work[1][...] = (end * updates).astype(_DTYPE)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(update, slices.values(out["updates"], c))

        scores, incoming = math.multiply(
            [(q, Transposed(k)) for q, k in zip(queries, keys, strict=True)],
            [(q, tiles[0]) for q, tiles in zip(queries, states, strict=True)],
        )
        weights = (scores * pair).astype(_DTYPE)
        (result,) = math.multiply([(weights, update)], start=(start * incoming,))
        work[0][...] = result.astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(work[0], slices.values(out["out"], c))
        total = gates.total[slices.b, slices.h, c]
        state = tuple(
            math.multiply([(Transposed(k), work[1])], start=(total * part,))[0]
            for k, part in zip(keys, state, strict=True)
        )
        plgpu.wait_smem_to_gmem(0)
        return state

    inputs.start()
    slices.walk(math, count, advance, given["state"], out["state"])


VECTORS = ("beta", *DECAY_VECTORS)
"""Per-token sums that `backward` returns, float32 ``[B, N, T]``."""


@functools.partial(jax.jit, static_argnames=("interpret",))
def backward(
    query, key, value, gates: Gates, saved: Saved, d_out, d_state, *, interpret: Any = None
):
    """Cotangents by name: "query", "key", "value" and "state", and the `VECTORS`."""
    b, t, n, dim = key.shape
    blocks = dim // CHUNK
    keys = jax.ShapeDtypeStruct(key.shape, _DTYPE)
    outputs = {
        "query": keys,
        "key": keys,
        "value": jax.ShapeDtypeStruct(value.shape, _DTYPE),
        "state": jax.ShapeDtypeStruct(d_state.shape, jnp.float32),
        "vectors": jax.ShapeDtypeStruct((len(VECTORS), b, n, t), jnp.float32),
    }
    scratch = {
        "inputs": [narrow_tiles() for _ in range(3 * blocks + 4)],
        "d_states": [narrow_tiles() for _ in range(blocks)],
        "work": [narrow_tiles() for _ in range(4)],
        "vectors": plgpu.SMEM((len(VECTORS), CHUNK), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=3 * blocks + 4),
    }
    math = ChunkMath(Arithmetic(interpret is not None))
    found = launch(
        functools.partial(_backward_body, math, (n, 1, blocks), t // CHUNK), outputs, scratch,
        gated_operands(query, key, value, gates, saved=saved, d_out=d_out, d_state=d_state),
        programs=b * n, config=Config(), interpret=interpret, threads=1,
    )  # fmt: skip
    return found | dict(zip(VECTORS, found.pop("vectors"), strict=True))


def _backward_body(math: ChunkMath, sizes, count: int, given, out, scratch):
    slices, blocks = ProgramSlices(*sizes), sizes[-1]
    gates, saved, d_states = given["gates"], given["saved"], scratch["d_states"]
    value, d_out, update, solver, *tiles = scratch["inputs"]
    queries, keys, states = (tiles[i * blocks : (i + 1) * blocks] for i in range(3))
    first, second, third, fourth = scratch["work"]

    def fetch(c):
        sources = [slices.values(array, c) for array in (given["value"], given["d_out"])]
        sources += [slices.values(saved.updates, c), saved.solvers.at[slices.b, slices.h, c]]
        sources += slices.keys(given["query"], c) + slices.keys(given["key"], c)
        sources += slices.states(saved.states, c)
        load_tiles(sources, scratch["inputs"], scratch["loaded"])

    def advance(i, d_state):
        c = count - 1 - i
        for tile, part in zip(d_states, d_state, strict=True):
            tile[...] = part.astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.barrier_wait(scratch["loaded"])
        sums = slices.sums(math, given, c)

        # du, and p, the cotangent of the right-hand side.
        scores_t, outgoing = math.multiply(
            [(k, Transposed(q)) for q, k in zip(queries, keys, strict=True)],
            list(zip(keys, d_states, strict=True)),
        )
        weights = (scores_t * math.pair(*sums, transposed=True)).astype(_DTYPE)
        end = slices.row(math, gates.end, c)
        (d_update,) = math.multiply([(weights, d_out)], start=(end * outgoing,))
        first[...] = d_update.astype(_DTYPE)
        plgpu.commit_smem()
        (right,) = math.multiply([(Transposed(solver), first)])
        d_beta = (right * math.load(value)).sum(axis=1)
        beta, start = (slices.row(math, array, c) for array in (gates.beta, gates.start))
        d_value = beta * right
        second[...] = d_value.astype(_DTYPE)
        third[...] = (-start * d_value).astype(_DTYPE)
        fourth[...] = (start * math.load(d_out)).astype(_DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(second, slices.values(out["value"], c))
        right = -right.astype(_DTYPE)

        # Scores of the queries, and the coupling between keys.
        pair = math.pair(*sums, transposed=False)
        d_scores, d_coupling, overlap = math.multiply(
            [(d_out, Transposed(update))],
            [(right, Transposed(update))],
            [(k, Transposed(k)) for k in keys],
        )
        d_scores = (d_scores * pair).astype(_DTYPE)
        first[...] = d_scores
        strict = math.index(0) > math.index(1)
        d_coupling = jnp.where(strict, d_coupling * pair, 0.0)
        d_beta = d_beta + (d_coupling * overlap).sum(axis=1)
        d_coupling = (beta * d_coupling).astype(_DTYPE)
        plgpu.wait_smem_to_gmem(0)
        second[...] = d_coupling
        plgpu.commit_smem()

        total = gates.total[slices.b, slices.h, c]
        targets = zip(slices.keys(out["query"], c), slices.keys(out["key"], c), strict=True)
        vectors, new = {"beta": d_beta}, []

        def note(name, matrix):
            vector = matrix.sum(axis=1)
            vectors[name] = vectors[name] + vector if name in vectors else vector

        for j, (query_target, key_target) in enumerate(targets):
            query, key, state, behind = queries[j], keys[j], states[j], d_states[j]
            note("through", d_state[j] * math.load(state))
            d_query, incoming = math.multiply([(d_scores, key)], [(d_out, Transposed(state))])
            incoming = start * incoming
            note("inside", d_query * math.load(query))
            note("entering", incoming * math.load(query))
            d_query = (d_query + incoming).astype(_DTYPE)

            d_key, column = math.multiply(
                [(d_coupling, key)], [(Transposed(first), query), (Transposed(second), key)]
            )
            note("inside", (d_key - column) * math.load(key))
            d_key = d_key + column
            incoming, leaving = math.multiply(
                [(right, Transposed(state))], [(update, Transposed(behind))]
            )
            leaving = end * leaving
            note("leaving", leaving * math.load(key))
            incoming = start * incoming
            note("beta", incoming * math.load(key))
            incoming = beta * incoming
            note("entering", incoming * math.load(key))
            d_key = d_key + leaving + incoming
            reads = [(Transposed(query), fourth), (Transposed(key), third)]
            new += math.multiply(reads, start=(total * d_state[j],))
            # The tiles of this state are not read again, so they can hold the results.
            state[...] = d_query
            behind[...] = d_key.astype(_DTYPE)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state, query_target)
            plgpu.copy_smem_to_gmem(behind, key_target)
        vectors = [vectors[name] for name in VECTORS]
        slices.store_vectors(vectors, scratch["vectors"], out["vectors"], c)
        plgpu.wait_smem_to_gmem(0)
        pl.when(c > 0)(lambda: fetch(c - 1))
        return tuple(new)

    fetch(count - 1)
    slices.walk(math, count, advance, given["d_state"], out["state"])
