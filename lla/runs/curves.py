"""Learning curves of any runs and sweeps: read from work directories, drawn as a figure or as text.

A curve is a metric against the updates. Of a sweep it is the mean over the seeds at the learning
rate with the best final value, for every point of the grid that has begun.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lla.registry import unknown
from lla.runs import figures, styles
from lla.runs.workdir import WorkdirError, flat, read_config, read_json, read_records

_KINDS = ("eval", "train")
_MARKS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of a run, or of the runs of a point of a sweep.

    Attributes:
      panel: what the curves of one panel share, such as a case of a sweep.
      label: what tells it from the other curves of its panel.
      mixer: name of the mechanism.
      steps: int ``[T]``, updates; T is 0 for a run without this metric.
      values: ``[runs, T]``, NaN where a run has none.
    """

    panel: str
    label: str
    mixer: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """``[T]``, the mean of the runs that have a value."""
        known = np.isfinite(self.values)
        count = known.sum(0)
        total = np.where(known, self.values, 0.0).sum(0)
        return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A work directory of training: a run, or a phase of a point of the sweep in `sweep`."""

    path: pathlib.Path
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    sweep: pathlib.Path | None

    @property
    def mixer(self) -> str:
        return self.config["model"]["mixer"]["name"]

    @property
    def choices(self) -> Mapping[str, Any]:
        return self.config.get("choices", {})


def read(paths: Sequence[pathlib.Path], metric: str | None = None) -> tuple[str, list[Curve]]:
    """The metric, and a curve for every run and every point of a sweep in `paths`.

    Args:
      paths: work directories of runs, of sweeps, or of points of a sweep. They may still train.
      metric: as in the records, such as "validation/loss" or, for the same, "loss"; "train/loss" is
        that of the batches. None for the primary metric of the task on the validation split.

    Raises:
      WorkdirError: a directory that is none of these, or damaged.
      ValueError: a metric that no directory has; the nearest one is named.
    """
    found = [folder for path in paths for folder in _folders(path)]
    if not any(folder.records for folder in found):
        raise WorkdirError(f"{', '.join(map(str, paths))}: no records yet.")
    metric = metric or _primary(found)[0]
    known = dict.fromkeys(name for folder in found for name in _metrics(folder.records))
    if f"validation/{metric}" in known:
        metric = f"validation/{metric}"
    if metric not in known:
        raise ValueError(unknown("metric", metric, known))
    labels = _labels(found)
    curves = []
    for folder, (panel, label) in zip(found, labels, strict=True):
        curves.append(Curve(panel, label, folder.mixer, *_values(folder, metric)))
    return metric, curves


def draw(metric: str, curves: Sequence[Curve]):
    """A Matplotlib figure with a panel for each `Curve.panel`.

    A band goes from the least to the largest of the runs of a curve.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    curves = [curve for curve in curves if curve.steps.size]
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 0.75 * figures.PAGE if len(panels) == 1 else figures.PAGE
    height = 1.2 + 1.7 * rows
    figure, axes = figures.new(rows, columns, width=width, height=height, sharey=True)
    flat_axes = list(axes.flat)
    looks = _looks(curves)
    for axis, panel in zip(flat_axes, panels, strict=False):
        for curve in curves:
            if curve.panel != panel:
                continue
            colour, line = looks[curve.label]
            axis.plot(curve.steps, curve.mean, color=colour, linestyle=line, label=curve.label)
            if len(curve.values) > 1:
                low, high = _bounds(curve.values)
                axis.fill_between(curve.steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(panel)
        axis.grid(True, axis="y")
    for axis in flat_axes[len(panels) :]:
        axis.set_axis_off()
    for axis in flat_axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("updates")
    for axis in axes[:, 0]:
        axis.set_ylabel(metric.replace("/", " "))
    figures.legend(figure, flat_axes[: len(panels)])
    return figure


def text(
    metric: str, curves: Sequence[Curve], *, width: int = 80, height: int = 16
) -> Iterable[str]:
    """The curves as lines of plain text, a plot for each panel with a letter for each curve.

    Where curves meet, the letter of the last one is shown.

    Args:
      metric, curves: of `read`.
      width: columns of text.
      height: rows of a plot.
    """
    finite = [value for curve in curves for value in curve.mean if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    marks = {}
    for curve in curves:
        marks.setdefault(curve.label, _MARKS[len(marks) % len(_MARKS)])
    edge = max(len(f"{value:.4g}") for value in (low, high))
    columns = max(width - edge - 2, 10)
    for panel in dict.fromkeys(curve.panel for curve in curves):
        here = [curve for curve in curves if curve.panel == panel]
        last = max((int(step) for curve in here for step in curve.steps[-1:]), default=0)
        rows = [[" "] * columns for _ in range(height)]
        for curve in here:
            for column, value in _columns(curve, last, columns):
                row = round((high - value) / (high - low) * (height - 1))
                rows[row][column] = marks[curve.label]
        yield f"{metric}{f', {panel}' if panel else ''}"
        for number, row in enumerate(rows):
            tick = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}.get(number, "")
            yield f"{tick:>{edge}} |{''.join(row)}".rstrip()
        yield f"{'':>{edge}} +{'-' * columns}"
        yield f"{'':>{edge}}  0{f'{last} updates':>{columns - 1}}"
        for curve in here:
            if not curve.steps.size:
                yield f"  -  {curve.label}: has no {metric}"
                continue
            final = curve.mean[np.isfinite(curve.mean)][-1:]
            value = f"{final[0]:.4g}" if final.size else "not finite"
            runs = f", {len(curve.values)} seeds" if len(curve.values) > 1 else ""
            yield f"  {marks[curve.label]}  {curve.label}: {value} at {curve.steps[-1]}{runs}"
        yield ""


def _folders(path):
    """The work directories of training in `path`."""
    cells = path / "cells"
    if cells.is_dir():
        found = []
        for point in sorted(cells.iterdir()):
            # The phase of the selection counts until the runs of the results have begun.
            phases = [point / name for name in ("final", "select")]
            begun = [phase for phase in phases if (phase / "metrics.jsonl").exists()]
            found += [_opened(phase, path) for phase in begun[:1]]
        if not found:
            raise WorkdirError(f"{path}: no point of this sweep has begun.")
        return found
    return [_opened(path, None)]


def _opened(path, sweep):
    config = read_config(path)
    if not isinstance(config.get("model"), Mapping) or "mixer" not in config["model"]:
        raise WorkdirError(f"{path} has no learning curves: nothing was trained there.")
    return _Folder(path, config, read_records(path), sweep)


def _metrics(records):
    """Names of the metrics, those of training with "train/" before them."""
    for record in records:
        if record.get("kind") in _KINDS:
            prefix = "train/" if record["kind"] == "train" else ""
            names = (name for name in record if name not in ("kind", "step"))
            yield from (f"{prefix}{name}" for name in names)


def _primary(found):
    """The primary metric, and "max" or "min": of a finished run, or of the task of the first."""
    for folder in found:
        if (file := folder.path / "result.json").exists():
            result = read_json(file, "Delete it, and the run resumes from its latest checkpoint.")
            return result["metric"], result["mode"]
    from lla import tasks

    options = dict(found[0].config["task"])
    task = tasks.create(options.pop("name"), **options)
    return f"validation/{task.primary_metric}", task.metric_mode


def _values(folder, metric):
    """Steps and values [runs, steps]; of a point of a sweep, the seeds at its best rate."""
    kind, _, name = metric.partition("/")
    kind, name = ("train", name) if kind == "train" else ("eval", metric)
    records = [r for r in folder.records if r.get("kind") == kind and name in r]
    steps = np.array([record["step"] for record in records], int)
    values = np.array([record[name] for record in records], float)
    if values.ndim < 3:
        return steps, values.reshape(1, -1)
    values = np.moveaxis(values, 0, -1)  # [seeds, rates, steps]
    return steps, values[:, _best_rate(folder)]


def _best_rate(folder):
    """The index of the learning rate with the best last value of the primary metric."""
    if len(folder.config["runs"]["learning_rates"]) == 1:
        return 0
    primary, mode = _primary([folder])
    last = [r[primary] for r in folder.records if r.get("kind") == "eval" and primary in r][-1:]
    if not last:
        return 0
    means = np.array(last[0], float).mean(0)  # NaN for a rate at which a run diverged
    sign = 1.0 if mode == "max" else -1.0
    return int(np.nan_to_num(sign * means, nan=-np.inf).argmax())


def _labels(found):
    """(panel, label) of every folder: choices of a sweep make panels, the mechanism labels.

    Settings that all runs share are left out; labels show those that differ.
    """
    shown = []
    for folder in found:
        panel, label = {}, {"mixer": styles.style(folder.mixer).name}
        if len({other.config["task"]["name"] for other in found}) > 1:
            panel["task"] = folder.config["task"]["name"]
        for path, value in folder.choices.items():
            if path != "model.mixer.name":
                (label if path.startswith("mixers.") else panel)[path] = value
        if len({other.sweep or other.path for other in found}) > 1 and folder.sweep:
            label["directory"] = folder.sweep.name
        shown.append((panel, label))
    panels = [_differing(panel, [p for p, _ in shown]) for panel, _ in shown]
    if any(panels):
        names = [folder.path.name for folder in found]
        panels = [panel or name for panel, name in zip(panels, names, strict=True)]
    labels = []
    for _, label in shown:
        parts = [label.pop("mixer")]
        directory = label.pop("directory", None)
        parts += [f"{path.rpartition('.')[2]}={value}" for path, value in label.items()]
        labels.append(", ".join(parts + ([directory] if directory else [])))
    return list(zip(panels, _told_apart(found, panels, labels), strict=True))


def _told_apart(found, panels, labels):
    """The labels, with the settings that differ where a panel has a label twice."""
    groups: dict[tuple, list[int]] = {}
    for number, key in enumerate(zip(panels, labels, strict=True)):
        groups.setdefault(key, []).append(number)
    labels = list(labels)
    for members in groups.values():
        if len(members) == 1:
            continue
        configs = [flat(found[number].config) for number in members]
        names = dict.fromkeys(name for config in configs for name in config)
        differ = [n for n in names if len({config.get(n) for config in configs}) > 1]
        for number, config in zip(members, configs, strict=True):
            parts = [f"{n.rpartition('.')[2]}={config.get(n)}" for n in differ]
            few = parts if 0 < len(parts) <= 3 else [found[number].path.name]
            labels[number] = ", ".join([labels[number], *few])
    return labels


def _differing(choices, all_choices):
    """The choices that are not the same everywhere, as text."""
    parts = []
    for path, value in choices.items():
        if any(other.get(path) != value for other in all_choices):
            parts.append(
                str(value) if path in ("case", "task") else f"{path.rpartition('.')[2]}={value}"
            )
    return ", ".join(parts)


def _looks(curves):
    """Label -> colour and line. A mechanism has its colour; further curves of it other lines."""
    lines, used, looks = ("-", "--", ":", "-."), {}, {}
    for curve in curves:
        if curve.label not in looks:
            colour = styles.style(curve.mixer).colour
            number = used[colour] = used.get(colour, -1) + 1
            looks[curve.label] = (colour, lines[number % len(lines)])
    return looks


def _bounds(values):
    known = np.isfinite(values)
    low = np.where(known, values, np.inf).min(0)
    high = np.where(known, values, -np.inf).max(0)
    nothing = ~known.any(0)
    low[nothing] = high[nothing] = np.nan
    return low, high


def _columns(curve, last, columns):
    """(column, value) of a line through the points of a curve."""
    known = np.isfinite(curve.mean)
    steps, mean = curve.steps[known], curve.mean[known]
    if not steps.size:
        return
    scale = (columns - 1) / max(last, 1)
    first, end = round(steps[0] * scale), round(steps[-1] * scale)
    for column in range(first, end + 1):
        yield column, float(np.interp(column / scale, steps, mean))
