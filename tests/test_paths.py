"""Which path was meant."""

from lla import paths


def test_the_nearest_path_is_named(tmp_path):
    (tmp_path / "runs" / "mqar").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").write_text("")
    mistyped = tmp_path / "runs" / "mqra"
    assert paths.hint(mistyped) == f" Did you mean {tmp_path / 'runs' / 'mqar'}?"
    assert paths.hint(mistyped, lambda path: path.suffix == ".txt") == ""
    assert paths.hint(tmp_path / "runs" / "language") == ""
    # Where the folder is mistyped, it is the folder that is named.
    assert paths.hint(tmp_path / "rums" / "mqar") == f" Did you mean {tmp_path / 'runs'}?"


def test_relative_paths_stay_relative(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    assert paths.hint(paths.pathlib.Path("bocks")) == " Did you mean books?"
