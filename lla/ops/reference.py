"""The exact dense form: every sum over the keys written out, one query at a time.

This is the definition that everything else is tested against. It materialises the centred keys of
every query (memory ``T * S * H`` per head), works in any precision up to float64, and can be
differentiated in forward and reverse mode, any number of times.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lla.kernels.tiles import NOTHING
from lla.ops.masks import dense_mask
from lla.ops.problem import Problem
from lla.ops.solver import Stats


def attend_one_query(
    mechanism, query, probe, key, value, ridge, scale, valid, bias=None, *, soft_cap=None
):
    """One query of the family; section 2 of the derivation in ``kernels/MATHEMATICS.md``.

    Args:
      mechanism: ``"softmax"``, ``"parallax"`` or ``"lla"``.
      query: ``[H]``.
      probe: ``[H]``, used by ``"parallax"`` only.
      key: ``[S, H]``.
      value: ``[S, Hv]``.
      ridge: scalar, used by ``"lla"`` only.
      scale: scalar.
      valid: bool ``[S]``.
      bias: ``[S]`` or None, added to the logits.
      soft_cap: None, or the bound of the logits after that.

    Returns:
      output ``[Hv]``, log-sum-exp and relative residual of the solve (scalars).
    """
    # Selected first: what the query does not see must not be multiplied, not even by zero.
    any_valid = valid.any()
    key, value = (jnp.where(valid[:, None], a, jnp.zeros_like(a)) for a in (key, value))
    query, probe = (jnp.where(any_valid, a, jnp.zeros_like(a)) for a in (query, probe))
    ridge, scale = (jnp.where(any_valid, a, jnp.ones_like(a)) for a in (ridge, scale))
    logits = scale * (key @ query)
    if bias is not None:
        logits = logits + jnp.where(valid, bias, jnp.zeros_like(bias))
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(valid, logits, NOTHING)
    largest = jnp.where(any_valid, jax.lax.stop_gradient(logits.max()), jnp.zeros_like(scale))
    weights = jnp.exp(logits - largest)
    total = jnp.where(any_valid, weights.sum(), jnp.ones_like(scale))
    weights = weights / total
    lse = jnp.where(any_valid, largest + jnp.log(total), NOTHING)
    residual = jnp.zeros_like(scale)
    if mechanism == "softmax":
        return weights @ value, lse, residual

    key_mean = weights @ key
    centred = jnp.where(valid[:, None], key - key_mean[None], jnp.zeros_like(key))
    if mechanism == "lla":
        covariance = (weights[:, None] * centred).T @ centred
        system = covariance + ridge * jnp.eye(query.size, dtype=query.dtype)
        target = jnp.where(any_valid, key_mean - query, jnp.zeros_like(query))
        probe = solve_positive_definite(system, target)
        norm = jnp.linalg.norm(jax.lax.stop_gradient(target))
        error = jnp.linalg.norm(jax.lax.stop_gradient(target - system @ probe))
        residual = jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), 0)
    return (weights * (1 - centred @ probe)) @ value, lse, residual


def solve_positive_definite(matrix, target):
    """Solves ``matrix [H, H] @ x = target [H]`` by Gaussian elimination, any derivative included.

    Written out because the library calls behind `jnp.linalg.solve` can block each other for good
    on a CPU with few cores; see `lla.numerics`.
    """

    def eliminate(_, right_side):
        def step(k, rows):
            pivot_row = rows[k] / rows[k, k]
            others = jnp.where(jnp.arange(rows.shape[0]) == k, 0, rows[:, k]).astype(rows.dtype)
            rows = rows - others[:, None] * pivot_row[None]
            return rows.at[k].set(pivot_row)

        rows = jnp.concatenate([matrix, right_side[:, None]], axis=1)
        return jax.lax.fori_loop(0, rows.shape[0], step, rows)[:, -1]

    return jax.lax.custom_linear_solve(lambda x: matrix @ x, target, eliminate, symmetric=True)


def unsupported(problem: Problem) -> str | None:
    """Why it cannot serve `problem`, None if it can."""
    if problem.solver.num_iters is not None:
        return "it solves exactly and cannot honour Solver.num_iters"
    return None


def attend(problem: Problem, with_stats: bool = True) -> tuple[jax.Array, Stats]:
    """Output and statistics, always complete, in the layout of `Problem`."""
    del with_stats
    dtype = problem.compute_dtype
    b, t, n, _ = problem.query.shape
    _, s, k, _ = problem.key.shape
    g = problem.group

    def rows(array):  # [B, T, N, ...] -> [B, T, K, G, ...]
        return array.reshape(b, t, k, g, *array.shape[3:])

    def pairs(array):  # [B | 1, N | 1, T | 1, S | 1] -> [B, K, G, T, S]
        return jnp.broadcast_to(array, (b, n, t, s)).reshape(b, k, g, t, s)

    query = rows(problem.query.astype(dtype))
    probe = query if problem.probe is None else rows(problem.probe.astype(dtype))
    scale = rows(problem.by_row(problem.scale))
    ridge = scale if problem.ridge is None else rows(problem.by_row(problem.ridge))
    valid = pairs(dense_mask(problem.mask, b, t, s))
    bias = None if problem.bias is None else pairs(problem.bias.astype(dtype))

    def one_query(*arrays):
        return attend_one_query(problem.mechanism, *arrays, soft_cap=problem.soft_cap)

    # Axes left to map after each level: [T, G, K, B] from the inside out; keys belong to (B, K).
    per_token = jax.vmap(one_query, in_axes=(0, 0, None, None, 0, 0, 0, 0))
    per_head = jax.vmap(per_token, in_axes=(1, 1, None, None, 1, 1, 0, 0), out_axes=1)
    per_group = jax.vmap(per_head, in_axes=(1, 1, 1, 1, 1, 1, 0, 0), out_axes=1)
    per_sequence = jax.vmap(per_group)
    with jax.default_matmul_precision("highest"):
        out, lse, residual = per_sequence(
            query, probe, problem.key.astype(dtype), problem.value.astype(dtype), ridge,
            scale, valid, bias,
        )  # fmt: skip
    out, lse, residual = (a.reshape(b, t, n, *a.shape[4:]) for a in (out, lse, residual))
    stats = Stats(lse, jnp.zeros(lse.shape, jnp.int32), residual)
    return out.astype(problem.query.dtype), stats
