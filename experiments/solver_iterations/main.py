"""Error against solver iterations, from config to figure; see README.md beside this file.

    python experiments/solver_iterations/main.py --config=configs/solver_iterations.py \\
        --workdir=runs/solver_iterations
"""

import plot
import study
from absl import app, flags
from ml_collections import config_flags

from lla.experiment import Progress, Workdir, WorkdirError, from_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `:argument` for a variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = _CONFIG.value
    try:
        job = from_config(study.Study, config)
        pieces = job.pieces()
        workdir = Workdir(_WORKDIR.value, config.to_dict())
    except (ValueError, WorkdirError) as error:
        raise app.UsageError(str(error)) from error

    finished = {record["piece"] for record in workdir.read()}
    left = [piece for piece in pieces if piece.id not in finished]
    print(f"{len(pieces)} pieces, {len(pieces) - len(left)} already finished, in {workdir.path}")
    progress = Progress(sum(piece.cost for piece in left))
    for piece in left:
        workdir.write({"piece": piece.id, **job.run(piece)})
        progress.advance(piece.cost, piece.id)

    for path in plot.draw(workdir.path):
        print(path)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
