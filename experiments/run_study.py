"""Runs an experiment that trains no model, from its config to its figure.

    lla-study --config=bias_exponents --workdir=runs/bias_exponents
    python experiments/run_study.py --config=configs/bias_exponents.py --workdir=runs/bias_exponents

The field `experiment` of the config says which one. The same command resumes a run that was killed.
Any field of the config can be overridden: `--config.seeds="(0,)"`.
"""

import importlib
import pathlib

from absl import app, flags
from ml_collections import config_flags

from lla.registry import unknown
from lla.runs import command, run_study
from lla.training import describe

# The field `experiment` -> the folder, and the class in its study.py.
STUDIES = {
    "bias_exponents": ("bias_exponents", "Study"),
    "solver_iterations": ("solver_iterations", "Study"),
    "test_time_regression": ("test_time_regression", "SyntheticStudy"),
    "series": ("test_time_regression", "SeriesStudy"),
}


def main(argv, config, workdir):
    """Runs the study that `config` names; `argv` is what is left of the command line."""
    name = config.get("experiment")
    if name is None:
        raise app.UsageError(
            "this config trains a model: use lla-train or lla-sweep (experiments/train.py or "
            "sweep.py)."
        )
    if name not in STUDIES:
        raise app.UsageError(f"config.experiment: {unknown('study', name, STUDIES)}")
    folder, study = STUDIES[name]
    study = getattr(importlib.import_module(f"lla.experiments.{folder}.study"), study)
    plot = importlib.import_module(f"lla.experiments.{folder}.plot")
    run_study(argv, study, config, workdir, plot.draw)


def run() -> None:
    """The command. Its flags exist from here on, so that importing this module defines none."""
    config = config_flags.DEFINE_config_file(
        "config", None, "Name or file of a config; `:NAME` behind it for a variant."
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Directory of results, by default runs/NAME_VARIANT; rerunning resumes."
    )
    listed = flags.DEFINE_bool("list", False, "Print configs, variants, tasks and mixers.")
    described = flags.DEFINE_bool("describe", False, "Print every field of the config, explained.")

    def run(argv):
        if listed.value:
            print(*describe.catalogue(command.configs()), sep="\n")
        elif described.value:
            file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
            file = file.with_name(file.name.partition(":")[0])
            print(*describe.lines(describe.study_fields(config.value, file)), sep="\n")
        else:
            main(argv, config.value, command.workdir(workdir.value))
            command.warn_of_smoke()

    command.run(run, {"config": ("list",)})


if __name__ == "__main__":
    run()
