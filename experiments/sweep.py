"""Trains the grid in the section `sweep` of a config.

    python experiments/sweep.py --config=configs/mqar.py --workdir=runs/mqar_sweep

A point of the grid trains all its seeds and learning rates at once on one device. The same command
resumes a sweep that was killed and skips what is finished. Results are in WORKDIR/results.csv.
Several processes may run the same command at once, on one device or several: each takes points that
no other process is working on.

    for gpu in 0 1; do CUDA_VISIBLE_DEVICES=$gpu python experiments/sweep.py ... & done; wait

Processes without a common file system share a grid by `--part=I/N`.
"""

import math
import re

from absl import app, flags
from ml_collections import config_flags

from lla.runs import WorkdirError, command
from lla.runs.workdir import directory
from lla.training import RefusedError, sweep
from lla.training.unused import check_used

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `:argument` for a variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")
_PART = flags.DEFINE_string("part", "0/1", "I/N: every N-th point of the grid, from the I-th on.")
_LIMIT = flags.DEFINE_float("limit", math.inf, "Seconds; then no further point is begun.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    part = re.fullmatch(r"(\d+)/(\d+)", _PART.value)
    if part is None:
        raise app.UsageError(f"--part must be I/N, such as 0/8; got {_PART.value!r}.")
    index, parts = map(int, part.groups())
    if index >= parts:
        raise app.UsageError(f"--part must be I/N with I < N; got {_PART.value!r}.")
    config = _CONFIG.value.to_dict()
    try:
        path = directory(_WORKDIR.value)
        _, points = sweep.grid_points(config)
        names = dict.fromkeys(point.settings.model.mixer.name for point in points)
        check_used(command.overrides(), names, sweeps=True)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    try:
        results = sweep.run(config, path, part=(index, parts), limit=_LIMIT.value or float("inf"))
    except (WorkdirError, RefusedError) as error:
        raise app.UsageError(str(error)) from error
    for line in sweep.summary(sweep.read_results(results)):
        print(line)
    print(results)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
