"""Work directories, the config boundary and progress."""

import dataclasses
import io

import pytest
from ml_collections import ConfigDict

from lla.experiment import Progress, Workdir, WorkdirError, from_config
from lla.experiment.workdir import read_config, read_records

CONFIG = {"dim": 4, "dims": (1, 2), "inner": {"rate": 0.5}}


def test_records_survive_and_only_grow(tmp_path):
    Workdir(tmp_path, CONFIG).write({"piece": "a", "error": 0.1})
    again = Workdir(tmp_path, CONFIG)
    again.write({"piece": "b", "error": 0.2})
    assert [record["piece"] for record in again.read()] == ["a", "b"]
    assert read_records(tmp_path) == again.read()
    assert read_config(tmp_path)["inner"] == {"rate": 0.5}


def test_another_config_is_refused_and_nothing_lost(tmp_path):
    Workdir(tmp_path, CONFIG).write({"piece": "a"})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(WorkdirError, match=r"inner\.rate: 0\.5 there, 0\.25 now"):
        Workdir(tmp_path, CONFIG | {"inner": {"rate": 0.25}})
    with pytest.raises(WorkdirError, match="seed: absent there, 1 now"):
        Workdir(tmp_path, CONFIG | {"seed": 1})
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_half_a_line_is_an_unfinished_piece(tmp_path):
    workdir = Workdir(tmp_path, CONFIG)
    workdir.write({"piece": "a"})
    with workdir.metrics.open("a") as file:
        file.write('{"piece": "b", "err')
    workdir = Workdir(tmp_path, CONFIG)
    workdir.write({"piece": "c"})
    assert [record["piece"] for record in workdir.read()] == ["a", "c"]


def test_nan_and_broken_files_are_errors(tmp_path):
    workdir = Workdir(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="JSON compliant"):
        workdir.write({"error": float("nan")})
    assert workdir.read() == []
    workdir.metrics.write_text("not json\n")
    with pytest.raises(WorkdirError, match="line 1"):
        workdir.read()


def test_records_without_config_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"piece": "a"}\n')
    with pytest.raises(WorkdirError, match=r"config\.json"):
        Workdir(tmp_path, CONFIG)


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float


@dataclasses.dataclass(frozen=True)
class Outer:
    dims: tuple[int, ...]
    inner: Inner
    table: dict
    length: int = 3


def test_config_becomes_a_frozen_dataclass():
    config = ConfigDict({"dims": [1, 2], "inner": {"rate": 1.0}, "table": {"a": {"b": (1,)}}})
    built = from_config(Outer, config)
    assert built == Outer((1, 2), Inner(1.0), {"a": {"b": (1,)}}, 3)
    assert type(built.table) is dict and type(built.table["a"]) is dict


def test_wrong_configs_name_the_nearest_key():
    with pytest.raises(ValueError, match=r"config\.inner\.rat .*config\.inner\.rate"):
        from_config(Outer, {"dims": (), "table": {}, "inner": {"rat": 1.0}})
    with pytest.raises(ValueError, match=r"lacks dims, table"):
        from_config(Outer, {"inner": {"rate": 1.0}})


def test_progress_tells_the_time_left(monkeypatch):
    clock = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(4.0, stream)
    progress.advance(1.0, "first")
    progress.advance(3.0, "second")
    first, second = stream.getvalue().splitlines()
    assert "25%" in first and "0:30 gone, 1:30 left  first" in first
    assert "100%" in second and "0:00 left" in second
