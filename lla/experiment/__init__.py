"""What every experiment needs around its computation: a work directory, records, progress, files.

Tables and figures are in `lla.experiment.tables` and `lla.experiment.figures`.
"""

from lla.experiment.boundary import from_config, to_config
from lla.experiment.pieces import run_pieces, run_study
from lla.experiment.progress import Progress
from lla.experiment.workdir import Workdir, WorkdirError

__all__ = [
    "Progress",
    "Workdir",
    "WorkdirError",
    "from_config",
    "run_pieces",
    "run_study",
    "to_config",
]
