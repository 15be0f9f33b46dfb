"""The text that comes with the package."""

import pathlib

import lla.tasks

SAMPLE = pathlib.Path(lla.tasks.__file__).parent / "sample_text"
