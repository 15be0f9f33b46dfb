"""Chunks of a sequence, and decays inside a chunk: shared by chunkwise-parallel recurrences.

Arrays are cut from ``[B, T, N, ...]`` into ``[M, B, N, C, ...]``: M chunks of C tokens, the chunk
first so that `jax.lax.scan` runs over it. Zeros fill the last chunk. A recurrence that multiplies
keys or step sizes by what enters the state is not changed by tokens of zeros behind its end.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Decays(NamedTuple):
    """Products of the gates of one head between positions of a chunk, all in [0, 1].

    Attributes:
      pair: ``[..., C, C]``: from position j (columns) to i (rows), the gates of j+1, ..., i; 1 on
        the diagonal, 0 above it.
      start: ``[..., C]``: from the state before the chunk to i, the gates of all positions up to i.
      end: ``[..., C]``: from i to the end of the chunk.
    """

    pair: jax.Array
    start: jax.Array
    end: jax.Array


def products(dtype):
    """`jnp.einsum` with float32 sums as exact as sequences of `dtype` deserve.

    Float32 and float64 sequences get exact products. Where sequences have 16 bits, operands of
    float32 are rounded to the 11 bits of TF32 on a GPU, or split into three parts of 8 bits on a
    TPU: their errors, 2^-12 each, are an eighth of those of a sequence rounded to bfloat16. A CPU
    computes in float32 anyway.
    """
    return partial(jnp.einsum, precision="high" if jnp.dtype(dtype).itemsize < 4 else "highest")


def check_form(form: str, chunk: int) -> None:
    """Raises ValueError unless `form` names a way to compute a recurrence and `chunk` is >= 1."""
    if form not in ("parallel", "recurrent"):
        raise ValueError(f"form must be 'parallel' or 'recurrent', got {form!r}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")


def form_of_piece(form: str, length: int) -> str:
    """How to compute the next `length` tokens: one alone is a step, whatever the form."""
    return "recurrent" if length == 1 else form


def start_state(state: jax.Array | None, shape: tuple[int, ...], dtype) -> jax.Array:
    """`state` in `dtype`, or zeros for None; ValueError unless it has `shape`."""
    if state is None:
        return jnp.zeros(shape, dtype)
    if state.shape != shape:
        raise ValueError(f"state must have shape {shape}, got {state.shape}.")
    return state.astype(dtype)


def split(array: jax.Array, chunk: int) -> jax.Array:
    """``[B, T, N, ...] -> [M, B, N, C, ...]`` with C = chunk and zeros behind T."""
    batch, length, heads, *rest = array.shape
    chunks = -(-length // chunk)
    pad = [(0, 0)] * array.ndim
    pad[1] = (0, chunks * chunk - length)
    array = jnp.pad(array, pad).reshape(batch, chunks, chunk, heads, *rest)
    return jnp.moveaxis(array, (1, 3), (0, 2))


def merge(array: jax.Array, length: int) -> jax.Array:
    """``[M, B, N, C, H] -> [B, length, N, H]``: the inverse of `split`."""
    chunks, batch, heads, chunk, dim = array.shape
    array = jnp.moveaxis(array, (0, 2), (1, 3))
    return array.reshape(batch, chunks * chunk, heads, dim)[:, :length]


def decays(log_decay: jax.Array) -> Decays:
    """Decays of a chunk from the logarithms of its gates, ``[..., C]``, finite and <= 0.

    Every exponent is a sum of the logarithms between two positions and nothing else. Differences of
    running sums would be cheaper and lose digits: behind a few strong decays a running sum is in
    the hundreds, and the difference of two such numbers cannot resolve a weak one.
    """
    chunk = log_decay.shape[-1]
    leading = (1,) * (log_decay.ndim - 1)
    visible = jnp.tril(jnp.ones((chunk, chunk), bool)).reshape(*leading, chunk, chunk)
    later = jnp.tril(jnp.ones((chunk, chunk), bool), -1).reshape(*leading, chunk, chunk)
    # between[m, j] is the logarithm at m where m > j; summing it over m <= i gives the exponents.
    between = jnp.where(later, log_decay[..., None], jnp.zeros((), log_decay.dtype))
    exponent = jnp.einsum(
        "...im,...mj->...ij", visible.astype(log_decay.dtype), between, precision="highest"
    )
    pair = jnp.where(visible, jnp.exp(exponent), jnp.zeros((), log_decay.dtype))
    start = jnp.exp(exponent[..., 0] + log_decay[..., :1])
    return Decays(pair, start, pair[..., -1, :])


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_lower_inverse(matrix: jax.Array, precision: str = "highest") -> jax.Array:
    """Inverse of lower triangular ``[..., C, C]`` with ones on the diagonal.

    Only what is strictly below the diagonal is read. Inverses of diagonal blocks of size s give
    those of size 2 s,

        [ A    ]^-1    [  A^-1              ]
        [ B  D ]     = [ -D^-1 B A^-1  D^-1 ]

    and all blocks of one size are treated by products of whole matrices. Like substitution this
    never forms powers of the matrix, which overflow long before the inverse does.

    It stands for `jax.lax.linalg.triangular_solve` because on a CPU the LAPACK calls behind that
    wait for threads of the pool that they run in: two of them at once, as in a backward pass, can
    block each other for good on a machine with few cores.
    """
    multiply = partial(jnp.matmul, precision=precision)
    chunk = matrix.shape[-1]
    leading = (1,) * (matrix.ndim - 2)
    row, column = np.indices((chunk, chunk))
    inverse = jnp.broadcast_to(
        jnp.eye(chunk, dtype=matrix.dtype).reshape(*leading, chunk, chunk), matrix.shape
    )
    size = 1
    while size < chunk:
        # B of every block of size 2 s: an odd block row of size s, and the block column before it.
        below = (row // size % 2 == 1) & (column // size == row // size - 1)
        part = jnp.where(below.reshape(*leading, chunk, chunk), matrix, 0)
        inverse = inverse - multiply(multiply(inverse, part), inverse)
        size *= 2
    return inverse


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(precision, primals, tangents):
    multiply = partial(jnp.matmul, precision=precision)
    inverse = unit_lower_inverse(*primals, precision)
    tangent = jnp.tril(tangents[0], -1)
    return inverse, -multiply(multiply(inverse, tangent), inverse)
