"""Hyena: a long convolution between two gates."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lla.mixers.chunks import check_form
from lla.mixers.long_convolution import long_convolution
from lla.mixers.parts import NoDecay, project
from lla.mixers.recurrent import State, WholeSequences, init_state
from lla.numerics import compute_dtype, nan_where
from lla.ops import segments
from lla.ops.cache import check_room, exists, write_tokens

# From the authors' code: the fractions of `filter_length` after which the fastest and the slowest
# window have decayed to `_FALLEN`, and the number of hidden layers after the first.
_FASTEST, _SLOWEST, _FALLEN = 0.3, 1.5, 1e-2
_HIDDEN_LAYERS = 2
_FILTER_LENGTH = 1024


class Hyena(nnx.Module):
    """Hyena of order 2 (Poli et al., arXiv 2302.10866).

    ``x [B, T, width] -> [B, T, width]``, causal. With W for projections with biases and * for the
    causal convolution over time of each channel with its filter h,

        v, x1, x2 = W x;  u = v x1;  y = W (x2 (h * u + D u))

    and h_t an MLP of t with sines, times a window that decays exponentially: `HyenaFilter`. The
    convolution runs in float32 or better whatever the dtype.

    Departures [ours]: no convolution of 3 taps on v, x1 and x2 by default; the filter is a function
    of the position in tokens rather than of the fraction of the sequence, so that the outputs of a
    prefix do not depend on what follows; its positional features are fixed, whereas the authors'
    code trains a table of them with a separate learning rate; LeCun normal kernels of the
    projections.

    Every channel has its own filter. There are no heads, and `num_heads` has no effect.

    Parameters: ``inputs``, ``filter``, ``out``; ``D`` [width], initially standard normal, has no
    weight decay.

    Args:
      width: of the tokens.
      num_heads: has no effect.
      short_conv: taps of a causal convolution on v, x1 and x2, without activation; 0 for none.
      filter_length: tokens over which the filter's features complete one period and the window
        decays. The filter continues for longer sequences, but hardly learns if sequences are much
        shorter. None: the longest sequence of the model (`lla.models`), or 1024 without a model.
      filter_width: width of the filter's hidden layers.
      filter_features: positional features, odd and at least 3: the position, and cosines and sines.
      filter_frequency: initial frequency of the sines in the MLP.
      form: ``"parallel"`` or ``"recurrent"``, see `lla.mixers.long_convolution`.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: for options outside their range.
    """

    length_option = "filter_length"

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        short_conv: int = 0,
        filter_length: int | None = None,
        filter_width: int = 64,
        filter_features: int = 33,
        filter_frequency: float = 14.0,
        form: str = "parallel",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_form(form, 1)
        self.form = form
        options = dict(use_bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.inputs = project(width, (3, width), short_conv=short_conv, activation=False, **options)
        self.filter = HyenaFilter(
            width,
            length=_FILTER_LENGTH if filter_length is None else filter_length,
            hidden=filter_width,
            features=filter_features,
            frequency=filter_frequency,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.width = width
        self.D = NoDecay(jax.random.normal(rngs.params(), (width,), param_dtype))
        self.out = project(width, width, **options)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """``[B, T, width] -> [B, T, width]``; see `lla.mixers.Mixer`."""
        u, gate, dtype = self._gated(WholeSequences(self, x, segment_ids).project("inputs"))
        filter = self.filter(x.shape[1])
        convolved = long_convolution(u, filter, segment_ids=segment_ids, form=self.form)
        return self._finish(u, gate, convolved, dtype)

    def init_state(self, batch: int, max_length: int, dtype: Any = None) -> State:
        """The state of `decode` before the first token, room for all u; see `lla.mixers.Mixer`."""
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}.")
        return init_state(self, batch, (max_length, self.width), dtype)

    def decode(
        self,
        x: jax.Array,
        state: State,
        new_lengths: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """The next tokens ``[B, T, width]`` of the sequences of `state`; see `lla.mixers.Mixer`.

        The convolution is over all u: the cost of a token is proportional to the capacity. After a
        call the state of packed sequences holds only the last segment, but it needs room for all
        tokens of the call after those that it held before.
        """
        state, tokens = state.begin(self, x, new_lengths, segment_ids)
        u, gate, dtype = self._gated(tokens.project("inputs"))
        room, length = state.memory.shape[1], x.shape[1]
        check_room(state.lengths, tokens.counts, room)
        memory = write_tokens(
            state.memory, u.astype(state.memory.dtype), state.lengths, tokens.counts
        )
        total, after = state.lengths + tokens.counts, state.advance(memory, tokens)
        filter, slots = self.filter(room).astype(memory.dtype), None
        if segment_ids is not None:
            slots = segments.slots(tokens.segment_ids, state.lengths, room)
            first = total - after.lengths
            after = after._replace(
                memory=segments.moved_to_front(memory, first, after.lengths),
                lengths=jnp.where(total > room, total, after.lengths),
            )
        # Positions of the new tokens in the memory. A single token needs no segment ids.
        offsets = jnp.arange(length, dtype=jnp.int32)[None]
        shape = (x.shape[0], length)
        positions = jnp.broadcast_to(state.lengths[:, None], shape)
        positions = positions + jnp.broadcast_to(offsets, shape)
        if length == 1:
            # The tap of every u, by its distance.
            distance = positions - jnp.arange(room, dtype=jnp.int32)[None]
            taps = jnp.take(filter, jnp.clip(distance, 0, room - 1), axis=0)
            taps = jnp.where(distance[..., None] >= 0, taps, jnp.zeros_like(taps))
            convolved = jnp.einsum("bld,bld->bd", memory, taps, precision="highest")[:, None]
        else:
            convolved = long_convolution(memory, filter, segment_ids=slots, form=self.form)
            rows = jnp.clip(positions, 0, room - 1)[..., None]
            convolved = jnp.take_along_axis(convolved, rows, axis=1)
        lost = (total > room)[:, None] & exists(tokens.counts, length)
        convolved = nan_where(lost, convolved)
        return self._finish(u, gate, convolved.astype(u.dtype), dtype), after

    def _gated(self, projected):
        """u and the gate of its convolution, float32 or better, and the dtype of the input."""
        v, x1, x2 = jnp.unstack(projected, axis=-2)
        dtype = compute_dtype(v.dtype)
        return v.astype(dtype) * x1.astype(dtype), x2.astype(dtype), v.dtype

    def _finish(self, u, gate, convolved, dtype):
        y = gate * (convolved + self.D[...].astype(u.dtype)[None, None] * u)
        return self.out(y.astype(dtype))


class HyenaFilter(nnx.Module):
    """The filter of every channel as a function of the position: an MLP times a window.

        h(t) = mlp(t, cos(w f t), sin(w f t)) exp(-r t / length),   w = 2 pi / length

    with frequencies f from 1e-4 to ``(features - 1) / 2 - 1``, sines of trained frequencies as
    activations, and rates r evenly spaced over the channels, such that the window decays to 1 %
    after 0.3 to 1.5 times `length`; all as in the authors' code. In float32.

    Parameters: ``layers`` (kernels and biases uniform in ±1/sqrt(fan-in)) and ``frequency``
    [hidden], which the layers share and which has no weight decay.

    Args:
      width: channels.
      length, hidden, features, frequency: `filter_length`, `filter_width`, `filter_features` and
        `filter_frequency` of `Hyena`.
      param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: for options outside their range.
    """

    def __init__(
        self,
        width: int,
        *,
        length: int,
        hidden: int,
        features: int,
        frequency: float,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        if length < 1 or hidden < 1:
            raise ValueError(
                f"filter_length and filter_width must be at least 1, got {length} and {hidden}."
            )
        if features < 3 or features % 2 == 0:
            raise ValueError(f"filter_features must be odd and at least 3, got {features}.")
        self.length = length
        self.features = features
        self.width = width

        def layer(inputs, outputs, use_bias=True):
            bound = 1 / math.sqrt(inputs)
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                kernel_init=_uniform(bound),
                bias_init=_uniform(bound),
                dtype=jnp.float32,
                param_dtype=param_dtype,
                precision="highest",
                rngs=rngs,
            )

        inner = [layer(hidden, hidden) for _ in range(_HIDDEN_LAYERS)]
        self.layers = nnx.List([layer(features, hidden), *inner, layer(hidden, width, False)])
        self.frequency = NoDecay(jnp.full((hidden,), frequency, jnp.float32))

    def __call__(self, length: int) -> jax.Array:
        """The first `length` taps, float32 ``[length, width]``."""
        position = jnp.arange(length, dtype=jnp.float32)[:, None] / self.length
        bands = (self.features - 1) // 2
        band = jnp.linspace(1e-4, bands - 1, bands, dtype=jnp.float32)[None]
        angle = 2 * math.pi * band * position
        h = jnp.concatenate([position, jnp.cos(angle), -jnp.sin(angle)], axis=-1)
        frequency = self.frequency[...][None]
        for layer in self.layers[:-1]:
            h = jnp.sin(frequency * layer(h))
        slowest, fastest = (-math.log(_FALLEN) / fraction for fraction in (_SLOWEST, _FASTEST))
        rate = jnp.linspace(slowest, fastest, self.width, dtype=jnp.float32)[None]
        return self.layers[-1](h) * jnp.exp(-rate * position)


def _uniform(bound: float) -> nnx.Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
