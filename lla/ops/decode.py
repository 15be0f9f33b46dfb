"""Decoding: new tokens attend to themselves and to a cache of everything before them."""

from __future__ import annotations

import dataclasses
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp

from lla.numerics import nan_where
from lla.ops import backend, sharding
from lla.ops import options as keyword
from lla.ops.backend import Implementation
from lla.ops.cache import KVCache, check_room, exists, token_counts
from lla.ops.call import CACHE
from lla.ops.problem import Mechanism, Problem, check_ridge, make_problem
from lla.ops.solver import Solver, Stats


@overload
def decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    ridge: float | jax.Array,
    return_stats: Literal[False] = False,
    **options: Unpack[keyword.SolvedDecoding],
) -> tuple[jax.Array, KVCache]: ...


@overload
def decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    ridge: float | jax.Array,
    return_stats: Literal[True],
    **options: Unpack[keyword.SolvedDecoding],
) -> tuple[jax.Array, KVCache, Stats]: ...


@overload
def decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    ridge: float | jax.Array,
    return_stats: bool,
    **options: Unpack[keyword.SolvedDecoding],
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]: ...


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
    bias: jax.Array | None = None,
    solver: Solver | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]:
    """Local linear attention of the next T tokens to themselves and to all tokens in the cache.

    Appends key and value to the cache, then attends causally: the rows of the new tokens in
    `lla.local_linear_attention` of the whole sequence. T = 1 is one step of decoding; with more
    tokens it reads a prompt, whole or in chunks. Memory is that of the cache and a bounded amount,
    except with a `bias`, where keys and values are converted to float32 at once.

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
      bias: float, broadcastable to ``[*B, N, T, max_length]``, a number for every new token and
        place in the cache, as in `lla.local_linear_attention`; not read for places that the token
        does not see.
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
        ridge=ridge, scale=scale, local_window_size=local_window_size, bias=bias, solver=solver,
    )  # fmt: skip


@overload
def parallax_decode_step(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[keyword.Decoding],
) -> tuple[jax.Array, KVCache]: ...


@overload
def parallax_decode_step(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    return_stats: Literal[True],
    **options: Unpack[keyword.Decoding],
) -> tuple[jax.Array, KVCache, Stats]: ...


@overload
def parallax_decode_step(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    return_stats: bool,
    **options: Unpack[keyword.Decoding],
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]: ...


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
    bias: jax.Array | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]:
    """`lla.parallax_attention` of the next T tokens to themselves and to all tokens in the cache.

    Args:
      probe: ``[*B, T, N, H]``, the query's dtype.
      query, key, value, cache, scale, local_window_size, new_lengths, bias, implementation,
        return_stats: as in `lla.decode_step`.

    Returns, Raises: as `lla.decode_step`.
    """
    return _decode(
        "parallax", query, key, value, cache, new_lengths, implementation, return_stats,
        probe=probe, scale=scale, local_window_size=local_window_size, bias=bias,
    )  # fmt: skip


@overload
def softmax_decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[keyword.CappedDecoding],
) -> tuple[jax.Array, KVCache]: ...


@overload
def softmax_decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    return_stats: Literal[True],
    **options: Unpack[keyword.CappedDecoding],
) -> tuple[jax.Array, KVCache, Stats]: ...


@overload
def softmax_decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    return_stats: bool,
    **options: Unpack[keyword.CappedDecoding],
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]: ...


def softmax_decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    *,
    scale: float | jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    new_lengths: jax.Array | None = None,
    bias: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, Stats]:
    """`lla.softmax_attention` of the next T tokens to themselves and to all tokens in the cache.

    Arguments, results and errors as `lla.parallax_decode_step` without ``probe``, and
    ``logits_soft_cap`` as in `lla.softmax_attention`.
    """
    return _decode(
        "softmax", query, key, value, cache, new_lengths, implementation, return_stats,
        scale=scale, local_window_size=local_window_size, bias=bias,
        logits_soft_cap=logits_soft_cap,
    )  # fmt: skip


def decoding_problem(
    mechanism: Mechanism, query, key, value, cache: KVCache, new_lengths=None, **options
) -> tuple[Problem, KVCache]:
    """The problem that new tokens pose with the cache that holds them, and that cache.

    Its mask is causal, with an offset, the tokens before the first query, and lengths, the tokens
    in the cache; no other mask but a window, and segments where it has a bias.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache must be an lla.KVCache, got {type(cache).__name__}.")
    query, key, value = (jnp.asarray(a) for a in (query, key, value))
    before = cache.lengths
    grown = cache.append(key, value, new_lengths)
    _check_leading(query, key)
    if options.get("bias") is not None and new_lengths is not None:
        # The bias of tokens that only pad is not read.
        options["query_seq_lengths"] = token_counts(new_lengths, before.shape, query.shape[-3])
    problem = make_problem(
        mechanism, query, grown.key, grown.value, is_causal=True, query_offset=before,
        key_value_seq_lengths=jnp.minimum(grown.lengths, grown.max_length), **options,
    )  # fmt: skip
    if new_lengths is not None:
        problem = _without_padding(
            problem, token_counts(new_lengths, before.shape, query.shape[-3])
        )
    return problem, grown


def _decode(
    mechanism, query, key, value, cache, new_lengths, implementation, return_stats, **options
):
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
            mechanism,
            query,
            key,
            value,
            cache,
            new_lengths,
            implementation,
            return_stats,
            **options,
        )
        return (out, cache, stats) if return_stats else (out, cache)
    return _sharded(mesh, mechanism, arrays, cache, implementation, return_stats, options)


def _sharded(mesh, mechanism, arrays, cache, implementation, return_stats, options):
    """`_decode` where several devices may hold the arrays."""
    query, key = arrays["query"], arrays["key"]
    cache.check(key, arrays["value"])
    counts = token_counts(arrays["new_lengths"], cache.lengths.shape, key.shape[-3])
    check_room(cache.lengths, counts, cache.max_length)
    _check_leading(query, key)
    names = ("ridge", "scale", "probe", "bias")
    arrays |= {name: options.pop(name) for name in names if name in options}
    if mechanism == "lla":
        check_ridge(arrays["ridge"])
    found = sharding.attend(
        mesh, mechanism, arrays, options, implementation, return_stats, kind="decode"
    )
    cache = KVCache(*(found[name] for name in CACHE))
    if not return_stats:
        return found["out"], cache
    return found["out"], cache, Stats(*(found[name] for name in Stats._fields))


def decode_arrays(mechanism, arrays, implementation, with_stats, options):
    """A step of decoding on named arrays: output, the arrays of the cache, and the statistics."""
    arrays = dict(arrays)
    cache = KVCache(*(arrays.pop(name) for name in CACHE))
    new_lengths = arrays.pop("new_lengths", None)
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    out, cache, stats = _on_one_device(
        mechanism, query, key, value, cache, new_lengths, implementation, with_stats, **arrays,
        **options,
    )  # fmt: skip
    return (out, cache.key, cache.value, cache.lengths, *(stats or ()))


def _on_one_device(
    mechanism, query, key, value, cache, new_lengths, implementation, return_stats, **options
):
    problem, grown = decoding_problem(mechanism, query, key, value, cache, new_lengths, **options)
    out, stats = backend.run(problem, implementation, return_stats, decoding=True)

    length, leading = query.shape[-3], cache.lengths.shape
    # A token that only pads gets the row of a query without keys, even if the cache is too short.
    real = exists(token_counts(new_lengths, leading, length), length)[..., None]
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
    b, t, _, _ = problem.query.shape
    real = exists(counts.reshape(b), t)[:, :, None, None]

    def select(array):
        if array is None:
            return None
        return jnp.where(jnp.broadcast_to(real, array.shape), array, jnp.zeros_like(array))

    return dataclasses.replace(problem, query=select(problem.query), probe=select(problem.probe))
