"""The benchmarks: result files, refusal of wrong implementations, fits, and README tables."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "benchmarks"
NAMES = ("measure", "subjects", "report", "operator_scaling", "solver_choice")
SCALING = ["--min_length=16", "--head_dims=8", "--heads=2", "--repeats=2", "--budget=0.1"]
SMALL = ["--max_length=16", "--implementations", "reference", "xla_cg", "jax_softmax"]
CHOICE = ["--length=16", "--head_dims=8", "--heads=2", "--repeats=2", "--budget=0.1"]


def scaling(bench, path, *extra):
    status = bench.operator_scaling.main([*SCALING, *extra, f"--output={path}"])
    return status, bench.measure.load(path)


@pytest.fixture(scope="module")
def measured(bench, tmp_path_factory):
    """One small run: exit status, path, document."""
    path = tmp_path_factory.mktemp("scaling") / "small.json"
    status, document = scaling(bench, path, *SMALL)
    return status, path, document


def test_scaling_records(measured):
    status, _, document = measured
    assert status == 0
    records = document["records"]
    cells = {(r["implementation"], r["pass"], r["n"], r["head_dim"]) for r in records}
    assert len(records) == len(cells) == 3 * 2
    for record in records:
        assert record["status"] == "timed" and record["repeats"] == 2
        assert record["temp_bytes"] > 0
        assert record["truth"] == "reference, float64" and record["truth_cross_check"] < 1e-9
        names = {"output"}
        if record["pass"] == "forward_backward":
            names |= {"query", "key", "value"}
            names |= {"ridge"} if record["implementation"] != "jax_softmax" else set()
        assert set(record["errors"]) == names
        assert record["bounds"]["output"] == pytest.approx(1e-5)
        for name in names:
            assert 0 < record["errors"][name] <= record["bounds"][name]
    header = document["header"]
    assert header["settings"]["heads"] == 2 and header["versions"]["jax"] == jax.__version__
    assert header["platform"] == "cpu" and header["device"]["cpu"]


def test_finished_cells_are_not_measured_again(bench, measured, monkeypatch, tmp_path):
    path = tmp_path / "copy.json"
    path.write_text(measured[1].read_text())

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench.subjects, "exact", fail)
    status, document = scaling(bench, path, *SMALL)
    assert status == 0 and document["records"] == measured[2]["records"]


@pytest.mark.parametrize("change", [{"source_digest": "other"}, {"settings": {"ridge": 2.0}}])
def test_results_of_another_run_are_dropped_unless_resumed(bench, measured, change):
    header = {**measured[2]["header"], **change}
    key = bench.operator_scaling.KEY_FIELDS
    assert not bench.measure.Results(measured[1], header, key).records
    assert bench.measure.Results(measured[1], header, key, resume=True).records
    assert bench.measure.Results(measured[1], measured[2]["header"], key).records


def test_beyond_the_memory_limit_nothing_runs(bench, tmp_path):
    status, document = scaling(
        bench, tmp_path / "out.json", "--max_length=16", "--implementations", "xla_cg",
        "--memory_limit_gib=1e-9",
    )  # fmt: skip
    assert status == 0
    assert [record["status"] for record in document["records"]] == ["memory only"] * 2
    assert all(r["temp_bytes"] > 0 and "time_min_s" not in r for r in document["records"])


def wrong_output(query, key, value, ridge):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def wrong_gradient(bench):
    right = bench.subjects.SUBJECTS["xla_cg"].function

    def attend(query, key, value, ridge):
        return right(query, jax.lax.stop_gradient(key), value, ridge)

    return attend


def test_what_is_wrong_is_not_timed(bench, monkeypatch, tmp_path, capsys):
    subject = bench.subjects.Subject
    wrong = {"xla_cg": subject("lla", wrong_gradient(bench))}
    wrong["xla_direct"] = subject("lla", wrong_output)
    for name, replacement in wrong.items():
        monkeypatch.setitem(bench.subjects.SUBJECTS, name, replacement)
    status, document = scaling(
        bench, tmp_path / "out.json", "--max_length=16", "--implementations", *wrong
    )
    found = {(r["implementation"], r["pass"]): r for r in document["records"]}
    assert status == 1
    assert found["xla_cg", "forward"]["status"] == "timed"
    for cell in (("xla_cg", "forward_backward"), ("xla_direct", "forward")):
        assert found[cell]["status"] == "refused" and "time_min_s" not in found[cell]
    assert found["xla_cg", "forward_backward"]["reason"].startswith("error too large: key 1.0e+00")
    assert "not timed" in capsys.readouterr().err


def test_what_is_not_finite_is_refused(bench):
    subject = bench.subjects.SUBJECTS["xla_cg"]
    want = {"output": np.ones(3)}
    truth = bench.subjects.Truth(want, "made up", None)
    verdict = bench.subjects.judge(subject, {"output": [1, math.nan, 1]}, truth, 1.0, "float32")
    assert verdict["errors"] == {"output": None} and "inf" in verdict["reason"]
    right = bench.subjects.judge(subject, {"output": [1, 1, 1]}, truth, 1.0, "float32")
    assert "reason" not in right


def test_bounds(bench):
    subject = bench.subjects.SUBJECTS["xla_cg"]
    want = {"output": np.linspace(0.1, 1, 99), "query": np.ones(3)}
    for ridge, bound in ((10, 1e-5), (1, 1e-5), (0.5, 1e-4), (0.1, 1e-4), (0.01, 1e-3)):
        found = bench.subjects.bounds(subject, ridge, jnp.float32, want)
        assert found == pytest.approx({"output": bound, "query": 10 * bound})
    found = bench.subjects.bounds(subject, 1.0, jnp.bfloat16, want)["output"]
    assert 2**-10 < found < 2**-7


def test_solver_choice(bench, tmp_path, capsys):
    path = tmp_path / "choice.json"
    arguments = [*CHOICE, "--ridges", "10", "0.1", "--dtypes", "float32"]
    assert bench.solver_choice.main([*arguments, f"--output={path}"]) == 0
    assert "Ridge below which" in capsys.readouterr().out
    records = bench.measure.load(path)["records"]
    solved = [record for record in records if record["ridge"] is not None]
    assert len(solved) == 2 * 2 * 2 and len(records) == len(solved) + 2 * 2
    iterations = {(r["implementation"], r["ridge"]): r["mean_iterations"] for r in solved}
    assert iterations["xla_cg", 0.1] > iterations["xla_cg", 10.0] >= 1
    assert iterations["xla_cg", 0.1] > iterations["xla_direct", 0.1] >= 1


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.1, 2.0])
def test_fitted_exponent(bench, exponent):
    sizes = [256, 512, 1024, 4096]
    amounts = [3e-5 * n**exponent for n in sizes]
    assert bench.report.fit_exponent(sizes, amounts) == pytest.approx(exponent, abs=1e-9)


def test_fitted_exponent_needs_two_sizes(bench):
    assert bench.report.fit_exponent([256], [1.0]) is None


def test_faster_from(bench):
    slow = {256: 1.0, 512: 1.0, 1024: 1.0, 2048: 1.0}
    find = bench.report.faster_from
    assert find({256: 0.5, 512: 2.0, 1024: 0.5, 2048: 0.5, 4096: 9.0}, slow) == 1024
    assert find({256: 0.5, 512: 0.5, 1024: 0.5, 2048: 2.0}, slow) is None
    assert find({256: 0.5}, slow) == 256
    assert find({}, slow) is None


def test_break_even(bench):
    direct = {10.0: 2.0, 1.0: 2.0, 0.1: 2.0, 0.01: 2.0}
    cg = {10.0: 0.5, 1.0: 1.0, 0.1: 4.0, 0.01: 8.0}
    found = bench.report.break_even(direct, cg)
    # The logarithm of the ratio changes sign half-way between 0.1 and 1.
    assert found["measured"] == 0.1 and found["estimate"] == pytest.approx(math.sqrt(0.1))
    always = bench.report.break_even(direct, dict.fromkeys(direct, 3.0))
    assert always == {"measured": 10.0, "estimate": None}
    never = bench.report.break_even(direct, dict.fromkeys(direct, 1.0))
    assert never == {"measured": None, "estimate": None}


def test_calls_take_turns_within_their_budget(bench, monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.measure.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        order.append(name)
        now[0] += seconds[name]
        return jnp.zeros(())

    seconds = {"slow": 4.0, "quick": 0.5}
    calls = {name: lambda name=name: call(name, seconds) for name in seconds}
    found = bench.measure.time_interleaved(calls, repeats=4, budget=3.0)
    assert order == ["slow", "quick", "slow", "quick", "quick", "quick"]
    expected = {"time_min_s": 4.0, "time_median_s": 4.0, "repeats": 2, "calls_in_queue": 0.0}
    assert vars(found["slow"]) == expected
    assert found["quick"].repeats == 4


def test_the_queue_tells_a_busy_device_from_one_that_waits(bench, monkeypatch):
    """A device that takes `busy` seconds a call, and a host that takes 1 to launch one."""
    now, ready = [0.0], [0.0]
    monkeypatch.setattr(bench.measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench.measure.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench.measure, "_calls_per_sample", lambda call: 10)

    def wait(out):
        now[0] = max(now[0], ready[0])

    monkeypatch.setattr(bench.measure.jax, "block_until_ready", wait)

    def call(busy):
        now[0] += 1.0
        ready[0] = max(ready[0], now[0]) + busy

    busy = {"short": 0.5, "long": 4.0}
    found = bench.measure.time_interleaved(
        {name: lambda name=name: call(busy[name]) for name in busy}, repeats=3, budget=1e9
    )
    assert found["short"].time_median_s == 1.05  # of the host
    assert found["short"].calls_in_queue == pytest.approx(0.5 / 1.05)
    assert found["long"].time_median_s == pytest.approx(4.1)
    assert found["long"].calls_in_queue == pytest.approx(31 / 4.1)


def test_malformed_results_are_rejected(bench, measured, tmp_path):
    path = tmp_path / "bad.json"
    document = json.loads(measured[1].read_text())
    for change in (
        lambda record: record.pop("errors"),
        lambda record: record.update(status="refused", reason="wrong"),
        lambda record: record.update(time_min_s=1e9),
        lambda record: record.update(status="done"),
    ):
        broken = json.loads(json.dumps(document))
        change(broken["records"][0])
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"status|positive"):
            bench.measure.load(path)
    del document["header"]["commit"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="commit"):
        bench.measure.load(path)


def test_figure(bench, measured, tmp_path):
    first = [path.read_bytes() for path in bench.report.draw(measured[1], tmp_path / "a")]
    again = [path.read_bytes() for path in bench.report.draw(measured[1], tmp_path / "b")]
    assert first == again and len(first) == 2
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]


def test_readme_blocks_have_to_match_the_results(bench, measured, tmp_path):
    (tmp_path / "small.json").write_text(measured[1].read_text())
    block = "a\n<!-- generated: {} -->\nold\n<!-- end generated -->\nb\n"
    text = bench.report.render(block.format("small"), tmp_path)
    assert "old" not in text and "| n | reference | xla, cg | jax.nn softmax |" in text
    assert bench.report.render(text, tmp_path) == text
    with pytest.raises(ValueError, match="other"):
        bench.report.render(block.format("other"), tmp_path)


@pytest.mark.parametrize("name", ["operator_scaling_cpu", "solver_choice_cpu"])
def test_results_are_committed(bench, name):
    document = bench.measure.load(FOLDER / "results" / f"{name}.json")
    assert document["header"]["commit"] and document["records"]


def test_readme_tables_are_those_of_the_results(bench):
    text = bench.report.README.read_text(encoding="utf-8")
    assert bench.report.render(text, bench.measure.RESULTS) == text
