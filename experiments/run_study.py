"""Runs an experiment that trains no model, from its config to its figure.

    python experiments/run_study.py --config=configs/bias_exponents.py --workdir=runs/bias_exponents

The field `experiment` of the config says which one. The same command resumes a run that was killed.
Any field of the config can be overridden: `--config.seeds="(0,)"`.
"""

import importlib

from absl import app, flags
from ml_collections import config_flags

from lla.runs import command, run_study

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `:argument` for a variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")

# The field `experiment` -> the folder, and the class in its study.py.
STUDIES = {
    "bias_exponents": ("bias_exponents", "Study"),
    "solver_iterations": ("solver_iterations", "Study"),
    "test_time_regression": ("test_time_regression", "SyntheticStudy"),
    "series": ("test_time_regression", "SeriesStudy"),
}


def main(argv):
    name = _CONFIG.value.get("experiment")
    if name not in STUDIES:
        known = ", ".join(STUDIES)
        raise app.UsageError(f"config.experiment must be one of {known}; got {name!r}.")
    folder, study = STUDIES[name]
    study = getattr(importlib.import_module(f"lla.experiments.{folder}.study"), study)
    plot = importlib.import_module(f"lla.experiments.{folder}.plot")
    run_study(argv, study, _CONFIG.value, _WORKDIR.value, plot.draw)


def run() -> None:
    """The command."""
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)


if __name__ == "__main__":
    run()
