"""The benchmarks: result files, refusal of wrong implementations, fits, and README tables."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.experiments.benchmarks import (
    formatting,
    operator_scaling,
    report,
    results,
    solver_choice,
    timing,
    truth,
)

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "benchmarks"
SCALING = ["--min_length=16", "--head_dims=8", "--heads=2", "--repeats=2", "--budget=0.1"]
SMALL = ["--max_length=16", "--implementations", "reference", "xla_cg", "jax_softmax"]
CHOICE = ["--length=16", "--head_dims=8", "--heads=2", "--repeats=2", "--budget=0.1"]


def scaling(path, *extra):
    status = operator_scaling.main([*SCALING, *extra, f"--output={path}"])
    return status, results.load(path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One small run: exit status, path, document."""
    path = tmp_path_factory.mktemp("scaling") / "small.json"
    status, document = scaling(path, *SMALL)
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


def test_finished_cells_are_not_measured_again(measured, monkeypatch, tmp_path):
    path = tmp_path / "copy.json"
    path.write_text(measured[1].read_text())

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(truth, "exact", fail)
    status, document = scaling(path, *SMALL)
    assert status == 0 and document["records"] == measured[2]["records"]


@pytest.mark.parametrize("change", [{"source_digest": "other"}, {"settings": {"ridge": 2.0}}])
def test_results_of_another_run_are_dropped_unless_resumed(measured, change):
    header = {**measured[2]["header"], **change}
    key = operator_scaling.KEY_FIELDS
    assert not results.Results(measured[1], header, key).records
    assert results.Results(measured[1], header, key, resume=True).records
    assert results.Results(measured[1], measured[2]["header"], key).records


def test_beyond_the_memory_limit_nothing_runs(tmp_path):
    status, document = scaling(
        tmp_path / "out.json", "--max_length=16", "--implementations", "xla_cg",
        "--memory_limit_gib=1e-9",
    )  # fmt: skip
    assert status == 0
    assert [record["status"] for record in document["records"]] == ["memory only"] * 2
    assert all(r["temp_bytes"] > 0 and "time_min_s" not in r for r in document["records"])


def wrong_output(query, key, value, ridge):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def wrong_gradient():
    right = truth.IMPLEMENTATIONS["xla_cg"].function

    def attend(query, key, value, ridge):
        return right(query, jax.lax.stop_gradient(key), value, ridge)

    return attend


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path, capsys):
    subject = truth.Implementation
    wrong = {"xla_cg": subject("lla", wrong_gradient())}
    wrong["xla_direct"] = subject("lla", wrong_output)
    for name, replacement in wrong.items():
        monkeypatch.setitem(truth.IMPLEMENTATIONS, name, replacement)
    status, document = scaling(
        tmp_path / "out.json", "--max_length=16", "--implementations", *wrong
    )
    found = {(r["implementation"], r["pass"]): r for r in document["records"]}
    assert status == 1
    assert found["xla_cg", "forward"]["status"] == "timed"
    for cell in (("xla_cg", "forward_backward"), ("xla_direct", "forward")):
        assert found[cell]["status"] == "refused" and "time_min_s" not in found[cell]
    assert found["xla_cg", "forward_backward"]["reason"].startswith("error too large: key 1.0e+00")
    assert "not timed" in capsys.readouterr().err


def test_what_is_not_finite_is_refused():
    subject = truth.IMPLEMENTATIONS["xla_cg"]
    want = {"output": np.ones(3)}
    exact = truth.Truth(want, "made up", None)
    verdict = truth.judge(subject, {"output": [1, math.nan, 1]}, exact, 1.0, "float32")
    assert verdict["errors"] == {"output": None} and "inf" in verdict["reason"]
    right = truth.judge(subject, {"output": [1, 1, 1]}, exact, 1.0, "float32")
    assert "reason" not in right


def test_bounds():
    subject = truth.IMPLEMENTATIONS["xla_cg"]
    want = {"output": np.linspace(0.1, 1, 99), "query": np.ones(3)}
    for ridge, bound in ((10, 1e-5), (1, 1e-5), (0.5, 1e-4), (0.1, 1e-4), (0.01, 1e-3)):
        found = truth.bounds(subject, ridge, jnp.float32, want)
        assert found == pytest.approx({"output": bound, "query": 10 * bound})
    found = truth.bounds(subject, 1.0, jnp.bfloat16, want)["output"]
    assert 2**-10 < found < 2**-7


def test_solver_choice(tmp_path, capsys):
    path = tmp_path / "choice.json"
    arguments = [*CHOICE, "--ridges", "10", "0.1", "--dtypes", "float32"]
    assert solver_choice.main([*arguments, f"--output={path}"]) == 0
    assert "Ridge below which" in capsys.readouterr().out
    records = results.load(path)["records"]
    solved = [record for record in records if record["ridge"] is not None]
    assert len(solved) == 2 * 2 * 2 and len(records) == len(solved) + 2 * 2
    iterations = {(r["implementation"], r["ridge"]): r["mean_iterations"] for r in solved}
    assert iterations["xla_cg", 0.1] > iterations["xla_cg", 10.0] >= 1
    assert iterations["xla_cg", 0.1] > iterations["xla_direct", 0.1] >= 1


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.1, 2.0])
def test_fitted_exponent(exponent):
    sizes = [256, 512, 1024, 4096]
    amounts = [3e-5 * n**exponent for n in sizes]
    assert formatting.fit_exponent(sizes, amounts) == pytest.approx(exponent, abs=1e-9)


def test_fitted_exponent_needs_two_sizes():
    assert formatting.fit_exponent([256], [1.0]) is None


def test_faster_from():
    slow = {256: 1.0, 512: 1.0, 1024: 1.0, 2048: 1.0}
    find = formatting.faster_from
    assert find({256: 0.5, 512: 2.0, 1024: 0.5, 2048: 0.5, 4096: 9.0}, slow) == 1024
    assert find({256: 0.5, 512: 0.5, 1024: 0.5, 2048: 2.0}, slow) is None
    assert find({256: 0.5}, slow) == 256
    assert find({}, slow) is None


def test_break_even():
    direct = {10.0: 2.0, 1.0: 2.0, 0.1: 2.0, 0.01: 2.0}
    cg = {10.0: 0.5, 1.0: 1.0, 0.1: 4.0, 0.01: 8.0}
    found = formatting.break_even(direct, cg)
    # The logarithm of the ratio changes sign half-way between 0.1 and 1.
    assert found["measured"] == 0.1 and found["estimate"] == pytest.approx(math.sqrt(0.1))
    always = formatting.break_even(direct, dict.fromkeys(direct, 3.0))
    assert always == {"measured": 10.0, "estimate": None}
    never = formatting.break_even(direct, dict.fromkeys(direct, 1.0))
    assert never == {"measured": None, "estimate": None}


def test_calls_take_turns_within_their_budget(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        order.append(name)
        now[0] += seconds[name]
        return jnp.zeros(())

    seconds = {"slow": 4.0, "quick": 0.5}
    calls = {name: lambda name=name: call(name, seconds) for name in seconds}
    found = timing.time_interleaved(calls, repeats=4, budget=3.0)
    assert order == ["slow", "quick", "slow", "quick", "quick", "quick"]
    expected = {"time_min_s": 4.0, "time_median_s": 4.0, "repeats": 2, "calls_in_queue": 0.0}
    assert vars(found["slow"]) == expected
    assert found["quick"].repeats == 4


def test_the_queue_tells_a_busy_device_from_one_that_waits(monkeypatch):
    """A device that takes `busy` seconds a call, and a host that takes 1 to launch one."""
    now, ready = [0.0], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "_calls_per_sample", lambda call: 10)

    def wait(out):
        now[0] = max(now[0], ready[0])

    monkeypatch.setattr(timing.jax, "block_until_ready", wait)

    def call(busy):
        now[0] += 1.0
        ready[0] = max(ready[0], now[0]) + busy

    busy = {"short": 0.5, "long": 4.0}
    found = timing.time_interleaved(
        {name: lambda name=name: call(busy[name]) for name in busy}, repeats=3, budget=1e9
    )
    assert found["short"].time_median_s == 1.05  # of the host
    assert found["short"].calls_in_queue == pytest.approx(0.5 / 1.05)
    assert found["long"].time_median_s == pytest.approx(4.1)
    assert found["long"].calls_in_queue == pytest.approx(31 / 4.1)


def test_malformed_results_are_rejected(measured, tmp_path):
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
            results.load(path)
    del document["header"]["commit"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="commit"):
        results.load(path)


def test_figure(measured, tmp_path):
    first = [path.read_bytes() for path in report.draw("small", measured[2], tmp_path / "a")]
    again = [path.read_bytes() for path in report.draw("small", measured[2], tmp_path / "b")]
    assert first == again and len(first) == 2
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]


def test_blocks_of_a_page_have_to_match_the_results(measured):
    found = {"small": measured[2]}
    block = "a\n<!-- generated: {} -->\nold\n<!-- end generated -->\nb\n"
    text = report.render(block.format("small"), found)
    assert "old" not in text and "| n | reference | xla, cg | jax.nn softmax |" in text
    assert report.render(text, found) == text
    with pytest.raises(ValueError, match="other"):
        report.render(block.format("other"), found)


def test_pages_have_the_tables_of_the_results():
    documents = report.documents(results.RESULTS)
    assert {path.stem for path in report.PAGES.glob("*.md")} == set(documents)
    for benchmark, found in documents.items():
        text = (report.PAGES / f"{benchmark}.md").read_text(encoding="utf-8")
        assert report.render(text, found) == text, benchmark
        for name in found:
            assert f"figures/{name}.png" not in text or (report.FIGURES / f"{name}.png").is_file()


def test_every_benchmark_runs_by_path_and_as_a_module(tmp_path):
    """From another folder, without anything on the path but the installed package."""
    for command in (
        [str(FOLDER / "mixer_updates.py")],
        ["-m", "lla.experiments.benchmarks.solver_choice"],
    ):
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "--repeats" in done.stdout, done.stderr
