"""Decoding: new tokens attend to themselves and to a cache of everything before them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lla.ops import decode_gpu, dispatch, sharding
from lla.ops.cache import KVCache, check_room, exists, token_counts
from lla.ops.call import CACHE
from lla.ops.dispatch import Implementation
from lla.ops.masks import Mask, dense_mask
from lla.ops.options import Solver, Stats
from lla.ops.plan import largest_divisor
from lla.ops.problem import Problem, check_ridge, make_problem
from lla.ops.shield import nan_where

# Bytes of cached keys and values that the blockwise implementation works on at once, each counted
# in the dtype of the cache and in float32.
_CHUNK_BYTES = 1 << 28
# Queries from which on a mask as an array is no longer small.
_FEW = 8


def decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    ridge: float | jax.Array,
    scale: float | jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    new_lengths: jax.Array | None = None,
    solver: Solver | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]:
    """Local linear attention of the next T tokens to themselves and to all tokens in the cache.

    Appends key and value to the cache, then attends causally: the rows of the new tokens in
    `lla.local_linear_attention` of the whole sequence. T = 1 is one step of decoding; with more
    tokens it reads a prompt, whole or in chunks. Memory is that of the cache and a bounded amount.

    Example::

        >>> import jax, jax.numpy as jnp, lla
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 16))
        >>> cache = lla.KVCache.create(2, 64, num_kv_heads=4, head_dim=16, dtype=jnp.float32)
        >>> out, cache = lla.decode_step(query, key, value, cache, ridge=1.0)
        >>> one = (a[:, :1] for a in (query, key, value))
        >>> out, cache = lla.decode_step(*one, cache, ridge=1.0)
        >>> out.shape, cache.lengths.tolist()
        ((2, 1, 4, 16), [11, 11])

    Args:
      query: ``[*B, T, N, H]``, the cache's dtype; ``N`` must be a multiple of ``K``.
      key: ``[*B, T, K, H]``, the cache's dtype.
      value: ``[*B, T, K, Hv]``, the cache's dtype.
      cache: the tokens before them. Donate it to the compiled step to have it updated in place.
      ridge, scale: as in `lla.local_linear_attention`, a float or broadcastable to ``[*B, T, N]``.
      local_window_size: an int or ``(left, right)``: a token sees at most `left` earlier ones.
      new_lengths: int ``[*B]``, in 0 ... T: how many of the T tokens of a sequence exist. The
        others pad it: they are not written, and their rows of the result are zeros. None for all.
      solver, implementation: as in `lla.local_linear_attention`.
      return_stats: also return an `lla.Stats`.

    Returns:
      ``(output, cache)``, the output ``[*B, T, N, Hv]`` in the query's dtype; with `return_stats`
      ``(output, cache, stats)``, whose rows are those of a query without keys where a token only
      pads. Sequences for which the cache is too short, now or before, get NaN; see `lla.KVCache`.

    Raises:
      ValueError: for arguments of wrong shape, dtype or value, and for tokens that do not fit where
        the lengths are known.
      NotImplementedError: if no requested implementation can serve the call.
    """
    return _decode(
        "lla", query, key, value, cache, new_lengths, implementation, return_stats,
        ridge=ridge, scale=scale, local_window_size=local_window_size, solver=solver,
    )  # fmt: skip


def parallax_decode_step(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    scale: float | jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    new_lengths: jax.Array | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]:
    """`lla.parallax_attention` of the next T tokens to themselves and to all tokens in the cache.

    Args:
      probe: ``[*B, T, N, H]``, the query's dtype.
      query, key, value, cache, scale, local_window_size, new_lengths, implementation, return_stats:
        as in `lla.decode_step`.

    Returns, Raises: as `lla.decode_step`.
    """
    return _decode(
        "parallax", query, key, value, cache, new_lengths, implementation, return_stats,
        probe=probe, scale=scale, local_window_size=local_window_size,
    )  # fmt: skip


def softmax_decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    scale: float | jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    new_lengths: jax.Array | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]:
    """`lla.softmax_attention` of the next T tokens to themselves and to all tokens in the cache.

    Arguments, results and errors as `lla.parallax_decode_step` without ``probe``.
    """
    return _decode(
        "softmax", query, key, value, cache, new_lengths, implementation, return_stats,
        scale=scale, local_window_size=local_window_size,
    )  # fmt: skip


def _decode(member, query, key, value, cache, new_lengths, implementation, return_stats, **options):
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache must be an lla.KVCache, got {type(cache).__name__}.")
    query, key, value = (jnp.asarray(a) for a in (query, key, value))
    arrays = dict(
        query=query, key=key, value=value, cache_key=cache.key, cache_value=cache.value,
        cache_lengths=cache.lengths, new_lengths=new_lengths,
    )  # fmt: skip
    mesh = sharding.find_mesh(arrays.values())
    if mesh is None:
        out, cache, stats = _on_one_device(
            member, query, key, value, cache, new_lengths, implementation, return_stats, **options
        )
        return (out, cache, stats) if return_stats else (out, cache)
    return _sharded(mesh, member, arrays, cache, implementation, return_stats, options)


def _sharded(mesh, member, arrays, cache, implementation, return_stats, options):
    """`_decode` where several devices may hold the arrays."""
    query, key = arrays["query"], arrays["key"]
    cache.check(key, arrays["value"])
    counts = token_counts(arrays["new_lengths"], cache.lengths.shape, key.shape[-3])
    check_room(cache.lengths, counts, cache.max_length)
    _check_leading(query, key)
    arrays |= {name: options.pop(name) for name in ("ridge", "scale", "probe") if name in options}
    if member == "lla":
        check_ridge(arrays["ridge"])
    found = sharding.attend(
        mesh, member, arrays, options, implementation, return_stats, kind="decode"
    )
    cache = KVCache(*(found[name] for name in CACHE))
    if not return_stats:
        return found["out"], cache
    return found["out"], cache, Stats(*(found[name] for name in Stats._fields))


def decode_arrays(member, arrays, implementation, with_stats, options):
    """A step of decoding on named arrays: output, the arrays of the cache, and the statistics."""
    arrays = dict(arrays)
    cache = KVCache(*(arrays.pop(name) for name in CACHE))
    new_lengths = arrays.pop("new_lengths", None)
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    out, cache, stats = _on_one_device(
        member, query, key, value, cache, new_lengths, implementation, with_stats, **arrays,
        **options,
    )  # fmt: skip
    return (out, cache.key, cache.value, cache.lengths, *(stats or ()))


def _on_one_device(
    member, query, key, value, cache, new_lengths, implementation, return_stats, **options
):
    before = cache.lengths
    grown = cache.append(key, value, new_lengths)
    _check_leading(query, key)
    problem = make_problem(
        member, query, grown.key, grown.value, is_causal=True, query_offset=before,
        key_value_seq_lengths=jnp.minimum(grown.lengths, grown.max_length), **options,
    )  # fmt: skip
    if new_lengths is not None:
        problem = _without_padding(
            problem, token_counts(new_lengths, before.shape, query.shape[-3])
        )
    out, stats = _attend_cached(problem, implementation, return_stats)

    length = query.shape[-3]
    # Rows that only pad are those of queries without keys, and what lacks keys is no number.
    real = exists(token_counts(new_lengths, before.shape, length), length)[..., None]
    full = grown.overflowed[..., None, None]
    out = jnp.where(jnp.broadcast_to(real[..., None], out.shape), out, jnp.zeros_like(out))
    out = nan_where(jnp.broadcast_to(real & full, out.shape[:-1]), out)
    if not return_stats:
        return out, grown, None
    fills = (-jnp.inf, 0, 0)
    real = jnp.broadcast_to(real, stats.lse.shape)
    stats = Stats(
        *(jnp.where(real, a, jnp.full_like(a, f)) for a, f in zip(stats, fills, strict=True))
    )
    return out, grown, stats


def _check_leading(query: jax.Array, key: jax.Array) -> None:
    if query.ndim != key.ndim or query.shape[:-2] != key.shape[:-2]:
        raise ValueError(
            f"query must have the leading axes and the length of key, got query {query.shape} and "
            f"key {key.shape}."
        )


def _without_padding(problem: Problem, counts: jax.Array) -> Problem:
    """The problem with zeros as queries and probes of the tokens that only pad."""
    b, t, k, g, _ = problem.query.shape
    real = exists(counts.reshape(b), t)[:, :, None, None, None]

    def select(array):
        if array is None:
            return None
        return jnp.where(jnp.broadcast_to(real, array.shape), array, jnp.zeros_like(array))

    return dataclasses.replace(problem, query=select(problem.query), probe=select(problem.probe))


def _attend_cached(
    problem: Problem, implementation: Implementation, with_stats: bool
) -> tuple[jax.Array, Stats]:
    """Causal attention of the last tokens of every sequence to all of its cached ones.

    `problem` has an offset, the tokens before the first query, and lengths, the tokens in the
    cache; no other mask but a window. Returns what `dispatch.run` does.
    """
    names = dispatch.check_names(implementation)
    reasons = dispatch.refusals(problem, names)
    served = next((name for name, reason in reasons.items() if reason is None), None)
    if served == "xla" and problem.query.size:
        return _by_chunks(problem, with_stats)
    if served == "mosaic_gpu" and decode_gpu.serves(problem):
        out, stats = decode_gpu.attend(problem)
        return dispatch.restore(problem, out, stats, with_stats)
    return dispatch.run(problem, implementation, with_stats)


def _by_chunks(problem: Problem, with_stats: bool) -> tuple[jax.Array, Stats]:
    """The blockwise implementation on chunks of sequences and key heads, one after the other.

    It transposes keys and values and converts them to float32: for the cache as a whole that would
    take several times the memory of the cache, and for one token most of the time.
    """
    narrowed = _inside_window(problem)
    inside, problem = narrowed is not problem, narrowed
    b, t, k, _, h = problem.query.shape
    room = problem.key.shape[1]
    per_head = room * (h + problem.value.shape[-1])
    per_head *= problem.key.dtype.itemsize + problem.compute_dtype.itemsize
    heads = largest_divisor(k, max(1, _CHUNK_BYTES // per_head))
    size = largest_divisor(b, max(1, _CHUNK_BYTES // (per_head * k))) if heads == k else 1
    sizes = (room,) if inside or t >= _FEW else _sizes(room)

    def attend(chunk):
        first, head = chunk

        def part(array, axis=2):
            """`size` sequences and, along `axis`, `heads` heads of an array ``[B, ...]``."""
            if array is None:
                return None
            array = lax.dynamic_slice_in_dim(array, first, size, axis=0)
            return array if axis is None else lax.dynamic_slice_in_dim(array, head, heads, axis)

        mask = dataclasses.replace(
            problem.mask,
            offset=part(problem.mask.offset, None),
            lengths=part(problem.mask.lengths, None),
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
            return dispatch.run(chunk, "xla", with_stats)

        longest = mask.lengths.max()
        index = sum((longest > length).astype(jnp.int32) for length in sizes[:-1])
        branches = [functools.partial(on, length) for length in sizes]
        return branches[0]() if len(branches) == 1 else lax.switch(index, branches)

    if (size, heads) == (b, k):
        return jax.tree.map(lambda a: a.reshape(*problem.leading, *a.shape[1:]), attend((0, 0)))
    firsts = jnp.repeat(jnp.arange(0, b, size, dtype=jnp.int32), k // heads)
    firsts = (firsts, jnp.tile(jnp.arange(0, k, heads, dtype=jnp.int32), b // size))
    results = lax.map(attend, firsts)

    def join(array):  # [chunks, size, T, heads * G, ...] -> [*B, T, N, ...]
        _, _, t, n, *rest = array.shape
        array = array.reshape(b // size, k // heads, size, t, n, *rest)
        array = jnp.moveaxis(array, 1, 3)
        return array.reshape(*problem.leading, t, -1, *rest)

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
