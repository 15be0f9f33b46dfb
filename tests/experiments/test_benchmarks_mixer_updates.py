"""Errors and times of training updates: records, what is wrong, and failures of one mechanism."""

import gc

import numpy as np
import pytest

from lla.mixers import hopper

NAMES = (
    "measure", "subjects", "report", "hopper_tables", "hopper_cells", "hopper", "peers_tables",
    "stages_tables", "peers_adapters", "peers", "mixers_tables", "mixers",
    "mixer_operators", "mixer_updates",
)  # fmt: skip
SMALL = [
    "--batch=2", "--length=256", "--width=16", "--heads=2", "--depth=1", "--runs-batch=2",
    "--checked=20", "--repeats=2", "--budget=0.1", "--workers=2",
]  # fmt: skip


@pytest.mark.slow
def test_errors_and_times_are_recorded(bench, tmp_path, capsys):
    path = tmp_path / "updates.json"
    argv = [*SMALL, "--only", "softmax", "linear", "--operators", "per_head", f"--output={path}"]
    assert bench.mixer_updates.main([*argv, "--cells", "forward_backward", "update"]) == 0
    document = bench.measure.load(path)
    found = document["header"]["operators"]["per_head"]
    assert max(found["float32"]) < 1e-5 and max(found["bfloat16"]) < 1e-2
    records = {(r["implementation"], r["pass"]): r for r in document["records"]}
    assert len(records) == 4
    for record in records.values():
        assert record["status"] == "timed" and "warning" not in record
        assert record["errors"]["float32"]["output"] < 1e-5
    update = records["linear", "update"]
    tokens = update["tokens_per_s"] * update["time_median_s"]
    np.testing.assert_allclose(tokens, 2 * 256)
    softmax = records["softmax", "update"]["time_median_s"]
    ratio = update["time_median_s"] / softmax
    np.testing.assert_allclose(update["times_softmax"], ratio, atol=1e-3)


def test_a_wrong_form_and_a_failure_are_named(bench, monkeypatch, tmp_path):
    script = bench.mixer_updates
    good = {"output": 1e-3, "parameters": 1e-3, "input": 1e-3, "worst": ("", 1e-3)}
    found = {"float32": dict.fromkeys(good, 1e-7), "bfloat16_recurrent": good, "bfloat16": good}
    assert script.judge(found) is None
    shared = {**good, "input": 0.1}
    assert script.judge({**found, "bfloat16": shared, "bfloat16_recurrent": shared}) is None
    assert "input" in script.judge({**found, "bfloat16": shared})
    assert "output" in script.judge({**found, "float32": {**good, "output": float("nan")}})

    def fail(options, cell):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(script, "compile_cell", fail)
    path = tmp_path / "updates.json"
    argv = [*SMALL, "--only", "linear", "--operators", "--cells", "update", f"--output={path}"]
    assert script.main(argv) == 1
    (record,) = bench.measure.load(path)["records"]
    assert record["status"] == "unavailable" and "does not compile" in record["reason"]


def test_kernels_that_are_not_measured_yet_serve_here(bench, monkeypatch, tmp_path):
    script, allowed = bench.mixer_updates, []

    def compile_cell(options, cell):
        gc.collect()
        allowed.append(hopper.allowed("a kernel that no GPU has run", 64))
        raise RuntimeError("not needed")

    monkeypatch.setattr(script, "compile_cell", compile_cell)
    output = f"--output={tmp_path / 'updates.json'}"
    script.main([*SMALL, "--only", "gla", "--operators", "--cells", "update", output])
    assert allowed and all(allowed)
    assert not hopper.allowed("a kernel that no GPU has run", 64)
