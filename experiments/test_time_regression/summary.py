"""Numbers from the records alone: selection, means and bands."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lla.runs.workdir import read_config, read_records

Record = dict[str, Any]


def mean_and_band(per_sequence: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % band over sequences (normal approximation)."""
    errors = np.asarray(per_sequence)
    return float(errors.mean()), float(1.96 * errors.std(ddof=1) / np.sqrt(len(errors)))


def ratio_and_band(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """sum(above) / sum(below) and half its 95 % band; the two are paired by sequence."""
    above, below = np.asarray(above), np.asarray(below)
    ratio = above.mean() / below.mean()
    spread = (above - ratio * below).std(ddof=1) / below.mean()
    return float(ratio), float(1.96 * spread / np.sqrt(len(above)))


def select(records: list[Record]) -> dict[tuple[str, int, int, str], Record]:
    """The record of each (kind, dim, segment length, label), with options selected from a grid.

    If there are several records, the first half of the sequences selects one, and the record that
    is returned has only the second half. So the selection does not bias the result.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = (record["kind"], record["dim"], record["segment_length"], record["label"])
        groups.setdefault(key, []).append(record)
    chosen = {}
    for key, group in groups.items():
        chosen[key] = group[0]
        if len(group) > 1:
            half = len(group[0]["per_sequence"]) // 2
            best = min(group, key=lambda record: np.mean(record["per_sequence"][:half]))
            chosen[key] = best | {"per_sequence": best["per_sequence"][half:]}
    return chosen


def synthetic_table(path: str | os.PathLike) -> list[Record]:
    """One row for each (kind, dim, segment length, label)."""
    chosen = select(read_records(path))
    rows = []
    for (kind, dim, segment_length, label), record in chosen.items():
        error, band = mean_and_band(record["per_sequence"])
        row = {
            "kind": kind,
            "dim": dim,
            "segment_length": segment_length,
            "label": label,
            "options": _options(record),
            "sequences": len(record["per_sequence"]),
            "error": error,
            "error_band95": band,
        }
        base = chosen.get((kind, dim, segment_length, "lla"))
        if base:
            # A choice among options leaves the last sequences only: pair these.
            common = min(len(record["per_sequence"]), len(base["per_sequence"]))
            pair = ratio_and_band(record["per_sequence"][-common:], base["per_sequence"][-common:])
            row["ratio_to_lla"], row["ratio_band95"] = pair
        rows.append(row)
    return rows


def series_table(path: str | os.PathLike) -> list[Record]:
    """One row for each (series, label), options and embedding chosen on the initial part."""
    config = read_config(path)
    rows = []
    for name in config["delays"]:
        best = select_series(path, name)
        base = _reported(best["lla"])
        resample = moving_blocks(len(base), config["block"][name], config["resamples"], seed=0)
        floor = _reported(best["persistence"])
        for label, record in best.items():
            errors = _reported(record)
            low, high = band(errors, resample)
            against = band(errors, resample, base)
            rows.append(
                {
                    "series": name,
                    "label": label,
                    "embedding": record["embedding"],
                    "options": _options(record),
                    "reported_steps": len(errors),
                    "rmse": float(np.sqrt(errors.mean())),
                    "rmse_low95": low,
                    "rmse_high95": high,
                    "rmse_over_lla": float(np.sqrt(errors.mean() / base.mean())),
                    "over_lla_low95": against[0],
                    "over_lla_high95": against[1],
                    "rmse_over_persistence": float(np.sqrt(errors.mean() / floor.mean())),
                    "selection_rmse": float(np.sqrt(_selection_error(record))),
                }
            )
    return rows


def select_series(path: str | os.PathLike, series: str) -> dict[str, Record]:
    """For each label the record with the smallest error on the selection part of `series`.

    Records get "squared_error" (by target, in the series' own unit) and "target_index".
    """
    records = [record for record in read_records(path) if record["series"] == series]
    observed = next(np.asarray(r["observed"]) for r in records if r["label"] == "persistence")
    best: dict[str, Record] = {}
    for record in records:
        index = np.arange(record["first_target"], len(observed))
        error = (np.asarray(record["prediction"]) - observed[index]) ** 2
        record |= {"target_index": index, "squared_error": error}
        rival = best.get(record["label"])
        if rival is None or _selection_error(record) < _selection_error(rival):
            best[record["label"]] = record
    return best


def moving_blocks(length: int, block: int, resamples: int, seed: int) -> np.ndarray:
    """Indices [resamples, length] of a circular block bootstrap: blocks keep the dependence."""
    starts = np.random.default_rng(seed).integers(0, length, (resamples, -(-length // block)))
    indices = (starts[:, :, None] + np.arange(block)[None, None, :]) % length
    return indices.reshape(resamples, -1)[:, :length]


def band(
    errors: np.ndarray, resample: np.ndarray, base: np.ndarray | None = None
) -> tuple[float, float]:
    """95 % interval of the root mean squared error, or of its ratio to that of `base`."""
    drawn = errors[resample].mean(axis=1)
    if base is not None:
        drawn = drawn / base[resample].mean(axis=1)
    low, high = np.quantile(np.sqrt(drawn), (0.025, 0.975))
    return float(low), float(high)


def _part(record: Record, inside: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return record["squared_error"][inside(record["target_index"])]


def _reported(record: Record) -> np.ndarray:
    return _part(record, lambda index: index >= record["selection_end"])


def _selection_error(record: Record) -> float:
    first, end = record["first_reported"], record["selection_end"]
    return float(_part(record, lambda index: (index >= first) & (index < end)).mean())


def _options(record: Record) -> str:
    return " ".join(f"{key}={value:g}" for key, value in record["options"].items())
