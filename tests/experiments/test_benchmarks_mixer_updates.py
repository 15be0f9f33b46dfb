"""Errors and times of training updates: records, what is wrong, and failures of one mechanism."""

import gc

import numpy as np
import pytest

from lla.experiments.benchmarks import mixer_updates, results
from lla.mixers import hopper

SMALL = [
    "--batch=2", "--length=256", "--width=16", "--heads=2", "--depth=1", "--runs-batch=2",
    "--checked=20", "--repeats=2", "--budget=0.1", "--workers=2",
]  # fmt: skip


@pytest.mark.slow
def test_errors_and_times_are_recorded(tmp_path, capsys):
    path = tmp_path / "updates.json"
    argv = [*SMALL, "--only", "softmax", "linear", "--operators", "per_head", f"--output={path}"]
    assert mixer_updates.main([*argv, "--cells", "forward_backward", "update"]) == 0
    document = results.load(path)
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


def test_a_wrong_form_and_a_failure_are_named(monkeypatch, tmp_path):
    good = {"output": 1e-3, "parameters": 1e-3, "input": 1e-3, "worst": ("", 1e-3)}
    found = {"float32": dict.fromkeys(good, 1e-7), "bfloat16_recurrent": good, "bfloat16": good}
    assert mixer_updates.judge(found) is None
    shared = {**good, "input": 0.1}
    assert mixer_updates.judge({**found, "bfloat16": shared, "bfloat16_recurrent": shared}) is None
    assert "input" in mixer_updates.judge({**found, "bfloat16": shared})
    assert "output" in mixer_updates.judge({**found, "float32": {**good, "output": float("nan")}})

    def fail(options, cell):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(mixer_updates, "compile_job", fail)
    path = tmp_path / "updates.json"
    argv = [*SMALL, "--only", "linear", "--operators", "--cells", "update", f"--output={path}"]
    assert mixer_updates.main(argv) == 1
    (record,) = results.load(path)["records"]
    assert record["status"] == "unavailable" and "does not compile" in record["reason"]


def test_kernels_that_are_not_measured_yet_serve_here(monkeypatch, tmp_path):
    allowed = []

    def compile_job(options, job):
        gc.collect()
        allowed.append(hopper.allowed("a kernel that no GPU has run", 64))
        raise RuntimeError("not needed")

    monkeypatch.setattr(mixer_updates, "compile_job", compile_job)
    output = f"--output={tmp_path / 'updates.json'}"
    mixer_updates.main([*SMALL, "--only", "gla", "--operators", "--cells", "update", output])
    assert allowed and all(allowed)
    assert not hopper.allowed("a kernel that no GPU has run", 64)
