"""Generated blocks of Markdown files.

A block is what stands between `<!-- generated: NAME -->` and `<!-- end generated -->`.
"""

import re
from collections.abc import Callable, Iterable

_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def names(text: str) -> list[str]:
    """The names of the blocks in `text`, in order."""
    return [match[2] for match in _BLOCK.finditer(text)]


def renew(text: str, make: Callable[[str], str], expected: Iterable[str]) -> str:
    """`text` with the contents of each block replaced by what `make` returns for its name.

    Raises:
      ValueError: the blocks are not exactly those `expected`, in any order.
    """
    found, expected = sorted(names(text)), sorted(expected)
    if found != expected:
        raise ValueError(f"the generated blocks must be {expected}; the file has {found}.")
    return _BLOCK.sub(lambda match: f"{match[1]}{make(match[2])}{match[3]}", text)
