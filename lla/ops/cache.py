"""A cache of keys and values, which grows by the tokens of every decoding step."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("key", "value", "lengths"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, of any number of sequences; a pytree of three arrays.

    A cache is never changed: `append` returns a new one. Donate the old one to a compiled step
    (``jax.jit(step, donate_argnums=...)``) and the new one takes its memory, without a copy.

    **Too many tokens.** Where lengths are known, tokens that do not fit are a ValueError. In a
    compiled function they are not: there such tokens are written nowhere, no other token is lost,
    `lengths` keeps counting beyond `max_length`, `overflowed` tells for which sequences, and
    `lla.decode_step` returns NaN for them from that step on.

    Attributes:
      key: ``[*B, max_length, K, H]``; entries at or beyond `lengths` have no influence, whatever
        they hold.
      value: ``[*B, max_length, K, Hv]``, the dtype of `key`.
      lengths: int32 ``[*B]``, tokens so far.
    """

    key: jax.Array
    value: jax.Array
    lengths: jax.Array

    @classmethod
    def create(
        cls,
        batch: int | tuple[int, ...],
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
    ) -> KVCache:
        """An empty cache.

        Args:
          batch: number of sequences, or the leading axes ``*B`` as a tuple, () for none.
          max_length: tokens that each sequence has room for.
          num_kv_heads: key and value heads ``K``.
          head_dim: width ``H`` of a key head.
          value_dim: width ``Hv`` of a value head; None means `head_dim`.
          dtype: of keys and values, that of the queries to come.

        Raises:
          ValueError: a size below 1 (0 is allowed for `batch`), or a dtype that is not floating.
        """
        leading = batch if isinstance(batch, tuple) else (batch,)
        sizes = dict(
            max_length=max_length,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=head_dim if value_dim is None else value_dim,
        )
        for name, size in sizes.items():
            if operator.index(size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if any(operator.index(size) < 0 for size in leading):
            raise ValueError(f"batch must not be negative, got {batch}.")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, got {jnp.dtype(dtype)}.")
        shape = (*leading, max_length, num_kv_heads)
        return cls(
            key=jnp.zeros((*shape, head_dim), dtype),
            value=jnp.zeros((*shape, sizes["value_dim"]), dtype),
            lengths=jnp.zeros(leading, jnp.int32),
        )

    @property
    def max_length(self) -> int:
        """Tokens that each sequence has room for."""
        return self.key.shape[-3]

    @property
    def overflowed(self) -> jax.Array:
        """Bool ``[*B]``: whether more tokens were appended than there is room for."""
        return self.lengths > self.max_length

    def append(
        self, key: jax.Array, value: jax.Array, new_lengths: jax.Array | None = None
    ) -> KVCache:
        """The cache with T more tokens of every sequence, each at the end of its own.

        Args:
          key: ``[*B, T, K, H]``, the cache's dtype.
          value: ``[*B, T, K, Hv]``, the cache's dtype.
          new_lengths: int ``[*B]``, in 0 ... T: how many of the T tokens of a sequence exist. The
            others pad it and are not written. None means all. A traced number outside that range
            counts as the nearest one inside.

        Raises:
          ValueError: for wrong shapes or dtypes, and where the lengths are known for `new_lengths`
            outside its range and for tokens that do not fit.
        """
        self.check(key, value)
        length = key.shape[-3]
        counts = token_counts(new_lengths, self.lengths.shape, length)
        check_room(self.lengths, counts, self.max_length)
        return KVCache(
            key=write_tokens(self.key, key, self.lengths, counts),
            value=write_tokens(self.value, value, self.lengths, counts),
            lengths=self.lengths + counts,
        )

    def check(self, key: jax.Array, value: jax.Array) -> None:
        """Raises ValueError unless tokens of this key and value can be appended."""
        for name, new, old in (("key", key, self.key), ("value", value, self.value)):
            fits = new.ndim == old.ndim and new.ndim >= 3
            fits = fits and (*new.shape[:-3], *new.shape[-2:]) == (
                *old.shape[:-3],
                *old.shape[-2:],
            )
            if not fits or new.shape[-3] == 0:
                raise ValueError(
                    f"{name} must have shape [*B, T, K, head_dim] with the axes of the cache's "
                    f"[*B, max_length, K, head_dim] = {old.shape} but for T >= 1, got {new.shape}."
                )
            if new.dtype != old.dtype:
                raise ValueError(
                    f"{name} must have the cache's dtype {old.dtype}, got {new.dtype} with shape "
                    f"{new.shape}."
                )
        if key.shape[-3] != value.shape[-3]:
            raise ValueError(
                f"key and value must have equal lengths, got {key.shape} and {value.shape}."
            )


def token_counts(new_lengths: jax.Array | None, leading: tuple[int, ...], length: int) -> jax.Array:
    """Int32 ``[*B]``: how many of `length` new tokens exist; see `KVCache.append`.

    Raises:
      ValueError: `new_lengths` is of another shape, not an integer, or known and out of range.
    """
    if new_lengths is None:
        return jnp.full(leading, length, jnp.int32)
    new_lengths = jnp.asarray(new_lengths)
    if not jnp.issubdtype(new_lengths.dtype, jnp.integer) or new_lengths.shape != leading:
        raise ValueError(
            f"new_lengths must be an integer array of shape [*B] = {leading}, got "
            f"{new_lengths.dtype} {new_lengths.shape}."
        )
    if not isinstance(new_lengths, jax.core.Tracer):
        values = np.asarray(new_lengths)
        if values.size and not (values.min() >= 0 and values.max() <= length):
            raise ValueError(
                f"new_lengths must lie in 0 ... {length}, the number of new tokens, got {values}."
            )
    return jnp.clip(new_lengths, 0, length).astype(jnp.int32)


def check_room(lengths: jax.Array, counts: jax.Array, max_length: int) -> None:
    """Raises ValueError if `counts` more tokens are known not to fit behind `lengths`."""
    if isinstance(lengths, jax.core.Tracer) or isinstance(counts, jax.core.Tracer):
        return
    before, new = np.asarray(lengths), np.asarray(counts)
    if (before + new > max_length).any():
        raise ValueError(
            f"the cache is full: max_length is {max_length}, lengths are {before} and {new} more "
            "tokens were given."
        )


def exists(counts: jax.Array, length: int) -> jax.Array:
    """Bool ``[*B, length]``: which of `length` tokens are among the first `counts` ``[*B]``."""
    positions = jnp.arange(length, dtype=jnp.int32).reshape(*(1,) * counts.ndim, length)
    return positions < counts[..., None]


def write_tokens(
    buffer: jax.Array, new: jax.Array, lengths: jax.Array, counts: jax.Array
) -> jax.Array:
    """`buffer` ``[*B, L, *rest]`` with the first `counts` of `new` ``[*B, T, *rest]`` at `lengths`.

    Tokens beyond `counts`, and those that do not fit, are not written. It is a scatter, which works
    in the buffer's memory where the caller gives it up. (Not on a CPU with 16-bit buffers before
    JAX 0.11: there XLA converts them to float32 and back.)
    """
    leading, rest = buffer.shape[: lengths.ndim], buffer.shape[lengths.ndim + 1 :]
    room, length = buffer.shape[lengths.ndim], new.shape[lengths.ndim]
    size = math.prod(leading)
    if size * length == 1:
        # XLA turns a scatter of a single token into five kernels on a GPU, one of two into one. The
        # second token is never written.
        new, length = jnp.concatenate([new, new], axis=lengths.ndim), 2
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    offsets = jnp.broadcast_to(offsets, (size, length))
    positions = lengths.reshape(size, 1) + offsets
    written = exists(counts.reshape(size), length) & (positions < room)
    # Positions behind the end are dropped; no two are equal, which spares the compiler atomics.
    positions = jnp.where(written, positions, room + offsets)
    rows = jnp.arange(size, dtype=jnp.int32)[:, None]
    rows = jnp.broadcast_to(rows, (size, length))
    flat, new = buffer.reshape(size, room, *rest), new.reshape(size, length, *rest)
    return flat.at[rows, positions].set(new, mode="drop", unique_indices=True).reshape(buffer.shape)
