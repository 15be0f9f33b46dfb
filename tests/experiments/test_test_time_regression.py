"""The main job end to end, and the statistics behind its tables."""

import json

import numpy as np
import pytest

from lla.experiments.test_time_regression import summary
from tests.experiments.scripts import ROOT, run, table

MAIN = ROOT / "experiments" / "test_time_regression" / "main.py"
CONFIG = ROOT / "configs" / "test_time_regression.py"


def test_smoke_resume_and_refusal(tmp_path):
    flags = ("--config.segment_lengths=(32,)",)  # one setting: every estimator, once
    done = run(MAIN, f"--config={CONFIG}:smoke", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    assert "left" in done.stderr and "100%" in done.stderr
    assert str(tmp_path / "figure.png") in done.stdout
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "figure.svg").read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["segment_lengths"] == [32]
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    labels = {json.loads(line)["label"] for line in records}
    assert labels == {*config["estimators"], "oracle"}
    assert {row["label"] for row in table(tmp_path)} == labels

    # A killed run: two trials are missing. Rerunning computes these and gives the same records.
    (tmp_path / "metrics.jsonl").write_text("\n".join(records[:-2]) + "\n")
    again = run(MAIN, f"--config={CONFIG}:smoke", f"--workdir={tmp_path}", *flags)
    assert again.returncode == 0, again.stderr
    assert f"{len(records) - 2} already finished" in again.stdout
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == records

    other = run(MAIN, f"--config={CONFIG}:smoke", f"--workdir={tmp_path}", "--config.dim=4")
    assert other.returncode != 0
    assert "another config" in other.stderr and "dim: 8 there, 4 now" in other.stderr
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == records


def test_a_typo_in_an_override_names_the_key(tmp_path):
    wrong = run(
        MAIN, f"--config={CONFIG}:smoke", f"--workdir={tmp_path / 'new'}", "--config.dimm=4"
    )
    assert wrong.returncode != 0
    assert "did you mean config.dim?" in wrong.stderr
    assert not (tmp_path / "new").exists()


def test_published_ordering_in_the_committed_results():
    rows = summary.synthetic_table(MAIN.parent / "results" / "full")
    row = {(r["kind"], r["dim"], r["segment_length"], r["label"]): r for r in rows}

    def interval(label, kind="piecewise", dim=64, segment_length=256):
        found = row[kind, dim, segment_length, label]
        return found["error"] - found["error_band95"], found["error"] + found["error_band95"]

    for label in ("softmax", "mesanet"):
        assert interval("lla")[1] < interval(label)[0]
    # What the ordering does not cover, as the README reports it.
    for dim in (8, 16, 32):
        assert interval("mesanet_decay", dim=dim)[1] < interval("lla", dim=dim)[0]
    assert interval("mesanet", segment_length=1024)[1] < interval("lla", segment_length=1024)[0]
    assert interval("mesanet_decay", kind="iid_keys")[1] < interval("lla", kind="iid_keys")[0]


def test_bands_cover():
    rng = np.random.default_rng(0)
    hits = ratio_hits = 0
    for _ in range(400):
        below = rng.normal(1.0, 0.1, 40)
        above = 2.0 * below + rng.normal(0.0, 0.05, 40)
        mean, half = summary.mean_and_band(below)
        hits += abs(mean - 1.0) < half
        ratio, half = summary.ratio_and_band(above, below)
        ratio_hits += abs(ratio - 2.0) < half
    assert 0.91 < hits / 400 < 0.985
    assert 0.91 < ratio_hits / 400 < 0.985


def test_a_grid_is_chosen_on_one_half_and_reported_on_the_other():
    point = {"kind": "piecewise", "dim": 8, "segment_length": 4, "label": "lla"}
    good = point | {"per_sequence": [1.0, 1.0, 5.0, 7.0], "options": {"beta": 1}}
    lucky = point | {"per_sequence": [2.0, 2.0, 0.0, 0.0], "options": {"beta": 2}}
    chosen = summary.select([lucky, good])["piecewise", 8, 4, "lla"]
    assert chosen["options"] == {"beta": 1} and chosen["per_sequence"] == [5.0, 7.0]


def test_block_bootstrap_is_wider_for_dependent_errors():
    resample = summary.moving_blocks(200, 20, 500, seed=0)
    assert resample.shape == (500, 200)
    assert ((np.diff(resample[:, :20], axis=1) - 1) % 200 == 0).all()  # a block stays together
    errors = np.repeat(np.random.default_rng(0).exponential(size=10), 20)
    low, high = summary.band(errors, resample)
    alone = summary.band(errors, summary.moving_blocks(200, 1, 500, seed=0))
    assert low < np.sqrt(errors.mean()) < high
    assert high - low > 2 * (alone[1] - alone[0])
    assert summary.band(4.0 * errors, resample, errors) == pytest.approx((2.0, 2.0))
