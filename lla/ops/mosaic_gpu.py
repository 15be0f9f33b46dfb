"""The Hopper kernels behind the operator: padding, tolerances, and one custom_vjp.

The kernels themselves are in `lla.kernels.mosaic_gpu`, their design in ``kernels/HOPPER.md``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lla.compat import default_device, match_varying
from lla.kernels.tiles import NOTHING
from lla.ops import again
from lla.ops.auto import choose_method
from lla.ops.handover import fields, named
from lla.ops.options import Solver, Stats
from lla.ops.problem import Member, Problem, refuse_for_kernels
from lla.ops.xla import RESIDUAL_NAMES

_MAX_HEAD_DIM = 128
_MAX_DIRECT_DIM = 32
# What the inverse systems of the direct solver may take at a time. Where one sequence takes more,
# the solver has to be asked for by name.
_INVERSE_BYTES = 2**30
# Estimated relative error of the effective weights at which a tile stops; see kernels/HOPPER.md.
_TOLERANCES = {
    "large": (1e-3, 3e-3), "medium": (1.5e-3, 5e-3), "small": (1e-3, 1e-3), "direct": (1e-3, 1e-4),
}  # fmt: skip
_LARGE_RIDGE = 10.0
_MAX_ITERS, _MAX_PRECISE_ITERS = 64, 256
# Above this ridge the probe is small enough to be used in one 16-bit part.
_SPLIT_BELOW = 5.0
# Below this ridge, or where a tolerance below this one is asked for, directions and weights have
# two 16-bit parts. The ridge is relative to the mean square of the key coordinates where that is
# looked at: for a ridge that is traced, or known to be between this number and the one above.
_PRECISE_RIDGE = 0.5
_PRECISE_TOL = 1e-3
_FIELDS = fields([RESIDUAL_NAMES[i] for i in (0, 1, 2, 2, 2, 2, 3)], "qnh nq nq nq qnh qnh qnh")


def refuse(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`, None if they can."""
    reason = refuse_machine()
    return refuse_shape(problem) if reason is None else reason


def refuse_machine() -> str | None:
    """Why this machine cannot run kernels for Hopper, None if it can."""
    if jax.__version_info__ < (0, 11):
        return f"the Mosaic GPU kernels need JAX 0.11 or later, this is {jax.__version__}"
    return _refuse_device()


def refuse_shape(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem` on any device, None if they can."""
    return refuse_for_kernels(problem, ("bfloat16", "float16"), _MAX_HEAD_DIM, _MAX_DIRECT_DIM)


def use_direct(problem: Problem) -> bool:
    """Whether the kernels solve `problem` directly."""
    if problem.member != "lla":
        return False
    if max(problem.query.shape[-1], problem.value.shape[-1]) > _MAX_DIRECT_DIM:
        return False
    if choose_method(problem, "mosaic_gpu") != "direct":
        return False
    # Who asks for it by name has the memory.
    _, t, k, g, h = problem.query.shape
    return problem.solver.method == "direct" or _inverse_bytes(h, t * k * g) <= _INVERSE_BYTES


def _inverse_bytes(head_dim: int, rows: int) -> int:
    """What `lla.kernels.mosaic_gpu.inverse` takes for the inverse systems of some rows."""
    return 4 * (16 if head_dim <= 16 else 32) * _MAX_DIRECT_DIM * rows


def _refuse_device() -> str | None:
    device = default_device()
    if device.platform != "gpu":
        return f"the kernels need a Hopper GPU, the platform is {device.platform}"
    if getattr(device, "compute_capability", None) != "9.0":
        return f"the kernels need a Hopper GPU (compute capability 9.0), this is {device}"
    return None


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static part of a call."""

    member: Member
    shape: Any
    mask: Any
    configs: Any
    forward: Any
    backward: Any
    # The same for the tiles that need two parts; None if all tiles are alike.
    precise_forward: Any
    precise_backward: Any
    split: bool
    # Head dimension before padding where the solves are direct, else None.
    direct: int | None
    interpret: Any

    @property
    def precise(self) -> bool:
        """Whether any tile may need two parts."""
        return self.forward.bf16x2 or self.precise_forward is not None

    @property
    def solve_config(self):
        """The configuration of both solves."""
        if self.direct is not None:
            return self.configs.solve_direct
        if self.precise_forward is not None:
            return self.configs.solve_mixed
        return self.configs.solve_bf16x2 if self.forward.bf16x2 else self.configs.solve


class _Operands(NamedTuple):
    """Padded arrays: ``[B, T, N, D]``, ``[B, S, K, D]``, rows ``[B, N, T]``."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    probe: jax.Array | None
    ridge: jax.Array | None
    scale: jax.Array


class _Saved(NamedTuple):
    """What the backward pass needs, padded; see `lla.kernels.mosaic_gpu.solve.Solution`."""

    out: jax.Array
    log_sum_exp: jax.Array
    shift_high: jax.Array | None = None
    shift: jax.Array | None = None
    high: jax.Array | None = None
    low: jax.Array | None = None
    key_mean: jax.Array | None = None


def mosaic_gpu(
    problem: Problem, *, configs: Any = None, interpret: Any = None, handover: Any = None
) -> tuple[jax.Array, Stats]:
    """Output ``[B, T, K, G, Hv]`` in the query's dtype, and the statistics.

    Args:
      problem: one that `refuse_shape` accepts.
      configs: an `lla.kernels.mosaic_gpu.configs.Configs`; None takes the table's.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    # Imported here: these modules need JAX 0.11.
    from lla.kernels.mosaic_gpu import configs as table
    from lla.kernels.mosaic_gpu import launch, tile

    b, t, k, g, h = problem.query.shape
    s, hv = problem.key.shape[1], problem.value.shape[-1]
    dim = next(d for d in table.HEAD_DIMS if d >= max(h, hv))
    padded_t, padded_s = (
        -(-n // table.SEQUENCE_MULTIPLE) * table.SEQUENCE_MULTIPLE for n in (t, s)
    )

    def pad(array, *sizes, fill=0):
        widths = [(0, size - n) for size, n in zip(sizes, array.shape, strict=True)]
        if not any(after for _, after in widths):
            return array
        return jnp.pad(array, widths, constant_values=fill)

    def queries(array):
        if array is None:
            return None
        return pad(array.reshape(b, t, k * g, -1), b, padded_t, k * g, dim)

    def rows(array, fill):
        if array is None:
            return None
        array = array.astype(jnp.float32).reshape(b, t, k * g)
        return pad(jnp.swapaxes(array, 1, 2), b, k * g, padded_t, fill=fill)

    operands = _Operands(
        query=queries(problem.query),
        key=pad(problem.key, b, padded_s, k, dim),
        value=pad(problem.value, b, padded_s, k, dim),
        probe=queries(problem.probe),
        ridge=rows(problem.ridge, 1),
        scale=rows(problem.scale, 1),
    )
    mask = problem.mask
    offset = jnp.zeros(b, jnp.int32) if mask.offset is None else mask.offset
    length = jnp.full(b, s, jnp.int32)
    if mask.lengths is not None:
        length = jnp.clip(mask.lengths, 0, s)
    segments = [mask.query_segments, mask.key_segments]
    if segments[0] is not None:
        segments = [
            pad(a, b, n, fill=-1) for a, n in zip(segments, (padded_t, padded_s), strict=True)
        ]
    masking = launch.Masking(jnp.stack([offset, length], axis=1), *segments)
    direct = use_direct(problem)
    forward, backward = iterations(problem, precise=direct, direct=direct)
    precise_forward = precise_backward = marked = None
    if choose_by_tile(problem) and not direct:
        precise_forward, precise_backward = iterations(problem, precise=True)
        marked = mark_small(operands.ridge, operands.key, masking.numbers, mask.is_causal, h)
    spec = _Spec(
        member=problem.member,
        shape=launch.Shape(b, padded_t, padded_s, k, g, dim, problem.query.dtype),
        mask=tile.MaskSpec(mask.is_causal, mask.window, segments[0] is not None),
        configs=table.choose(dim) if configs is None else configs,
        forward=forward,
        backward=backward,
        precise_forward=precise_forward,
        precise_backward=precise_backward,
        split=(problem.static_ridge or 0) < _SPLIT_BELOW or forward.bf16x2,
        direct=h if direct else None,
        interpret=interpret,
    )
    leaves, tree = jax.tree.flatten((operands, (masking, marked)))
    operands, tiles = jax.tree.unflatten(tree, match_varying(*leaves))
    attend = _attend if handover is None else handover.bind(_results, _gradients, _Saved, _FIELDS)
    out, stats = attend(spec, operands, tiles)

    def restore(array):  # [B, N, T] -> [B, T, K, G]
        return jnp.swapaxes(array[:, :, :t], 1, 2).reshape(b, t, k, g)

    return out[:, :t, :, :hv].reshape(b, t, k, g, hv), Stats(*(restore(a) for a in stats))


def choose_by_tile(problem: Problem) -> bool:
    """Whether the ridges and keys of a tile decide if it needs two parts."""
    if problem.member != "lla" or iterations(problem, precise=False)[0].bf16x2:
        return False
    return problem.static_ridge is None or problem.static_ridge < _SPLIT_BELOW


def mark_small(
    ridge: jax.Array, key: jax.Array, numbers: jax.Array, is_causal: bool, head_dim: int
) -> jax.Array:
    """The tiles of 64 queries, int32 ``[B, N, T/64]``, with a ridge that is small for their keys.

    The smallest ridge of a tile is compared with the mean square of the coordinates of the keys up
    to the last one that the tile sees: no tile depends on later keys.

    Args:
      ridge: ``[B, N, T]``, padded.
      key: ``[B, S, K, D]``, padded.
      numbers: int32 ``[B, 2]``, the offset and the number of keys of each sequence.
      is_causal: whether later keys are invisible.
      head_dim: D before padding.
    """
    rows = 64
    b, s, k, _ = key.shape
    n, t = ridge.shape[1:]
    offset, length = (numbers[:, i, None, None] for i in range(2))
    exists = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None, None], (b, 1, s)) < length
    squares = jnp.square(key.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    squares = jnp.where(exists, squares, 0.0).reshape(b, k, s // rows, rows).sum(-1)
    first = jnp.arange(s // rows, dtype=jnp.int32)[None, None] * rows
    counts = jnp.clip(length - first, 0, rows).astype(jnp.float32) * head_dim
    if is_causal:
        squares, counts = jnp.cumsum(squares, axis=-1), jnp.cumsum(counts, axis=-1)
        end = (jnp.arange(t // rows, dtype=jnp.int32)[None, None] + 1) * rows + offset
        last = jnp.clip((end + (rows - 1)) // rows - 1, 0, s // rows - 1)
        squares = jnp.take_along_axis(squares, jnp.broadcast_to(last, (b, k, t // rows)), axis=-1)
        counts = jnp.take_along_axis(counts, last, axis=-1)
    else:
        squares, counts = squares.sum(-1, keepdims=True), counts.sum(-1, keepdims=True)
    mean = squares / jnp.maximum(counts, 1.0)
    mean = jnp.broadcast_to(jnp.repeat(mean, n // k, axis=1), (b, n, t // rows))
    smallest = ridge.reshape(b, n, t // rows, rows).min(-1)
    return (smallest < _PRECISE_RIDGE * mean).astype(jnp.int32)


def iterations(problem: Problem, *, precise: bool, direct: bool = False):
    """When the forward and the adjoint solve stop; `precise` asks for two parts."""
    from lla.kernels.mosaic_gpu.solve import CGOptions

    solver: Solver = problem.solver
    ridge = problem.static_ridge
    small = precise or (ridge is not None and ridge < _PRECISE_RIDGE)
    # A ridge that is not known may be large, where the result is exact enough to notice.
    large = ridge is None or ridge >= _LARGE_RIDGE
    kind = "direct" if direct else "small" if small else "large" if large else "medium"
    tol, backward_tol = _TOLERANCES[kind]
    if solver.tol is not None:
        tol, backward_tol = solver.tol, min(10 * solver.tol, 0.5)
    if solver.backward_tol is not None:
        backward_tol = solver.backward_tol
    precise = small or tol < _PRECISE_TOL
    if solver.num_iters is not None:
        return (CGOptions(None, solver.num_iters, precise),) * 2
    max_iters = solver.max_iters or (_MAX_PRECISE_ITERS if precise else _MAX_ITERS)
    return (
        CGOptions(tol, max_iters, precise),
        CGOptions(backward_tol, max_iters, precise),
    )


# ---------------------------------------------------------------------------------------------
# Differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, operands: _Operands, tiles) -> tuple[jax.Array, Stats]:
    saved, stats = _results(spec, operands, *tiles)
    return saved.out, stats


def _attend_fwd(spec: _Spec, operands: _Operands, tiles):
    saved, stats = _results(spec, operands, *tiles)
    saved = _Saved(*named(saved, _FIELDS))
    return (saved.out, stats), (operands, tiles, saved)


def _attend_bwd(spec: _Spec, residuals, cotangents):
    operands, tiles, saved = residuals
    return _gradients(spec, operands, *tiles, saved, cotangents[0]), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec: _Spec, operands: _Operands, masking, marked) -> tuple[_Saved, Stats]:
    from lla.kernels.mosaic_gpu import attend as attend_kernel
    from lla.kernels.mosaic_gpu import solve as solve_kernel
    from lla.kernels.mosaic_gpu.tile import LN2

    query, key, value, probe, ridge, scale = operands
    precise = spec.member == "lla" and spec.precise
    attend = functools.partial(
        attend_kernel.attend, spec.shape, spec.mask,
        spec.configs.attend_bf16x2 if precise else spec.configs.attend,
        query, key, value, scale, masking, interpret=spec.interpret,
    )  # fmt: skip
    iterations = jnp.zeros(scale.shape, jnp.int32)
    residual = jnp.zeros(scale.shape, jnp.float32)
    if spec.member == "lla":
        if spec.direct is None:
            solution = solve_kernel.solve(
                spec.shape, spec.mask, spec.solve_config, spec.forward, query, key, scale, ridge,
                masking, override=_choice(spec.precise_forward, marked), interpret=spec.interpret,
            )  # fmt: skip
        else:
            solution = _by_sequences(
                spec, functools.partial(_solve_directly, spec), query, key, scale, ridge, masking
            )
        solved = attend_kernel.Solved(
            solution.log_sum_exp,
            solution.shift if spec.split else solution.shift_high,
            solution.low if spec.split else None,
            marked,
        )
        saved = _Saved(
            out=attend(solution.high, solved, bf16x2=spec.precise).out,
            log_sum_exp=solution.log_sum_exp,
            shift_high=solution.shift_high,
            shift=solution.shift,
            high=solution.high,
            low=solution.low,
            key_mean=solution.key_mean,
        )
        iterations, residual = solution.iterations.astype(jnp.int32), solution.residual
    else:
        attended = attend(None if probe is None else -probe)
        saved = _Saved(attended.out, attended.log_sum_exp, shift_high=attended.shift)
    empty = saved.log_sum_exp == jnp.inf
    natural = jnp.where(empty, NOTHING, saved.log_sum_exp * LN2)
    return saved, Stats(natural, iterations, residual)


def _by_sequences(spec: _Spec, function, *operands):
    """``function(shape, *operands)`` for as many sequences at a time as `_INVERSE_BYTES` allow."""
    batch = spec.shape.batch
    each = _inverse_bytes(spec.direct, spec.shape.heads * spec.shape.num_queries)
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n * each <= _INVERSE_BYTES]
    count = max(fitting, default=1)
    shape = dataclasses.replace(spec.shape, batch=count)
    if count == batch:
        return function(shape, *operands)
    divided = jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]), operands)
    results = lax.map(lambda part: function(shape, *part), divided)
    return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), results)


def _solve_directly(spec: _Spec, shape, query, key, scale, ridge, masking):
    """The forward solve by inverse systems."""
    from lla.kernels.mosaic_gpu import solve as solve_kernel

    solve = functools.partial(
        solve_kernel.solve, shape, spec.mask, spec.solve_config,
        query=query, key=key, scale=scale, ridge=ridge, masking=masking, interpret=spec.interpret,
    )  # fmt: skip
    first = solve(dataclasses.replace(spec.forward, tol=None, max_iters=0))
    known = first.log_sum_exp, first.key_mean
    inverse = _inverse(spec, shape, query, key, scale, ridge, masking, first.log_sum_exp)
    solution = solve(spec.forward, preconditioner=solve_kernel.Preconditioner(inverse, *known))
    return solution._replace(log_sum_exp=known[0], key_mean=known[1])


def _adjoint_directly(spec: _Spec, shape, query, key, scale, ridge, masking, adjoint):
    """The adjoint solve by inverse systems, which are formed again.

    Without the barrier the compiler would find that they are those of the forward pass, and keep
    them until here.
    """
    from lla.kernels.mosaic_gpu import solve as solve_kernel

    again = lax.optimization_barrier((key, adjoint.log_sum_exp, adjoint.cotangent))[:2]
    inverse = _inverse(spec, shape, query, again[0], scale, ridge, masking, again[1])
    return solve_kernel.solve(
        shape, spec.mask, spec.solve_config, spec.backward, query, key, scale, ridge, masking,
        adjoint, preconditioner=solve_kernel.Preconditioner(inverse), interpret=spec.interpret,
    )  # fmt: skip


def _inverse(spec: _Spec, shape, query, key, scale, ridge, masking, log_sum_exp) -> jax.Array:
    from lla.kernels.mosaic_gpu.inverse import inverse_systems

    return inverse_systems(
        shape, spec.mask, spec.configs.moments, spec.direct, query, key, scale, ridge, log_sum_exp,
        masking, interpret=spec.interpret,
    )  # fmt: skip


def _choice(iteration, marked):
    from lla.kernels.mosaic_gpu.solve import TileOverride

    return None if iteration is None else TileOverride(iteration, marked)


def _backward(
    spec: _Spec, operands: _Operands, masking, marked, saved: _Saved, cotangent
) -> _Operands:
    from lla.kernels.mosaic_gpu import gradients
    from lla.kernels.mosaic_gpu import solve as solve_kernel

    query, key, value, probe, ridge, scale = operands
    f32 = jnp.float32
    delta = (cotangent.astype(f32) * saved.out.astype(f32)).sum(-1)
    delta = jnp.swapaxes(delta, 1, 2)
    directions = gradients.Directions()
    cotangent_mean, d_probe, d_ridge = delta, None, None
    solution = probe_square = None
    if spec.member == "lla":
        solution = saved.high.astype(f32) + saved.low.astype(f32)
        probe_square = jnp.swapaxes(jnp.square(solution).sum(-1), 1, 2)
    if spec.member != "softmax":
        target = solve_kernel.Adjoint(
            value, cotangent, saved.log_sum_exp, delta, saved.key_mean, probe_square
        )
        if spec.direct is None:
            iteration = spec.backward if spec.member == "lla" else solve_kernel.CGOptions(None, 0)
            adjoint = solve_kernel.solve(
                spec.shape, spec.mask, spec.solve_config, iteration, query, key, scale, ridge,
                masking, target, _choice(spec.precise_backward, marked), interpret=spec.interpret,
            )  # fmt: skip
        else:
            adjoint = _by_sequences(
                spec, functools.partial(_adjoint_directly, spec), query, key, scale, ridge,
                masking, target,
            )  # fmt: skip
        cotangent_mean = adjoint.cotangent_mean
        if spec.member == "lla":
            full_mean = cotangent_mean + adjoint.shift
            directions = gradients.Directions(
                saved.high, saved.shift_high, adjoint.high, adjoint.low, saved.key_mean
            )
            cotangent_mean = cotangent_mean + adjoint.shift_high
            d_ridge = ((adjoint.high.astype(f32) + adjoint.low.astype(f32)) * solution).sum(-1)
            d_ridge = jnp.swapaxes(d_ridge, 1, 2)
        else:
            directions = gradients.Directions(
                probe=-probe, probe_shift=saved.shift_high, key_mean=adjoint.key_mean
            )
            d_probe = (adjoint.high.astype(f32) + adjoint.low.astype(f32)).astype(probe.dtype)
    rows = gradients.Rows(scale, saved.log_sum_exp, cotangent_mean)
    by_query = gradients.query_gradients(
        spec.shape, spec.mask, spec.configs.query_gradients, query, key, value, cotangent, rows,
        directions, masking, interpret=spec.interpret,
    )  # fmt: skip
    config = spec.configs.key_gradients
    if spec.member == "lla" and spec.precise:
        config = spec.configs.key_gradients_split
        directions = directions._replace(probe_shift=saved.shift, probe_low=saved.low)
        rows = rows._replace(cotangent_mean=full_mean)
    d_key, d_value = gradients.key_gradients(
        spec.shape, spec.mask, config, query, key, value, cotangent, rows, by_query.mean,
        directions, masking, interpret=spec.interpret,
    )  # fmt: skip
    return _Operands(by_query.query, d_key, d_value, d_probe, d_ridge, by_query.scale)


_results = again.refuse_derivative(_forward, "mosaic_gpu")
_gradients = again.refuse_derivative(_backward, "mosaic_gpu")
