"""The benchmark of the Hopper kernels: its cells, its rules, a run on a CPU, and its tables."""

import itertools
import pathlib

import numpy as np
import pytest

import lla
from lla.experiments.benchmarks import hopper, hopper_programs, hopper_tables, report, results

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"
SMALL = [
    "--implementation=xla", "--head_dims=8", "--ridges=1", "--batch=1", "--heads=2", "--length=16",
    "--accuracy_length=16", "--growth_lengths", "--long_length=0", "--matmul_size=16",
    "--repeats=2", "--budget=0.1", "--workers=2",
]  # fmt: skip


def made_up(**changes):
    """A document with every default cell timed, as a run on a GPU would write it."""
    options = hopper.parse([])
    header = {
        **results.make_header("hopper", {"dtype": options.dtype}),
        "platform": "gpu",
        "date": "2000-01-01",
    }
    header["device"] = {**header["device"], "kind": "Some GPU"}
    records = []
    for cell in hopper_programs.make_cases(options):
        fields, backward = cell.fields(), cell.program.which == "forward_backward"
        names = ("output", *cell.program.differentiable) if backward else ("output",)
        rank = 4.0 if fields["mechanism"] == "lla" else 2.0
        seconds = 1e-12 * rank * fields["n"] ** 2 * (3 if backward else 1)
        record = {
            **fields, "status": "timed", "errors": dict.fromkeys(names, 2e-3), "worst_row": 1e-2,
            "bounds": dict.fromkeys(names, 4e-3), "truth": "made up", "repeatable": True,
            "time_min_s": seconds, "time_median_s": seconds, "repeats": 7,
            "temp_bytes": 2**10 * fields["n"], "commit": "abc", "date": header["date"],
        }  # fmt: skip
        if fields["mechanism"] == "lla":
            record["mean_iterations"] = 3.25
        if (amount := hopper.flops(cell.program)) is not None:
            record["flops"] = amount
        records.append({**record, **changes})
    return {"header": header, "records": records}


def test_a_tolerance_reaches_the_solver():
    sizes = (1, 2, 1, 64, 16)
    program = hopper_programs.Program(
        "xla", "lla", "forward_backward", *sizes, 0.1, "static", "bfloat16"
    )
    inputs = hopper_programs.on_device(program, hopper_programs.make_inputs(program, "normal", 0))
    solvers = (lla.Solver(), lla.Solver(tol=0.3))
    compiled = [hopper.compile_program(program, solver).call for solver in solvers]
    usual, early = (float(call(inputs)["iterations"]) for call in compiled)
    assert early < usual / 2


def test_default_cases():
    cells = hopper_programs.make_cases(hopper.parse([]))
    assert len(cells) == len(set(cells))
    lla = [c.program for c in cells if c.group == "speed" and c.program.mechanism == "lla"]
    found = {(p.head_dim, p.ridge, p.which, p.ridge_kind) for p in lla}
    ridges, passes = (10, 1, 0.1, 0.01), ("forward", "forward_backward")
    assert found == set(itertools.product((64, 128), ridges, passes, ("static", "array")))
    # What is timed has an accuracy cell that decides about it.
    decided = {
        (p.implementation, p.mechanism, p.head_dim, p.ridge, p.ridge_kind)
        for group, inputs, p in cells
        if group == "accuracy" and inputs == "normal"
    }
    timed = [c.program for c in cells if c.group != "accuracy" and c.program.mechanism != "matmul"]
    found = {(p.implementation, p.mechanism, p.head_dim, p.ridge, p.ridge_kind) for p in timed}
    assert found == decided


def test_inputs():
    options = hopper.parse([*SMALL, "--accuracy_length=512"])
    program = next(
        c.program for c in hopper_programs.make_cases(options) if c.program.mechanism == "lla"
    )
    normal = hopper_programs.make_inputs(program, "normal", 0)
    assert set(normal) == {"query", "key", "value", "cotangent"}
    assert normal["key"].shape == (1, 512, 1, 8) and normal["query"].shape == (1, 512, 2, 8)
    parallax = hopper_programs.make_inputs(
        program._replace(mechanism="parallax", which="forward"), "normal", 0
    )
    assert set(parallax) == {"query", "key", "value", "probe"}
    np.testing.assert_array_equal(parallax["key"], normal["key"])
    assert 0.1 < parallax["probe"].std() < 0.15
    found = {
        kind: hopper_programs.make_inputs(program, kind, 0) for kind in hopper_programs.HOSTILE
    }
    np.testing.assert_allclose(found["sharp"]["key"], 2 * normal["key"])
    shift = found["offset"]["key"] - normal["key"]
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-5)
    assert np.abs(shift).max() > 2
    spread = np.linalg.eigvalsh(np.cov(found["anisotropic"]["key"].reshape(-1, 8).T))
    assert 1e3 < spread[-1] / spread[0] < 1e5
    nearest = found["clustered"]["key"].reshape(-1, 8)
    distances = np.linalg.norm(nearest[:, None] - nearest[None], axis=-1) + 9 * np.eye(512)
    assert distances.min(1).max() < 1


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("hopper") / "hopper_cpu.json"
    status = hopper.main([*SMALL, "--mechanisms", "lla", f"--output={path}"])
    return status, path, results.load(path)


def test_run(measured, monkeypatch, capsys):
    status, path, document = measured
    assert status == 0
    inputs = {r["inputs"] for r in document["records"] if r["group"] == "accuracy"}
    assert inputs == {"normal", *hopper_programs.HOSTILE}
    assert {r["mechanism"] for r in document["records"] if r["group"] == "speed"} == {
        "lla",
        "matmul",
    }
    for record in document["records"]:
        assert record["status"] == "timed" and record["repeats"] == 2
        for name, error in record["errors"].items():
            assert 0 < error <= record["bounds"][name]
        if record["mechanism"] == "lla":
            assert record["mean_iterations"] >= 1 and record["worst_row"] < 2e-2
        if record["group"] == "accuracy":
            assert record["repeatable"] is True
            names = {"output", "query", "key", "value"}
            names |= {"ridge"} if record["ridge_kind"] == "array" else set()
            assert set(record["errors"]) == names
    monkeypatch.setattr(hopper, "compile_program", None)
    assert hopper.main([*SMALL, "--mechanisms", "lla", f"--output={path}"]) == 0
    assert "**Accuracy, head dimension 8**" in capsys.readouterr().out


def test_nothing_is_measured_after_the_limit(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert hopper.main([*SMALL, "--limit=0", f"--output={path}"]) == 0
    assert not path.exists() and "no time left" in capsys.readouterr().err


def test_what_is_wrong_is_not_timed():
    cells = hopper_programs.make_cases(hopper.parse([]))
    accuracy = next(c for c in cells if c.program.mechanism == "lla")
    speed = [c for c in cells if c.group == "speed" and c.program.mechanism == "lla"]
    speed = [c for c in speed if c.program[-4:-1] == (64, 10, "static")]
    want = {"output": np.ones((1, 8, 2, 4)), "key": np.ones(3)}

    def checked(output, key):
        got = {"output": want["output"] * output, "key": want["key"] * key}
        record = {**accuracy.fields(), **hopper.verdict(accuracy, got, want)}
        return {c.program.which: hopper.check(c, [record])["status"] for c in speed}

    assert checked(1.003, 1.03) == {"forward": "timed", "forward_backward": "timed"}
    assert checked(1.003, 1.05) == {"forward": "timed", "forward_backward": "refused"}
    assert checked(1.005, 1.0) == {"forward": "refused", "forward_backward": "refused"}
    assert checked(np.nan, 1.0) == {"forward": "refused", "forward_backward": "refused"}
    assert hopper.check(speed[0], [])["status"] == "unavailable"


def test_bounds():
    cells = hopper_programs.make_cases(hopper.parse([]))
    for cell in cells:
        if cell.group == "accuracy":
            mechanism, ridge, head_dim = (
                getattr(cell.program, name) for name in ("mechanism", "ridge", "head_dim")
            )
            strict = mechanism != "lla" or (ridge in (1, 10) and head_dim == 64)
            strict = strict and cell.inputs == "normal" and cell.program.implementation != "cudnn"
            assert hopper.bound(cell) == (4e-3 if strict else 1e-2)


def test_tables():
    document = made_up()
    text = hopper_tables.markdown(document)
    assert (
        "Measured on Some GPU" in text and "Matrix product on the same card: 8192 TFLOP/s" in text
    )
    row = next(
        line for line in text.splitlines() if line.startswith("| mosaic_gpu, lla, ridge 10 |")
    )
    assert row.startswith(
        "| mosaic_gpu, lla, ridge 10 | 3.2 | 0.0671 (0.0671); 2e-03 | 2.00 |  | 4 |"
    )
    assert "- forward: exponent of time 2.00 (2.00), of memory 1.00 (1.00)." in text
    assert "| 65536 | 1 |  |  | 51.5 (51.5); 2e-03 | 64 |" in text
    assert "forward + backward, 2 times the heads: 1.00 times as long" in text
    assert "| mosaic_gpu, lla, ridge 1 as an array | normal | 3.2 | 2.0e-03 | 1.0e-02 |" in text
    accuracy = [r for r in document["records"] if r["group"] == "accuracy"]
    assert text.count("within bounds") == len(accuracy)


def test_tables_of_what_failed():
    document = made_up()
    for record in document["records"]:
        for name in ("time_min_s", "time_median_s", "repeats", "errors", "bounds", "truth"):
            del record[name]
        record |= {"status": "unavailable", "reason": "no"}
        results.check_record(record)
    text = hopper_tables.markdown(document)
    assert "| mosaic_gpu, lla, ridge 10 | 3.2 | unavailable |" in text


def test_result_file_is_added_with_its_block(tmp_path):
    for folder in ("results", "pages"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "hopper_some.json"
    results.write_json(path, made_up())
    for _ in range(2):  # adding it again changes nothing
        page = report.add(path, tmp_path / "results", tmp_path / "pages")
    assert page == tmp_path / "pages" / "hopper.md"
    found = report.documents(tmp_path / "results")["hopper"]
    rendered = report.render(page.read_text(), found)
    assert "## Some GPU" in rendered and rendered.count("**Growth**") == 1
    assert "(../figures/hopper_some.png)" in rendered
    assert report.render(rendered, found) == rendered
    first, again = (
        [file.read_bytes() for file in report.draw("some", found["hopper_some"], tmp_path / part)]
        for part in "ab"
    )
    assert first == again and first[0].startswith(b"\x89PNG")
