"""Optimisers as gradient transformations that leave out the learning rate.

The trainer multiplies by the rate, which may then be traced: one program trains many rates.
"""

import jax
import jax.numpy as jnp
import optax

from lla.training.settings import Optimizer

Params = dict[str, jax.Array]  # by path, such as "blocks.0.mixer.query.kernel"


def schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """The factor of the peak learning rate at update `n`, from 0 to `steps - 1`.

    Linear warm-up over ``round(warmup_fraction * steps)`` updates, the last of which has the factor
    1, then a cosine that would reach `final_fraction` at update `steps`. No update has a rate of
    zero.
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
    """Gradients -> the direction that, times the learning rate, is subtracted from the parameters.

    Clipping, then AdamW; or Muon (`optax.contrib.muon`) for the linear maps of blocks and AdamW for
    the rest, both with Nesterov momentum. Muon's updates are scaled to the root mean square 0.2
    that is typical of AdamW (arXiv 2502.16982), so that a learning rate and a decay mean the same
    for both.

    Args:
      settings: the optimiser and its constants.
      spared: paths of parameters without weight decay.
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
    # Optax relies on implicit promotion, which the caller may have switched off.
    def init(params):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = rule.init(params)
            widest = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        # Muon's constants have JAX's default dtype; under x64 checkpoints would differ.
        return jax.tree.map(
            lambda leaf: leaf.astype(widest) if leaf.dtype == jnp.float64 else leaf, state
        )

    def update(gradients, state, params=None):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return rule.update(gradients, state, params)

    return optax.GradientTransformation(init, update)


def _decays(path: str, settings: Optimizer) -> bool:
    # By name: the bias of a projection to heads has two axes like a kernel.
    leaf = path.rsplit(".", 1)[-1]
    return leaf == "kernel" or (leaf == "embedding" and settings.decay_embeddings)


def _matrices(
    params: Params, spared: frozenset[str]
) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """How Muon reads a kernel as a matrix; None leaves a parameter to AdamW.

    Muon updates the linear maps inside blocks. A projection to or from heads is one matrix, with
    the heads and their width as one axis.
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
