"""Work directories, the config boundary and progress."""

import dataclasses
import io
import pathlib

import pytest
from ml_collections import ConfigDict

from lla.runs import Progress, Workdir, WorkdirError, from_config, to_config
from lla.runs.workdir import directory, read_config, read_records

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


def test_a_reader_leaves_a_line_that_is_being_written(tmp_path):
    workdir = Workdir(tmp_path, CONFIG)
    workdir.write({"piece": "a"})
    with workdir.metrics.open("a") as file:
        file.write('{"piece": "b", "err')
    before = workdir.metrics.read_bytes()
    assert [record["piece"] for record in read_records(tmp_path)] == ["a"]
    assert workdir.metrics.read_bytes() == before


@pytest.mark.parametrize(
    "text, found", [("", "empty"), ('{"dim": 4', "not JSON"), ("[]\n", "not a JSON object")]
)
def test_damaged_files_are_named_with_what_to_do(tmp_path, text, found):
    Workdir(tmp_path, CONFIG).write({"piece": "a"})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WorkdirError, match=rf"config\.json is damaged: {found}.*another directory"):
        Workdir(tmp_path, CONFIG)
    with pytest.raises(WorkdirError, match=rf"config\.json is damaged: {found}"):
        read_config(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(f'{{"piece": "a"}}\n{text.strip()}\n')
    with pytest.raises(WorkdirError, match=rf"line 2 is damaged: {found}.*Delete that line"):
        read_records(tmp_path)


def test_what_is_no_work_directory_is_said_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path, message in (
        ("", "must have a name"),
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file" / "a" / "b", "file is a file"),
        ("~no-such-user/a", "home directory"),
    ):
        for refuse in (directory, lambda path: Workdir(path, CONFIG)):
            with pytest.raises(WorkdirError, match=message):
                refuse(path)
    with pytest.raises(WorkdirError, match=r"no work directory: it has no config\.json"):
        read_config(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert directory("~/a") == tmp_path / "home" / "a" and directory("b") == pathlib.Path("b")
    assert not (tmp_path / "home").exists()
    assert Workdir("~/a", CONFIG).metrics.parent == tmp_path / "home" / "a"


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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"length": 2.5}, r"config\.length must be an integer, got 2\.5"),
        ({"length": None}, r"config\.length must be an integer, got None"),
        ({"dims": (1, "a")}, r"config\.dims must be a tuple of integers, got \(1, 'a'\)"),
        ({"inner": {"rate": "fast"}}, r"config\.inner\.rate must be a finite number, got 'fast'"),
        ({"inner": 3}, r"config\.inner is a section, got 3"),
        ({"table": 3}, r"config\.table must be a section of names and values, got 3"),
    ],
)
def test_values_of_other_types_are_refused(changes, message):
    valid = {"dims": [1, 2], "inner": {"rate": 1}, "table": {}}
    assert isinstance(from_config(Outer, valid).inner.rate, float)
    with pytest.raises(ValueError, match=message):
        from_config(Outer, valid | changes)


def test_an_option_takes_what_its_default_is_not():
    config = to_config({"number": 1, "none": None, "section": {"rate": 0.5}, "name": "a"})
    config.number, config.none = None, (1, 2)
    config.section.rate = 3
    config.lock()
    assert config.to_dict() == {
        "number": None, "none": (1, 2), "section": {"rate": 3}, "name": "a"
    }  # fmt: skip
    with pytest.raises(TypeError):
        config.name = 3
    with pytest.raises(AttributeError):
        config.section.rat = 3


def test_progress_goes_on_where_it_was(monkeypatch):
    clock = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(8.0, stream, done=4.0)
    progress.advance(1.0, "first")
    progress.advance(3.0, "second")
    first, second = stream.getvalue().splitlines()
    assert " 62%" in first and "0:30 gone, 1:30 left" in first  # time of what is done now alone
    assert "100%" in second and "0:00 left" in second


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
