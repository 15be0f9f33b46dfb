"""A residual model around any mixer, for tokens or for regression."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lla import mixers
from lla.nn.layer import HeadNorm
from lla.nn.new_tokens import NewTokens
from lla.numerics import nan_where
from lla.ops import segments
from lla.ops.cache import check_room

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The configuration of a `SequenceModel`.

    Attributes:
      width: of the residual stream.
      depth: number of blocks.
      num_heads: heads of every mixer.
      mixer: name of the mixer, one of `lla.mixers.names()`.
      mixer_options: its options, see `lla.mixers.options(mixer)`.
      vocab_size: number of token ids, or None where inputs are continuous.
      input_dim: width of continuous inputs, or None where inputs are tokens.
      output_dim: logits, or numbers to predict, per position.
      max_length: longest sequence, for learned positions and for `lla.mixers.length_option`.
      positions: "learned" adds a learned vector per position to the input, "none" adds nothing, and
        "auto" is "learned" for mixers that do not see the order of tokens.
      mlp_ratio: hidden width of the MLP of a block over `width`; 0 for no MLP.
      mlp_type: "gelu", two linear maps with a GELU in between, or "swiglu", with a gate
        (arXiv 2002.05202).
      mlp_multiple_of: the hidden width is rounded up to a multiple of this.
      tie_embeddings: whether the head shares the table of token embeddings.
      embedding_std: standard deviation of the embedding tables, used without a factor; None for
        tables of variance 1 / width, multiplied by sqrt(width).
      head_bias: whether the head has a bias; excludes `tie_embeddings`.
      readout: "each" computes the output at a position from the residual stream there; "last"
        computes all outputs from the stream at the last token, see `PositionDecoder`.
      dtype: of the computation, such as "bfloat16"; norms and states of mixers stay float32.
      param_dtype: of the parameters.
    """

    width: int
    depth: int
    num_heads: int
    mixer: str
    mixer_options: dict[str, Any] = dataclasses.field(hash=False)  # a dict has no hash
    vocab_size: int | None
    input_dim: int | None
    output_dim: int
    max_length: int
    positions: Literal["auto", "learned", "none"] = "auto"
    mlp_ratio: float = 0.0
    mlp_type: Literal["gelu", "swiglu"] = "gelu"
    mlp_multiple_of: int = 1
    tie_embeddings: bool = False
    embedding_std: float | None = None
    head_bias: bool = False
    readout: Literal["each", "last"] = "each"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in (
            "width", "depth", "num_heads", "output_dim", "max_length", "mlp_multiple_of"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if (self.vocab_size is None) == (self.input_dim is None):
            raise ValueError(
                "exactly one of vocab_size and input_dim must be given, got "
                f"{self.vocab_size} and {self.input_dim}."
            )
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                *others, last = map(repr, valid)
                raise ValueError(
                    f"{name} must be {', '.join(others)} or {last}, got {getattr(self, name)!r}."
                )
        if not 0 <= self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be >= 0 and finite, got {self.mlp_ratio}.")
        if self.embedding_std is not None and not 0 < self.embedding_std < math.inf:
            raise ValueError(f"embedding_std must be > 0 and finite, got {self.embedding_std}.")
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias needs a head of its own: tie_embeddings must be False.")
        if self.tie_embeddings and self.vocab_size != self.output_dim:
            raise ValueError(
                f"tie_embeddings needs output_dim == vocab_size, got output_dim {self.output_dim} "
                f"and vocab_size {self.vocab_size}."
            )
        for name in ("dtype", "param_dtype"):
            given = getattr(self, name)
            try:
                valid = jnp.dtype(given).name in _DTYPES
            except TypeError:
                valid = False
            if not valid:
                raise ValueError(f"{name} must be one of {', '.join(_DTYPES)}, got {given!r}.")
            if jnp.dtype(given) == jnp.float64 and not jax.config.jax_enable_x64:
                raise ValueError(f"{name} 'float64' needs jax_enable_x64 (JAX_ENABLE_X64=1).")

    @property
    def learned_positions(self) -> bool:
        """Whether the model has learned position embeddings."""
        if self.positions == "auto":
            return mixers.uses_positions(self.mixer)
        return self.positions == "learned"

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP of a block; 0 if there is none."""
        if self.mlp_ratio == 0:
            return 0
        hidden = max(1, round(self.width * self.mlp_ratio))
        return -(-hidden // self.mlp_multiple_of) * self.mlp_multiple_of


_CHOICES = {
    "positions": ("auto", "learned", "none"),
    "mlp_type": ("gelu", "swiglu"),
    "readout": ("each", "last"),
}


class ModelState(NamedTuple):
    """The state of `SequenceModel.decode`; the batch is the leading axis of every array.

    Attributes:
      layers: the states of the blocks' mixers.
      lengths: int32 ``[B]``, tokens so far; of packed sequences, those of the last segment.
      segment: int32 ``[B]``, the segment id of the last token; 0 where none was given.
    """

    layers: tuple[Any, ...]
    lengths: jax.Array
    segment: jax.Array


class MLP(nnx.Module):
    """Two linear maps with a GELU between them, without biases."""

    def __init__(self, width: int, hidden: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        options = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = nnx.Linear(width, hidden, **options)
        self.down = nnx.Linear(hidden, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        options = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, **options)
        self.up = nnx.Linear(width, hidden, **options)
        self.down = nnx.Linear(hidden, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class PositionDecoder(nnx.Module):
    """The last token's vector ``[B, width]`` and positions ``[B, Q]`` -> ``[B, Q, width]``.

    The vector plus a sinusoidal embedding of the position passes through a norm, a linear map with
    a bias and a GELU, twice and without residuals. This is the decoder of the compression task of
    MAD (arXiv 2403.17844). Sines fill the first half of the channels and cosines the second, at
    ``width // 2`` angular frequencies from 1 to 1 / 10000 in geometric progression.
    """

    def __init__(self, width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        options = dict(kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norms = nnx.List([HeadNorm(width, param_dtype=param_dtype) for _ in range(2)])
        self.maps = nnx.List([nnx.Linear(width, width, **options) for _ in range(2)])

    def __call__(self, vector: jax.Array, at: jax.Array) -> jax.Array:
        width = vector.shape[-1]
        x = vector[:, None].astype(jnp.float32) + _sinusoids(at, width)
        x = x.astype(vector.dtype)
        for norm, linear in zip(self.norms, self.maps, strict=True):
            x = jax.nn.gelu(linear(norm(x)), approximate=False)
        return x


def _sinusoids(at: jax.Array, width: int) -> jax.Array:
    """Float32 ``[B, Q, width]`` of positions ``[B, Q]``; an odd width ends with a zero."""
    half = width // 2
    steps = jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1)
    rates = jnp.exp(-math.log(10_000.0) * steps)
    angles = at[:, :, None].astype(jnp.float32) * rates[None, None]
    return jnp.pad(
        jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1),
        ((0, 0), (0, 0), (0, width - 2 * half)),
    )


class Block(nnx.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` if there is an MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.mixer_norm = HeadNorm(config.width, param_dtype=param_dtype)
        options = dict(config.mixer_options)
        length_option = mixers.length_option(config.mixer)
        if length_option is not None and options.get(length_option) is None:
            options[length_option] = config.max_length
        self.mixer = mixers.create(
            config.mixer,
            config.width,
            config.num_heads,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            **options,
        )
        hidden = config.mlp_width
        self.has_mlp = hidden > 0
        if self.has_mlp:
            self.mlp_norm = HeadNorm(config.width, param_dtype=param_dtype)
            kind = SwiGLU if config.mlp_type == "swiglu" else MLP
            self.mlp = kind(config.width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        mixed = self.mixer(self.mixer_norm(x), segment_ids=segment_ids)
        return self._add_mlp(x + mixed.astype(x.dtype))

    def decode(
        self,
        x: jax.Array,
        state: Any,
        new_lengths: jax.Array | None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The next tokens, see `lla.mixers.Mixer`; the state is that of the mixer."""
        x_in = self.mixer_norm(x)
        mixed, state = self.mixer.decode(x_in, state, new_lengths, segment_ids=segment_ids)
        return self._add_mlp(x + mixed.astype(x.dtype)), state

    def _add_mlp(self, x):
        if self.has_mlp:
            x = x + self.mlp(self.mlp_norm(x)).astype(x.dtype)
        return x


class SequenceModel(nnx.Module):
    """Inputs ``[B, T]`` of tokens or ``[B, T, input_dim]`` -> outputs ``[B, T, output_dim]``.

    Pre-norm blocks on a residual stream, a final norm, a linear head. Embeddings of tokens and
    positions have a variance of about 1 per coordinate in the stream: their tables have a variance
    of 1 / width and are multiplied by sqrt(width), so that a tied head gives logits of variance 1
    (as in Gemma, arXiv 2403.08295; for positions [ours]). With `ModelConfig.embedding_std` tables
    have that standard deviation and no factor.

    `decode` continues sequences from a state by one or more tokens at a time; `lla.generate`
    samples with it.

    Args:
      config: what to build.
      rngs: Flax random streams; uses ``params``.

    Raises:
      ValueError: an unknown mixer, or options that do not fit it.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.config = config
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # Rows are looked up in the dtype of the parameters and cast afterwards: the gradient of a
        # table is a sum over all tokens, for which 16 bits are inaccurate, and slow on a GPU.
        tables = options | {"dtype": param_dtype}
        if config.embedding_std is not None:
            tables["embedding_init"] = nnx.initializers.normal(config.embedding_std)
        if config.vocab_size is not None:
            self.embed = nnx.Embed(config.vocab_size, config.width, **tables)
        else:
            self.embed = nnx.Linear(config.input_dim, config.width, use_bias=False, **options)
        if config.learned_positions:
            self.positions = nnx.Embed(config.max_length, config.width, **tables)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        if config.readout == "last":
            self.decoder = PositionDecoder(config.width, **options)
        self.norm = HeadNorm(config.width, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.width, config.output_dim, use_bias=config.head_bias, **options
            )

    def __call__(
        self,
        inputs: jax.Array,
        at: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Outputs ``[B, T, output_dim]`` in `config.dtype`.

        Args:
          inputs: int ``[B, T]`` or ``[B, T, input_dim]``. Tokens outside the vocabulary give
            meaningless outputs, as in `flax.nnx.Embed`.
          at: int ``[B, Q]``, the positions to return, ``[B, Q, output_dim]``, which saves the cost
            of the other logits. None for all.
          segment_ids: int ``[B, T]``, of packed sequences, each a run of equal ids: outputs are
            those of the segments on their own (`lla.mixers.Mixer`), and learned positions count
            from 0 in each. None for one sequence.

        Raises:
          ValueError: inputs of the wrong shape or dtype, or longer than `max_length` with learned
            positions. For packed sequences this is the longest segment, if ids are known; under
            `jax.jit` positions that do not exist give NaN.
          NotImplementedError: packed sequences with ``readout="last"``.
        """
        config = self.config
        x = self._embed(inputs)
        if segment_ids is not None and config.readout == "last":
            raise NotImplementedError(
                "a model with readout 'last' reads all outputs from one token: it takes no "
                "segment_ids."
            )
        if config.learned_positions and segment_ids is not None:
            starts = segments.starts(segment_ids, x.shape[:2])
            x = x + self._positions_within(segments.positions(starts))
        elif config.learned_positions:
            length = inputs.shape[1]
            if length > config.max_length:
                raise ValueError(
                    f"inputs {inputs.shape} are longer than max_length {config.max_length}."
                )
            positions = self._position(jnp.arange(length, dtype=jnp.int32))
            x = x + jnp.broadcast_to(positions[None], x.shape)
        for block in self.blocks:
            x = block(x, segment_ids=segment_ids)
        if config.readout == "last":
            if at is None:
                at = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
            x = self.decoder(x[:, -1], at)
        elif at is not None:
            x = jnp.take_along_axis(x, at[:, :, None], axis=1)
        return self._read(x)

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary; None if inputs are continuous."""
        return self.config.vocab_size

    @property
    def length_limit(self) -> int | None:
        """The longest sequence that the model accepts; None if there is no limit."""
        return self.config.max_length if self.config.learned_positions else None

    def init_state(self, batch: int, max_length: int, dtype: Any = None) -> ModelState:
        """The state of `decode` before the first token.

        Args:
          batch: number of sequences.
          max_length: capacity in tokens per sequence.
          dtype: of cached keys and values; None means `config.dtype`.

        Raises:
          ValueError: `max_length` is below 1, or exceeds the number of learned positions.
          NotImplementedError: a model with ``readout="last"``.
        """
        if self.config.readout == "last":
            raise NotImplementedError(
                "a model with readout 'last' cannot decode: no output exists before the last token."
            )
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}.")
        if self.length_limit is not None and max_length > self.length_limit:
            raise ValueError(
                f"max_length ({max_length}) exceeds the {self.length_limit} learned positions of "
                "the model."
            )
        layers = tuple(block.mixer.init_state(batch, max_length, dtype) for block in self.blocks)
        zeros = jnp.zeros((batch,), jnp.int32)
        return ModelState(layers, zeros, zeros)

    def decode(
        self,
        inputs: jax.Array,
        state: ModelState,
        new_lengths: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, ModelState]:
        """The outputs of the next T tokens, equal to theirs in a call on the whole sequence.

        Args:
          inputs: int ``[B, T]`` or ``[B, T, input_dim]``; T = 1 is a step of decoding.
          state: from `init_state`, or from the call before. Donate it to a compiled step.
          new_lengths: int ``[B]``, in 0 ... T: how many of the T tokens of a sequence exist. The
            others are padding: they do not change the state, and their outputs have no meaning.
            None for all.
          segment_ids: int ``[B, T]``, of packed sequences, see `lla.mixers.Mixer`; None: all tokens
            continue the last segment.

        Returns:
          ``[B, T, output_dim]`` in `config.dtype`, and the new state. Once a sequence exceeds the
          capacity, its outputs are NaN.

        Raises:
          ValueError: inputs of the wrong shape or dtype, or more tokens than there is room for
            where lengths are known.
        """
        x = self._embed(inputs)
        tokens, lengths = (
            NewTokens(self, x, {}, new_lengths, segment_ids, state.segment),
            state.lengths,
        )
        x = tokens.x
        if tokens.starts is not None:
            lengths = tokens.reset(lengths)
        if self.config.learned_positions and tokens.starts is not None:
            at = tokens.mask(tokens.positions(lengths))
            x = x + tokens.mask(self._positions_within(at))
        elif self.config.learned_positions:
            x = x + tokens.mask(self._positions_behind(lengths, tokens.counts, x.shape))
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer = block.decode(x, layer, new_lengths, segment_ids=segment_ids)
            layers.append(layer)
        state = ModelState(tuple(layers), tokens.lengths_after(lengths), tokens.segment)
        return self._read(x), state

    def _positions_behind(self, lengths, counts, shape):
        """Embeddings of the next positions; NaN for sequences that are too long."""
        room = self.config.max_length
        check_room(lengths, counts, room)
        offsets = jnp.arange(shape[1], dtype=jnp.int32)[None]
        at = jnp.broadcast_to(lengths[:, None], shape[:2]) + jnp.broadcast_to(offsets, shape[:2])
        positions = self._position(jnp.clip(at, 0, room - 1))
        return nan_where(lengths + counts > room, positions)

    def _positions_within(self, at):
        """Embeddings of positions ``[B, T]``; NaN for positions that do not exist."""
        room = self.config.max_length
        if not isinstance(at, jax.core.Tracer) and at.size and int(at.max()) >= room:
            raise ValueError(
                f"a segment has {int(at.max()) + 1} tokens or more, max_length is {room}."
            )
        positions = self._position(jnp.clip(at, 0, room - 1))
        return nan_where(at >= room, positions)

    def _embed(self, inputs):
        """Embedded inputs ``[B, T, width]``, without positions."""
        config = self.config
        tokens = config.vocab_size is not None
        if tokens and (inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer)):
            raise ValueError(
                f"inputs must be integers of shape [B, T], got {inputs.dtype} {inputs.shape}."
            )
        if not tokens and (inputs.ndim != 3 or inputs.shape[-1] != config.input_dim):
            raise ValueError(
                f"inputs must have shape [B, T, {config.input_dim}], got {inputs.shape}."
            )
        embedded = self.embed(inputs)
        return self._scaled(embedded) if tokens else embedded

    def _position(self, at):
        return self._scaled(self.positions(at))

    def _scaled(self, rows):
        """Rows of a table as they enter the residual stream."""
        factor = self.config.width**0.5 if self.config.embedding_std is None else 1.0
        return (rows * factor).astype(jnp.dtype(self.config.dtype))

    def _read(self, x):
        x = self.norm(x)
        if self.config.tie_embeddings:
            table = self.embed.embedding[...].astype(jnp.dtype(self.config.dtype))
            return jnp.matmul(x, table.T)
        return self.head(x)
