"""A residual model around any mixer: embeddings, blocks, a head for tokens or for regression."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lla import mixers
from lla.nn.layer import HeadNorm


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `SequenceModel` is built from.

    Attributes:
      width: of the residual stream.
      depth: number of blocks.
      num_heads: heads of every mixer.
      mixer: name of the mechanism, one of `lla.mixers.names()`.
      mixer_options: its options; `lla.mixers.options(mixer)` lists them.
      vocab_size: number of token ids, or None where inputs are continuous.
      input_dim: width of continuous inputs, or None where inputs are tokens.
      output_dim: logits, or numbers to predict, per position.
      max_length: longest sequence, read by learned positions alone.
      positions: "learned" adds a vector per position to the input, "none" does not, "auto" does
        for mixers that cannot tell the order of tokens by themselves.
      mlp_ratio: width of the hidden layer of a block's MLP over `width`; 0 for no MLP.
      tie_embeddings: whether logits are products with the token embeddings.
      dtype: of the computation, such as "bfloat16"; norms and states of mixers are float32 anyway.
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
    tie_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("width", "depth", "num_heads", "output_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if (self.vocab_size is None) == (self.input_dim is None):
            raise ValueError(
                "exactly one of vocab_size and input_dim must be given, got "
                f"{self.vocab_size} and {self.input_dim}."
            )
        if self.positions not in ("auto", "learned", "none"):
            raise ValueError(
                f"positions must be 'auto', 'learned' or 'none', got {self.positions!r}."
            )
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be >= 0, got {self.mlp_ratio}.")
        if self.tie_embeddings and self.vocab_size != self.output_dim:
            raise ValueError(
                f"tie_embeddings needs as many logits as tokens, got output_dim {self.output_dim} "
                f"and vocab_size {self.vocab_size}."
            )
        for name in ("dtype", "param_dtype"):
            try:
                inexact = jnp.issubdtype(jnp.dtype(getattr(self, name)), jnp.floating)
            except TypeError:
                inexact = False
            if not inexact:
                raise ValueError(
                    f"{name} must name a floating point type, got {getattr(self, name)!r}."
                )

    @property
    def learned_positions(self) -> bool:
        """Whether there is a vector per position."""
        if self.positions == "auto":
            return mixers.uses_positions(self.mixer)
        return self.positions == "learned"


class MLP(nnx.Module):
    """Two linear maps with a GELU between them, without biases."""

    def __init__(self, width: int, hidden: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        options = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = nnx.Linear(width, hidden, **options)
        self.down = nnx.Linear(hidden, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` where there is an MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.mixer_norm = HeadNorm(config.width, param_dtype=param_dtype)
        self.mixer = mixers.create(
            config.mixer,
            config.width,
            config.num_heads,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            **config.mixer_options,
        )
        self.has_mlp = config.mlp_ratio > 0
        if self.has_mlp:
            self.mlp_norm = HeadNorm(config.width, param_dtype=param_dtype)
            hidden = max(1, round(config.width * config.mlp_ratio))
            self.mlp = MLP(config.width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.mixer(self.mixer_norm(x)).astype(x.dtype)
        if self.has_mlp:
            x = x + self.mlp(self.mlp_norm(x)).astype(x.dtype)
        return x


class SequenceModel(nnx.Module):
    """Inputs ``[B, T]`` of tokens or ``[B, T, input_dim]`` -> outputs ``[B, T, output_dim]``.

    Pre-norm blocks on a residual stream, a last norm, a linear head. Embeddings of tokens and of
    positions enter the stream with a variance of about 1 per coordinate: their tables have
    1 / width and are multiplied by sqrt(width), so that the same table gives logits of variance 1
    where it is tied to the head (as in Gemma, arXiv 2403.08295; that of positions is ours).

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
        if config.vocab_size is not None:
            self.embed = nnx.Embed(config.vocab_size, config.width, **options)
        else:
            self.embed = nnx.Linear(config.input_dim, config.width, use_bias=False, **options)
        if config.learned_positions:
            self.positions = nnx.Embed(config.max_length, config.width, **options)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = HeadNorm(config.width, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.head = nnx.Linear(config.width, config.output_dim, use_bias=False, **options)

    def __call__(self, inputs: jax.Array, at: jax.Array | None = None) -> jax.Array:
        """Outputs ``[B, T, output_dim]`` in `config.dtype`.

        Args:
          inputs: int ``[B, T]`` or ``[B, T, input_dim]``.
          at: int ``[B, Q]``, the positions whose outputs are wanted, ``[B, Q, output_dim]``: many
            logits at few positions cost less. None for all.

        Raises:
          ValueError: inputs of another kind, or longer than `max_length` with learned positions.
        """
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
        root = config.width**0.5
        x = self.embed(inputs) * root if tokens else self.embed(inputs)
        if config.learned_positions:
            length = inputs.shape[1]
            if length > config.max_length:
                raise ValueError(
                    f"inputs {inputs.shape} are longer than max_length {config.max_length}."
                )
            positions = self.positions(jnp.arange(length, dtype=jnp.int32)) * root
            x = x + jnp.broadcast_to(positions[None], x.shape)
        for block in self.blocks:
            x = block(x)
        if at is not None:
            x = jnp.take_along_axis(x, at[:, :, None], axis=1)
        x = self.norm(x)
        return self.embed.attend(x) if config.tie_embeddings else self.head(x)
