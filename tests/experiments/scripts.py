"""Running a script as a user does."""

import csv
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments, cwd=ROOT):
    """The finished process of Python with these arguments, on one device."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(kept)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def table(path):
    """The rows of the summary.csv of a work directory."""
    with (path / "summary.csv").open() as file:
        return list(csv.DictReader(file))
