"""What mixers are built from: projections, short convolutions, norms, initialisers."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.nn.layer import HeadNorm
from lla.nn.ridge import NoDecay
from lla.numerics import compute_dtype
from lla.ops import segments

__all__ = [
    "GatedNorm",
    "HeadNorm",
    "LowRank",
    "NoDecay",
    "Projected",
    "ShortConvolution",
    "expanded_head_size",
    "head_size",
    "l2_normalize",
    "merge_heads",
    "project",
    "step_bias",
    "symmetric_uniform",
]


def head_size(
    width: int, num_heads: int, head_dim: int | None = None, name: str = "head_dim"
) -> int:
    """`head_dim`, or ``width // num_heads`` if it is None.

    Raises:
      ValueError: `width` is not a multiple of `num_heads`, or `head_dim` is below 1.
    """
    if head_dim is None:
        if width % num_heads:
            raise ValueError(
                f"width ({width}) must be a multiple of num_heads ({num_heads}) unless {name} is "
                "given."
            )
        return width // num_heads
    if head_dim < 1:
        raise ValueError(f"{name} must be at least 1, got {head_dim}.")
    return head_dim


def expanded_head_size(width: int, num_heads: int, expand: float, name: str) -> int:
    """``expand * width // num_heads``.

    Raises:
      ValueError: the division has a remainder, or the result is not positive.
    """
    total = round(expand * width)
    if not math.isclose(total, expand * width) or total < 1 or total % num_heads:
        raise ValueError(
            f"{name} ({expand}) times width ({width}) must be a positive multiple of num_heads "
            f"({num_heads})."
        )
    return total // num_heads


def project(
    width: int,
    shape: int | tuple[int, ...],
    *,
    short_conv: int = 0,
    activation: bool = True,
    conv_bias: bool = False,
    use_bias: bool = False,
    kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A linear map ``[B, T, width] -> [B, T, *shape]``, optionally with a short convolution.

    Args:
      width: of the input.
      shape: axes of the output, such as ``(num_heads, head_dim)``.
      short_conv: taps of a `ShortConvolution` after the map; 0 for none.
      activation: whether SiLU follows the convolution; there is none without a convolution.
      conv_bias: whether the convolution has a bias.
      use_bias: whether the map has a bias.
      kernel_init: initialiser of the kernel of the map.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Returns:
      `nnx.LinearGeneral`, or `Projected` with a convolution.
    """
    linear = nnx.LinearGeneral(
        width,
        shape,
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    if short_conv == 0:
        return linear
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    convolution = ShortConvolution(
        shape,
        short_conv,
        activation=activation,
        use_bias=conv_bias,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    return Projected(linear, convolution)


def merge_heads(
    num_heads: int, head_dim: int, width: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """The output projection ``[B, T, num_heads, head_dim] -> [B, T, width]``."""
    return nnx.LinearGeneral(
        (num_heads, head_dim),
        width,
        axis=(-2, -1),
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Projected(nnx.Module):
    """A projection followed by a short convolution."""

    def __init__(self, projection: nnx.Module, convolution: ShortConvolution):
        self.projection = projection
        self.convolution = convolution

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return self.convolution(self.projection(x), segment_ids)

    def init_state(self, batch: int | tuple[int, ...], dtype: Any) -> jax.Array:
        """See `ShortConvolution.init_state`."""
        return self.convolution.init_state(batch, dtype)

    def decode(
        self,
        x: jax.Array,
        state: jax.Array,
        counts: jax.Array | None,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """See `ShortConvolution.decode`."""
        return self.convolution.decode(self.projection(x), state, counts, starts)


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution over time: ``y_t = sum_i w_i x_{t-size+1+i}`` per channel.

    ``[B, T, *shape] -> [B, T, *shape]`` in the dtype of the input, accumulated in float32 or
    better. Zeros precede the sequence, or every segment if segment ids ``[B, T]`` are given.

    Parameters: ``filter`` ``[size, *shape]`` and optionally ``bias`` ``[*shape]``, both uniform in
    ``±1 / sqrt(size)`` as in Mamba's published code (arXiv 2312.00752). The last tap is that of the
    current token.

    Args:
      shape: axes after batch and time.
      size: number of taps, at least 1.
      activation: whether SiLU follows.
      use_bias: whether a bias is added before the activation.
      param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: `size` is below 1.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        size: int,
        *,
        activation: bool = True,
        use_bias: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if size < 1:
            raise ValueError(f"a short convolution needs at least one tap, got {size}.")
        self.size = size
        self.activation = activation
        self.use_bias = use_bias
        init = symmetric_uniform(size**-0.5)
        self.filter = nnx.Param(init(rngs.params(), (size, *shape), param_dtype))
        if use_bias:
            self.bias = nnx.Param(init(rngs.params(), shape, param_dtype))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        pad = [(0, 0), (self.size - 1, 0)] + [(0, 0)] * (x.ndim - 2)
        starts = None if segment_ids is None else segments.starts(segment_ids, x.shape[:2])
        padded = jnp.pad(x.astype(compute_dtype(x.dtype)), pad)
        return self._convolve(padded, self._reach(starts)).astype(x.dtype)

    def init_state(self, batch: int | tuple[int, ...], dtype: Any) -> jax.Array:
        """The inputs before the first token, zeros ``[batch, size - 1, *shape]``.

        Raises:
          ValueError: there is more than one batch axis.
        """
        if isinstance(batch, tuple) and len(batch) != 1:
            raise ValueError(f"a short convolution needs one batch axis, got {batch}.")
        leading = batch if isinstance(batch, tuple) else (batch,)
        shape = (*leading, self.size - 1, *self.filter.shape[1:])
        return jnp.zeros(shape, compute_dtype(jnp.dtype(dtype)))

    def decode(
        self,
        x: jax.Array,
        state: jax.Array,
        counts: jax.Array | None,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The outputs of the next tokens ``x [B, T, *shape]``, and the state after them.

        Args:
          x: the tokens.
          state: the last ``size - 1`` inputs before them.
          counts: int ``[B]``, how many of the tokens exist; None for all.
          starts: bool ``[B, T]``, whether a token exists and starts a segment; a first token that
            does not continues from `state`. None for one sequence.
        """
        inputs = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
        if counts is None:
            state = inputs[:, x.shape[1] :]
        else:
            last = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=self.size - 1)
            state = jax.vmap(last)(inputs, counts)
        reach = self._reach(starts)
        if reach is not None and self.size > 1:
            # Inputs from before the last segment do not belong to the state. Its input i lies
            # ``size - 1 - i`` before the next token. Padding belongs to the last segment.
            total = jnp.full(x.shape[:1], x.shape[1], jnp.int32) if counts is None else counts
            length = reach[:, -1] + 1 - (x.shape[1] - total)
            distance = jnp.arange(self.size - 1, 0, -1, dtype=jnp.int32)[None]
            state = _where(distance <= length[:, None], state)
        return self._convolve(inputs, reach).astype(x.dtype), state

    def _reach(self, starts):
        """Int32 ``[B, T]``: how many earlier inputs of its segment a token has, or more."""
        return None if starts is None else segments.positions(starts, self.size)

    def _convolve(self, padded, reach):
        """``[B, size - 1 + T, *shape] -> [B, T, *shape]``."""
        dtype, length = padded.dtype, padded.shape[1] - self.size + 1
        taps = self.filter[...].astype(dtype)

        def inputs(i):
            shifted = padded[:, i : i + length]
            return shifted if reach is None else _where(reach >= self.size - 1 - i, shifted)

        y = sum(taps[i][None, None] * inputs(i) for i in range(self.size))
        if self.use_bias:
            y = y + self.bias[...].astype(dtype)[None, None]
        return jax.nn.silu(y) if self.activation else y


def _where(mask, array):
    """`array` ``[B, T, ...]`` where `mask` ``[B, T]`` is True, zeros elsewhere."""
    mask = mask.reshape(*array.shape[:2], *(1,) * (array.ndim - 2))
    return jnp.where(jnp.broadcast_to(mask, array.shape), array, jnp.zeros_like(array))


class LowRank(nnx.Module):
    """Two linear maps ``[B, T, width] -> [B, T, rank] -> [B, T, *shape]``, the second with a bias.

    Parameters: ``down.kernel``, ``up.kernel`` (initialised by `up_init`) and, unless
    ``use_bias=False``, ``up.bias``, zero at the start.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        shape: int | tuple[int, ...],
        *,
        use_bias: bool = True,
        up_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = project(width, rank, **options)
        self.up = project(rank, shape, use_bias=use_bias, kernel_init=up_init, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.down(x))


class GatedNorm(nnx.Module):
    """``HeadNorm(x) * silu(gate)`` over the last axis, or ``HeadNorm(x * silu(gate))``.

    In float32 or better, returned in the dtype of `gate`. Parameters: ``norm.scale`` ``[dim]``.

    Args:
      dim: length of the last axis.
      gate_first: whether the gate acts before the norm, as in Mamba-2.
      param_dtype: dtype of the scale.
    """

    def __init__(self, dim: int, *, gate_first: bool = False, param_dtype: Any = jnp.float32):
        self.gate_first = gate_first
        self.norm = HeadNorm(dim, param_dtype=param_dtype)

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        dtype = compute_dtype(gate.dtype)
        x, opening = x.astype(dtype), jax.nn.silu(gate.astype(dtype))
        x = self.norm(x * opening) if self.gate_first else self.norm(x) * opening
        return x.astype(gate.dtype)


def l2_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """``x / sqrt(|x|^2 + epsilon)`` over the last axis, in float32 or better, in the dtype of x."""
    y = x.astype(compute_dtype(x.dtype))
    y = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + epsilon)
    return y.astype(x.dtype)


def symmetric_uniform(bound: float) -> nnx.Initializer:
    """Initialiser with values uniform in ``±bound``."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def step_bias(
    key: jax.Array,
    shape: tuple[int, ...],
    *,
    smallest: float = 1e-3,
    largest: float = 1e-1,
    floor: float = 1e-4,
) -> jax.Array:
    """Biases b, float32, with ``softplus(b)`` log-uniform between `smallest` and `largest`.

    The initial step sizes of Mamba (arXiv 2312.00752, section 3.6) and later models; none is below
    `floor`.
    """
    logarithm = jax.random.uniform(key, shape, jnp.float32, math.log(smallest), math.log(largest))
    step = jnp.maximum(jnp.exp(logarithm), floor)
    return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
