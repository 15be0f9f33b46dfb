"""The kernels for every NVIDIA GPU since Ampere behind the operator.

They compute what those for Hopper do, with products by mma.sync, and run in the same order; the
direct solver is left out. The kernels themselves are in `lla.kernels.mosaic_gpu_mma`, their design
in ``kernels/PORTABLE.md``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lla import compat
from lla.ops.mosaic_gpu import hopper
from lla.ops.problem import Problem, options_unsupported_by_kernels, unsupported_by_kernels
from lla.ops.shield import shielded
from lla.ops.solver import Stats

NAME = "mosaic_gpu_portable"
MEASURED: dict[tuple[int, int], int] = {(9, 0): 256}
"""Compute capabilities whose accuracy was checked in full, and up to which head dimension.

``implementation=None`` takes these kernels nowhere else.
"""

_FOLDER = "mosaic_gpu_mma"
_MAX_HEAD_DIM = 256
# The first versions that compile for Hopper and later, and for what was before.
_JAX, _JAX_BEFORE_HOPPER = (0, 11, 2), (0, 12)


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`, None if they can: on an untried card, too."""
    return (
        options_unsupported_by_kernels(problem)
        or refuse_machine()
        or unsupported_shape(problem)
        or _refuse_size(problem)
    )


def untried(problem: Problem) -> str | None:
    """That the kernels were not checked on such a card, None if they were.

    The problem is one that they can serve.
    """
    found = capability()
    widest = max(problem.query.shape[-1], problem.value.shape[-1])
    if widest <= MEASURED.get(found, 0):
        return None
    return (
        f"the portable kernels, which would serve this call, have never been checked on compute "
        f"capability {_text(found)} with head dimension {widest}; ask for them by name "
        f'(implementation="mosaic_gpu") after `lla-selftest --implementation mosaic_gpu`'
    )


def refuse_machine() -> str | None:
    """Why this machine, or the one that is lowered for, cannot run the kernels."""
    found = capability()
    if found is None:
        platform = compat.default_device().platform
        return f"the portable kernels need an NVIDIA GPU, the platform is {platform}"
    needed = _JAX if found >= (9, 0) else _JAX_BEFORE_HOPPER
    if found < (8, 0):
        return (
            f"the portable kernels need compute capability 8.0 (Ampere) or later, this is "
            f"{_text(found)}"
        )
    if jax.__version_info__ < needed:
        return (
            f"the portable kernels need JAX {_text(needed)} for compute capability {_text(found)} "
            f"(Python 3.12 or later), this is {jax.__version__}"
        )
    from lla.kernels.mosaic_gpu_mma.launch import SHARED_MEMORY

    if found not in SHARED_MEMORY:
        return f"the portable kernels do not know compute capability {_text(found)}"
    return None


def unsupported_shape(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem` on any device, None if they can."""
    return unsupported_by_kernels(problem, ("bfloat16", "float16"), _MAX_HEAD_DIM)


def _refuse_size(problem: Problem) -> str | None:
    """Why they cannot serve it on the device at hand."""
    from lla.kernels.mosaic_gpu_mma import configs

    dim, found = _padded_dim(problem), capability()
    if configs.fits(dim, found):
        return None
    return (
        f"the kernels for head dimension {dim} do not fit into the shared memory of compute "
        f"capability {_text(found)}"
    )


def _padded_dim(problem: Problem) -> int:
    from lla.kernels.mosaic_gpu_mma import configs

    widest = max(problem.query.shape[-1], problem.value.shape[-1])
    return next(d for d in configs.HEAD_DIMS if d >= widest)


def capability() -> tuple[int, int] | None:
    """The compute capability that is computed or lowered for, None without an NVIDIA GPU."""
    target = compat.target_capability()
    if target is not None:
        return target
    device = compat.default_device()
    text = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(text, str):
        return None
    parts = text.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return None  # AMD's are named gfx...
    return int(parts[0]), int(parts[1])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def attend_shielded(
    problem: Problem, *, target: tuple[int, int] | None = None, interpret: Any = None
) -> tuple[jax.Array, Stats]:
    """Output and statistics, always complete, in the layout of `Problem`.

    Hidden numbers and those that are not finite reach other rows; `attend` keeps them away.

    Args:
      problem: one that `unsupported_shape` accepts.
      target: the compute capability; None takes that of `capability`.
      interpret: parameters of Pallas's GPU interpreter, or None to compile.
    """
    from lla.kernels.mosaic_gpu_mma import configs

    chosen = configs.choose(_padded_dim(problem), capability() if target is None else target)
    if problem.mechanism == "parallax":
        chosen = dataclasses.replace(chosen, attend=chosen.attend_probed)
    options = {"configs": chosen, "interpret": interpret, "kernels": _FOLDER}
    packed = _heads_as_positions(problem)
    if packed is None:
        return hopper.attend_shielded(problem, **options)
    return jax.tree.map(
        lambda array: _to_heads(array, problem.key.shape[2]),
        hopper.attend_shielded(packed, **options),
    )


attend = shielded(attend_shielded)


def _heads_as_positions(problem: Problem) -> Problem | None:
    """A problem with one position, with the query heads that share keys as its positions.

    They see the same keys, which one program instance then reads for all of them. None where there
    is nothing to gain, or where the mask counts from the position.
    """
    b, t, n, _ = problem.query.shape
    _, s, k, _ = problem.key.shape
    mask = problem.mask
    if t > 1 or n == k or mask.window is not None or mask.query_segments is not None:
        return None
    lengths = mask.lengths
    if mask.is_causal:
        offset = 0 if mask.offset is None else mask.offset
        visible = jnp.broadcast_to(jnp.clip(offset + 1, 0, s), (b,))
        lengths = visible if lengths is None else jnp.minimum(lengths, visible)
    rows = {
        name: None if array is None else _to_positions(problem.by_row(array), k)
        for name, array in (("ridge", problem.ridge), ("scale", problem.scale))
    }
    return dataclasses.replace(
        problem,
        query=_to_positions(problem.query, k),
        probe=None if problem.probe is None else _to_positions(problem.probe, k),
        mask=dataclasses.replace(mask, is_causal=False, offset=None, lengths=lengths),
        **rows,
    )


def _to_positions(array, kv_heads: int):
    """``[B, 1, K G, ...] -> [B, G, K, ...]``."""
    b, _, n, *rest = array.shape
    return jnp.swapaxes(array.reshape(b, kv_heads, n // kv_heads, *rest), 1, 2)


def _to_heads(array, kv_heads: int):
    """``[B, G, K, ...] -> [B, 1, K G, ...]``."""
    b, g, _, *rest = array.shape
    return jnp.swapaxes(array, 1, 2).reshape(b, 1, kv_heads * g, *rest)
