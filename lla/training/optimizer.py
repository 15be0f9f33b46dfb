"""Optimisers, as directions that a scheduled learning rate multiplies afterwards.

The rate is a factor outside, so that it may be a traced number: one program trains many rates.
"""

import jax
import jax.numpy as jnp
import optax

from lla.training.settings import Optimizer

Params = dict[str, jax.Array]  # by path, such as "blocks.0.mixer.query.kernel"


def schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Factor of the peak learning rate for update `n`, from 0 to `steps - 1`.

    Linear warm-up over ``round(warmup_fraction * steps)`` updates, whose last one has the factor 1,
    then a cosine that would reach `final_fraction` at update `steps`: no update is wasted on a rate
    of zero.
    """
    warmup = min(round(settings.warmup_fraction * steps), steps)
    curve = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else 1.0,
        peak_value=1.0,
        warmup_steps=warmup,
        decay_steps=steps + 1,
        end_value=settings.final_fraction,
    )
    return lambda step: curve(jnp.asarray(step, jnp.float32) + 1)


def direction(settings: Optimizer, spared: frozenset[str]) -> optax.GradientTransformation:
    """Gradients -> what the learning rate times is subtracted from the parameters.

    Clipping, then AdamW, or Muon (`optax.contrib.muon`) for the linear maps of blocks with AdamW
    for the rest (both with Nesterov's momentum). Muon's steps are scaled to the root mean square
    0.2 that is usual for AdamW's (arXiv 2502.16982), so that one learning rate and one decay mean
    the same for both.

    Args:
      settings: which, and its constants.
      spared: paths of parameters that never decay.
    """

    def decays(params: Params) -> dict[str, bool]:
        return {path: path not in spared and _decays(path, settings) for path in params}

    if settings.name == "muon":
        rule = optax.chain(
            optax.contrib.muon(
                learning_rate=1.0,
                adam_b1=settings.b1,
                adam_b2=settings.b2,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=lambda params: _matrices(params, spared),
            ),
            optax.scale(-1.0),
        )
    else:
        rule = optax.scale_by_adam(b1=settings.b1, b2=settings.b2)
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return _lenient(
        optax.chain(clip, rule, optax.add_decayed_weights(settings.weight_decay, decays))
    )


def _lenient(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    # Optax relies on implicit promotion, which a caller of ours may have switched off.
    def init(params):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = rule.init(params)
            widest = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        # Muon's constants take JAX's widest type, which would make other checkpoints under x64.
        return jax.tree.map(
            lambda leaf: leaf.astype(widest) if leaf.dtype == jnp.float64 else leaf, state
        )

    def update(gradients, state, params=None):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return rule.update(gradients, state, params)

    return optax.GradientTransformation(init, update)


def _decays(path: str, settings: Optimizer) -> bool:
    # A bias of a projection to heads has two axes: the name tells, not the shape.
    leaf = path.rsplit(".", 1)[-1]
    return leaf == "kernel" or (leaf == "embedding" and settings.decay_embeddings)


def _matrices(
    params: Params, spared: frozenset[str]
) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """How Muon reads a kernel as a matrix; None leaves a parameter to AdamW.

    Muon gets the linear maps inside blocks. Heads are part of the width that they come from or go
    to, so that a map to heads is one matrix.
    """
    numbers = {}
    for path, leaf in params.items():
        *modules, name = path.split(".")
        numbers[path] = None
        if isinstance(leaf, optax.MaskedNode) or path in spared:
            continue
        if name == "kernel" and modules[0] == "blocks" and leaf.ndim > 1:
            inputs = tuple(range(leaf.ndim - 1)) if modules[-1] == "out" else (0,)
            outputs = tuple(axis for axis in range(leaf.ndim) if axis not in inputs)
            numbers[path] = optax.contrib.MuonDimensionNumbers(inputs, outputs)
    return numbers
