"""The benchmark of the blockwise implementation against simpler variants."""

import numpy as np

NAMES = ("measure", "subjects", "report", "blockwise_variants")
SMALL = ["--length=512", "--head_dim=8", "--heads=2", "--repeats=2", "--budget=0.1"]


def test_all_variants_agree_and_are_timed(bench, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert bench.blockwise_variants.main([*SMALL, f"--output={path}"]) == 0
    records = bench.measure.load(path)["records"]
    assert len(records) == 7 and {record["status"] for record in records} == {"timed"}
    # Rounding alone: a variant with another number of iterations would be off by far more.
    assert max(record["errors"]["output"] for record in records) < 1e-5
    assert "| xla | " in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(bench, tmp_path, monkeypatch):
    variants = bench.blockwise_variants
    monkeypatch.setattr(variants, "_ours", lambda *_: lambda query, key, value, ridge: value)
    path = tmp_path / "out.json"
    assert variants.main([*SMALL, f"--output={path}"]) == 1
    records = bench.measure.load(path)["records"]
    assert {r["implementation"] for r in records if r["status"] == "refused"} == {"xla"}


def test_fewer_iterations_are_told_apart(bench):
    """The iterations matter at the sizes of the test above."""
    inputs = bench.subjects.normal_inputs(1, 512, 2, 8, np.float32, 0)
    inputs = bench.subjects.with_ridge(inputs, 1.0)
    few, many = (
        bench.blockwise_variants.in_float64(
            bench.blockwise_variants.make_subjects(1.0, count)["dense"].function, inputs
        )["output"]
        for count in (3, 4)
    )
    assert np.linalg.norm(few - many) > 1e-4 * np.linalg.norm(many)
