"""Causal convolution of every channel with a filter as long as the sequence.

    y_t = sum_{s = 0 .. min(t, L - 1)} filter_s u_{t - s}

`"parallel"` multiplies Fourier transforms, zero-padded so that nothing wraps around. `"recurrent"`,
the reference, is a scan over tokens whose state is a window of the last inputs, O(T L).

A transform of n = n1 n2 points takes two steps of matrix products (Cooley and Tukey; on tensor
cores Fu et al., arXiv 2311.05908). With t = n2 t1 + t2, k = k1 + n1 k2 and W_n = exp(-2 pi i / n),

    X[k] = sum_t2 W_n2^(t2 k2) W_n^(t2 k1) sum_t1 W_n1^(t1 k1) x[t]

which costs O(n^1.5) and, as x is real, needs only k1 up to n1 / 2. Not `jnp.fft`: on a CPU with
JAX 0.11 its calls wait for threads of the pool that they run in, and two at once can deadlock.

A transform mixes all inputs, so an output changes by rounding errors (1e-7 of the largest input of
its channel in float32) when later inputs change.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lla.mixers.chunks import check_form
from lla.numerics import compute_dtype
from lla.ops import segments

# Tokens of the blocks in which a packed convolution computes distances one by one.
_BLOCK = 16


def long_convolution(
    inputs: jax.Array,
    filter: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    form: str = "parallel",
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal convolution over time, ``y_t = sum_s filter_s u_(t - s)`` per channel.

    As in Hyena (arXiv 2302.10866). Differentiable in all arrays, also through the returned state,
    in forward and reverse mode.

    Args:
      inputs: u, ``[B, T, D]``.
      filter: ``[L, D]``, the tap of the current token first; inputs before the first are zero.
      state: ``[B, L - 1, D]``, the inputs before the first token, oldest first, of any dtype; None
        for zeros.
      segment_ids: int ``[B, T]``, of packed sequences: a token reads only the inputs of its
        segment, a run of equal ids. The first token continues from `state`. None for one sequence.
      form: ``"parallel"`` or ``"recurrent"``.
      return_state: also return the last L - 1 inputs, with zeros for earlier segments.

    Returns:
      ``[B, T, D]`` in the dtype of `inputs`, or a pair with the state. Both are computed in float32
      (float64 for float64 inputs), which is the state's dtype.

    Raises:
      ValueError: for shapes that do not match, an unknown form, or `segment_ids` that are not
        integers.
    """
    if inputs.ndim != 3 or 0 in inputs.shape:
        raise ValueError(f"inputs must be [B, T, D] and not empty, got {inputs.shape}.")
    batch, length, width = inputs.shape
    if filter.ndim != 2 or filter.shape[0] < 1 or filter.shape[1] != width:
        raise ValueError(f"filter must be [L, {width}], got {filter.shape}.")
    check_form(form, 1)
    taps = filter.shape[0]
    if state is not None and state.shape != (batch, taps - 1, width):
        raise ValueError(f"state must have shape {(batch, taps - 1, width)}, got {state.shape}.")
    dtype = compute_dtype(inputs.dtype)
    u, filter = inputs.astype(dtype), filter.astype(dtype)
    starts = None if segment_ids is None else segments.starts(segment_ids, (batch, length))
    if form == "recurrent":
        window = jnp.zeros((batch, taps - 1, width), dtype) if state is None else state
        out, window = _recurrent(window.astype(dtype), u, filter, starts)
    else:
        # With a state, compute a longer sequence and drop its first outputs.
        behind = 0 if state is None else taps - 1
        whole = u if state is None else jnp.concatenate([state.astype(dtype), u], axis=1)
        if starts is None:
            out = _parallel(whole, filter)[:, behind:]
            last = whole
        else:
            ids = segments.runs(jnp.pad(starts, [(0, 0), (behind, 0)]))
            out = _packed(whole, filter, ids)[:, behind:]
            last = segments.cleared(whole, ids != ids[:, -1:])
        window = jnp.pad(last, [(0, 0), (taps - 1, 0), (0, 0)])[:, whole.shape[1] :]
    out = out.astype(inputs.dtype)
    return (out, window) if return_state else out


def long_convolution_step(
    state: jax.Array, inputs: jax.Array, filter: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of `long_convolution`; all arrays in the dtype of the state.

    Differentiable in all of them, in forward and reverse mode.

    Args:
      state: ``[B, L - 1, D]``, the inputs before the token, oldest first.
      inputs: ``[B, D]``.
      filter: ``[L, D]``, the tap of the token first.

    Returns:
      The new state and the output ``[B, D]``.
    """
    window = jnp.concatenate([state, inputs[:, None]], axis=1)
    newest_last = jnp.flip(filter, axis=0)
    out = jnp.einsum("bld,ld->bd", window, newest_last, precision="highest")
    return window[:, 1:], out


def _recurrent(window, u, filter, starts=None):
    def advance(window, arrays):
        token, *start = arrays
        if start:
            window = segments.cleared(window, *start)
        return long_convolution_step(window, token, filter)

    arrays = (u,) if starts is None else (u, starts)
    window, out = jax.lax.scan(advance, window, tuple(jnp.moveaxis(a, 1, 0) for a in arrays))
    return jnp.moveaxis(out, 0, 1), window


def _packed(u, filter, ids):
    """Outputs ``[B, T, D]``, where tokens read only their segments; ``ids [B, T]`` never repeat.

    The tokens are divided into blocks of a power of two. Within blocks of `_BLOCK` tokens the
    distances are computed one by one. Two neighbouring blocks, which form one of twice the size,
    have at most one segment in common, so the second reads a convolution of the part of the first
    that belongs to this segment. Each size costs at most as much as one convolution of the whole
    sequence, and there are log2(T / _BLOCK) sizes.
    """
    batch, length, width = u.shape
    size = _BLOCK
    while size < length:
        size *= 2
    u = jnp.pad(u, [(0, 0), (0, size - length), (0, 0)])
    ids = jnp.pad(ids, [(0, 0), (0, size - length)], mode="edge")
    filter = jnp.pad(filter, [(0, max(0, size - filter.shape[0])), (0, 0)])

    def blocks(array, size):
        return array.reshape(-1, size, *array.shape[2:])

    inputs, within = blocks(u, _BLOCK), blocks(ids, _BLOCK)
    out = jnp.zeros_like(inputs)
    for distance in range(_BLOCK):
        shift = [(0, 0), (distance, 0), (0, 0)]
        earlier = jnp.pad(inputs, shift)[:, :_BLOCK]
        other = jnp.pad(within, shift[:2], constant_values=-1)[:, :_BLOCK] != within
        out = out + filter[None, None, distance] * segments.cleared(earlier, other)
    out = out.reshape(u.shape)

    half = _BLOCK
    while half < size:
        inputs, within = blocks(u, 2 * half), blocks(ids, 2 * half)
        first = segments.cleared(inputs[:, :half], within[:, :half] != within[:, half : half + 1])
        read = _parallel(first, filter[: 2 * half], 2 * half)[:, half:]
        read = segments.cleared(read, within[:, half:] != within[:, half - 1 : half])
        out = out + jnp.pad(read, [(0, 0), (half, 0), (0, 0)]).reshape(u.shape)
        half *= 2
    return out[:, :length]


def _parallel(u, filter, length=None):
    """The first `length` outputs, by default as many as there are inputs."""
    length = u.shape[1] if length is None else length
    filter = filter[:length]  # later taps have no inputs
    transform = _Transform(u.shape[1] + filter.shape[0] - 1, u.dtype)
    real, imag = transform.forward(u)
    filter_real, filter_imag = transform.forward(filter[None])
    product = (real * filter_real - imag * filter_imag, real * filter_imag + imag * filter_real)
    return transform.backward(product, length)


class _Transform:
    """Fourier transforms over axis 1 of real ``[B, T, D]``, zero-padded to at least `points`.

    A spectrum is a pair ``[B, n1 / 2 + 1, n2, D]`` of real and imaginary parts at (k1, k2).
    """

    def __init__(self, points: int, dtype):
        self.dtype = dtype
        self.columns = 1 << (points.bit_length() // 2)  # n2
        self.rows = 2 * -(-points // (2 * self.columns))  # n1, even
        half = np.arange(self.rows // 2 + 1)
        self.outer = self._roots(self.rows, half, np.arange(self.rows))
        self.twiddle = self._roots(self.rows * self.columns, half, np.arange(self.columns))
        self.inner = self._roots(self.columns, np.arange(self.columns), np.arange(self.columns))
        # Every k1 but the first and the last of the half counts twice, for its conjugate.
        self.weight = np.where(half % (self.rows // 2) == 0, 1.0, 2.0) / (self.rows * self.columns)

    def _roots(self, points, left, right):
        """cos and -sin of 2 pi left right / points, in float64 and without large angles."""
        angle = 2 * np.pi * (np.outer(left, right) % points) / points
        return np.cos(angle), -np.sin(angle)

    def forward(self, x):
        """``[B, T, D]`` to its spectrum."""
        batch, length, width = x.shape
        filled = -(-length // self.columns)  # rows that are not only padding
        x = jnp.pad(x, [(0, 0), (0, filled * self.columns - length), (0, 0)])
        x = x.reshape(batch, filled, self.columns, width)
        real, imag = (self._product("kt,btsd->bksd", part[:, :filled], x) for part in self.outer)
        real, imag = self._twist(real, imag, 1)
        return self._rotate("qs,bksd->bkqd", real, imag, 1)

    def backward(self, spectrum, length):
        """A spectrum to the first `length` points of its real sequence, ``[B, length, D]``."""
        real, imag = self._rotate("qs,bkqd->bksd", *spectrum, -1)
        real, imag = self._twist(real, imag, -1)
        filled = -(-length // self.columns)
        cosine, sine = (self.weight[:, None] * part[:, :filled] for part in self.outer)
        # The real part of a product with conjugate roots.
        x = self._product("kt,bksd->btsd", cosine, real) + self._product(
            "kt,bksd->btsd", sine, imag
        )
        batch, _, _, width = x.shape
        return x.reshape(batch, filled * self.columns, width)[:, :length]

    def _twist(self, real, imag, sign):
        """Times W_n^(t2 k1), or its conjugate for sign = -1."""
        cosine, sine = (jnp.asarray(part, self.dtype)[None, :, :, None] for part in self.twiddle)
        sine = sign * sine
        return real * cosine - imag * sine, real * sine + imag * cosine

    def _rotate(self, subscripts, real, imag, sign):
        """The complex transform along columns, or its conjugate for sign = -1."""
        cosine, sine = self.inner
        sine = sign * sine
        return (
            self._product(subscripts, cosine, real) - self._product(subscripts, sine, imag),
            self._product(subscripts, sine, real) + self._product(subscripts, cosine, imag),
        )

    def _product(self, subscripts, constant, x):
        constant = jnp.asarray(constant, self.dtype)
        return jnp.einsum(subscripts, constant, x, precision="highest")
