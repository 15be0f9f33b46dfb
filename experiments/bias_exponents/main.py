"""Bias against the bandwidth, from config to figure; see README.md beside this file.

    python experiments/bias_exponents/main.py --config=configs/bias_exponents.py \\
        --workdir=runs/bias_exponents
"""

from absl import flags
from ml_collections import config_flags

from lla.experiments.bias_exponents import plot, study
from lla.runs import command, run_study

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `:argument` for a variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")


def main(argv):
    run_study(argv, study.Study, _CONFIG.value, _WORKDIR.value, plot.draw)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
