"""What every experiment needs around its computation: a work directory, records, progress, files.

Tables and figures are in `lla.runs.tables` and `lla.runs.figures`.
"""

from lla.runs.config import from_config, to_config
from lla.runs.progress import Progress
from lla.runs.study import run_pieces, run_study
from lla.runs.workdir import Workdir, WorkdirError

__all__ = [
    "Progress",
    "Workdir",
    "WorkdirError",
    "from_config",
    "run_pieces",
    "run_study",
    "to_config",
]
