"""What the studies' dataclasses refuse, before anything is computed or written."""

import importlib

import pytest
from absl import app
from ml_collections import ConfigDict

from lla.experiments import run_study
from lla.runs import from_config

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
    folder = "test_time_regression" if name == "sunspots" else name
    study = getattr(importlib.import_module(f"lla.experiments.{folder}.study"), kind)
    get_config = importlib.import_module(f"lla.configs.{file}").get_config
    for changes, message in cases:
        for variant in ("", "smoke"):
            config = get_config(variant).to_dict() | changes
            if message == "accepted":
                from_config(study, config)
                continue
            with pytest.raises(ValueError) as refused:
                from_config(study, config)
            assert str(refused.value) == message


def test_every_config_names_a_study():
    for (file, kind), _ in CASES.values():
        config = importlib.import_module(f"lla.configs.{file}").get_config("")
        assert run_study.STUDIES[config.experiment][1] == kind


def test_a_config_of_something_else_is_refused():
    config = ConfigDict({"experiment": "mqar"})
    with pytest.raises(app.UsageError, match=r"unknown study: 'mqar'.*Valid: bias_exponents"):
        run_study.main(["run_study.py"], config, None)
