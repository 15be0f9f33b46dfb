"""Schedule, masks and the two rules, against what they are defined as."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla import mixers
from lla.models import ModelConfig
from lla.training.optimizer import direction, schedule
from lla.training.settings import Optimizer
from lla.training.trainer import abstract_model

PARAMS = {
    "embed.embedding": (8, 4),
    "blocks.0.mixer.query.kernel": (4, 2, 3),
    "blocks.0.mixer.query.bias": (2, 3),
    "blocks.0.mixer.out.kernel": (2, 3, 4),
    "blocks.0.mixer.ridge.kernel": (4, 2),
    "blocks.0.mixer_norm.scale": (4,),
    "head.kernel": (4, 8),
}
SPARED = frozenset({"blocks.0.mixer.ridge.kernel"})


def draw(seed):
    keys = jax.random.split(jax.random.key(seed), len(PARAMS))
    return {
        path: jax.random.normal(key, shape)
        for key, (path, shape) in zip(keys, PARAMS.items(), strict=True)
    }


@pytest.mark.parametrize("warmup, final", [(0.1, 0.0), (0.0, 0.1), (1.0, 0.0)])
def test_the_schedule_is_a_ramp_and_a_cosine(warmup, final):
    steps = 40
    factor = schedule(Optimizer(warmup_fraction=warmup, final_fraction=final), steps)
    ramp = round(warmup * steps)
    for step in range(steps):
        if step < ramp:
            expected = (step + 1) / ramp
        else:
            angle = math.pi * (step + 1 - ramp) / (steps + 1 - ramp)
            expected = final + (1 - final) * (1 + math.cos(angle)) / 2
        assert float(factor(jnp.int32(step))) == pytest.approx(expected, abs=1e-6), step
        assert expected > 0  # no update is wasted


def decayed(settings):
    """Paths that shrink when all gradients are zero, which AdamW and Muon turn into nothing."""
    rule, params = direction(settings, SPARED), draw(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = rule.update(zeros, rule.init(params), params)
    moved = {path for path, change in changes.items() if np.any(np.abs(change) > 1e-7)}
    for path in moved:
        np.testing.assert_allclose(changes[path], settings.weight_decay * params[path], rtol=1e-5)
    return moved


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_shrinks_linear_maps_alone(name):
    maps = {
        "blocks.0.mixer.query.kernel",
        "blocks.0.mixer.out.kernel",
        "head.kernel",
    }
    assert decayed(Optimizer(name=name, weight_decay=0.3)) == maps
    everything = Optimizer(name=name, weight_decay=0.3, decay_embeddings=True)
    assert decayed(everything) == maps | {"embed.embedding"}
    assert decayed(Optimizer(name=name, weight_decay=0.0)) == set()


def test_ridges_and_rates_of_mixers_are_spared():
    def spared(name, **options):
        config = ModelConfig(
            width=16,
            depth=1,
            num_heads=2,
            mixer=name,
            mixer_options={**mixers.options(name), **options},
            vocab_size=4,
            input_dim=None,
            output_dim=4,
            max_length=4,
        )
        return abstract_model(config)[2]

    assert "blocks.0.mixer.A_log" in spared("mamba2")
    ridges = spared("lla", ridge_type="per_token")
    assert len(ridges) == 2 and all(".ridge." in path for path in ridges)


def test_adamw_is_the_published_rule():
    settings = Optimizer(clip_norm=0.0, weight_decay=0.1, b1=0.8, b2=0.9)
    rule, params = direction(settings, SPARED), draw(0)
    state, first, second = rule.init(params), 0.0, 0.0
    path = "head.kernel"
    for count in range(1, 4):
        gradients = draw(count)
        changes, state = rule.update(gradients, state, params)
        gradient = np.asarray(gradients[path], np.float64)
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        expected = (first / (1 - 0.8**count)) / (np.sqrt(second / (1 - 0.9**count)) + 1e-8)
        expected += 0.1 * np.asarray(params[path], np.float64)
        np.testing.assert_allclose(changes[path], expected, rtol=1e-5)


def test_clipping_scales_all_gradients_together():
    settings = Optimizer(clip_norm=0.5, weight_decay=0.0, b1=0.0, b2=0.0)
    rule, params = direction(settings, SPARED), draw(0)
    gradients = draw(1)
    _, state = rule.update(gradients, rule.init(params), params)
    clipped = state[1].mu  # with b1 = 0 the first moment is the gradient
    norm = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in gradients.values()))
    for path, leaf in gradients.items():
        np.testing.assert_allclose(clipped[path], leaf * 0.5 / norm, rtol=1e-5)


def test_muon_makes_maps_of_blocks_orthogonal_and_leaves_the_rest_to_adamw():
    rule, params = direction(Optimizer(name="muon", weight_decay=0.0), SPARED), draw(0)
    gradients = draw(1)
    changes, _ = rule.update(gradients, rule.init(params), params)
    for path, shape in {
        "blocks.0.mixer.query.kernel": (4, 6),
        "blocks.0.mixer.out.kernel": (6, 4),
    }.items():
        singular = np.linalg.svd(np.asarray(changes[path]).reshape(shape), compute_uv=False)
        # 0.2 sqrt(longer side) for each, up to what five iterations leave.
        ratio = singular / (0.2 * math.sqrt(6))
        assert ratio.min() > 0.6 and ratio.max() < 1.3, path
    for path in ("embed.embedding", "head.kernel", "blocks.0.mixer.ridge.kernel"):
        # The first step of Adam is the sign of the gradient, times a constant with Nesterov's.
        ratio = np.asarray(changes[path]) / np.sign(gradients[path])
        assert ratio.min() > 0 and np.ptp(ratio) < 1e-3 * ratio.min(), path
