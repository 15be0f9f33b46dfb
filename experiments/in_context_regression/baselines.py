"""Errors of the oracle and of trivial predictions, kept beside the results as baselines.json.

python experiments/in_context_regression/baselines.py            # of the committed results
python experiments/in_context_regression/baselines.py runs/in_context_regression_sweep

They take a second or two for each segment length; plot.py runs this where the file is missing.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from lla.experiments.in_context_regression import summary
from lla.experiments.trained import tables as shared
from lla.runs.workdir import write_whole


def measure(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> pathlib.Path:
    """Writes the baselines of every segment length of the points `found`; returns the path."""
    settings = shared.task_settings(summary.EXPERIMENT, folder, variant)
    choices = {point.choices[summary.LENGTH]: point.choices for point in found}
    made = {}
    for length in sorted(choices):
        task = shared.task(settings, choices[length])
        made[str(length)] = {"dim": task.dim, "length": task.length, "noise": task.noise}
        made[str(length)] |= task.baselines()
    file = folder / summary.BASELINES
    write_whole(file, json.dumps(made, indent=2) + "\n")
    return file


def main(argv: Sequence[str]) -> int:
    """`baselines.py [FOLDER] [--variant V]`."""
    options = shared.parser(summary.EXPERIMENT, "Measures the baselines.").parse_args(argv)

    def work():
        found = summary.EXPERIMENT.points(options.folder)
        return [measure(found, options.folder, options.variant)]

    return shared.report(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
