"""The Hopper kernels behind the operator: limits, padding, and the order in which they run.

The kernels themselves are in `lla.kernels.mosaic_gpu`, their design in ``kernels/HOPPER.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lla.compat import default_device, target_capability
from lla.kernels.tiles import NOTHING
from lla.numerics import pad_to
from lla.ops.differentiation import Residuals, attention
from lla.ops.mosaic_gpu import precision
from lla.ops.problem import (
    Mechanism,
    Operands,
    Problem,
    options_unsupported_by_kernels,
    unsupported_by_kernels,
)
from lla.ops.shield import shielded
from lla.ops.solver import Stats, choose_method

_MAX_HEAD_DIM = 128
_MAX_DIRECT_DIM = 32
# What the inverse systems of the direct solver may take at a time. Where one sequence takes more,
# the solver has to be asked for by name.
_INVERSE_BYTES = 2**30


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`, None if they can."""
    reason = options_unsupported_by_kernels(problem) or refuse_machine()
    return unsupported_shape(problem) if reason is None else reason


def refuse_machine() -> str | None:
    """Why this machine cannot run kernels for Hopper, None if it can."""
    if jax.__version_info__ < (0, 11):
        return (
            f"the Hopper kernels need JAX 0.11 or later (Python 3.12 or later), this is "
            f"{jax.__version__}"
        )
    return _refuse_device()


def unsupported_shape(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem` on any device, None if they can."""
    return unsupported_by_kernels(problem, ("bfloat16", "float16"), _MAX_HEAD_DIM, _MAX_DIRECT_DIM)


def use_direct(problem: Problem) -> bool:
    """Whether the kernels solve `problem` directly."""
    if problem.mechanism != "lla":
        return False
    if max(problem.query.shape[-1], problem.value.shape[-1]) > _MAX_DIRECT_DIM:
        return False
    if choose_method(problem, "mosaic_gpu") != "direct":
        return False
    # A caller who names the direct solver accepts the memory that it takes.
    _, t, n, h = problem.query.shape
    return problem.solver.method == "direct" or _inverse_bytes(h, t * n) <= _INVERSE_BYTES


def _inverse_bytes(head_dim: int, rows: int) -> int:
    """What `lla.kernels.mosaic_gpu.inverse` takes for the inverse systems of some rows."""
    return 4 * (16 if head_dim <= 16 else 32) * _MAX_DIRECT_DIM * rows


def _refuse_device() -> str | None:
    target = target_capability()
    if target is not None:
        named = ".".join(map(str, target))
        reason = f"the kernels need a Hopper GPU (compute capability 9.0), the target is {named}"
        return None if target == (9, 0) else reason
    device = default_device()
    if device.platform != "gpu":
        return f"the kernels need a Hopper GPU, the platform is {device.platform}"
    if getattr(device, "compute_capability", None) != "9.0":
        return f"the kernels need a Hopper GPU (compute capability 9.0), this is {device}"
    return None


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static part of a call."""

    mechanism: Mechanism
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
    kernels: str = "mosaic_gpu"  # folder of the kernels

    def module(self, name: str) -> Any:
        """A module of the kernels; imported late, as they need JAX 0.11."""
        return _kernels(self.kernels, name)

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


def _kernels(folder: str, name: str) -> Any:
    return importlib.import_module(f"lla.kernels.{folder}.{name}")


class _Probe(NamedTuple):
    """The solution that the backward pass needs; see `lla.kernels.mosaic_gpu.solve.Solution`."""

    shift_high: jax.Array | None = None
    shift: jax.Array | None = None
    high: jax.Array | None = None
    low: jax.Array | None = None


def attend_shielded(
    problem: Problem, *, configs: Any = None, interpret: Any = None, kernels: str = "mosaic_gpu"
) -> tuple[jax.Array, Stats]:
    """Output and statistics, always complete, in the layout of `Problem`.

    Hidden numbers and those that are not finite reach other rows; `attend` keeps them away.

    Inside, arrays are padded: query and probe ``[B, T, N, D]``, key and value ``[B, S, K, D]``,
    ridge and scale ``[B, N, T]``.

    Args:
      problem: one that `unsupported_shape` accepts.
      configs: an `lla.kernels.mosaic_gpu.configs.Configs`; None takes the table's.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
      kernels: the folder of the kernels; others than "mosaic_gpu" have functions and arguments of
        the same names, `configs` that are given, and no direct solver.
    """
    # Imported here: these modules need JAX 0.11.
    from lla.kernels.mosaic_gpu import launch, tile

    table = _kernels(kernels, "configs")

    b, t, n, h = problem.query.shape
    _, s, k, hv = problem.value.shape
    dim = next(d for d in table.HEAD_DIMS if d >= max(h, hv))
    padded_t, padded_s = (
        -(-n // table.SEQUENCE_MULTIPLE) * table.SEQUENCE_MULTIPLE for n in (t, s)
    )

    def queries(array):
        if array is None:
            return None
        return pad_to(array, b, padded_t, n, dim)

    def rows(array, fill):
        if array is None:
            return None
        array = jnp.swapaxes(problem.by_row(array.astype(jnp.float32)), 1, 2)
        return pad_to(array, b, n, padded_t, fill=fill)

    operands = Operands(
        query=queries(problem.query),
        key=pad_to(problem.key, b, padded_s, k, dim),
        value=pad_to(problem.value, b, padded_s, k, dim),
        probe=queries(problem.probe),
        ridge=rows(problem.ridge, 1),
        scale=rows(problem.scale, 1),
    )
    mask = problem.mask
    segments = [mask.query_segments, mask.key_segments]
    if segments[0] is not None:
        segments = [
            pad_to(a, b, size, fill=-1)
            for a, size in zip(segments, (padded_t, padded_s), strict=True)
        ]
    masking = launch.Masking(mask.numbers(b, s), *segments)
    direct = kernels == "mosaic_gpu" and use_direct(problem)
    forward, backward = precision.iterations(problem, precise=direct, direct=direct)
    precise_forward = precise_backward = marked = None
    if precision.choose_by_tile(problem) and not direct:
        precise_forward, precise_backward = precision.iterations(problem, precise=True)
        ridge = operands.ridge
        if problem.ridge.shape[1] == 1:  # one number for all rows
            ridge = jnp.swapaxes(problem.ridge.astype(jnp.float32), 1, 2)
        marked = precision.mark_small(
            ridge, operands.key, masking.numbers, mask.is_causal, h, (n, padded_t)
        )
    spec = _Spec(
        mechanism=problem.mechanism,
        shape=launch.Shape(b, padded_t, padded_s, k, problem.group, dim, problem.query.dtype),
        mask=tile.MaskSpec(mask.is_causal, mask.window, segments[0] is not None),
        configs=table.choose(dim) if configs is None else configs,
        forward=forward,
        backward=backward,
        precise_forward=precise_forward,
        precise_backward=precise_backward,
        split=(problem.static_ridge or 0) < precision.SPLIT_BELOW or forward.bf16x2,
        direct=h if direct else None,
        interpret=interpret,
        kernels=kernels,
    )
    out, stats = _attend(spec, operands, (masking, marked))

    stats = Stats(*(jnp.swapaxes(a[:, :, :t], 1, 2) for a in stats))  # [B, N, T] -> [B, T, N]
    return out[:, :t, :, :hv], stats


attend = shielded(attend_shielded)


# ---------------------------------------------------------------------------------------------
# Forward and backward pass


def _forward(spec: _Spec, operands: Operands, constants) -> tuple[Residuals, Stats]:
    from lla.kernels.mosaic_gpu.tile import LN2

    attend_kernel, solve_kernel = spec.module("attend"), spec.module("solve")
    query, key, value, probe, ridge, scale, _ = operands
    masking, marked = constants
    precise = spec.mechanism == "lla" and spec.precise
    attend = functools.partial(
        attend_kernel.attend, spec.shape, spec.mask,
        spec.configs.attend_bf16x2 if precise else spec.configs.attend,
        query, key, value, scale, masking, interpret=spec.interpret,
    )  # fmt: skip
    iterations = jnp.zeros(scale.shape, jnp.int32)
    residual = jnp.zeros(scale.shape, jnp.float32)
    if spec.mechanism == "lla":
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
        saved = Residuals(
            out=attend(solution.high, solved, bf16x2=spec.precise).out,
            log_sum_exp=solution.log_sum_exp,
            probe=_Probe(solution.shift_high, solution.shift, solution.high, solution.low),
            key_mean=solution.key_mean,
        )
        iterations, residual = solution.iterations.astype(jnp.int32), solution.residual
    else:
        attended = attend(None if probe is None else -probe)
        saved = Residuals(attended.out, attended.log_sum_exp, _Probe(attended.shift))
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


def _backward(spec: _Spec, operands: Operands, constants, saved: Residuals, cotangent) -> Operands:
    gradients, solve_kernel = spec.module("gradients"), spec.module("solve")
    query, key, value, probe, ridge, scale, _ = operands
    masking, marked = constants
    found: _Probe = saved.probe
    f32 = jnp.float32
    delta = (cotangent.astype(f32) * saved.out.astype(f32)).sum(-1)
    delta = jnp.swapaxes(delta, 1, 2)
    directions = gradients.Directions()
    cotangent_mean, d_probe, d_ridge = delta, None, None
    solution = probe_square = None
    if spec.mechanism == "lla":
        solution = found.high.astype(f32) + found.low.astype(f32)
        probe_square = jnp.swapaxes(jnp.square(solution).sum(-1), 1, 2)
    if spec.mechanism != "softmax":
        target = solve_kernel.Adjoint(
            value, cotangent, saved.log_sum_exp, delta, saved.key_mean, probe_square
        )
        if spec.direct is None:
            iteration = (
                spec.backward if spec.mechanism == "lla" else solve_kernel.CGOptions(None, 0)
            )
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
        if spec.mechanism == "lla":
            full_mean = cotangent_mean + adjoint.shift
            directions = gradients.Directions(
                found.high, found.shift_high, adjoint.high, adjoint.low, saved.key_mean
            )
            cotangent_mean = cotangent_mean + adjoint.shift_high
            d_ridge = ((adjoint.high.astype(f32) + adjoint.low.astype(f32)) * solution).sum(-1)
            d_ridge = jnp.swapaxes(d_ridge, 1, 2)
        else:
            directions = gradients.Directions(
                probe=-probe, probe_shift=found.shift_high, key_mean=adjoint.key_mean
            )
            d_probe = (adjoint.high.astype(f32) + adjoint.low.astype(f32)).astype(probe.dtype)
    rows = gradients.Rows(scale, saved.log_sum_exp, cotangent_mean)
    by_query = gradients.query_gradients(
        spec.shape, spec.mask, spec.configs.query_gradients, query, key, value, cotangent, rows,
        directions, masking, interpret=spec.interpret,
    )  # fmt: skip
    config = spec.configs.key_gradients
    if spec.mechanism == "lla" and spec.precise:
        config = spec.configs.key_gradients_split
        directions = directions._replace(probe_shift=found.shift, probe_low=found.low)
        rows = rows._replace(cotangent_mean=full_mean)
    d_key, d_value = gradients.key_gradients(
        spec.shape, spec.mask, config, query, key, value, cotangent, rows, by_query.mean,
        directions, masking, interpret=spec.interpret,
    )  # fmt: skip
    return Operands(by_query.query, d_key, d_value, d_probe, d_ridge, by_query.scale)


_attend = attention("mosaic_gpu", _forward, _backward, axes={3: "nq", 4: "qnh"})
