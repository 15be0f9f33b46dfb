"""The public functions."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax

from lla.ops import backend, sharding
from lla.ops import options as keyword
from lla.ops.backend import Implementation
from lla.ops.cache import KVCache
from lla.ops.context import make_context
from lla.ops.decode import decoding_problem
from lla.ops.problem import make_problem
from lla.ops.solver import Solver, Stats


@overload
def local_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    ridge: float | jax.Array,
    return_stats: Literal[False] = False,
    **options: Unpack[keyword.SolvedAttention],
) -> jax.Array: ...


@overload
def local_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    ridge: float | jax.Array,
    return_stats: Literal[True],
    **options: Unpack[keyword.SolvedAttention],
) -> tuple[jax.Array, Stats]: ...


@overload
def local_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    ridge: float | jax.Array,
    return_stats: bool,
    **options: Unpack[keyword.SolvedAttention],
) -> jax.Array | tuple[jax.Array, Stats]: ...


def local_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    ridge: float | jax.Array,
    scale: float | jax.Array | None = None,
    is_causal: bool = True,
    query_offset: int | jax.Array | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    logits_soft_cap: None = None,
    solver: Solver | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
    context_axis: str | None = None,
    context_balance: bool = False,
) -> jax.Array | tuple[jax.Array, Stats]:
    """Local linear attention: a weighted ridge regression around every query.

    For query ``i``, with softmax weights ``p_ij`` of the logits ``scale * q_i . k_j``, fits
    ``v ~ b + W (k - q_i)`` to all visible keys, minimising
    ``sum_j p_ij |v_j - b - W (k_j - q_i)|^2 + ridge_i |W|^2``, and returns ``b``. A large ridge
    gives softmax attention, a small scale ridge regression.

    Works under `jit`, `vmap`, `grad`, `checkpoint`, `scan` and `shard_map`. Arrays that are sharded
    over batch, heads or queries stay so, without communication, in `jit` as under Explicit axes;
    what cannot be kept, the head dimension or the keys, is gathered with a warning.

    Derivatives beyond the first need ``implementation="xla"``, where they are as exact as the
    solver's tolerances, or ``"reference"``; forward mode of the function itself needs
    ``"reference"``.

    **What is hidden is not read.** What a query cannot see, by any mask, has no influence on its
    output or gradients, whatever it holds: NaN, infinity, huge numbers. A query that sees a key,
    value or bias that is not finite is NaN, and so are its gradients and those of what it sees;
    where the mask is causal and nothing else, kernels may return NaN for the gradients of all keys
    then. A query that sees nothing is zero and adds nothing to any gradient, whatever it holds
    itself.

    Args:
      query: ``[*B, T, N, H]``, float32, bfloat16, float16 (float64 where x64 is enabled). Any
        number of leading axes ``*B``, none included.
      key: ``[*B, S, K, H]``, the query's dtype; ``N`` must be a multiple of ``K`` (grouped-query
        and multi-query attention).
      value: ``[*B, S, K, Hv]``, the query's dtype; ``Hv`` may differ from ``H``.
      ridge: positive, relative to the total weight of a query (so it does not depend on how the
        weights are normalised), in the units of squared keys. A float or an array broadcastable to
        ``[*B, T, N]``, differentiable. A traced value cannot be checked: a row whose ridge is not
        positive is NaN.
      scale: factor of the logits, the inverse bandwidth; None means ``1 / sqrt(H)``. A float or an
        array broadcastable to ``[*B, T, N]``, differentiable.
      is_causal: query ``i`` sees key ``j`` only if ``j <= i + query_offset``.
      query_offset: position of query 0 among the keys, an int or int array broadcastable to
        ``[*B]``; None means 0, as in `jax.nn.dot_product_attention`. Beyond 2**29 in size it counts
        as that, and with a window it is an error where it is known.
      query_seq_lengths: int, broadcastable to ``[*B]``: queries at or beyond it do not exist. They
        see nothing. Any number above T means T, any below 0 means 0.
      key_value_seq_lengths: int, broadcastable to ``[*B]``: keys at or beyond it do not exist. Any
        number above S means S, any below 0 means 0.
      segment_ids: pair of int arrays (query ``[*B, T]``, key ``[*B, S]``): attention only within
        equal ids, for packed sequences. Any integers.
      local_window_size: an int or ``(left, right)``, of any size: a query at position ``i`` sees
        keys ``i - left <= j <= i + right``.
      mask: bool, broadcastable to ``[*B, N, T, S]``, True where attention is allowed.
      bias: float, broadcastable to ``[*B, N, T, S]``, added to the logits before the masks:
        ``p_ij`` are then the softmax weights of ``scale * q_i . k_j + bias_ij``, and all else
        follows from them. Differentiable; the gradient has the shape that was given, and neither
        it nor the bias is repeated in memory over axes of 1. An entry below -1e36, -inf included,
        hides the key from the query as `mask` does: a query whose entries are all -inf is zero.
        ``"reference"`` and ``"xla"`` have it.
      logits_soft_cap: anything but None is an error: capped logits are defined for
        `softmax_attention` alone.
      solver: how the systems are solved, an `lla.Solver`; None means ``lla.Solver()``.
      implementation: None (the best one for the platform), ``"reference"`` (exact, dense),
        ``"xla"`` (blockwise), ``"mosaic_gpu"`` (NVIDIA GPUs since Ampere; on Hopper kernels of
        its own), ``"mosaic_gpu_portable"`` (the same without those), ``"mosaic_tpu"``, or a
        sequence tried in order; see `lla.explain`.
      return_stats: also return an `lla.Stats`.
      context_axis: the name of a mesh axis over which the sequence of queries, keys and values is
        split, an Explicit axis or one of an enclosing `jax.shard_map`; for other meshes see
        `lla.sharding.on_mesh`. Keys and values are gathered once (with a window those around a
        device's own alone), and their gradients are summed in float32. Inside `jax.shard_map`,
        offsets, lengths, and the last axis of `mask` and `bias` are those of the whole sequence,
        all else is a device's share.
      context_balance: whether the sequence is in the order of `lla.sharding.balance`, which gives
        all devices the same work under a causal mask.

    Returns:
      ``[*B, T, N, Hv]`` in the query's dtype; statistics and solves are float32 or better. A query
      that sees no key gets zeros. With ``return_stats`` a pair ``(output, Stats)``.

    Raises:
      ValueError: for arguments of wrong shape, dtype or value.
      NotImplementedError: if no requested implementation can serve the call.

    Source: Zuo et al., "Local Linear Attention", arXiv 2510.01450, in the centred form derived in
    ``kernels/MATHEMATICS.md``.
    """
    arrays = dict(
        query=query, key=key, value=value, ridge=ridge, scale=scale, query_offset=query_offset,
        query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
        segment_ids=segment_ids, mask=mask, bias=bias,
    )  # fmt: skip
    options = dict(
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        solver=solver,
    )
    split = make_context(context_axis, context_balance)
    return _serve("lla", arrays, options, implementation, return_stats, split)


@overload
def parallax_attention(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[keyword.Attention],
) -> jax.Array: ...


@overload
def parallax_attention(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_stats: Literal[True],
    **options: Unpack[keyword.Attention],
) -> tuple[jax.Array, Stats]: ...


@overload
def parallax_attention(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_stats: bool,
    **options: Unpack[keyword.Attention],
) -> jax.Array | tuple[jax.Array, Stats]: ...


def parallax_attention(
    query: jax.Array,
    probe: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = True,
    query_offset: int | jax.Array | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    logits_soft_cap: None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
    context_axis: str | None = None,
    context_balance: bool = False,
) -> jax.Array | tuple[jax.Array, Stats]:
    """Parallax attention: softmax attention corrected along a given direction, the probe.

    ``o_i = sum_j p_ij (1 - (k_j - k_mean_i) . probe_i) v_j`` with the softmax weights ``p_ij`` and
    ``k_mean_i = sum_j p_ij k_j``. Local linear attention is the case where the probe solves the
    ridge regression; here it is an input, usually a learned projection of the token.

    Args:
      query, key, value: as in `local_linear_attention`.
      probe: ``[*B, T, N, H]``, the query's dtype.
      scale, is_causal, query_offset, query_seq_lengths: as in `local_linear_attention`.
      key_value_seq_lengths, segment_ids, local_window_size, mask, bias, logits_soft_cap: likewise.
      implementation, return_stats, context_axis, context_balance: likewise.

    Returns:
      ``[*B, T, N, Hv]`` in the query's dtype, or a pair with `lla.Stats`.

    Raises:
      ValueError, NotImplementedError: as `local_linear_attention`.

    Source: "Parallax", arXiv 2605.29157.
    """
    arrays = dict(
        query=query, key=key, value=value, probe=probe, scale=scale, query_offset=query_offset,
        query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
        segment_ids=segment_ids, mask=mask, bias=bias,
    )  # fmt: skip
    options = dict(
        is_causal=is_causal, local_window_size=local_window_size, logits_soft_cap=logits_soft_cap
    )
    split = make_context(context_axis, context_balance)
    return _serve("parallax", arrays, options, implementation, return_stats, split)


@overload
def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[keyword.CappedAttention],
) -> jax.Array: ...


@overload
def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_stats: Literal[True],
    **options: Unpack[keyword.CappedAttention],
) -> tuple[jax.Array, Stats]: ...


@overload
def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    return_stats: bool,
    **options: Unpack[keyword.CappedAttention],
) -> jax.Array | tuple[jax.Array, Stats]: ...


def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = True,
    query_offset: int | jax.Array | None = None,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
    return_stats: bool = False,
    context_axis: str | None = None,
    context_balance: bool = False,
) -> jax.Array | tuple[jax.Array, Stats]:
    """Softmax attention through the same code, the mechanism of the family without a probe.

    Arguments, results and errors as `parallax_attention` without ``probe``, except for one:

    Args:
      logits_soft_cap: a positive number ``c`` or None. Bounds the logits: they become
        ``c * tanh((scale * q_i . k_j + bias_ij) / c)``, the bias inside, as in tokamax. Where the
        bias is -inf the key is hidden all the same. ``"reference"`` and ``"xla"`` have it.
    """
    arrays = dict(
        query=query, key=key, value=value, scale=scale, query_offset=query_offset,
        query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
        segment_ids=segment_ids, mask=mask, bias=bias,
    )  # fmt: skip
    options = dict(
        is_causal=is_causal, local_window_size=local_window_size, logits_soft_cap=logits_soft_cap
    )
    split = make_context(context_axis, context_balance)
    return _serve("softmax", arrays, options, implementation, return_stats, split)


def explain(
    query: jax.Array | jax.ShapeDtypeStruct,
    key: jax.Array | jax.ShapeDtypeStruct,
    value: jax.Array | jax.ShapeDtypeStruct,
    *,
    cache: KVCache | None = None,
    implementation: Implementation = None,
    **options: Any,
) -> dict[str, str | None]:
    """Why each implementation would or would not serve a call, without computing anything.

    ``docs/how-to/operator.md`` has a table of what each of them supports, ``docs/how-to/gpus.md``
    and ``docs/how-to/tpus.md`` what runs on which machine.

    Args:
      query, key, value: arrays or `jax.ShapeDtypeStruct`, as for `local_linear_attention`, or those
        of the new tokens where there is a `cache`.
      cache: of arrays or `jax.ShapeDtypeStruct`, to ask about `lla.decode_step`.
      implementation: the ones to ask about; None means all of them.
      **options: the other options of the function; ``ridge`` may be left out. With a
        ``logits_soft_cap`` the call is one of `softmax_attention`.

    Returns:
      A dict from implementation name to None (it can serve) or the reason why it cannot. With a
      cache, an implementation that has kernels or a method of its own for decoding also has an
      entry ``"<name>:decode"``; where that is a reason, the implementation treats the step as a
      call on the whole cache. Where ``"mosaic_gpu"`` serves with the portable kernels,
      ``"mosaic_gpu:hopper"`` says why those for Hopper do not, and ``"mosaic_gpu:default"``, if it
      is there, why ``implementation=None`` passes them over.
    """
    names = (
        tuple(backend.BACKENDS) if implementation is None else backend.check_names(implementation)
    )
    options.setdefault("ridge", 1.0)
    mechanism = "lla" if options.get("logits_soft_cap") is None else "softmax"
    reasons = {}

    def check(query, key, value, cache):
        if cache is None:
            problem = make_problem(mechanism, query, key, value, **options)
        else:
            problem, _ = decoding_problem(mechanism, query, key, value, cache, **options)
        reasons.update(backend.explain(problem, names, decoding=cache is not None))
        return problem.query

    jax.eval_shape(check, query, key, value, cache)
    return reasons


def _serve(mechanism, arrays, options, implementation, return_stats, split):
    call = mechanism, arrays, options, implementation, return_stats
    if split is not None:
        found = sharding.attend_split(split, *call)
    else:
        mesh = sharding.find_mesh(arrays.values())
        if mesh is None:
            problem = make_problem(mechanism, **arrays, **options)
            out, stats = backend.run(problem, implementation, return_stats)
            return (out, stats) if return_stats else out
        found = sharding.attend(mesh, *call)
    stats = Stats(*(found[name] for name in Stats._fields))
    return (found["out"], stats) if return_stats else found["out"]
