"""Studies: what is computed, resumed and refused; tables, figures."""

import dataclasses
import json
import os
import pathlib

import pytest
from absl import app
from ml_collections import ConfigDict

from lla.runs import Workdir, figures, run_study, run_trials, tables
from lla.runs.lock import exclusive


@dataclasses.dataclass(frozen=True)
class Trial:
    id: str
    cost: float = 1.0


@dataclasses.dataclass(frozen=True)
class Study:
    names: tuple[str, ...]
    stop: str = ""  # this trial fails

    def trials(self):
        if "forbidden" in self.names:
            raise ValueError("names may not hold 'forbidden'.")
        return [Trial(name) for name in self.names]

    def run(self, trial):
        if trial.id == self.stop:
            raise ValueError("computation failed.")
        return {"length": len(trial.id)}


def names(path):
    return {file.name for file in path.iterdir()}


def test_only_what_is_missing_is_computed(tmp_path, capsys):
    workdir = Workdir(tmp_path, {})
    workdir.write({"piece": "b", "length": 7})
    run_trials(Study(("a", "b", "ccc")), workdir)
    done = capsys.readouterr()
    assert done.out == f"3 trials, 1 already finished, in {tmp_path}\n"
    assert "67%" in done.err and "100%" in done.err and done.err.endswith("  ccc\n")
    lines = workdir.metrics.read_text()
    assert lines == "".join(
        f'{{"piece":"{name}","length":{length}}}\n'
        for name, length in (("b", 7), ("a", 1), ("ccc", 3))
    )
    assert "uncommitted_changes" in json.loads((tmp_path / "environment.json").read_text())

    # Nothing is left: nothing is written.
    (tmp_path / "environment.json").unlink()
    run_trials(Study(("a", "b", "ccc")), workdir)
    assert capsys.readouterr().out == f"3 trials, 3 already finished, in {tmp_path}\n"
    assert workdir.metrics.read_text() == lines and not (tmp_path / "environment.json").exists()


def test_finished_trials_survive_a_failure(tmp_path):
    workdir = Workdir(tmp_path, {})
    with pytest.raises(ValueError, match="computation failed"):
        run_trials(Study(("a", "b", "c"), stop="b"), workdir)
    assert workdir.read() == [{"piece": "a", "length": 1}]


def test_a_study_from_config_to_figures(tmp_path, capsys):
    def draw(path):
        (path / "figure.txt").write_text("drawn")
        return [path / "figure.txt"]

    config = ConfigDict({"names": ("a", "b")})
    run_study(["main.py"], Study, config, tmp_path, draw)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "figure.txt")
    assert names(tmp_path) == {"config.json", "environment.json", "metrics.jsonl", "figure.txt"}

    def refused(message, *argv, path=tmp_path, **changes):
        with pytest.raises(app.UsageError, match=message):
            run_study(["main.py", *argv], Study, ConfigDict(config.to_dict() | changes), path, draw)

    new = tmp_path / "new"
    refused("unexpected arguments", "further", path=new)
    refused("did you mean config.names", path=new, name=("a",))
    refused("may not hold", path=new, names=("forbidden",))
    assert not new.exists()
    refused("another config", names=("a", "b", "c"))
    # Not what the command line says: a traceback is wanted.
    with pytest.raises(ValueError, match="computation failed"):
        run_study(["main.py"], Study, ConfigDict({"names": ("a",), "stop": "a"}), new, draw)


def test_a_missing_optional_package_is_a_line_and_the_records_stay(tmp_path):
    def draw(path):
        raise ImportError('figures need Matplotlib: pip install "lla-jax[plot]"')

    config = ConfigDict({"names": ("a",)})
    with pytest.raises(app.UsageError, match=r'"lla-jax\[plot\]", and give the command again'):
        run_study(["main.py"], Study, config, tmp_path, draw)
    assert len(Workdir(tmp_path, config.to_dict()).read()) == 1


def test_a_directory_that_another_process_is_at_is_left_alone(tmp_path):
    config = ConfigDict({"names": ("a",)})
    with exclusive(tmp_path):
        before = names(tmp_path)
        with pytest.raises(app.UsageError, match=rf"in use by process {os.getpid()}"):
            run_study(["main.py"], Study, config, tmp_path, lambda path: [])
        assert names(tmp_path) == before
    (tmp_path / "file").write_text("")
    for path, message in (("", "must have a name"), (tmp_path / "file", "is a file")):
        with pytest.raises(app.UsageError, match=message):
            run_study(["main.py"], Study, config, path, lambda path: [])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("")
    with pytest.raises(app.UsageError, match="damaged: empty"):
        run_study(["main.py"], Study, config, tmp_path / "new", lambda path: [])


def test_csv(tmp_path):
    rows = [{"name": "a", "error": 0.123456, "count": 123456}, {"name": "b, c", "more": None}]
    file = tables.write_csv(tmp_path / "summary.csv", rows, digits=4)
    assert file.read_bytes() == b'name,error,count,more\na,0.1235,123456,\n"b, c",,,\n'
    assert b"0.12346" in tables.write_csv(file, rows).read_bytes()


def test_markdown():
    assert tables.markdown(["a", 2], [["x", 1], ["", None]]) == (
        "| a | 2 |\n|---|---|\n| x | 1 |\n|  | None |"
    )
    assert tables.markdown(["a"], ()) == "| a |\n|---|"


def test_equal_figures_give_equal_files(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def drawn(folder, salt, **options) -> list[pathlib.Path]:
        figure, axis = pyplot.subplots(figsize=(1, 1))
        axis.plot([0, 1], marker="o", clip_on=True)
        return figures.save(figure, folder, salt, **options)

    before = matplotlib.rcParams["svg.hashsalt"]
    first, second, other = (drawn(tmp_path / f, f[0]) for f in ("a", "again", "b"))
    assert [file.name for file in first] == ["figure.png", "figure.svg"]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert first[0].read_bytes() == other[0].read_bytes()
    assert (
        first[1].read_bytes() != other[1].read_bytes() and b"<dc:date>" not in first[1].read_bytes()
    )
    png, svg = drawn(tmp_path, "a", name="small", dpi=40, png_metadata={"Software": None})
    assert (png.name, svg.name) == ("small.png", "small.svg")
    assert svg.read_bytes() == first[1].read_bytes()
    assert b"Software" in first[0].read_bytes() and b"Software" not in png.read_bytes()
    assert matplotlib.rcParams["svg.hashsalt"] == before and not pyplot.get_fignums()
