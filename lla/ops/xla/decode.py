"""Decoding with the blockwise implementation: chunks of sequences and key heads, one by one.

The implementation transposes keys and values and converts them to the compute dtype. For the cache
as a whole that would take several times its memory, and for one token most of the time.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lla.ops.masks import Mask, dense_mask
from lla.ops.problem import Problem
from lla.ops.solver import Stats
from lla.ops.xla import backend
from lla.ops.xla.plan import largest_divisor

# Bytes of cached keys and values that are worked on at once, each counted in the dtype of the cache
# and in the compute dtype.
_CHUNK_BYTES = 1 << 28
# With this many queries or more, a mask array is no longer small.
_FEW = 8


def unsupported(problem: Problem) -> str | None:
    """Why it cannot serve a decoding problem, None if it can."""
    if problem.bias is not None:
        return "it has no logit bias"
    return None if problem.query.size else "there is no sequence to divide"


def attend(problem: Problem, with_stats: bool) -> tuple[jax.Array, Stats]:
    """Output and statistics in the layout of `Problem`."""
    narrowed = _inside_window(problem)
    inside, problem = narrowed is not problem, narrowed
    b, t, n, h = problem.query.shape
    _, room, k, _ = problem.key.shape
    per_head = room * (h + problem.value.shape[-1])
    per_head *= problem.key.dtype.itemsize + problem.compute_dtype.itemsize
    heads = largest_divisor(k, max(1, _CHUNK_BYTES // per_head))
    size = largest_divisor(b, max(1, _CHUNK_BYTES // (per_head * k))) if heads == k else 1
    sizes = (room,) if inside or t >= _FEW else _sizes(room)

    def attend_chunk(chunk):
        first, head = chunk

        def sequences(array):
            return lax.dynamic_slice_in_dim(array, first, size, axis=0)

        def part(array):
            """The chunk's sequences and heads of ``[B | 1, L, N or K or 1, ...]``."""
            if array is None:
                return None
            if array.shape[0] == b:
                array = sequences(array)
            if array.shape[2] in (n, k):
                each = array.shape[2] // k
                array = lax.dynamic_slice_in_dim(array, head * each, heads * each, axis=2)
            return array

        mask = dataclasses.replace(
            problem.mask,
            offset=sequences(problem.mask.offset),
            lengths=sequences(problem.mask.lengths),
        )
        names = ("query", "probe", "ridge", "scale")
        arrays = {name: part(getattr(problem, name)) for name in names}

        def on(length):
            """With the first `length` cached tokens alone."""
            visible = mask
            if t < _FEW:
                # Written out, the mask leaves nothing for the implementation to decide again.
                dense = dense_mask(mask, size, t, length)
                visible = Mask(False, None, None, None, None, None, dense)
            chunk = dataclasses.replace(
                problem,
                mask=visible,
                key=part(problem.key[:, :length]),
                value=part(problem.value[:, :length]),
                leading=(size,),
                **arrays,
            )
            return backend.attend(chunk, with_stats)

        longest = mask.lengths.max()
        index = sum((longest > length).astype(jnp.int32) for length in sizes[:-1])
        branches = [functools.partial(on, length) for length in sizes]
        return branches[0]() if len(branches) == 1 else lax.switch(index, branches)

    if (size, heads) == (b, k):
        return attend_chunk((0, 0))
    firsts = jnp.repeat(jnp.arange(0, b, size, dtype=jnp.int32), k // heads)
    firsts = (firsts, jnp.tile(jnp.arange(0, k, heads, dtype=jnp.int32), b // size))
    results = lax.map(attend_chunk, firsts)

    def join(array):  # [chunks, size, T, heads * G, ...] -> [B, T, N, ...]
        array = array.reshape(b // size, k // heads, *array.shape[1:])
        array = jnp.moveaxis(array, 1, 3)
        return array.reshape(b, t, n, *array.shape[5:])

    return jax.tree.map(join, results)


def _sizes(room: int) -> tuple[int, ...]:
    """Numbers of cached tokens to compile for, so that work follows their number and not `room`."""
    step = -(-room // 64) * 8  # an eighth, in multiples of 8
    return tuple(min(room, size) for size in range(step, room + step, step))


def _inside_window(problem: Problem) -> Problem:
    """The same problem on those keys alone that any of its queries can see through the window."""
    window, mask = problem.mask.window, problem.mask
    if window is None:
        return problem
    seen, length = window[0] + problem.query.shape[1], problem.key.shape[1]
    if seen >= length:
        return problem
    start = jnp.clip(mask.offset - window[0], 0, length - seen)

    def narrow(array):
        return jax.vmap(lambda a, i: lax.dynamic_slice_in_dim(a, i, seen, axis=0))(array, start)

    mask = dataclasses.replace(mask, offset=mask.offset - start, lengths=mask.lengths - start)
    return dataclasses.replace(
        problem, key=narrow(problem.key), value=narrow(problem.value), mask=mask
    )
