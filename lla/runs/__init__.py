"""What every run needs apart from its computation: settings, a work directory, records, progress.

`lla.runs.tables` and `lla.runs.figures` write its tables and figures.
"""

from lla.runs.config import check_variant, from_config, to_config
from lla.runs.progress import Progress
from lla.runs.study import run_study, run_trials
from lla.runs.workdir import Workdir, WorkdirError

__all__ = [
    "Progress",
    "Workdir",
    "WorkdirError",
    "check_variant",
    "from_config",
    "run_study",
    "run_trials",
    "to_config",
]
