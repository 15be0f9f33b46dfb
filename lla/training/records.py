"""Metrics of a run: JSON lines that a resumed run continues exactly, and TensorBoard if installed.

`metrics.jsonl` depends on the settings alone; wall-clock times are in `timing.jsonl`.
"""

import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lla.runs import Workdir


class Records:
    """Writes the metrics of training and evaluation.

    Args:
      workdir: where to write. Records after step `start`, and those of the test split, are dropped,
        because the run computes them again.
      start: the step that the run resumes from; -1 for a run without a checkpoint.
    """

    def __init__(self, workdir: Workdir, start: int):
        self._workdir = workdir
        workdir.keep(lambda record: record["step"] <= start and record["kind"] != "test")
        self._board = _tensorboard(workdir)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends {"kind", "step", **values}; numbers that are not finite become null."""
        values = {name: plain_numbers(value) for name, value in values.items()}
        self._workdir.write({"kind": kind, "step": step, **values})
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)):
                tag = name if kind == "eval" else f"{kind}/{name}"
                self._board.add_scalar(tag, value, step)
        self._board.flush()

    def time(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends to `timing.jsonl`."""
        with (self._workdir.path / "timing.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class NoRecords:
    """The `Records` of all processes but the first: they write nothing."""

    def write(self, kind, step, values):
        pass

    def time(self, step, values):
        pass

    def close(self):
        pass


def training_seconds(path: str | os.PathLike) -> float:
    """The time of all updates in the work directory `path`, including those made twice."""
    file = pathlib.Path(path) / "timing.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return sum(json.loads(line)["seconds"] for line in lines)


def plain_numbers(value: Any) -> Any:
    """Arrays as nested lists and scalars as floats, with None for numbers that are not finite."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_numbers(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _tensorboard(workdir: Workdir):
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from tensorboard.summary import Writer

    return Writer(str(workdir.path / "tensorboard"))
