"""What every experiment needs around its computation: a work directory, records, progress, files.

Tables and figures are in `lla.runs.tables` and `lla.runs.figures`.
"""

from lla.runs.config import from_config, to_config
from lla.runs.progress import Progress
from lla.runs.study import run_study, run_trials
from lla.runs.workdir import Workdir, WorkdirError

__all__ = [
    "Progress",
    "Workdir",
    "WorkdirError",
    "from_config",
    "run_study",
    "run_trials",
    "to_config",
]
