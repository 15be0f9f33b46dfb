"""Digests of settings, by which the committed results of sweeps are found again."""

import pytest

from lla import training
from lla.training import sweep
from lla.training.settings import override
from tests.training.test_commands import ROOT, config

COMMITTED = {
    "mqar": ("full", "mqar/results/h200_full_1.csv"),
    "mad": ("", "mad/results/h200_1.csv"),
}


def digest(config):
    return sweep.GridPoint("", {}, training.resolve(config)).digest


@pytest.mark.parametrize(
    "task, changes, expected",
    [
        ("mqar", {}, "7cc8653cafd1"),
        (
            "mqar",
            {
                "task": {"length": (64, 128), "pairs": (4, 8)},
                "model": {"mixer": {"name": "mesanet"}, "width": 64, "dtype": "bfloat16"},
                "mixers": {"mesanet": {"tol": 1e-4, "short_conv": 4}},
                "optimizer": {"name": "muon", "learning_rate": 3e-3},
                "training": {"steps": 20_000, "batch_size": 256, "stop_at": 0.99, "seed": 7},
            },
            "f0a18606e3e4",
        ),
        ("state_tracking", {"model": {"mixer": {"name": "gated_deltanet"}}}, "642c35818468"),
        (
            "in_context_regression",
            {"model": {"mixer": {"name": "hyena"}, "mlp_ratio": 4.0}},
            "271215e96f13",
        ),
        ("mad", {"task": {"kind": "compression"}, "model": {"mlp_type": "swiglu"}}, "c2e7eb91400f"),
    ],
)
def test_of_settings(task, changes, expected):
    assert digest(override(training.defaults(task), changes)) == expected


def test_what_changes_no_result_changes_no_digest():
    usual = training.defaults("mqar")
    same = {
        "training": {"seed": 1, "log_every": 5, "checkpoint_every": 5, "steps_per_call": 1},
        "optimizer": {"learning_rate": 0.1},
        "mixers": {"gla": {"chunk": 32}},
    }
    assert digest(override(usual, same)) == digest(usual)
    assert digest(override(usual, {"training": {"steps": 7}})) != digest(usual)


@pytest.mark.parametrize("task", COMMITTED)
def test_of_committed_results(task):
    """Every row has the digest that the config, with the choices of the row, has today."""
    variant, file = COMMITTED[task]
    described = config(task, variant)
    digests = {}
    for row in sweep.read_results(ROOT / "experiments" / file):
        changed = override(described, described["sweep"]["cases"][row["case"]])
        for path in filter(lambda column: "." in column, row):
            *sections, option = path.split(".")
            if row[path] is not None and "/" not in path:
                nested = {option: row[path]}
                for section in reversed(sections):
                    nested = {section: nested}
                changed = override(changed, nested)
        digests[row["settings"]] = digest(changed)
    assert digests and all(found == wanted for wanted, found in digests.items()), digests
