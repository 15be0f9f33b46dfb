"""The table of mixers: records, refusal of what is wrong, isolation, the table."""

import dataclasses

import jax
import numpy as np
import pytest

import lla
from lla.experiments.benchmarks import mixers, results, truth

SMALL = ["--length=16", "--width=16", "--heads=2", "--repeats=2", "--budget=0.1", "--workers=2"]
MEASURED = ("softmax", "linear")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One small run: exit status, arguments, path."""
    path = tmp_path_factory.mktemp("mixers") / "mixers_cpu.json"
    argv = [*SMALL, "--batch=2", "--only", *MEASURED, f"--output={path}"]
    return mixers.main(argv), argv, path


def test_run(measured, monkeypatch, capsys):
    status, argv, path = measured
    document = results.load(path)
    assert status == 0 and document["header"]["benchmark"] == "mixers"
    records = {(r["implementation"], r["pass"]): r for r in document["records"]}
    assert set(records) == {(name, which) for name in MEASURED for which in truth.PASSES}
    for (name, which), record in records.items():
        assert record["status"] == "timed" and record["repeats"] == 2
        assert record["parameters"] == 4 * 16 * 16 + {"softmax": 2, "linear": 1}[name] * 8
        assert (record["dtype"], record["batch"], record["n"]) == ("float32", 2, 16)
        assert record["temp_bytes"] > 0 and record["compile_s"] > 0
        assert record.get("served_by") == {"softmax": "xla"}.get(name)
        gradients = {"parameters", "input"} if which == "forward_backward" else set()
        assert set(record["errors"]) == {"output"} | gradients
        assert max(record["errors"].values()) < 1e-5
    # What is timed is kept, unless the code or the sizes change.
    monkeypatch.setattr(mixers, "compile_program", None)
    assert mixers.main(argv) == 0
    assert results.load(path)["records"] == document["records"]
    assert "| softmax (xla) | 1040 | " in capsys.readouterr().out


def test_what_is_wrong_or_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    """A wrong output, a wrong gradient, an exception; afterwards they are measured in place."""
    options, create = mixers.reference_options, lla.mixers.create
    compile_program = mixers.compile_program

    def wrong_reference(name):
        return {**options(name), **({"scale": 2.0} if name == "softmax" else {})}

    def wrong_gradient(program):
        made = compile_program(program)
        if (program.mixer, program.which) != ("linear", "forward_backward"):
            return made

        def call(*given):
            out = made.call(*given)
            return {**out, "parameters": jax.tree.map(lambda leaf: 1.5 * leaf, out["parameters"])}

        return dataclasses.replace(made, call=call)

    def broken(name, *args, **kwargs):
        if name == "hyena":
            raise ValueError("out of order\nand more")
        return create(name, *args, **kwargs)

    path = tmp_path / "out.json"
    argv = [*SMALL, "--dtypes=bfloat16", "--only", "hyena", *MEASURED, f"--output={path}"]
    with monkeypatch.context() as patch:
        patch.setattr(mixers, "reference_options", wrong_reference)
        patch.setattr(mixers, "compile_program", wrong_gradient)
        patch.setattr(lla.mixers, "create", broken)
        assert mixers.main(argv) == 1
    records = results.load(path)["records"]
    found = {(r["implementation"], r["pass"]): r for r in records}
    assert len(found) == len(records) == 3 * 2
    for which in truth.PASSES:
        assert found["hyena", which]["status"] == "unavailable"
        assert found["hyena", which]["reason"] == "ValueError: out of order"
        assert found["softmax", which]["status"] == "refused"
        assert "time_min_s" not in found["softmax", which]
        assert "output 6.5e-01 > 5.0e-02" in found["softmax", which]["reason"]
    assert found["linear", "forward"]["status"] == "timed"
    refused = found["linear", "forward_backward"]
    assert refused["status"] == "refused" and "output" not in refused["reason"]
    np.testing.assert_allclose(refused["errors"]["parameters"], 0.5, rtol=1e-2)
    text = mixers.result_tables(records)
    assert "| hyena |  | unavailable |  |  | unavailable |" in text
    assert "- hyena, bfloat16, forward: unavailable: ValueError: out of order" in text
    assert mixers.main([*argv, "--only", "linear"]) == 0
    again = results.load(path)["records"]
    assert len(again) == 6 and [r["status"] for r in again].count("timed") == 2


def test_every_mixer_has_a_reference():
    for name in lla.mixers.names():
        valid = lla.mixers.options(name)
        for option, value in mixers.reference_options(name).items():
            assert option in valid and valid[option] != value


def test_table():
    records = []
    for name, factor in (("softmax", 1), ("lla", 3)):
        for i, which in enumerate(truth.PASSES, 1):
            records.append({
                "implementation": name, "pass": which, "dtype": "float32", "batch": 1, "n": 8,
                "width": 16, "heads": 2, "head_dim": 8, "parameters": 1040, "served_by": "xla",
                "temp_bytes": 2**20, "compile_s": 1.25, "status": "timed", "repeats": 2,
                "time_min_s": 1e-3 * factor * i, "time_median_s": 2e-3 * factor * i,
                "errors": {"output": 1e-6}, "bounds": {"output": 1e-3}, "truth": "made up",
                "commit": "abc", "date": "2000-01-01",
            })  # fmt: skip
    times = "6 (3); 1e-06 | 3.00 | 1 | 12 (6); 1e-06 | 3.00 | 1 | 1.2; 1.2 |"
    header = results.make_header("mixers", {})
    for text in (
        mixers.result_tables(records),
        mixers.markdown({"header": header, "records": records}),
    ):
        assert "**float32**, batch 1, 8 tokens, width 16, 2 heads" in text
        assert f"| lla (xla) | 1040 | {times}" in text
