"""Calls of the TPU kernels, to interpret or to lower."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lla.kernels.mosaic_tpu.launch import BlockSizes
from lla.ops.mosaic_tpu.backend import attend, attend_shielded
from lla.ops.problem import make_problem
from tests.ops.harness import DIFFERENTIABLE, OPTIMISED, Result

# Small tiles, so that short sequences have more than one.
SMALL = BlockSizes(rows=128, keys=128, own_keys=128)


@functools.cache
def compiled(mechanism: str, static: tuple, solver, interpret, blocks, optimised: bool):
    """Jitted ``(differentiable, options, cotangent) -> (out, stats, gradients)``."""

    def call(differentiable, options, cotangent):
        def forward(arrays):
            problem = make_problem(mechanism, **arrays, **options, **dict(static), solver=solver)
            out, stats = attend(problem, blocks=blocks, interpret=interpret)
            return problem.restore(out), type(stats)(*map(problem.restore, stats))

        out, pullback, stats = jax.vjp(forward, differentiable, has_aux=True)
        return out, stats, pullback(cotangent)[0]

    return jax.jit(call, compiler_options=OPTIMISED if optimised else None)


def evaluate(
    inputs: dict[str, Any],
    *,
    mechanism: str = "lla",
    dtype: str = "float32",
    static_ridge: float | None = None,
    solver=None,
    interpret: Any = True,
    blocks: BlockSizes | None = SMALL,
    optimised: bool = False,
    **options,
) -> Result:
    """Like `tests.ops.harness.evaluate`, with the interpreted kernels.

    `static_ridge` is a ridge that is known when the kernels are traced; it has no gradient.
    """
    names = [n for n in DIFFERENTIABLE[mechanism] if n != "ridge" or static_ridge is None]
    arrays = {
        name: jnp.asarray(inputs[name], np.float32 if name in ("ridge", "scale") else dtype)
        for name in names
    }
    static = {n: o for n, o in options.items() if n in ("is_causal", "local_window_size")}
    traced = {n: o for n, o in options.items() if n not in static}
    if static_ridge is not None and mechanism == "lla":
        static["ridge"] = static_ridge
    function = compiled(
        mechanism, tuple(sorted(static.items())), solver, interpret, blocks, optimised
    )  # fmt: skip
    result = function(arrays, traced, jnp.asarray(inputs["cotangent"], dtype))
    return Result(*jax.tree.map(np.asarray, result))


# ---------------------------------------------------------------------------------------------
# To lower or to compile

MASKS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"local_window_size": (100, 0)},
    "segments": {"segments": True},
    "lengths": {"lengths": True},
}


def program(
    mechanism, head_dim, *, value_dim=None, ridge=None, dtype=jnp.bfloat16, mask="causal",
    queries=600, keys=None, heads=4, kv_heads=2, batch=2, forward_only=False, sharding=None,
):  # fmt: skip
    """A function that runs the forward (and backward) pass, and its abstract arguments."""
    keys, value_dim = keys or queries, value_dim or head_dim
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    arrays = {
        "query": struct((batch, queries, heads, head_dim), dtype),
        "key": struct((batch, keys, kv_heads, head_dim), dtype),
        "value": struct((batch, keys, kv_heads, value_dim), dtype),
    }
    if mechanism == "parallax":
        arrays["probe"] = arrays["query"]
    options = dict(MASKS[mask])
    if options.pop("segments", False):
        options["segment_ids"] = tuple(np.zeros((batch, n), np.int32) for n in (queries, keys))
    if options.pop("lengths", False):
        options["key_value_seq_lengths"] = np.arange(1, batch + 1, dtype=np.int32) * keys // batch
    if mechanism == "lla" and ridge is None:
        arrays["ridge"] = struct((batch, queries, heads), jnp.float32)
    elif mechanism == "lla":
        options["ridge"] = ridge

    def forward(arrays):
        problem = make_problem(mechanism, **arrays, **options)
        return problem.restore(attend_shielded(problem)[0])

    def both(arrays, cotangent):
        out, pullback = jax.vjp(forward, arrays)
        return out, pullback(cotangent)

    cotangent = struct((batch, queries, heads, value_dim), dtype)
    return (forward, (arrays,)) if forward_only else (both, (arrays, cotangent))
