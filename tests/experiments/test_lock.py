"""One process at a time in a work directory."""

import os
import platform
import subprocess
import sys

import pytest

from lla.runs import WorkdirError
from lla.runs.lock import claimed, exclusive

HOLDER = (
    "import sys\n"
    "from lla.runs.lock import exclusive\n"
    "with exclusive(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


def holder(path):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], **pipes)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_error_names_the_other_process(tmp_path):
    with holder(tmp_path) as process:
        expected = f"process {process.pid} on {platform.node()}"
        with pytest.raises(WorkdirError, match=rf"is in use by {expected}\."), exclusive(tmp_path):
            raise AssertionError("not reached")
        with claimed(tmp_path / "lock") as found:
            assert found == expected
        process.communicate("")
    with exclusive(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_holds_nothing(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        process.communicate()
    assert (tmp_path / "lock").exists()
    with exclusive(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def test_the_same_process_is_another_one_too(tmp_path):
    refused = pytest.raises(WorkdirError, match=str(os.getpid()))
    with exclusive(tmp_path), refused, exclusive(tmp_path):
        raise AssertionError("not reached")


def test_an_error_inside_lets_it_go(tmp_path):
    with pytest.raises(RuntimeError, match="inside"), exclusive(tmp_path):
        raise RuntimeError("inside")
    with exclusive(tmp_path):
        pass


def test_a_file_that_its_holder_removes_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between opening and locking, the holder may have left, and a third process come."""
    import fcntl

    lock, file, late = fcntl.flock, tmp_path / "lock", []

    def slowly(handle, how):
        if not late:
            late.append(handle)
            file.unlink()
            file.write_text("of the third process")
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", slowly)
    with claimed(file) as found:
        assert found is None
        assert file.read_text().startswith("process ")


def test_what_cannot_be_locked_is_a_warning(tmp_path, monkeypatch):
    import fcntl

    def refuse(handle, how):
        raise OSError("no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", refuse)
    warned = pytest.warns(RuntimeWarning, match="no locks on this file system")
    with warned, exclusive(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    refused = pytest.raises(WorkdirError, match="cannot be written to")
    with refused, exclusive(tmp_path / "file" / "x"):
        raise AssertionError("not reached")
