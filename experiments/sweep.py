"""Trains the grid in the section `sweep` of a config.

    lla-sweep --config=mqar:short --workdir=runs/mqar_sweep
    python experiments/sweep.py --config=configs/mqar.py:short --workdir=runs/mqar_sweep  # the same

A point of the grid trains all its seeds and learning rates at once on one device. The same command
resumes a sweep that was killed and skips what is finished. Results are in WORKDIR/results.csv.
Several processes may run the same command at once, on one device or several: each takes points that
no other process is working on.

    for gpu in 0 1; do CUDA_VISIBLE_DEVICES=$gpu lla-sweep ... & done; wait

Processes without a common file system share a grid by `--part=I/N`.
"""

import math
import re

from absl import app, flags
from ml_collections import config_flags

from lla.runs import WorkdirError, command
from lla.runs.workdir import directory
from lla.training import RefusedError, describe, sweep
from lla.training.unused import check_used

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Name or file of a config; `:NAME` behind it for a variant."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of results, by default runs/NAME_VARIANT_sweep; rerunning resumes."
)
_LIST = flags.DEFINE_bool("list", False, "Print configs, variants, tasks and mixers.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every field of the config, explained.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the points with their parameters, runs and steps; train nothing."
)
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
    if _LIST.value:
        print(*describe.catalogue(command.configs()), sep="\n")
        return
    config = _CONFIG.value.to_dict()
    try:
        describe.check_trains(config)
        path = (
            None
            if _DESCRIBE.value or _DRY_RUN.value
            else directory(command.workdir(_WORKDIR.value, "sweep"))
        )
        _, points = sweep.grid_points(config)
        names = dict.fromkeys(name for point in points for name in point.settings.model.mixer_names)
        check_used(command.overrides(), names, sweeps=True)
        if _DESCRIBE.value or _DRY_RUN.value:
            fields = describe.lines(describe.fields(config))
            print(*(fields if _DESCRIBE.value else describe.dry_run_of_sweep(config)), sep="\n")
            return
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    try:
        results = sweep.run(config, path, part=(index, parts), limit=_LIMIT.value or float("inf"))
    except (WorkdirError, RefusedError) as error:
        raise app.UsageError(str(error)) from error
    for line in sweep.summary(sweep.read_results(results)):
        print(line)
    print(results)
    command.warn_of_smoke()


def run() -> None:
    """The command `lla-sweep`."""
    command.run(main, {"config": ("list",)})


if __name__ == "__main__":
    run()
