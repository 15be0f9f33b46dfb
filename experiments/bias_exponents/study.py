"""The trials: exact integrals, and the operators of `lla` on a grid of keys and on random keys.

A trial is one target, dimension and ridge for the integrals, one radius for the grid of keys, one
seed for the random keys. Its record holds every bandwidth.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lla
from lla.experiments.bias_exponents import population
from lla.typed import LARGEST_SEED, check_range

# (factor, power): the ridge is factor * bandwidth^power.
Ridge = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one record is computed from."""

    id: str
    cost: float  # about the seconds on one core; only used to estimate the time left
    compute: Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """Squared bias against the bandwidth; fields as in configs/bias_exponents.py."""

    experiment: str
    settings: tuple[tuple[str, int, Ridge], ...]
    bandwidths: tuple[float, ...]
    fit_ranges: tuple[tuple[float, float], ...]
    operator_target: str
    operator_circles: tuple[tuple[float, Ridge], ...]
    operator_keys: int
    operator_bandwidths: tuple[float, ...]
    operator_range: tuple[float, float]
    seeds: tuple[int, ...]
    sample_keys: int
    replicates: int
    noise: float
    sample_circle: tuple[float, Ridge]
    sample_bandwidths: tuple[float, ...]

    def __post_init__(self):
        for target in (self.operator_target, *(setting[0] for setting in self.settings)):
            if target not in population.TARGETS:
                valid = ", ".join(population.TARGETS)
                raise ValueError(f"targets may be {valid}; got {target!r}.")
        if not all(1 <= dim <= 3 for _, dim, _ in self.settings):
            raise ValueError("dimensions may be 1, 2 and 3: the queries are a grid.")
        for bandwidths in (self.bandwidths, self.operator_bandwidths, self.sample_bandwidths):
            if not all(0 < bandwidth <= 0.2 for bandwidth in bandwidths):
                raise ValueError(f"bandwidths must lie in (0, 0.2]; got {bandwidths}.")
        fits = [(self.bandwidths, span) for span in self.fit_ranges]
        for bandwidths, span in (*fits, (self.operator_bandwidths, self.operator_range)):
            if np.sum(within(bandwidths, *span)) < 2:
                raise ValueError(f"fewer than two bandwidths lie in the range {span} of a fit.")
        check_range(0, LARGEST_SEED, seeds=self.seeds)
        check_range(2, operator_keys=self.operator_keys, sample_keys=self.sample_keys)
        check_range(0, noise=self.noise)
        if self.replicates < 2:
            raise ValueError(f"replicates must be >= 2 for a variance; got {self.replicates}.")

    def trials(self) -> list[Trial]:
        """All trials: integrals, then grids of keys, then random keys."""
        trials = []
        for target, dim, ridge in self.settings:
            name = f"integrals-{target}-d{dim}-ridge{_plain(ridge)}"
            cost = (0.1, 0.2, 2.0)[dim - 1]
            trials.append(Trial(name, cost, functools.partial(self._integrals, target, dim, ridge)))
        for radius, ridge in self.operator_circles:
            compute = functools.partial(self._operators, radius, ridge)
            name = f"grid-radius{radius:g}-ridge{_plain(ridge)}"
            trials.append(Trial(name, 2.0, compute))
        for seed in self.seeds:
            trials.append(Trial(f"random-seed{seed}", 12.0, functools.partial(self._random, seed)))
        return trials

    def run(self, trial: Trial) -> dict[str, Any]:
        """The record of a trial, without its name."""
        return trial.compute()

    def _integrals(self, target, dim, ridge):
        results = []
        for bandwidth in self.bandwidths:
            size = ridge[0] * bandwidth ** ridge[1]
            fits = population.squared_bias(population.TARGETS[target], dim, bandwidth, size)
            results.append({"bandwidth": bandwidth, **fits})
        return _record("integrals", target, dim, ridge, None, results)

    def _operators(self, radius, ridge):
        target = population.TARGETS[self.operator_target]
        keys = (np.arange(self.operator_keys) + 0.5) / self.operator_keys
        query, measure = population.query_rule(min(self.operator_bandwidths))
        query = np.concatenate([[0.0], query])
        results = []
        for bandwidth in self.operator_bandwidths:
            size = ridge[0] * bandwidth ** ridge[1]
            exact = population.arc_biases(target, query, bandwidth, radius, size)
            flat = population.flat_biases(target, query, bandwidth, 0.0)
            outputs = attend(query, keys, target.value(keys)[:, None], radius, bandwidth, size)
            result = {"bandwidth": bandwidth}
            for fit, output, integral, line in zip(
                population.FITS, outputs, exact, flat, strict=True
            ):
                bias = output[:, 0] - target.value(query)
                worst = np.abs(bias - integral).max() / np.abs(integral).max()
                result[fit] = {
                    **_squares(bias, measure),
                    **{f"{key}_integral": v for key, v in _squares(integral, measure).items()},
                    **{f"{key}_line": v for key, v in _squares(line, measure).items()},
                    "worst_difference": float(worst),
                }
            results.append(result)
        return _record("grid", self.operator_target, 1, ridge, radius, results)

    def _random(self, seed):
        target = population.TARGETS[self.operator_target]
        radius, ridge = self.sample_circle
        rng = np.random.default_rng([seed, self.sample_keys])
        keys = rng.uniform(size=(self.replicates, self.sample_keys))
        values = target.value(keys)
        # Two channels: the same weights give the fit of exact and of noisy values.
        values = np.stack([values, values + self.noise * rng.normal(size=keys.shape)], axis=-1)
        query, measure = population.query_rule(min(self.sample_bandwidths))
        query = np.concatenate([[0.0], query])
        results = []
        for bandwidth in self.sample_bandwidths:
            size = ridge[0] * bandwidth ** ridge[1]
            outputs = attend(query, keys, values, radius, bandwidth, size)
            result = {"bandwidth": bandwidth}
            for fit, output in zip(population.FITS, outputs, strict=True):
                errors = output - target.value(query)[:, None]
                result[fit] = _statistics(errors, measure)
            results.append(result)
        return {"seed": seed} | _record("random", self.operator_target, 1, ridge, radius, results)


def _record(kind, target, dim, ridge, radius, results):
    where = {"kind": kind, "target": target, "dim": dim, "ridge": ridge, "radius": radius}
    return {**where, "results": results}


def within(bandwidths, low: float, high: float) -> np.ndarray:
    """Which of the bandwidths lie in the closed range, up to rounding."""
    bandwidths = np.asarray(bandwidths)
    return (bandwidths >= low * (1 - 1e-9)) & (bandwidths <= high * (1 + 1e-9))


def attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    radius: float,
    bandwidth: float,
    ridge: float,
) -> tuple[np.ndarray, np.ndarray]:
    """`lla`'s softmax and local linear attention with keys on a circle, in float64.

    On a circle the weights exp(q.k / bandwidth^2) are Gaussian in the distance of q and k.

    Args:
      query: places [T] along the arc.
      keys: places [S], or [R, S] for R data sets.
      values: [S, V] or [R, S, V].

    Returns:
      two arrays [T, V] or [R, T, V].
    """
    with jax.enable_x64(True):
        numbers = (jnp.asarray(x, jnp.float64) for x in (1 / bandwidth**2, ridge))
        places = (_on_circle(x, radius) for x in (query, keys))
        outputs = _attend(*map(jnp.asarray, places), jnp.asarray(values), *numbers)
        outputs = tuple(np.asarray(output) for output in outputs)
    assert all(output.dtype == np.float64 for output in outputs)
    return outputs


@jax.jit
def _attend(query, keys, values, scale, ridge):
    def one(data):
        key, value = (array[:, None] for array in data)
        shared = {"scale": scale, "is_causal": False, "implementation": "reference"}
        constant = lla.softmax_attention(query[:, None], key, value, **shared)
        linear = lla.local_linear_attention(query[:, None], key, value, ridge=ridge, **shared)
        return constant[:, 0], linear[:, 0]

    return one((keys, values)) if keys.ndim == 2 else jax.lax.map(one, (keys, values))


def _on_circle(places, radius):
    angle = (places - 0.5) / radius
    return radius * np.stack([np.sin(angle), np.cos(angle)], axis=-1)


def _squares(bias, measure):
    return {"integrated": float(measure @ bias[1:] ** 2), "boundary": float(bias[0] ** 2)}


def _statistics(errors, measure):
    """From errors [R, T, (exact values, noisy values)]; the query at the boundary is the first."""
    replicates = len(errors)
    clean, noisy = errors[:, :, 0], errors[:, :, 1]
    # The square of a mean over few data sets is too large by its own variance.
    bias = clean.mean(axis=0) ** 2 - clean.var(axis=0, ddof=1) / replicates
    parts = {"bias": bias, "variance": noisy.var(axis=0, ddof=1), "error": (noisy**2).mean(axis=0)}
    return {
        name: {"integrated": float(measure @ part[1:]), "boundary": float(part[0])}
        for name, part in parts.items()
    }


def _plain(ridge):
    return f"{ridge[0]:g}b^{ridge[1]:g}"


def ridge_name(ridge: Ridge) -> str:
    """The ridge as a formula of the bandwidth b."""
    factor, power = ridge
    if factor == 0 or power == 0:
        return f"{factor:g}"
    return f"{factor:g} b^{power:g}" if not math.isclose(factor, 1) else f"b^{power:g}"
