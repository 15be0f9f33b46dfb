"""Locks that keep two processes from writing into the same work directory."""

import contextlib
import os
import pathlib
import platform
import warnings
from collections.abc import Iterator

from lla.runs.workdir import WorkdirError


@contextlib.contextmanager
def claimed(file: str | os.PathLike) -> Iterator[str | None]:
    """Takes the lock `file` for the `with` block, unless another process holds it.

    The file is removed at the end. The lock of a process that dies is released, even though its
    file remains. If the file system or the platform has no locks, there is a warning and no
    protection.

    Args:
      file: created with its folder if it does not exist.

    Yields:
      None if this process has the lock, else the holder, such as "process 17 on host-a".

    Raises:
      WorkdirError: the file cannot be written.
    """
    file = pathlib.Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _lock(file)
    except OSError as error:
        raise WorkdirError(f"{file.parent} cannot be written to: {error}.") from error
    if isinstance(handle, str):
        yield handle
        return
    try:
        yield None
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)  # while no other process can take the lock
            os.close(handle)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike) -> Iterator[None]:
    """Locks the work directory `path` for the `with` block.

    Raises:
      WorkdirError: another process, which the message names, is using it.
    """
    path = pathlib.Path(path)
    with claimed(path / "lock") as holder:
        if holder is not None:
            raise WorkdirError(
                f"{path} is in use by {holder}. Wait until that process has ended, or choose "
                "another directory."
            )
        yield


def _lock(file):
    """The descriptor with the lock, None if there are no locks, or the holder as text."""
    try:
        import fcntl  # not available on Windows
    except ImportError:
        _warn(file, "this platform has no fcntl")
        return None
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode("utf-8", "replace").strip()
            os.close(handle)
            return holder or "another process"
        except OSError as error:
            os.close(handle)
            _warn(file, error)
            return None
        # The process that held the lock may have removed the file after it was opened here.
        try:
            current = os.stat(file).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            current = False
        if current:
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
            return handle
        os.close(handle)


def _warn(file, reason):
    warnings.warn(
        f"{file} cannot be locked ({reason}): nothing keeps a second process out of the directory.",
        RuntimeWarning,
        stacklevel=4,
    )
