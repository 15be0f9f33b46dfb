"""Bias against the bandwidth, from config to figure; see README.md beside this file.

    python experiments/bias_exponents/main.py --config=configs/bias_exponents.py \\
        --workdir=runs/bias_exponents
"""

import json

import plot
import study
from absl import app, flags
from ml_collections import config_flags

from lla.experiment import Progress, Workdir, WorkdirError, command, environment, from_config
from lla.experiment.workdir import write_whole

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `:argument` for a variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = _CONFIG.value
    try:
        job = from_config(study.Study, config)
        workdir = Workdir(_WORKDIR.value, config.to_dict())
    except (ValueError, WorkdirError) as error:
        raise app.UsageError(str(error)) from error
    compute(job, workdir)
    for path in plot.draw(workdir.path):
        print(path)


def compute(job, workdir):
    """Writes the records of the pieces that the work directory lacks."""
    finished = {record["piece"] for record in workdir.read()}
    pieces = job.pieces()
    left = [piece for piece in pieces if piece.id not in finished]
    print(f"{len(pieces)} pieces, {len(pieces) - len(left)} already finished, in {workdir.path}")
    if left:
        origin = json.dumps(environment.describe(), indent=2) + "\n"
        write_whole(workdir.path / "environment.json", origin)
    progress = Progress(sum(piece.cost for piece in left))
    for piece in left:
        workdir.write({"piece": piece.id, **job.run(piece)})
        progress.advance(piece.cost, piece.id)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
