"""Paths that do not exist: which one was meant."""

import difflib
import pathlib
from collections.abc import Callable


def hint(path: pathlib.Path, wanted: Callable[[pathlib.Path], bool] = lambda path: True) -> str:
    """ " Did you mean PATH?" for a path beside `path` with a similar name, or "".

    If the folder of `path` does not exist either, the hint is about that folder.

    Args:
      path: does not exist.
      wanted: whether a path can have been meant; folders above `path` always can.
    """
    while not path.parent.is_dir() and path.parent != path:
        path, wanted = path.parent, pathlib.Path.is_dir
    try:
        beside = [entry.name for entry in path.parent.iterdir() if wanted(entry)]
    except OSError:  # a folder that cannot be read
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" Did you mean {path.with_name(near[0])}?" if near else ""
