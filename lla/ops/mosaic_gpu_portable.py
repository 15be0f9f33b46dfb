"""The kernels for every NVIDIA GPU since Ampere behind the operator.

They compute what those for Hopper do (`lla.ops.mosaic_gpu`), with products by mma.sync; the direct
solver is left out. The kernels themselves are in `lla.kernels.mosaic_gpu_mma`, their design in
``kernels/PORTABLE.md``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lla import compat
from lla.compat import default_device, match_varying
from lla.kernels.tiles import NOTHING
from lla.ops import again, mosaic_gpu
from lla.ops.options import Stats
from lla.ops.problem import Member, Problem, refuse_for_kernels
from lla.ops.xla import RESIDUAL_NAMES

NAME = "mosaic_gpu_portable"
MEASURED = {(9, 0): 128}
"""Cards that the kernels have run on, by compute capability, and up to which head dimension.

``implementation="mosaic_gpu"`` takes these kernels there, where those for Hopper do not serve.
"""

_MAX_HEAD_DIM = 256
# Above this ridge the probe is small enough to be used in one 16-bit part.
_SPLIT_BELOW = 5.0
# The first versions that compile for Hopper and later, and for what was before.
_JAX, _JAX_BEFORE_HOPPER = (0, 11, 2), (0, 12)


def refuse(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`, None if they can."""
    return refuse_machine() or refuse_shape(problem) or _refuse_size(problem)


def refuse_unmeasured(problem: Problem) -> str | None:
    """The same, or that the kernels have not run for such a problem on such a card."""
    reason = refuse(problem)
    if reason is not None:
        return reason
    found = capability()
    widest = max(problem.query.shape[-1], problem.value.shape[-1])
    if widest <= MEASURED.get(found, 0):
        return None
    text = ".".join(map(str, found))
    return (
        f"implementation={NAME!r} has kernels for compute capability {text} and head dimension "
        f"{widest}, which have never run"
    )


def refuse_machine() -> str | None:
    """Why this machine, or the one that is lowered for, cannot run the kernels."""
    found = capability()
    if found is None:
        return f"the kernels need an NVIDIA GPU, the platform is {default_device().platform}"
    from_hopper = found >= (9, 0)
    needed = _JAX if from_hopper else _JAX_BEFORE_HOPPER
    text = ".".join(map(str, found))
    if found < (8, 0):
        return f"the kernels need compute capability 8.0 (Ampere) or later, this is {text}"
    if jax.__version_info__ < needed:
        version = ".".join(map(str, needed))
        return (
            f"the kernels need JAX {version} for compute capability {text} (Python 3.12 or later), "
            f"this is {jax.__version__}"
        )
    from lla.kernels.mosaic_gpu_mma.launch import SHARED_MEMORY

    if found not in SHARED_MEMORY:
        return f"the kernels do not know compute capability {text}"
    return None


def refuse_shape(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem` on any device, None if they can."""
    return refuse_for_kernels(problem, ("bfloat16", "float16"), _MAX_HEAD_DIM)


def _refuse_size(problem: Problem) -> str | None:
    """Why they cannot serve it on the device at hand."""
    from lla.kernels.mosaic_gpu_mma import configs

    dim = _padded_dim(problem, configs.HEAD_DIMS)
    if configs.fits(dim, capability()):
        return None
    text = ".".join(map(str, capability()))
    return (
        f"the kernels for head dimension {dim} do not fit into the shared memory of compute "
        f"capability {text}"
    )


def _padded_dim(problem: Problem, head_dims: tuple[int, ...]) -> int:
    widest = max(problem.query.shape[-1], problem.value.shape[-1])
    return next(d for d in head_dims if d >= widest)


def capability() -> tuple[int, int] | None:
    """The compute capability that is computed or lowered for, None without an NVIDIA GPU."""
    target = compat.target_capability()
    if target is not None:
        return target
    device = default_device()
    text = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(text, str):
        return None
    parts = text.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return None  # AMD's are named gfx...
    return int(parts[0]), int(parts[1])


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
    interpret: Any

    @property
    def precise(self) -> bool:
        """Whether any tile may need two parts."""
        return self.forward.bf16x2 or self.precise_forward is not None

    @property
    def solve_config(self):
        """The configuration of both solves."""
        return self.configs.solve_bf16x2 if self.precise else self.configs.solve


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


def mosaic_gpu_portable(
    problem: Problem,
    *,
    target: tuple[int, int] | None = None,
    configs: Any = None,
    interpret: Any = None,
) -> tuple[jax.Array, Stats]:
    """Output ``[B, T, K, G, Hv]`` in the query's dtype, and the statistics.

    Args:
      problem: one that `refuse_shape` accepts.
      target: the compute capability; None takes that of `capability`.
      configs: an `lla.kernels.mosaic_gpu_mma.configs.Configs`; None takes the chosen one.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    from lla.kernels.mosaic_gpu import launch, tile
    from lla.kernels.mosaic_gpu_mma import configs as table

    packed = _one_position(problem)
    if packed is not None:
        out, stats = mosaic_gpu_portable(
            packed, target=target, configs=configs, interpret=interpret
        )
        restore = functools.partial(jnp.swapaxes, axis1=1, axis2=3)
        return restore(out), Stats(*map(restore, stats))
    b, t, k, g, h = problem.query.shape
    s, hv = problem.key.shape[1], problem.value.shape[-1]
    dim = _padded_dim(problem, table.HEAD_DIMS)
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
    forward, backward = mosaic_gpu.iterations(problem, precise=False)
    precise_forward = precise_backward = marked = None
    if mosaic_gpu.choose_by_tile(problem):
        precise_forward, precise_backward = mosaic_gpu.iterations(problem, precise=True)
        marked = mosaic_gpu.mark_small(
            operands.ridge, operands.key, masking.numbers, mask.is_causal, h
        )
    if configs is None:
        configs = table.choose(dim, capability() if target is None else target)
    spec = _Spec(
        member=problem.member,
        shape=launch.Shape(b, padded_t, padded_s, k, g, dim, problem.query.dtype),
        mask=tile.MaskSpec(mask.is_causal, mask.window, segments[0] is not None),
        configs=configs,
        forward=forward,
        backward=backward,
        precise_forward=precise_forward,
        precise_backward=precise_backward,
        split=(problem.static_ridge or 0) < _SPLIT_BELOW or forward.bf16x2,
        interpret=interpret,
    )
    leaves, tree = jax.tree.flatten((operands, (masking, marked)))
    operands, tiles = jax.tree.unflatten(tree, match_varying(*leaves))
    out, stats = _attend(spec, operands, tiles)

    def restore(array):  # [B, N, T] -> [B, T, K, G]
        return jnp.swapaxes(array[:, :, :t], 1, 2).reshape(b, t, k, g)

    return out[:, :t, :, :hv].reshape(b, t, k, g, hv), Stats(*(restore(a) for a in stats))


def _one_position(problem: Problem) -> Problem | None:
    """A problem with one query position, with the heads that share keys as its positions.

    They see the same keys, so that one program instance reads them for all of these heads. None
    where that is nothing to gain, or where the mask counts from the position.
    """
    _, t, _, g, _ = problem.query.shape
    mask, s = problem.mask, problem.key.shape[1]
    if t > 1 or g == 1 or mask.window is not None or mask.query_segments is not None:
        return None
    lengths = mask.lengths
    if mask.is_causal:
        offset = 0 if mask.offset is None else mask.offset
        visible = jnp.broadcast_to(jnp.clip(offset + 1, 0, s), problem.key.shape[:1])
        lengths = visible if lengths is None else jnp.minimum(lengths, visible)
    mask = dataclasses.replace(mask, is_causal=False, offset=None, lengths=lengths)
    names = ("query", "probe", "ridge", "scale")  # [B, 1, K, G, ...] to [B, G, K, 1, ...]
    arrays = {name: getattr(problem, name) for name in names}
    arrays = {n: None if a is None else jnp.swapaxes(a, 1, 3) for n, a in arrays.items()}
    return dataclasses.replace(problem, mask=mask, **arrays)


# ---------------------------------------------------------------------------------------------
# Differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, operands: _Operands, tiles) -> tuple[jax.Array, Stats]:
    saved, stats = _results(spec, operands, *tiles)
    return saved.out, stats


def _attend_fwd(spec: _Spec, operands: _Operands, tiles):
    saved, stats = _results(spec, operands, *tiles)
    names = (RESIDUAL_NAMES[0], RESIDUAL_NAMES[1], *[RESIDUAL_NAMES[2]] * 4, RESIDUAL_NAMES[3])
    saved = _Saved(
        *(None if a is None else checkpoint_name(a, n) for a, n in zip(saved, names, strict=True))
    )
    return (saved.out, stats), (operands, tiles, saved)


def _attend_bwd(spec: _Spec, residuals, cotangents):
    operands, tiles, saved = residuals
    return _gradients(spec, operands, *tiles, saved, cotangents[0]), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec: _Spec, operands: _Operands, masking, marked) -> tuple[_Saved, Stats]:
    from lla.kernels.mosaic_gpu.attend import Solved
    from lla.kernels.mosaic_gpu.tile import LN2
    from lla.kernels.mosaic_gpu_mma import attend as attend_kernel
    from lla.kernels.mosaic_gpu_mma import solve as solve_kernel

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
        solution = solve_kernel.solve(
            spec.shape, spec.mask, spec.solve_config, spec.forward, query, key, scale, ridge,
            masking, override=_override(spec.precise_forward, marked), interpret=spec.interpret,
        )  # fmt: skip
        solved = Solved(
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


def _override(iteration, marked):
    from lla.kernels.mosaic_gpu.solve import TileOverride

    return None if iteration is None else TileOverride(iteration, marked)


def _backward(
    spec: _Spec, operands: _Operands, masking, marked, saved: _Saved, cotangent
) -> _Operands:
    from lla.kernels.mosaic_gpu.gradients import Directions, Rows
    from lla.kernels.mosaic_gpu.solve import Adjoint, CGOptions
    from lla.kernels.mosaic_gpu_mma import gradients
    from lla.kernels.mosaic_gpu_mma import solve as solve_kernel

    query, key, value, probe, ridge, scale = operands
    f32 = jnp.float32
    delta = (cotangent.astype(f32) * saved.out.astype(f32)).sum(-1)
    delta = jnp.swapaxes(delta, 1, 2)
    directions = Directions()
    cotangent_mean, d_probe, d_ridge = delta, None, None
    solution = probe_square = None
    if spec.member == "lla":
        solution = saved.high.astype(f32) + saved.low.astype(f32)
        probe_square = jnp.swapaxes(jnp.square(solution).sum(-1), 1, 2)
    if spec.member != "softmax":
        target = Adjoint(value, cotangent, saved.log_sum_exp, delta, saved.key_mean, probe_square)
        iteration = spec.backward if spec.member == "lla" else CGOptions(None, 0)
        adjoint = solve_kernel.solve(
            spec.shape, spec.mask, spec.solve_config, iteration, query, key, scale, ridge,
            masking, target, _override(spec.precise_backward, marked), interpret=spec.interpret,
        )  # fmt: skip
        cotangent_mean = adjoint.cotangent_mean
        if spec.member == "lla":
            full_mean = cotangent_mean + adjoint.shift
            directions = Directions(
                saved.high, saved.shift_high, adjoint.high, adjoint.low, saved.key_mean
            )
            cotangent_mean = cotangent_mean + adjoint.shift_high
            d_ridge = ((adjoint.high.astype(f32) + adjoint.low.astype(f32)) * solution).sum(-1)
            d_ridge = jnp.swapaxes(d_ridge, 1, 2)
        else:
            directions = Directions(
                probe=-probe, probe_shift=saved.shift_high, key_mean=adjoint.key_mean
            )
            d_probe = (adjoint.high.astype(f32) + adjoint.low.astype(f32)).astype(probe.dtype)
    rows = Rows(scale, saved.log_sum_exp, cotangent_mean)
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


_results = again.refuse_derivative(_forward, NAME)
_gradients = again.refuse_derivative(_backward, NAME)
