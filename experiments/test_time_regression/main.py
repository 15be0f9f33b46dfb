"""Test-time regression, from config to figure; see README.md beside this file.

    python experiments/test_time_regression/main.py --config=configs/test_time_regression.py \\
        --workdir=runs/test_time_regression
"""

from absl import flags
from ml_collections import config_flags

from lla.experiments.test_time_regression import plot, study
from lla.runs import command, run_study

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `:argument` for a variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")

_STUDIES = {"test_time_regression": study.SyntheticStudy, "series": study.SeriesStudy}


def main(argv):
    run_study(argv, _STUDIES[_CONFIG.value.experiment], _CONFIG.value, _WORKDIR.value, plot.draw)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
