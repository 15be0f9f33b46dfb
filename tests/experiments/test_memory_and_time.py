"""Memory and time against length: cells, resuming, what is not run, figure and README tables."""

import numpy as np
import pytest

from lla.experiments.benchmarks import truth
from lla.experiments.benchmarks.results import load
from lla.experiments.memory_and_time import cases, main, plot, summary

SMALL = ["--heads=1", "--head_dims=8", "--repeats=2", "--seconds_per_cell=0.01", "--checked=16"]
QUICK = ["--series", "softmax", "--lengths", "8", "16", *SMALL]


def run(path, *arguments):
    status = main.main([*arguments, f"--out={path}"])
    return status, load(path)["records"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One small run of the series that are not in experiments/benchmarks, and of CG."""
    path = tmp_path_factory.mktemp("memory_and_time") / "cpu.json"
    arguments = ["--series", "lla_cg", "dense_matrices", "mesanet", "--lengths", "16", *SMALL]
    return *run(path, *arguments), path, arguments


def test_records(measured):
    status, records, _, _ = measured
    assert status == 0 and len(records) == 3 * 2
    for record in records:
        assert record["status"] == "timed" and record["temp_bytes"] > 0
        assert record["checked_tokens"] == 16
        gradients = {"query", "key", "value"}
        gradients |= set() if record["implementation"] == "mesanet" else {"ridge"}
        expected = gradients if record["pass"] == "forward_backward" else set()
        assert set(record["errors"]) == {"output", *expected}
        assert 0 < record["errors"]["output"] < 1e-5


def test_finished_cases_are_skipped(measured, monkeypatch):
    _, records, path, arguments = measured

    def fail(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(main, "compile_case", fail)
    assert run(path, *arguments) == (0, records)
    # Nor does a run that needs the memory alone compile what is measured.
    assert run(path, *arguments, "--memory_only")[1] == records


def test_memory_first_and_time_later(tmp_path):
    path = tmp_path / "cpu.json"
    _, records = run(path, *QUICK, "--memory_only")
    assert [r["reason"] for r in records] == [main.NOT_RUN] * 4
    amounts = {main.key(r): r["temp_bytes"] for r in records}
    _, records = run(path, *QUICK[:2], "--lengths", "8", *SMALL)
    found = {(r["n"], r["status"]) for r in records}
    assert len(records) == 4 and found == {(8, "timed"), (16, "memory only")}
    assert {main.key(r): r["temp_bytes"] for r in records} == amounts


def test_what_does_not_fit_or_is_too_slow_is_not_run(tmp_path):
    _, records = run(tmp_path / "a.json", *QUICK, "--memory_limit_gib=1e-9")
    assert {summary.state(r) for r in records} == {"out of memory"}
    _, records = run(tmp_path / "b.json", *QUICK, "--call_limit=1e-9")
    found = {r["n"]: summary.state(r) for r in records}
    assert found == {8: "timed", 16: "too slow"}
    assert {r["repeats"] for r in records if r["n"] == 8} == {1}


def test_a_wrong_implementation_is_not_timed(monkeypatch, tmp_path):
    right = truth.IMPLEMENTATIONS["xla_softmax"]
    wrong = right._replace(function=lambda query, key, value, ridge: value)
    monkeypatch.setattr(cases, "make_implementation", lambda *_: ("wrong", wrong))
    status, records = run(tmp_path / "a.json", *QUICK)
    assert status == 1 and {r["status"] for r in records} == {"refused"}
    assert all("time_min_s" not in r for r in records)


def test_nothing_is_begun_after_the_budget(tmp_path):
    assert main.main([*QUICK, "--budget_seconds=0", f"--out={tmp_path / 'a.json'}"]) == 0
    assert not (tmp_path / "a.json").exists()


def test_parts_share_the_work():
    flags = (cases.SERIES, "float32", (8, 1), (64, 128), (512, 1024))
    whole = cases.make_units(*flags)
    assert len(whole) == len(cases.SERIES) * 2 * 2 * 2
    assert whole[0][0] == ("lla_cg", "float32", "forward_backward", 8, 64, 512)
    parts = [cases.make_units(*flags, (i, 4)) for i in (1, 2, 3, 4)]
    assert sorted(unit for part in parts for unit in part) == sorted(whole)
    assert {unit[0].series for unit in parts[-1]} == set(cases.DENSE)
    with pytest.raises(SystemExit):
        main.parse(["--part=1/4"])


def test_inputs_of_shorter_cases_are_the_beginning_of_longer_ones():
    short, long = (cases.one_head(0, n, 8, 0)["key"] for n in (5, 9))
    assert np.array_equal(short, long[:5])
    cell = cases.Case("softmax", "float32", "forward", 2, 8, 5)
    inputs = cases.make_inputs(cell, 9, 1.0, 0)
    assert np.array_equal(inputs["key"][0, :, 0], short) and inputs["ridge"].shape == (1, 5, 2)
    assert not np.array_equal(inputs["key"][0, :, 1], short)


def test_exact_results_are_kept(tmp_path):
    get = cases.exact_results.__wrapped__
    first = get("softmax", 8, 8, 1.0, 0, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    again = get("softmax", 8, 8, 1.0, 0, str(tmp_path))
    assert first[1:] == again[1:]
    for name, array in first.results.items():
        assert np.array_equal(array, again.results[name])


def test_extrapolation():
    quadratic = {512: 7.0, 1024: 28.0}
    assert main.extrapolate(quadratic, 4096) == pytest.approx(16 * 28)
    assert main.extrapolate(quadratic, 1024) is None


def test_figure_and_tables(measured, tmp_path):
    path = measured[2]
    png, svg = (written.read_bytes() for written in plot.draw(path, tmp_path))
    assert png.startswith(b"\x89PNG") and b"<svg" in svg
    text = f"a\n<!-- generated: {path.stem} -->\nold\n<!-- end generated -->\nb\n"
    text = summary.render(text, path.parent)
    assert "old" not in text and "| n | LLA, CG | LLA, dense, n² + n d² | MesaNet |" in text
    assert summary.render(text, path.parent) == text


def record(n, median, least=None, **more):
    """A timed record, in milliseconds."""
    seconds = {"time_median_s": 1e-3 * median, "time_min_s": 1e-3 * (least or median)}
    return {"n": n, "status": "timed", **seconds, **more}


def shown(*records):
    return list(summary.settled({r["n"]: r for r in records}))


def test_short_times_that_are_not_the_devices_are_left_out():
    # One longer sequence took less; repeats that differ; with a length all shorter ones go.
    assert shown(record(1, 0.5), record(2, 0.6), record(4, 0.1), record(8, 0.2)) == [4, 8]
    assert shown(record(1, 0.1), record(2, 0.3, 0.2), record(4, 0.4)) == [4]
    assert shown(record(1, 0.1), record(2, 0.25, 0.2), record(4, 0.4)) == [1, 2, 4]
    # From a millisecond on launches do not matter.
    assert shown(record(1, 5.0, 1.0), record(2, 3.0)) == [1, 2]
    assert shown(record(1, 5.0), {"n": 2, "status": "memory only"}) == [1]
    # The queue tells by itself.
    waits, busy = {"calls_in_queue": 1.1}, {"calls_in_queue": 9.0}
    assert shown(record(1, 0.2, **waits), record(2, 0.2, 0.1, **busy)) == [2]
    assert shown(record(1, 0.2, **busy), record(2, 0.1, **busy)) == [1, 2]
    assert shown(record(1, 2.0, **waits), record(2, 9.0, **waits)) == [1, 2]


def test_the_committed_figure_leaves_out_what_is_noise():
    document = load(plot.main_result())
    records = [r for r in document["records"] if (r["heads"], r["head_dim"]) == (8, 64)]
    found = summary.series(records, implementation="softmax", which="forward")
    times = [r["time_median_s"] for r in summary.settled(found).values()]
    assert len(times) >= 3 and times == sorted(times)


def test_readme_tables_are_those_of_the_results():
    text = summary.README.read_text(encoding="utf-8")
    assert summary.render(text) == text
    assert (summary.RESULTS / "figure.png").read_bytes().startswith(b"\x89PNG")
