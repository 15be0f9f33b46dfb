"""What every experiment needs around its computation: a work directory, records, progress."""

from lla.experiment.boundary import from_config, to_config
from lla.experiment.progress import Progress
from lla.experiment.workdir import Workdir, WorkdirError

__all__ = ["Progress", "Workdir", "WorkdirError", "from_config", "to_config"]
