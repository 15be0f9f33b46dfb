"""Real series that ship with statsmodels, as one-step-ahead regression problems.

No network is needed. The keys are delay embeddings. Scaling uses only the first values of a series,
and errors should only be counted after them, so that nothing leaks from the future.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Series:
    """A series: `values` float64 [n] in `unit`, `times` float64 [n] in years."""

    name: str
    title: str
    unit: str
    times: np.ndarray
    values: np.ndarray


class Pairs(NamedTuple):
    """One-step-ahead regression at positions i of T = n - delays - 1.

    The pair at position i is an embedding and the value that follows it; the query is the next
    embedding, and the target the value that follows that. All that a predictor reads at position i,
    including the pair, is observed before `target[i]`.

    Attributes:
      queries, keys: float64 [T, delays + 1], |k|^2 = delays + 1 if normalised.
      values, targets: float64 [T, 1], standardised.
      last: float64 [T, 1], the newest value in the query, standardised.
      target_index: int [T], index of the target in the series.
      mean, unit: the value of a standardised z is mean + unit * z.
    """

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    targets: np.ndarray
    last: np.ndarray
    target_index: np.ndarray
    mean: float
    unit: float


def names() -> tuple[str, ...]:
    """Series that `load` knows."""
    return ("sunspots", "elnino")


def load(name: str) -> Series:
    """Loads a series.

    "sunspots": yearly mean sunspot numbers, 1700-2008; cycles of about 11 years of changing height.
    "elnino": monthly sea-surface temperature (Nino 1+2), 1950-2010; a yearly cycle with events.

    Raises:
      ValueError: unknown name.
      ImportError: statsmodels is not installed.
    """
    if name not in names():
        raise ValueError(f"unknown series {name!r}; valid: {', '.join(names())}.")
    try:
        from statsmodels.datasets import elnino, sunspots
    except ImportError as error:
        raise ImportError(
            'the real series need statsmodels: pip install "lla-jax[data]"'
        ) from error
    if name == "sunspots":
        table = sunspots.load_pandas().data
        times, values = table["YEAR"].to_numpy(), table["SUNACTIVITY"].to_numpy()
        return Series(name, "Sunspots", "yearly sunspot number", times, values)
    table = elnino.load_pandas().data
    years = table["YEAR"].to_numpy()
    times = (years[:, None] + np.arange(12)[None, :] / 12).reshape(-1)
    values = table.drop(columns="YEAR").to_numpy().reshape(-1)
    return Series(name, "El Niño", "monthly temperature, °C", times, values)


def pairs(
    values: np.ndarray,
    *,
    delays: int,
    statistics: int,
    embedding: Literal["plain", "sphere"] = "plain",
) -> Pairs:
    """Turns a series into one-step-ahead regression.

    An embedding is `(z_t, ..., z_{t-delays+1}, c)` of standardised values z, newest first. "plain"
    has c = 1, so that linear maps have an intercept. "sphere" has c = sqrt(delays) and is scaled to
    |k|^2 = delays + 1, so that exp(q.k) decreases with the distance of the two, while the ratio to
    c keeps the amplitude.

    Args:
      values: [n] finite.
      delays: values per embedding.
      statistics: mean and standard deviation are those of the first `statistics` values.
      embedding: "plain" or "sphere".

    Raises:
      ValueError: a series too short or not finite, or an unknown embedding.
    """
    values = np.asarray(values, np.float64)
    count = values.shape[0] - delays - 1
    if values.ndim != 1 or delays < 1 or count < 1 or not np.isfinite(values).all():
        raise ValueError(
            f"values must be finite, [n] with n > delays + 1; got {values.shape}, delays={delays}."
        )
    if not 2 <= statistics <= len(values):
        raise ValueError(f"statistics must be in [2, {len(values)}]; got {statistics}.")
    if embedding not in ("plain", "sphere"):
        raise ValueError(f"embedding must be 'plain' or 'sphere'; got {embedding!r}.")
    mean, unit = float(values[:statistics].mean()), float(values[:statistics].std())
    z = (values - mean) / unit
    windows = np.lib.stride_tricks.sliding_window_view(z, delays)[:, ::-1]
    constant = 1.0 if embedding == "plain" else np.sqrt(delays)
    embedded = np.concatenate([windows, np.full((len(windows), 1), constant)], axis=1)
    if embedding == "sphere":
        embedded *= np.sqrt((delays + 1) / np.sum(embedded**2, axis=1, keepdims=True))
    return Pairs(
        queries=embedded[1 : count + 1],
        keys=embedded[:count],
        values=z[delays : delays + count, None],
        targets=z[delays + 1 :, None],
        last=z[delays : delays + count, None],
        target_index=np.arange(delays + 1, len(values)),
        mean=mean,
        unit=unit,
    )


def autoregression(problem: Pairs, ridge: float = 1e-6) -> np.ndarray:
    """Predictions [T, 1] of an autoregression refitted to the whole past at every step.

    Least squares in float64 on the given embedding; the small `ridge` selects one of the exact fits
    while there are fewer pairs than unknowns.
    """
    out = np.empty_like(problem.targets)
    eye = ridge * np.eye(problem.keys.shape[1])
    for i in range(len(out)):
        past, values = problem.keys[: i + 1], problem.values[: i + 1]
        out[i] = problem.queries[i] @ np.linalg.solve(past.T @ past + eye, past.T @ values)
    return out
