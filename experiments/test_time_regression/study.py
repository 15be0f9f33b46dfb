"""The trials of the study, each of which gives one record.

A trial is one estimator with one choice of options on one setting (a synthetic task or a real
series). Its record has the errors themselves. Every table and figure, with its bands and its
selection of options, is made from the records alone.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lla import estimators
from lla.tasks import series
from lla.tasks.test_time_regression import Batch, Task, generate, oracle
from lla.typed import LARGEST_SEED, check_range

# Seconds on two cores, roughly, to estimate the time left: per sequence of 1024 pairs at dim 64; to
# compile an estimator for a dimension; to compile and draw the data of a setting.
_RUN, _COMPILE, _DRAW = {"lla": 0.08, "mesanet": 0.03}, 1.2, 1.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one record is computed from."""

    setting: Any
    label: str
    estimator: str
    options: tuple[tuple[str, Any], ...]
    traced: frozenset[str]
    cost: float

    @property
    def id(self) -> str:
        """A name that no other trial has."""
        given = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.setting.name}/{self.label}[{given}]"

    @property
    def choice(self) -> dict[str, Any]:
        """What the record says about the estimator."""
        return {"label": self.label, "estimator": self.estimator, "options": dict(self.options)}


def _expand(config: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, tuple, frozenset]]:
    """(label, estimator, options, traced) for every point of the grid of every estimator.

    Numbers that a grid varies are traced, so that one compilation serves the whole grid.
    """
    for label, entry in config.items():
        fixed = {key: value for key, value in entry.items() if key not in ("name", "grid")}
        grid = entry.get("grid", {})
        for point in itertools.product(*grid.values()):
            options = fixed | dict(zip(grid, point, strict=True))
            estimators.create(entry["name"], **options)  # a wrong option raises here
            traced = frozenset(key for key in grid if isinstance(options[key], float))
            yield label, entry["name"], tuple(options.items()), traced


@dataclasses.dataclass(frozen=True)
class Setting:
    """A synthetic task and how many sequences of it to draw."""

    kind: str
    task: Task
    sequences: int

    @property
    def name(self) -> str:
        return f"{self.kind}-d{self.task.dim}-S{self.task.segment_length}"


@dataclasses.dataclass(frozen=True)
class SyntheticStudy:
    """Errors on the synthetic task; fields as in configs/test_time_regression.py."""

    experiment: str
    seed: int
    dim: int
    segment_length: int
    length: int
    spread: float
    noise: float
    frequency: float
    sequences: int
    dims: tuple[int, ...]
    segment_lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    full_grid: bool
    scan_sequences: int
    group: int
    position_bin: int
    estimators: Mapping[str, Mapping[str, Any]]

    def settings(self) -> list[Setting]:
        """The centre of the scans first, then the scans through it, or the whole grid."""
        kinds = ("piecewise", *self.kinds)
        wanted = [("piecewise", self.dim, self.segment_length)]
        if self.full_grid:
            wanted += itertools.product(("piecewise",), self.dims, self.segment_lengths)
            wanted += itertools.product(kinds, (self.dim,), self.segment_lengths)
        wanted += [("piecewise", self.dim, length) for length in self.segment_lengths]
        wanted += [(kind, self.dim, self.segment_length) for kind in kinds]
        wanted += [("piecewise", dim, self.segment_length) for dim in self.dims]
        return [self._setting(*each) for each in dict.fromkeys(wanted)]

    def _setting(self, kind: str, dim: int, segment_length: int) -> Setting:
        if kind not in ("piecewise", "iid_keys", "smooth"):
            raise ValueError(f"kinds may hold 'iid_keys' and 'smooth'; got {kind!r}.")
        task = Task(
            dim=dim,
            length=self.length,
            segment_length=segment_length,
            spread=self.spread,
            noise=self.noise,
            target="smooth" if kind == "smooth" else "piecewise_linear",
            frequency=self.frequency,
            iid_keys=kind == "iid_keys",
        )
        centre = (kind, dim, segment_length) == ("piecewise", self.dim, self.segment_length)
        return Setting(kind, task, self.sequences if centre else self.scan_sequences)

    def trials(self) -> list[Trial]:
        """All trials, those of one setting together."""
        expanded = list(_expand(self.estimators))
        trials, compiled = [], set()
        for setting in self.settings():
            each = list(expanded)
            if setting.task.target == "piecewise_linear":
                each.append(("oracle", "oracle", (), frozenset()))
            size = setting.sequences * self.length / 1024 * setting.task.dim / 64
            cost = _DRAW
            for label, name, *how in each:
                cost += 0.05 + size * _RUN.get(name, 0.005)
                cost += 0.0 if (label, setting.task.dim) in compiled else _COMPILE
                compiled.add((label, setting.task.dim))
                trials.append(Trial(setting, label, name, *how, cost))
                cost = 0.0
        return trials

    def run(self, trial: Trial) -> dict[str, Any]:
        """Computes the record of a trial."""
        task, sequences = trial.setting.task, trial.setting.sequences
        batch = _batch(self.seed, sequences, task)
        errors = []
        for first in range(0, sequences, self.group):
            part = Batch(*(a[first : first + self.group] for a in batch[:4]), batch.segments)
            if trial.estimator == "oracle":
                errors.append(_oracle_errors(part, task))
            else:
                errors.append(_errors(part.targets, _predict(trial, part)))
        errors = np.concatenate([np.asarray(each, np.float64) for each in errors])
        bins = errors.reshape(sequences, -1, self.position_bin).mean(axis=-1)
        return trial.choice | {
            "kind": trial.setting.kind,
            "dim": task.dim,
            "segment_length": task.segment_length,
            "sequences": sequences,
            "error": _short(errors.mean()),
            "per_sequence": _short(errors.mean(axis=1)),
            "by_position": _short(bins.mean(axis=0)),
            "by_position_stderr": _short(bins.std(axis=0, ddof=1) / np.sqrt(sequences)),
        }

    def __post_init__(self):
        check_range(0, LARGEST_SEED, seed=self.seed)
        check_range(1, group=self.group, position_bin=self.position_bin)
        if self.length % self.position_bin:
            raise ValueError(f"position_bin={self.position_bin} must divide length={self.length}.")
        if self.sequences < 2 or self.scan_sequences < 2:
            raise ValueError("sequences and scan_sequences must be >= 2: the bands need them.")


@dataclasses.dataclass(frozen=True)
class SeriesSetting:
    """A real series under one embedding."""

    series: str
    embedding: str
    delays: int

    @property
    def name(self) -> str:
        return f"{self.series}-{self.embedding}"


@dataclasses.dataclass(frozen=True)
class SeriesStudy:
    """Errors on real series; fields as in configs/test_time_regression_sunspots.py."""

    experiment: str
    delays: Mapping[str, int]
    embeddings: tuple[str, ...]
    statistics_fraction: float
    selection_fraction: float
    block: Mapping[str, int]
    resamples: int
    estimators: Mapping[str, Mapping[str, Any]]

    def __post_init__(self):
        for name in self.delays:
            if name not in series.names():
                raise ValueError(f"delays may name {', '.join(series.names())}; got {name!r}.")
        if not self.delays.keys() <= self.block.keys():
            raise ValueError(f"block must have the series of delays, got {dict(self.block)}.")
        check_range(1, delays=tuple(self.delays.values()), block=tuple(self.block.values()))
        check_range(1, resamples=self.resamples)
        if not 0 < self.statistics_fraction < self.selection_fraction < 1:
            raise ValueError(
                "statistics_fraction and selection_fraction must lie in (0, 1), the former below "
                f"the latter; got {self.statistics_fraction} and {self.selection_fraction}."
            )
        for embedding in self.embeddings:
            if embedding not in ("plain", "sphere"):
                raise ValueError(f"embeddings may be plain and sphere; got {embedding!r}.")

    def trials(self) -> list[Trial]:
        """Estimators on every embedding; the two baselines do not depend on one."""
        trials = []
        for name, delays in self.delays.items():
            for embedding in self.embeddings:
                setting = SeriesSetting(name, embedding, delays)
                trials += [Trial(setting, *each, 1.0) for each in _expand(self.estimators)]
            setting = SeriesSetting(name, "plain", delays)
            trials += [
                Trial(setting, label, label, (), frozenset(), 1.0)
                for label in ("persistence", "autoregression")
            ]
        return trials

    def run(self, trial: Trial) -> dict[str, Any]:
        """Computes the record of a trial."""
        loaded = series.load(trial.setting.series)
        statistics = round(self.statistics_fraction * len(loaded.values))
        problem = series.pairs(
            loaded.values,
            delays=trial.setting.delays,
            statistics=statistics,
            embedding=trial.setting.embedding,
        )
        if trial.estimator == "persistence":
            out = problem.last
        elif trial.estimator == "autoregression":
            out = series.autoregression(problem)
        else:
            arrays = (jnp.asarray(a[None], jnp.float32) for a in problem[:3])
            out = _predict(trial, arrays)[0]
        record = trial.choice | {
            "series": trial.setting.series,
            "embedding": trial.setting.embedding,
            "first_reported": statistics,
            "selection_end": round(self.selection_fraction * len(loaded.values)),
            "first_target": int(problem.target_index[0]),
            "prediction": _short(problem.mean + problem.unit * np.asarray(out, np.float64)[:, 0]),
        }
        if trial.estimator == "persistence":  # once a series is enough
            record |= {"times": loaded.times.tolist(), "observed": loaded.values.tolist()}
            record |= {"title": loaded.title, "unit": loaded.unit}
        return record


@functools.lru_cache(maxsize=1)
def _batch(seed: int, sequences: int, task: Task) -> Batch:
    return jax.jit(generate, static_argnums=(1, 2))(seed, sequences, task)


def _predict(trial: Trial, arrays: Iterable[jax.Array]) -> jax.Array:
    """The trial's estimator on (queries, keys, values, ...)."""
    static = tuple((key, value) for key, value in trial.options if key not in trial.traced)
    traced = {key: value for key, value in trial.options if key in trial.traced}
    return _predict_jit(trial.estimator, static, traced, *tuple(arrays)[:3])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict_jit(name, static, traced, queries, keys, values):
    return estimators.create(name, **dict(static), **traced)(queries, keys, values)


@jax.jit
def _errors(targets: jax.Array, out: jax.Array) -> jax.Array:
    """Squared error, mean over coordinates, [B, T]."""
    return jnp.mean((out - targets) ** 2, axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def _oracle_errors(batch: Batch, task: Task) -> jax.Array:
    return _errors(batch.targets, oracle(batch, task))


def _short(numbers):
    """Floats rounded to six significant digits, to keep the records small."""
    rounded = [float(f"{x:.6g}") for x in np.atleast_1d(numbers)]
    return rounded if np.ndim(numbers) else rounded[0]
