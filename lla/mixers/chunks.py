"""Chunks of a sequence, and decays within a chunk, for chunkwise-parallel recurrences.

Arrays ``[B, T, N, ...]`` are reshaped to ``[M, B, N, C, ...]``: M chunks of C tokens, with the
chunk first for `jax.lax.scan`. The last chunk is padded with zeros, which do not change the state,
since all that enters it is multiplied by a key or a step size.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lla.numerics import compute_dtype


class Decays(NamedTuple):
    """Products of the gates of a head between positions of a chunk, all in [0, 1].

    Attributes:
      pair: ``[..., C, C]``, from position j (columns) to i (rows): the product of the gates of j+1,
        ..., i; 1 on the diagonal, 0 above it.
      start: ``[..., C]``, from the start of the chunk to i: the product of all gates up to i.
      end: ``[..., C]``, from i to the end of the chunk.
    """

    pair: jax.Array
    start: jax.Array
    end: jax.Array


def products(dtype):
    """`jnp.einsum` with float32 sums, at a precision that suits sequences of `dtype`.

    Float32 and float64 sequences have exact products. For 16-bit sequences, float32 operands are
    rounded to the 11 bits of TF32 on a GPU, or split into three parts of 8 bits on a TPU. Their
    errors, 2^-12 each, are an eighth of those of rounding a sequence to bfloat16. A CPU computes in
    float32.
    """
    return partial(jnp.einsum, precision="high" if jnp.dtype(dtype).itemsize < 4 else "highest")


def operand_dtype(dtype) -> jnp.dtype:
    """The dtype of the operands of products for sequences of `dtype`.

    Bfloat16 stays bfloat16; float16 lacks the range for intermediate results.
    """
    return jnp.dtype(dtype) if dtype == jnp.bfloat16 else compute_dtype(jnp.dtype(dtype))


class Products(NamedTuple):
    """Einsums of two operands, of which keys have the dtype `narrow`, with sums in `wide`."""

    narrow: Any
    wide: Any

    @property
    def precision(self) -> str:
        """The precision of operands that are not rounded to `narrow`."""
        return "highest" if self.narrow == self.wide else "high"

    def __call__(self, spec: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        """The einsum, rounded to `dtype` if given."""
        dtype = self.wide if dtype is None else dtype
        if x.dtype != y.dtype:
            x, y = x.astype(self.wide), y.astype(self.wide)
        out = jnp.einsum(spec, x, y, precision=self.precision, preferred_element_type=self.wide)
        return out.astype(dtype)


def check_form(form: str, chunk: int) -> None:
    """Raises ValueError unless `form` is "parallel" or "recurrent" and `chunk` is >= 1."""
    if form not in ("parallel", "recurrent"):
        raise ValueError(f"form must be 'parallel' or 'recurrent', got {form!r}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")


def start_state(state: jax.Array | None, shape: tuple[int, ...], dtype) -> jax.Array:
    """`state` in `dtype`, or zeros for None; ValueError unless it has `shape`."""
    if state is None:
        return jnp.zeros(shape, dtype)
    if state.shape != shape:
        raise ValueError(f"state must have shape {shape}, got {state.shape}.")
    return state.astype(dtype)


def split(array: jax.Array, chunk: int) -> jax.Array:
    """``[B, T, N, ...] -> [M, B, N, C, ...]`` with C = chunk, padded with zeros."""
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
    """The decays of a chunk from the logarithms of its gates, ``[..., C]``, finite and <= 0."""
    return decays_of(running_sums(log_decay))


def decays_of(sums: "Sums") -> Decays:
    """The decays of a chunk from the `Sums` of its logarithms."""
    return Decays(pair_decays(sums), start_decays(sums), end_decays(sums))


class Sums(NamedTuple):
    """Sums of logarithms up to every position of a chunk, ``[..., C]`` each, in two parts.

    After a few strong decays a running sum is in the hundreds, and the difference of two such
    numbers does not resolve a weak decay. The logarithms are therefore split at a power of two,
    large enough for sums of the upper parts to be exact in floating point. So are their
    differences, and the lower parts are small.
    """

    upper: jax.Array
    lower: jax.Array

    def between(self, late: "Sums") -> jax.Array:
        """The logarithms of the gates after these positions, up to the positions of `late`."""
        return (late.upper - self.upper) + (late.lower - self.lower)

    def at(self, index) -> "Sums":
        """Both parts at an index of the last axis."""
        return Sums(self.upper[..., index], self.lower[..., index])


def log_of_zero(dtype) -> float:
    """A finite number, minus a power of two, whose exponential is zero in `dtype`."""
    return -(2.0 ** math.ceil(math.log2(-math.log(jnp.finfo(dtype).smallest_subnormal))))


@jax.custom_jvp
def running_sums(log_decay: jax.Array) -> Sums:
    """The running sums of `log_decay`, ``[..., C]``, finite and <= 0.

    Logarithms are clipped at one whose exponential is zero.
    """
    chunk, floor = log_decay.shape[-1], log_of_zero(log_decay.dtype)
    digits = jnp.finfo(log_decay.dtype).nmant + 1
    unit = 2.0 ** (math.ceil(math.log2(-floor * chunk)) - digits)
    log_decay = jnp.maximum(log_decay, floor)
    upper = jnp.round(log_decay / unit) * unit
    return Sums(_sum_up(upper), _sum_up(log_decay - upper))


@running_sums.defjvp
def _running_sums_jvp(primals, tangents):
    sums = running_sums(*primals)
    return sums, Sums(_sum_up(tangents[0]), jnp.zeros_like(sums.lower))


def _sum_up(array):
    ones = jnp.asarray(np.tril(np.ones(array.shape[-1:] * 2)), array.dtype)
    return jnp.einsum("...m,im->...i", array, ones, precision="highest")


def spread_cotangents(onward: jax.Array, leaving: jax.Array, through: jax.Array) -> jax.Array:
    """The cotangents of the logarithms ``[..., C]`` of a chunk.

    Args:
      onward: ``[..., C]``, cotangents of the sums of the logarithms up to a position.
      leaving: ``[..., C]``, of the sums after a position.
      through: ``[...]``, of the sum of all.
    """
    up_to = np.tril(np.ones(onward.shape[-1:] * 2))
    behind = np.triu(np.ones(onward.shape[-1:] * 2), 1)
    return (
        sum(
            jnp.einsum("...i,im->...m", a, jnp.asarray(mask, a.dtype), precision="highest")
            for a, mask in ((onward, up_to), (leaving, behind))
        )
        + through[..., None]
    )


def pair_decays(sums: Sums) -> jax.Array:
    """`Decays.pair`, which is cheap to recompute from sums."""
    rows, columns = (Sums(*(jnp.expand_dims(part, axis) for part in sums)) for axis in (-1, -2))
    exponent = columns.between(rows)
    hidden = jnp.full_like(exponent, log_of_zero(exponent.dtype))
    return jnp.exp(jnp.where(lower_triangle(exponent), exponent, hidden))


def start_decays(sums: Sums) -> jax.Array:
    """`Decays.start`."""
    return jnp.exp(sums.upper + sums.lower)


def end_decays(sums: Sums) -> jax.Array:
    """`Decays.end`."""
    return jnp.exp(sums.between(sums.at(slice(-1, None))))


def lower_triangle(array: jax.Array, offset: int = 0) -> jax.Array:
    """True on the diagonal `offset` of matrices ``[..., C, C]`` and below it; same rank."""
    mask = np.tril(np.ones(array.shape[-2:], bool), offset)
    return jnp.asarray(mask.reshape((1,) * (array.ndim - 2) + mask.shape))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_lower_inverse(matrix: jax.Array, precision: str = "highest") -> jax.Array:
    """Inverse of lower triangular ``[..., C, C]`` with ones on the diagonal.

    Only entries strictly below the diagonal are read. Inverses of diagonal blocks of size s give
    those of size 2 s,

        [ A    ]^-1    [  A^-1              ]
        [ B  D ]     = [ -D^-1 B A^-1  D^-1 ]

    and all blocks of one size are computed by products of whole matrices. Like substitution, this
    never forms powers of the matrix, which overflow long before the inverse does.

    Not `jax.lax.linalg.triangular_solve`: on a CPU its LAPACK calls wait for threads of the pool
    that they run in. Two at once, as in a backward pass, can deadlock on a machine with few cores.
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
        # B of every block of size 2 s: an odd block row of size s and the block column before it.
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
