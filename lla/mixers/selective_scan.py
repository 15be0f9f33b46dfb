"""The selective scan of Mamba (S6): a diagonal state space model with input-dependent steps.

Per token and channel, with input x, step size Delta >= 0, and vectors B, C that all channels share,

    h = exp(Delta A) h + Delta B x;  y = C . h                         h: [N], h = 0 at the start

where A <= 0 is a vector of N rates for each channel (Mamba, arXiv 2312.00752; as in its published
code, A is discretised exactly and B by Euler's rule).

`"recurrent"`, the reference, is a scan over tokens. `"parallel"` runs an associative scan over the
tokens of each chunk in turn: maps h -> a h + b, as pairs (a, b), compose to maps of the same kind.
All a are products of numbers in [0, 1]. The states of all tokens are held for one chunk at a time,
in the backward pass as well; chunks of the recurrent form have about the square root of the length.
On a Hopper GPU there are kernels for bfloat16 inputs (`lla.mixers.scan_kernel`).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from lla.mixers import scan_kernel
from lla.mixers.chunks import check_form, start_state
from lla.numerics import compute_dtype
from lla.ops import segments

_einsum = partial(jnp.einsum, precision="highest")


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    form: str = "parallel",
    chunk: int = 32,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Outputs of the selective scan of Mamba (S6, arXiv 2312.00752).

    Per token and channel ``h = exp(delta a) h + delta b x; y = c . h``.

    Differentiable in all arrays and in `state`, also through the returned state. Where a
    kernel runs, in reverse mode only; ``form="recurrent"`` has both modes.

    Args:
      x: ``[B, T, D]``, one input per channel.
      delta: ``[B, T, D]``, step sizes, >= 0.
      a: ``[D, N]``, rates, <= 0.
      b, c: ``[B, T, N]``, into and out of the state.
      state: ``[B, D, N]``, the state before the first token, of any dtype; None for zero.
      segment_ids: int ``[B, T]``, of packed sequences: the state is reset before a token whose id
        differs from the one before. The first token continues from `state`. None for one sequence.
      form: ``"parallel"`` or ``"recurrent"``.
      chunk: tokens per chunk of the parallel form, which holds some arrays ``[B, chunk, D, N]``.
      return_state: also return the state after the last token.

    Returns:
      ``[B, T, D]`` in the dtype of `x`, or a pair with the state ``[B, D, N]``. States, gates and
      intermediate results are float32 (float64 for float64 inputs).

    Raises:
      ValueError: for shapes that do not match, an unknown form, a chunk below 1, or `segment_ids`
        that are not integers.
    """
    check_form(form, chunk)
    if x.ndim != 3 or delta.shape != x.shape or 0 in x.shape:
        raise ValueError(
            f"x and delta must both be [B, T, D] and not empty, got {x.shape} and {delta.shape}."
        )
    batch, length, channels = x.shape
    if a.ndim != 2 or a.shape[0] != channels:
        raise ValueError(f"a must be [D, N] with the D of x {x.shape}, got {a.shape}.")
    for name, array in (("b", b), ("c", c)):
        if array.shape != (batch, length, a.shape[1]):
            raise ValueError(
                f"{name} must have shape {(batch, length, a.shape[1])}, got {array.shape}."
            )
    dtype = compute_dtype(x.dtype)
    state = start_state(state, (batch, *a.shape), dtype)
    # The kernel has no segments: where a rate is zero, no step size can reset the state.
    if form == "parallel" and segment_ids is None and scan_kernel.serves(x, a):
        wide = (array.astype(dtype) for array in (delta, b, c))
        y, state = scan_kernel.run(state, a.astype(dtype), x, *wide)
        return (y, state) if return_state else y
    arrays = tuple(array.astype(dtype) for array in (x, delta, b, c))
    if segment_ids is not None:
        starts = segments.starts(segment_ids, (batch, length))
        arrays = (*arrays, starts[..., None].astype(dtype))
    compute = _recurrent if form == "recurrent" else partial(_parallel, chunk=min(chunk, length))
    y, state = compute(state, a.astype(dtype), *arrays)
    y = y.astype(x.dtype)
    return (y, state) if return_state else y


def selective_scan_step(
    state: jax.Array,
    a: jax.Array,
    x: jax.Array,
    delta: jax.Array,
    b: jax.Array,
    c: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token of `selective_scan`; all arrays in the dtype of the state, float32 or float64.

    Differentiable in all of them, in forward and reverse mode.

    Args:
      state: ``[B, D, N]``.
      a: ``[D, N]``.
      x, delta: ``[B, D]``.
      b, c: ``[B, N]``.

    Returns:
      The new state and the output ``[B, D]``.
    """
    decay, inflow = _discretise(a, x, delta, b)
    state = decay * state + inflow
    return state, _einsum("bdn,bn->bd", state, c)


def _discretise(a, x, delta, b):
    """exp(Delta A) and Delta B x, both ``[..., D, N]``, from ``[..., D]`` and ``[..., N]``."""
    leading = (1,) * (x.ndim - 1)
    decay = jnp.exp(delta[..., None] * a.reshape(*leading, *a.shape))
    return decay, (delta * x)[..., None] * b[..., None, :]


def _recurrent(state, a, *arrays):
    def step(state, token):
        x, delta, b, c, *first = token
        if first:  # ``[B, 1]``, 1 for the first token of a segment
            state = segments.cleared(state, first[0][:, 0] > 0)
        return selective_scan_step(state, a, x, delta, b, c)

    def advance(state, block):
        # Unrolled, since on a GPU the loop itself makes up a third of the kernels.
        by_time = tuple(jnp.moveaxis(array, 1, 0) for array in block)
        state, y = jax.lax.scan(step, state, by_time, unroll=4)
        return state, jnp.moveaxis(y, 0, 1)

    return _by_chunks(advance, state, arrays, math.isqrt(arrays[0].shape[1] - 1) + 1)


def _parallel(state, a, *arrays, chunk):
    def advance(state, block):
        x, delta, b, c, *first = block
        decay, inflow = _discretise(a, x, delta, b)
        if first:  # ``[B, C, 1]``, 1 for the first token of a segment
            decay = (1 - first[0][..., None]) * decay
        decay, inflow = jax.lax.associative_scan(_compose, (decay, inflow), axis=1)
        states = decay * state[:, None] + inflow
        return states[:, -1], _einsum("bcdn,bcn->bcd", states, c)

    return _by_chunks(advance, state, arrays, chunk)


def _by_chunks(advance, state, arrays, chunk):
    """``advance(state, block) -> (state, y)`` over blocks of `chunk` tokens of `arrays`.

    The backward pass stores only the states before blocks and recomputes the others.
    """
    batch, length, channels = arrays[0].shape
    count = -(-length // chunk)

    def split(array):
        # Steps of zero after the end do not change the state.
        array = jnp.pad(array, [(0, 0), (0, count * chunk - length), (0, 0)])
        return jnp.moveaxis(array.reshape(batch, count, chunk, -1), 1, 0)

    blocks = tuple(split(array) for array in arrays)
    state, y = jax.lax.scan(jax.checkpoint(advance), state, blocks)
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * chunk, channels)[:, :length], state


def _compose(first, second):
    """h -> a2 (a1 h + b1) + b2."""
    return first[0] * second[0], second[0] * first[1] + second[1]
