"""The modules of experiments/benchmarks that this folder uses, importable from here."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import hopper
import measure
import peers
import report
import subjects

__all__ = ["hopper", "measure", "peers", "report", "subjects"]
