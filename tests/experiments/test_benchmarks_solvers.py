"""The benchmark of the Hopper kernels' two solvers: a run on a CPU, its rules and its tables."""

import json
import math

import numpy as np
import pytest

from lla.experiments.benchmarks import hopper, hopper_solvers

SMALL = [
    "--implementation=xla", "--head_dims=8", "--ridges", "1", "0.1", "--batch=1", "--heads=2",
    "--length=32", "--accuracy_length=16", "--repeats=2", "--budget=0.1", "--workers=2",
]  # fmt: skip


def document(times, **changes):
    """Records of one dimension from ``{(method, ridge): seconds}``."""
    records = [
        {
            "method": method, "pass": which, "head_dim": 16, "ridge": ridge, "inputs": "normal",
            "n": 8, "status": "timed", "time_median_s": seconds, "time_min_s": seconds,
            "errors": {"output": 1e-3}, "commit": "abc", **changes,
        }
        for (method, ridge), seconds in times.items()
        for which in ("forward", "forward_backward")
    ]  # fmt: skip
    return records


def test_a_run(tmp_path, capsys):
    path = tmp_path / "solvers.json"
    arguments = [*SMALL, "--inputs", "normal", "sharp", f"--output={path}"]
    assert hopper_solvers.main(arguments) == 0
    records = json.loads(path.read_text())["records"]
    keys = [tuple(r[name] for name in hopper_solvers.KEY_FIELDS) for r in records]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * 2
    assert {r["status"] for r in records} == {"timed"}
    assert {r["inputs"] for r in records} == {"normal", "sharp"}
    assert all(0 < r["errors"]["output"] <= r["bounds"]["output"] for r in records)
    assert all(r["truth"] == "reference, float64, n = 16" for r in records)
    direct = [r["accuracy_iterations"] for r in records if r["method"] == "direct"]
    cg = [r["accuracy_iterations"] for r in records if r["method"] == "cg"]
    assert max(direct) < min(cg)
    backward = [r for r in records if r["pass"] == "forward_backward"]
    assert backward and all(np.isfinite(r["mean_iterations"]) for r in backward)
    assert "**sharp**" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    true = hopper.make_function

    def wrong(program, solver=None):
        function = true(program, solver)
        if solver is None or solver.method != "direct":
            return function
        return lambda inputs: {**function(inputs), "output": 1.1 * function(inputs)["output"]}

    monkeypatch.setattr(hopper, "make_function", wrong)
    path = tmp_path / "solvers.json"
    arguments = [*SMALL, "--ridges", "1", "--inputs", "normal", f"--output={path}"]
    assert hopper_solvers.main(arguments) == 1
    records = json.loads(path.read_text())["records"]
    status = {r["method"]: r["status"] for r in records}
    assert status == {"cg": "timed", "direct": "refused"}
    assert all("time_median_s" not in r for r in records if r["method"] == "direct")
    assert "refused" in capsys.readouterr().out


def test_crossings():
    # Level in the middle of the logarithms of 0.1 and 1; 0.01 has no direct time.
    times = {
        ("cg", 1.0): 1.0, ("cg", 0.1): 4.0, ("cg", 0.01): 9.0,
        ("direct", 1.0): 2.0, ("direct", 0.1): 2.0,
    }  # fmt: skip
    found = hopper_solvers.crossing(document(times), 16)
    assert found["measured"] == 0.1 and found["ridges"] == [0.1, 1.0]
    assert found["estimate"] == pytest.approx(10**-0.5)
    assert hopper_solvers._crossing_text(found) == "0.1 (0.32) [0.1]"
    slow = hopper_solvers.crossing(document({**times, ("direct", 0.1): 5.0}), 16)
    assert hopper_solvers._crossing_text(slow) == "never [0.1]"
    assert (
        hopper_solvers._crossing_text(
            hopper_solvers.crossing(document(times, status="refused"), 16)
        )
        == ""
    )


def test_crossing_of_all_inputs():
    """By geometric means: half the time on one kind outweighs 1.5 times the time on another."""
    easy = {("cg", 1.0): 1.0, ("direct", 1.0): 3.0, ("cg", 0.1): 2.0, ("direct", 0.1): 3.0}
    hard = {("cg", 1.0): 4.0, ("direct", 1.0): 3.0, ("cg", 0.1): 6.0, ("direct", 0.1): 3.0}
    records = [*document(easy), *document(hard, inputs="sharp")]
    found = hopper_solvers.crossing(records, 16)
    assert found["measured"] == 0.1 and found["ridges"] == [0.1, 1.0]
    gains = [math.log(12 / 9), math.log(4 / 9)]
    assert found["estimate"] == pytest.approx(10 ** (gains[0] / (gains[0] - gains[1]) - 1))
    assert hopper_solvers.crossing(records, 16, kind="normal")["measured"] is None
    assert hopper_solvers.crossing(records, 16, kind="sharp")["measured"] == 1.0
    # A kind without a time of both leaves the ridge out.
    del hard["direct", 0.1]
    records = [*document(easy), *document(hard, inputs="sharp")]
    assert hopper_solvers.crossing(records, 16)["ridges"] == [1.0]
