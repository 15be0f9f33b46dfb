"""What the studies' dataclasses refuse, before anything is computed or written."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import importlib.util, json, sys
sys.path.insert(0, "experiments/" + sys.argv[1])
import study
from lla.runs import from_config

def config(file, variant):
    spec = importlib.util.spec_from_file_location("config", f"configs/{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant).to_dict()

for file, kind, changes in json.loads(sys.argv[2]):
    try:
        for variant in ("", "smoke"):
            from_config(getattr(study, kind), config(file, variant) | changes)
        print("accepted")
    except ValueError as error:
        print(error)
"""
CASES = {
    "bias_exponents": (
        ("bias_exponents", "Study"),
        [
            ({}, "accepted"),
            ({"seeds": [-1]}, "seeds must be >= 0 and <= 4294967295, got (-1,)."),
            ({"seeds": [1.5]}, "config.seeds must be a tuple of integers, got (1.5,)."),
            ({"operator_keys": 0}, "operator_keys must be >= 2, got 0."),
            ({"noise": -1}, "noise must be >= 0, got -1.0."),
            (
                {"fit_ranges": [1.0]},
                "config.fit_ranges must be a tuple, each entry a tuple (a finite number, a finite "
                "number), got (1.0,).",
            ),
        ],
    ),
    "solver_iterations": (
        ("solver_iterations", "Study"),
        [
            ({}, "accepted"),
            ({"seeds": [2**32]}, "seeds must be >= 0 and <= 4294967295, got (4294967296,)."),
            ({"length": 0}, "length must be >= 1, got 0."),
            ({"iterations": [0]}, "iterations must be >= 1, got (0,)."),
            ({"settings": [["normal", 0]]}, "dimensions must be >= 1, got (0,)."),
            ({"dtypes": ["int8"]}, "dtypes may name float32, bfloat16, float16; got 'int8'."),
            ({"heads": "two"}, "config.heads must be an integer, got 'two'."),
        ],
    ),
    "test_time_regression": (
        ("test_time_regression", "SyntheticStudy"),
        [
            ({}, "accepted"),
            ({"seed": -1}, "seed must be >= 0 and <= 4294967295, got -1."),
            ({"position_bin": 0}, "position_bin must be >= 1, got 0."),
            ({"group": 0}, "group must be >= 1, got 0."),
            ({"full_grid": 1}, "config.full_grid must be True or False, got 1."),
        ],
    ),
    "sunspots": (
        ("test_time_regression_sunspots", "SeriesStudy"),
        [
            ({}, "accepted"),
            ({"delays": {"moon": 3}}, "delays may name sunspots, elnino; got 'moon'."),
            ({"delays": {"sunspots": 0}}, "delays must be >= 1, got (0,)."),
            ({"resamples": 0}, "resamples must be >= 1, got 0."),
            ({"embeddings": ["round"]}, "embeddings may be plain and sphere; got 'round'."),
            (
                {"statistics_fraction": 0.5},
                "statistics_fraction and selection_fraction must lie in (0, 1), the former below "
                "the latter; got 0.5 and 0.45.",
            ),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_impossible_studies_are_refused(name):
    (file, kind), cases = CASES[name]
    given = json.dumps([(file, kind, changes) for changes, _ in cases])
    folder = "test_time_regression" if name == "sunspots" else name
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, given], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [message for _, message in cases]
