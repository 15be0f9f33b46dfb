"""When recurrences run as Hopper kernels, and how arrays are padded for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lla.mixers import chunks
from lla.ops import mosaic_gpu

SIZE = 64
"""Tokens per chunk, and coordinates per block of values."""


MEASURED = {
    "delta_rule": 128,
    "linear": 64,
    "mesa": 64,
    "retention": 128,
    "retention_shared": 128,
    "selective_scan": 16,
}
"""Kernels that were checked and timed on a GPU, with the largest key dimension that was.

For `selective_scan` it is the size of a state. Source:
experiments/benchmarks/results/mixer_updates_h200.json; `retention_shared`, where all heads share
their keys, is Mamba-2's. Other kernels run only inside `unmeasured_kernels`.
"""

_enabled = 0  # number of open `unmeasured_kernels`; global, since programs are traced in threads


@contextlib.contextmanager
def unmeasured_kernels() -> Iterator[None]:
    """Enables all kernels for what is traced inside, including those not in `MEASURED`."""
    global _enabled
    _enabled += 1
    try:
        yield
    finally:
        _enabled -= 1


def allowed(kernel: str, dim: int) -> bool:
    """Whether a kernel may run for keys of dimension `dim`: it is measured, or enabled."""
    return _enabled > 0 or dim <= MEASURED.get(kernel, 0)


def serve(kernel: str, key: jax.Array, value: jax.Array, largest: int = SIZE) -> bool:
    """Whether `kernel` runs for these sequences on this machine.

    It needs a Hopper GPU, bfloat16, at least a chunk of tokens, and keys of at most `largest`
    coordinates, and must be `allowed`.
    """
    return (
        value.dtype == jnp.bfloat16
        and key.shape[1] >= SIZE
        and key.shape[-1] <= largest
        and allowed(kernel, key.shape[-1])
        and mosaic_gpu.refuse_machine() is None
    )


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Pads sequences to whole chunks and splits heads into blocks of 64 value coordinates.

    For the kernels every block is a head, with the keys of its head. Padding is zero, which does
    not change the state.

    Attributes:
      length, heads: of the sequences.
      dim, value_dim: coordinates of keys and values.
      key_dim: padded coordinates of keys, at least `dim`.
    """

    length: int
    heads: int
    dim: int
    value_dim: int
    key_dim: int

    @property
    def count(self) -> int:
        """Blocks per head."""
        return -(-self.value_dim // SIZE)

    def tokens(self, array: jax.Array, repeat: bool = True) -> jax.Array:
        """``[B, T, N, ...] -> [B, T', N', ...]``; heads are not repeated without `repeat`."""
        array = _pad(array, 1, -self.length % SIZE)
        return jnp.repeat(array, self.count, 2) if repeat and self.count > 1 else array

    def keys(self, array: jax.Array, repeat: bool = True) -> jax.Array:
        """``[B, T, N, H] -> [B, T', N', H']``; heads are not repeated without `repeat`."""
        return _pad(self.tokens(array, repeat), -1, self.key_dim - self.dim)

    def values(self, array: jax.Array) -> jax.Array:
        """``[B, T, N, Hv] -> [B, T', N', 64]``."""
        array = _pad(_pad(array, 1, -self.length % SIZE), -1, -self.value_dim % SIZE)
        return array.reshape(*array.shape[:2], -1, SIZE)

    def states(self, array: jax.Array) -> jax.Array:
        """``[B, N, H, Hv] -> [B, N', H', 64]``."""
        array = _pad(_pad(array, -2, self.key_dim - self.dim), -1, -self.value_dim % SIZE)
        array = array.reshape(-1, self.heads, self.key_dim, self.count, SIZE)
        return jnp.moveaxis(array, 3, 2).reshape(-1, self.heads * self.count, self.key_dim, SIZE)

    def restore_values(self, array: jax.Array) -> jax.Array:
        """The inverse of `values`."""
        array = array[:, : self.length].reshape(-1, self.length, self.heads, self.count * SIZE)
        return array[..., : self.value_dim]

    def restore_states(self, array: jax.Array) -> jax.Array:
        """The inverse of `states`."""
        array = array.reshape(-1, self.heads, self.count, self.key_dim, SIZE)
        array = jnp.moveaxis(array, 2, 3)
        array = array.reshape(-1, self.heads, self.key_dim, self.count * SIZE)
        return array[:, :, : self.dim, : self.value_dim]


def gates(log_decay: jax.Array) -> tuple[jax.Array, ...]:
    """Decays of the tokens within their chunks, from log-decays ``[B, N, T]``.

    Returns:
      the two parts of the running sums, the decays from the start of the chunk to the token and
      from the token to the end, all ``[B, N, T]``; and the decays over whole chunks, ``[B, N, M]``.
    """
    sums = chunks.running_sums(log_decay.reshape(*log_decay.shape[:2], -1, SIZE))
    start, end = chunks.start_decays(sums), chunks.end_decays(sums)
    return *(array.reshape(log_decay.shape) for array in (*sums, start, end)), start[..., -1]


def log_decay_cotangents(found: dict[str, jax.Array], total: jax.Array) -> jax.Array:
    """Cotangents ``[B, T, N]`` of the log-decays.

    Args:
      found: by name, the `lla.kernels.mosaic_gpu.chunk.DECAY_VECTORS` that a backward kernel
      returns. total: the decays over whole chunks, ``[B, N, M]``.
    """
    entering, leaving, inside, through = (
        found[name].reshape(*total.shape, SIZE)
        for name in ("entering", "leaving", "inside", "through")
    )
    through = total * through.sum(-1)
    cotangents = chunks.spread_cotangents(entering + inside, leaving, through)
    return jnp.swapaxes(cotangents.reshape(*total.shape[:2], -1), 1, 2)


def _pad(array: jax.Array, axis: int, count: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return jnp.pad(array, widths) if count else array
