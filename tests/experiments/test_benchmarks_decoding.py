"""The benchmark of decoding: records, refusal of what is wrong, table and figure."""

import jax.numpy as jnp
import numpy as np
import pytest

from lla.experiments.benchmarks import compilation, decoding, decoding_traffic, report, results

MEASURED = ("softmax", "lla_10")
SMALL = [
    "--implementations", *MEASURED, "cudnn", "--dtype=float32", "--head_dims=8", "--lengths=16",
    "--batches=3", "--kv_heads=1", "--groups=2", "--steps=2", "--copied=65536", "--repeats=2",
    "--budget=0.1", "--workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One small run: exit status, arguments, path."""
    path = tmp_path_factory.mktemp("decoding") / "decoding_cpu.json"
    argv = [*SMALL, f"--output={path}"]
    return decoding.main(argv), argv, path


def test_run(measured, monkeypatch, capsys):
    status, argv, path = measured
    document = results.load(path)
    assert status == 0 and document["header"]["benchmark"] == "decoding"
    records = {r["implementation"]: r for r in document["records"]}
    assert set(records) == {*MEASURED, "cudnn", "copy"}
    assert records["copy"]["bytes_per_s"] == 2 * 65536 / records["copy"]["time_min_s"]
    assert records["cudnn"]["status"] == "unavailable"
    for name in MEASURED:
        record = records[name]
        assert record["status"] == "timed" and record["errors"]["output"] < 1e-5
        assert record["cache_bytes"] == 2 * 3 * 16 * 8 * 4
        assert (record["batch"], record["n"], record["group"]) == (3, 16, 2)
    # What is timed is kept, unless the code or the sizes change.
    monkeypatch.setattr(decoding, "compile_case", None)
    monkeypatch.setattr(decoding, "copy_bandwidth", None)
    assert decoding.main(argv) == 0
    assert results.load(path)["records"] == document["records"]
    assert "| 3 | 16 | lla, ridge 10 | " in capsys.readouterr().out


def test_what_is_wrong_is_not_timed():
    options = decoding.parse([*SMALL, "--implementations", "softmax"])
    ((case,),) = decoding.make_cases(options)
    inputs = decoding.make_inputs(case, options.steps, 0)

    def call(cache, tokens):
        return cache, tokens["query"][-1], jnp.ones_like(tokens["query"][-1])

    found = compilation.Compiled(call, {"temp_bytes": 0}, 0.0)
    (record,) = decoding.run_group([case], {case: found}, options)
    assert record["status"] == "refused" and "time_min_s" not in record
    assert record["errors"]["output"] > 0.1
    assert inputs[0].key.shape == (3, 16, 1, 8)


def test_figure(measured, tmp_path):
    paths = report.draw("small", results.load(measured[2]), tmp_path)
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


class Counter:
    """Always a quarter of the time busy."""

    def read(self):
        return 0.0

    def busy(self, first, second):
        return 0.25


def test_counted_bytes(tmp_path, monkeypatch):
    """Bytes are those of the copy, in the ratio of the times that the memory is busy in a call."""
    traffic = decoding_traffic
    small = [
        "--implementations", "softmax", "cudnn", "--head_dims=8", "--lengths=16", "--batches=3",
        "--kv_heads=1", "--groups=2", "--steps=2", "--copied=65536", "--seconds=0.02",
        "--workers=1", f"--output={tmp_path / 'traffic.json'}",
    ]  # fmt: skip
    monkeypatch.setattr(traffic, "MemoryCounter", lambda index: Counter())
    busy = iter([0.5, 3.0])  # of the copy, then of two steps of softmax attention
    monkeypatch.setattr(traffic, "busy_seconds", lambda counter, call, seconds: next(busy))
    assert traffic.main(small) == 0
    document = results.load(tmp_path / "traffic.json")
    records = {r["implementation"]: r for r in document["records"]}
    assert records["cudnn"]["status"] == "unavailable"
    record = records["softmax"]
    assert record["cache_bytes"] == 2 * 3 * 16 * 1 * 8 * 2
    assert record["bytes_per_busy_second"] == 2 * 65536 / 0.5
    assert record["moved_bytes"] == 3.0 * (2 * 65536 / 0.5) / 2
    assert "softmax" in decoding_traffic.markdown(document)


def points(axis):
    """What is drawn by each error bar of an axis."""
    return [bars.lines[0].get_xydata().tolist() for bars in axis.containers]


def test_figure_has_a_row_for_each_head_dimension():
    pytest.importorskip("matplotlib")
    cells = [(64, 1, 10), (64, 1, 20), (64, 32, 10), (128, 32, 10)]
    records = [
        {"pass": "decode", "status": "timed", "group": 1, "implementation": "lla_10",
         "head_dim": d, "batch": b, "n": n, "time_median_s": 1e-6 * d * b * n,
         "time_min_s": 5e-7 * d * b * n}
        for d, b, n in cells
    ]  # fmt: skip
    records += [{**records[0], "group": 4}, {**records[0], "status": "refused"}]
    assert decoding.panels(records) == [[(64, 1), (64, 32)], [(128, 32)]]
    axes = decoding.draw(records).axes
    drawn = [points(axis) for axis in axes]
    expected = [[[[10, 640], [20, 1280]]], [[[10, 20480]]], [[[10, 40960]]], []]
    assert [np.shape(here) for here in drawn] == [np.shape(here) for here in expected]
    assert all(np.allclose(got, want) for got, want in zip(drawn, expected, strict=True))
    (bar,) = axes[1].containers[0].lines[2]
    assert bar.get_segments()[0][:, 1] == pytest.approx([10240, 20480])  # the least, the median


def test_figure_of_counted_bytes():
    pytest.importorskip("matplotlib")

    def record(n, moved, **changes):
        cell = {"group": 1, "batch": 32, "head_dim": 64, "implementation": "softmax"}
        return {**cell, "n": n, "moved_bytes": moved, "cache_bytes": 2 * n, **changes}

    records = [record(200, 600), record(100, 250), record(100, 900, batch=1), record(1, 9, group=4)]
    records += [{"group": 1, "batch": 64, "status": "unavailable"}, record(100, 220, head_dim=128)]
    drawn = [points(axis) for axis in decoding_traffic.draw(records).axes]
    assert drawn == [[[[100, 1.25], [200, 1.5]]], [[[100, 1.1]]]]


def test_busy_seconds_of_a_call(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(decoding_traffic.time, "perf_counter", lambda: next(clock))
    # Every look at the clock takes a second: three turns of four calls in 4 seconds.
    found = decoding_traffic.busy_seconds(Counter(), lambda: jnp.ones(()), 2.5)
    assert found == 0.25 * 4 / 12


def test_without_a_counter(tmp_path, capsys):
    assert decoding_traffic.main([f"--output={tmp_path / 'traffic.json'}"]) == 1
    assert "counter" in capsys.readouterr().err
