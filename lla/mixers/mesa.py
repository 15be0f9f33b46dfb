"""The mesa layer: for every token, ridge regression of all values on all keys so far.

Per token and head, with key k, value v, query q, weight beta, gate g in (0, 1] and a positive
diagonal Lambda (MesaNet, arXiv 2506.05233),

    H = g H + beta k k^T;  G = g G + beta k v^T;  o = G^T (H + Lambda)^-1 q

`"recurrent"` is a scan over tokens with the state (H, G). `"parallel"` forms (H, G) only between
chunks. With g_ij the product of the gates after j up to i, g_i0 that of all gates of the chunk up
to i, and H0, G0 the state before the chunk, products with H and G are a linear attention:

    (H_i + Lambda) x = g_i0 H0 x + sum_{j <= i} g_ij beta_j k_j (k_j.x) + Lambda x
    o_i = g_i0 G0^T x_i + sum_{j <= i} g_ij beta_j v_j (k_j.x_i),   (H_i + Lambda) x_i = q_i

so conjugate gradients solve for all tokens at once by matrix products, and no H_i is formed. On a
Hopper GPU a kernel does so for bfloat16 sequences (`lla.kernels.mosaic_gpu.mesa`).

Gradients use implicit differentiation (`jax.lax.custom_linear_solve`): the derivative of
x = (H + Lambda)^-1 q needs one more solve with the same symmetric matrix. It is exact up to the
tolerance of the solves and stores only x. Differentiating the iterations would store every iterate
and be less accurate, since the iterates depend on the keys through every step size.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lla import numerics
from lla.compat import match_varying
from lla.mixers import chunks, hopper, segments
from lla.mixers.chunks import check_form
from lla.mixers.delta_rule import check_sequences
from lla.numerics import compute_dtype, nan_where
from lla.ops import mosaic_gpu

_einsum = partial(jnp.einsum, precision="highest")

# Tokens whose H the exact parallel solver forms at once.
_EXACT_BLOCK = 16


class MesaState(NamedTuple):
    """Statistics of the tokens so far, float32 or better.

    Attributes:
      moment: H, ``[B, N, H, H]``.
      target: G, ``[B, N, H, Hv]``.
    """

    moment: jax.Array
    target: jax.Array


def mesa(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    ridge: jax.Array,
    state: MesaState | None = None,
    segment_ids: jax.Array | None = None,
    form: str = "parallel",
    solver: str = "cg",
    max_iters: int = 30,
    tol: float = 1e-6,
    chunk: int = 64,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, MesaState]:
    """Outputs of the mesa layer (MesaNet, arXiv 2506.05233).

    Per token and head ``H = g H + beta k k^T; G = g G + beta k v^T; o = G^T (H + Lambda)^-1 q``
    with ``g = exp(log_decay)``.

    Differentiable in all arrays and in `state`, also through the returned state, by implicit
    differentiation: gradients are exact up to the tolerance of the solves.

    Args:
      query, key: ``[B, T, N, H]``. They are not normalised here.
      value: ``[B, T, N, Hv]``.
      beta: ``[B, T, N]``, weight of each pair, >= 0.
      log_decay: ``[B, T, N]``, logarithm of the gates, finite and <= 0; None for no decay.
      ridge: ``[N, H]``, the diagonal Lambda, > 0.
      state: the state before the first token, of any dtype; None for zero.
      segment_ids: int ``[B, T]``, of packed sequences: the state is reset before a token whose id
        differs from the one before. The first token continues from `state`. None for one sequence.
      form: ``"parallel"`` or ``"recurrent"``.
      solver: ``"cg"``, conjugate gradients, or ``"exact"``, Cholesky factorisations, which form H
        for every token (16 at a time in the parallel form). The reference is
        ``form="recurrent", solver="exact"``.
      max_iters: the largest number of iterations of ``"cg"``; the paper takes 30. A token that
        reaches it keeps its last iterate. With unit keys and Lambda = 1, 15 give an error of 1e-4;
        keys that share a direction, without decay, take 30.
      tol: a token stops when its residual, in the norm of the preconditioner, is below `tol` times
        that of its query [ours]. The paper has a fixed number of iterations.
      chunk: tokens per chunk of the parallel form.
      return_state: also return the state after the last token.

    Returns:
      ``[B, T, N, Hv]`` in the dtype of `value`, or a pair with the `MesaState`. States, gates and
      intermediate results are float32 (float64 for float64 values).

    Raises:
      ValueError: for shapes that do not match, options outside their range, or `segment_ids` that
        are not integers.
    """
    check_sequences(query, key, value, beta, log_decay)
    log_decay = segments.gates(log_decay, segment_ids, value)
    check_form(form, chunk)
    batch, length, heads, dim = key.shape
    if ridge.shape != (heads, dim):
        raise ValueError(f"ridge must have shape {(heads, dim)}, got {ridge.shape}.")
    solve = make_solver(solver, max_iters, tol)
    dtype = compute_dtype(value.dtype)
    shapes = MesaState((batch, heads, dim, dim), (batch, heads, dim, value.shape[-1]))
    if state is None:
        state = MesaState(*(jnp.zeros(shape, dtype) for shape in shapes))
    elif (state[0].shape, state[1].shape) != shapes:
        raise ValueError(
            f"state must have shapes {shapes[0]} and {shapes[1]}, "
            f"got {state[0].shape} and {state[1].shape}."
        )
    if log_decay is None:
        log_decay = jnp.zeros_like(beta)
    state = MesaState(*(array.astype(dtype) for array in state))
    arrays = (array.astype(dtype) for array in (query, key, value, beta, log_decay))
    ridge = ridge.astype(dtype)
    if form == "recurrent":
        out, state = _recurrent(state, *arrays, ridge=ridge, solve=solve)
    else:
        options = dict(chunk=min(chunk, length), einsum=chunks.products(value.dtype))
        if isinstance(solve, _ConjugateGradients) and _kernels_serve(query, key, value, chunk):
            options["kernel"] = _KernelOptions()
        out, state = _parallel(state, *arrays, ridge=ridge, solve=solve, **options)
    out = out.astype(value.dtype)
    return (out, state) if return_state else out


def mesa_step(
    state: MesaState,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    *,
    ridge: jax.Array,
    solve,
) -> tuple[MesaState, jax.Array]:
    """One token of `mesa`; all arrays in the dtype of the state, float32 or float64.

    Differentiable in all of them as `mesa` is.

    Args:
      state: before the token.
      query, key: ``[B, N, H]``.
      value: ``[B, N, Hv]``.
      beta, log_decay: ``[B, N]``.
      ridge: ``[N, H]``.
      solve: from `make_solver`.

    Returns:
      The new state and the output ``[B, N, Hv]``.
    """
    decay = jnp.exp(log_decay)[..., None, None]
    weighted = beta[..., None] * key
    moment = decay * state.moment + _einsum("bnh,bng->bnhg", weighted, key)
    target = decay * state.target + _einsum("bnh,bnv->bnhv", weighted, value)
    solution = solve.dense(moment, jnp.broadcast_to(ridge[None], query.shape), query)
    return MesaState(moment, target), _einsum("bnhv,bnh->bnv", target, solution)


def make_solver(solver: str = "cg", max_iters: int = 30, tol: float = 1e-6):
    """The solver for `mesa_step`; arguments as in `mesa`.

    Raises:
      ValueError: for an unknown solver, `max_iters` below 1 or `tol` outside [0, 1).
    """
    if solver not in ("cg", "exact"):
        raise ValueError(f"solver must be 'cg' or 'exact', got {solver!r}.")
    if max_iters < 1:
        raise ValueError(f"max_iters must be at least 1, got {max_iters}.")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be in [0, 1), got {tol}.")
    return _Exact() if solver == "exact" else _ConjugateGradients(max_iters, tol)


class _Exact(NamedTuple):
    """Cholesky factorisation of every system, by matrix products (`lla.numerics.spd_inverse`).

    Not `jnp.linalg.cholesky`: on a CPU its LAPACK calls wait for threads of the pool that they run
    in, and two at once can deadlock.
    """

    def dense(self, moment, ridge, right):
        """(moment + diag(ridge))^-1 right for [..., H, H], [..., H] and [..., H]."""
        apply = partial(_apply, moment, ridge)

        def factorise(_, right):
            dim = right.shape[-1]
            eye = jnp.eye(dim, dtype=right.dtype).reshape((1,) * (right.ndim - 1) + (dim, dim))
            inverse, positive = numerics.spd_inverse(moment + ridge[..., None] * eye, "highest")
            solution = _einsum("...hg,...g->...h", inverse, right)
            # NaN, rather than a wrong solution, for systems that are not positive definite.
            return nan_where(~positive, solution)

        return jax.lax.custom_linear_solve(apply, right, factorise, symmetric=True)


class _ConjugateGradients(NamedTuple):
    """Conjugate gradients for every system, preconditioned by its diagonal.

    The paper starts from ``q / diag(H + Lambda)``, without a preconditioner. Starting from zero
    with this preconditioner, the first step is the best multiple of that, and a Lambda that differs
    between channels takes no more iterations [ours].
    """

    max_iters: int
    tol: float

    def dense(self, moment, ridge, right):
        """(moment + diag(ridge))^-1 right for [..., H, H], [..., H] and [..., H]."""
        diagonal = jnp.diagonal(moment, axis1=-2, axis2=-1) + ridge
        return self(partial(_apply, moment, ridge), diagonal, right)

    def __call__(self, apply, diagonal, right, iterate=None):
        """Solves ``apply(x) = right``, one system for each row ``[..., H]``.

        ``iterate(right, inverse=...)`` replaces the iterations below, if given.
        """
        inverse = jax.lax.stop_gradient(1 / diagonal)
        run = partial(self._iterate, inverse=inverse)
        if iterate is not None:
            run = lambda _, right: iterate(right, inverse=inverse)  # noqa: E731
        return jax.lax.custom_linear_solve(apply, right, run, symmetric=True)

    def _iterate(self, apply, right, *, inverse):
        def product(x, y):
            return jnp.sum(x * y, axis=-1, keepdims=True)

        def unfinished(carry):
            count, _, _, _, square = carry
            return (count < self.max_iters) & jnp.any(square > bound)

        def advance(carry):
            count, x, residual, direction, square = carry
            image = apply(direction)
            curvature = product(direction, image)
            # Rows that are finished, or whose curvature has underflowed, do not change.
            active = (square > bound) & (curvature > 0)
            step = jnp.where(active, square / jnp.where(active, curvature, 1), 0)
            x = x + step * direction
            residual = residual - step * image
            scaled = inverse * residual
            new = product(residual, scaled)
            ratio = jnp.where(active, new / jnp.where(active, square, 1), 0)
            direction = scaled + ratio * direction
            return count + 1, x, residual, direction, jnp.where(active, new, 0)

        scaled = inverse * right
        square = product(right, scaled)
        bound = self.tol**2 * square
        start = (0, jnp.zeros_like(right), right, scaled, square)
        return jax.lax.while_loop(unfinished, advance, start)[1]


def _apply(moment, ridge, x):
    return _einsum("...hg,...g->...h", moment, x) + ridge * x


def _recurrent(state, *arrays, ridge, solve):
    def advance(state, token):
        return mesa_step(state, *token, ridge=ridge, solve=solve)

    by_time = tuple(jnp.moveaxis(array, 1, 0) for array in arrays)
    state, out = jax.lax.scan(advance, state, by_time)
    return jnp.moveaxis(out, 0, 1), state


def _parallel(
    state, query, key, value, beta, log_decay, *, ridge, solve, chunk, einsum, kernel=None
):
    length, dim = query.shape[1], key.shape[-1]
    exact = isinstance(solve, _Exact)
    if exact:
        query = _solve_exactly(state.moment, query, key, beta, log_decay, ridge, solve)

    q, k, v, beta, log_decay = (
        chunks.split(array, chunk) for array in (query, key, value, beta, log_decay)
    )
    sums = chunks.running_sums(log_decay)
    decays = chunks.decays_of(sums)
    weighted = beta[..., None] * k

    # The states before every chunk, H and G side by side.
    def advance(state, block):
        total, contribution = block
        return total[..., None, None] * state + contribution, state

    pairs = jnp.concatenate([k, v], axis=-1)
    contribution = einsum("...ih,...iv->...hv", decays.end[..., None] * weighted, pairs)
    joined, before = jax.lax.scan(
        advance, jnp.concatenate(state, axis=-1), (decays.start[..., -1], contribution)
    )
    moment, target = before[..., :dim], before[..., dim:]
    start = decays.start[..., None]
    pair = decays.pair * beta[..., None, :]

    def attend(x, state, value):
        scores = einsum("...ih,...jh->...ij", x, k) * pair
        incoming = einsum("...ih,...hv->...iv", start * x, state)
        return incoming + einsum("...ij,...jv->...iv", scores, value)

    if exact:
        solution = q
    else:
        diagonal = start * jnp.diagonal(moment, axis1=-2, axis2=-1)[..., None, :]
        diagonal = diagonal + einsum("...ij,...jh->...ih", pair, k * k)
        lam = ridge[None, None, :, None, :]
        iterate = None
        if kernel is not None:
            chunk_gates = (beta, decays.start, sums)
            iterate = partial(_iterate_in_kernel, solve, kernel, moment, k, chunk_gates, ridge)
        solution = solve(lambda x: attend(x, moment, k) + lam * x, diagonal + lam, q, iterate)
    out = chunks.merge(attend(solution, target, v), length)
    return out, MesaState(joined[..., :dim], joined[..., dim:])


class _KernelOptions(NamedTuple):
    """Options of the kernels: parameters of Pallas's GPU interpreter, or None to compile."""

    interpret: Any = None


def _kernels_serve(query, key, value, chunk: int) -> bool:
    """Whether the kernels for Hopper solve for sequences like these on this machine."""
    size = 64
    return (
        query.dtype == key.dtype == value.dtype == jnp.bfloat16
        and key.shape[-1] == size
        and key.shape[1] >= size
        and chunk == size
        and hopper.allowed("mesa", size)
        and mosaic_gpu.refuse_machine() is None
    )


def _iterate_in_kernel(solve, kernel, moment, k, gates, ridge, right, *, inverse):
    """x of all chunks ``[M, B, N, C, H]`` by `lla.kernels.mosaic_gpu.mesa`."""
    from lla.kernels.mosaic_gpu import mesa as kernels

    beta, start, sums = gates
    flat = partial(jax.lax.collapse, start_dimension=0, stop_dimension=3)
    arrays = (moment, k.astype(jnp.bfloat16), beta, sums, start)
    arrays = match_varying(*jax.tree.leaves((*arrays, ridge, inverse, right)))
    moment, k, beta, *parts, start, ridge, inverse, right = arrays
    found = kernels.solve(
        flat(moment),
        flat(k),
        flat(beta),
        tuple(flat(part) for part in parts),
        flat(start),
        ridge,
        flat(inverse),
        flat(right),
        max_iters=solve.max_iters,
        tol=solve.tol,
        interpret=kernel.interpret,
    )
    return found.reshape(right.shape)


def _solve_exactly(moment, query, key, beta, log_decay, ridge, solve):
    """x [B, T, N, H] with (H + Lambda) x = query at every token, from the moment before them."""
    length = query.shape[1]
    block = min(_EXACT_BLOCK, length)
    arrays = (chunks.split(array, block) for array in (query, key, beta, log_decay))

    @jax.checkpoint  # or the backward pass would hold H for every token
    def advance(moment, arrays):
        q, k, beta, log_decay = arrays
        decays = chunks.decays(log_decay)
        pairs = (beta[..., None] * k)[..., :, None] * k[..., None, :]
        moments = decays.start[..., None, None] * moment[..., None, :, :]
        moments = moments + _einsum("bnij,bnjhg->bnihg", decays.pair, pairs)
        lam = jnp.broadcast_to(ridge[None, :, None, :], q.shape)
        return moments[..., -1, :, :], solve.dense(moments, lam, q)

    _, solution = jax.lax.scan(advance, moment, tuple(arrays))
    return chunks.merge(solution, length)
