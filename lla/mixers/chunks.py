"""Chunks of a sequence, and decays inside a chunk: shared by chunkwise-parallel recurrences.

Arrays are cut from ``[B, T, N, ...]`` into ``[M, B, N, C, ...]``: M chunks of C tokens, the chunk
first so that `jax.lax.scan` runs over it. Zeros fill the last chunk. A recurrence that multiplies
keys or step sizes by what enters the state is not changed by tokens of zeros behind its end.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lla.ops.problem import compute_dtype


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


def operand_dtype(dtype) -> jnp.dtype:
    """What operands of products are rounded to where sequences have `dtype`.

    Bfloat16 stays; float16 does not have the range for what lies between.
    """
    return jnp.dtype(dtype) if dtype == jnp.bfloat16 else compute_dtype(jnp.dtype(dtype))


class Products(NamedTuple):
    """Einsums of two operands with sums in `wide`, where rows of keys have the dtype `narrow`."""

    narrow: Any
    wide: Any

    @property
    def precision(self) -> str:
        """Of operands that are not rounded to `narrow`."""
        return "highest" if self.narrow == self.wide else "high"

    def __call__(self, spec: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        """The einsum, rounded to `dtype` or not at all."""
        dtype = self.wide if dtype is None else dtype
        if x.dtype != y.dtype:
            x, y = x.astype(self.wide), y.astype(self.wide)
        out = jnp.einsum(spec, x, y, precision=self.precision, preferred_element_type=self.wide)
        return out.astype(dtype)


def check_form(form: str, chunk: int) -> None:
    """Raises ValueError unless `form` names a way to compute a recurrence and `chunk` is >= 1."""
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
    """Decays of a chunk from the logarithms of its gates, ``[..., C]``, finite and <= 0."""
    return decays_of(running_sums(log_decay))


def decays_of(sums: "Sums") -> Decays:
    """Decays of a chunk from the `Sums` of its logarithms."""
    return Decays(pair_decays(sums), start_decays(sums), end_decays(sums))


class Sums(NamedTuple):
    """Sums of logarithms up to every position of a chunk, ``[..., C]`` each, in two parts.

    Behind a few strong decays a running sum is in the hundreds, and the difference of two such
    numbers cannot resolve a weak decay. Here the logarithms are cut at a power of two that is so
    large that sums of the upper parts need no more digits than a number has. Their differences are
    exact, and the lower parts are small.
    """

    upper: jax.Array
    lower: jax.Array

    def between(self, late: "Sums") -> jax.Array:
        """The logarithms after these positions and up to those of `late`."""
        return (late.upper - self.upper) + (late.lower - self.lower)

    def at(self, index) -> "Sums":
        """Both parts at an index behind the leading axes."""
        return Sums(self.upper[..., index], self.lower[..., index])


def log_of_zero(dtype) -> float:
    """A finite number, minus a power of two, whose exponential is zero in `dtype`."""
    return -(2.0 ** math.ceil(math.log2(-math.log(jnp.finfo(dtype).smallest_subnormal))))


@jax.custom_jvp
def running_sums(log_decay: jax.Array) -> Sums:
    """The sums over positions of `log_decay`, ``[..., C]``, finite and <= 0.

    What is below the logarithm of the smallest number is as good as that.
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
      onward: ``[..., C]``, what acts through the sum of the logarithms up to a position.
      leaving: ``[..., C]``, through the sum of those behind it.
      through: ``[...]``, through the sum of all of them.
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
    """`Decays.pair`, which nothing has to store: a function of two positions."""
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
