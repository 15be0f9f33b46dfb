"""The meanings of fields and options, read from where they are documented.

A class documents them in its docstring, in a section "Attributes" or "Args"; a config file of an
experiment in the comments beside its assignments.
"""

import ast
import importlib
import inspect
import io
import pathlib
import re
import tokenize
from types import ModuleType

_SECTION = re.compile(r"^(Attributes|Args):\n((?:[ ]+.*\n?|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^  (?=\S)((?:\*{0,2}\w+,\s+)*\*{0,2}\w+):\s+", re.MULTILINE)
_REFERENCE = re.compile(r"(?:as in|see) `([\w.]+)`")


def meanings(cls: type) -> dict[str, str]:
    """Name -> meaning of the fields or options of a class, from its docstring and its bases'.

    A meaning that only refers to another object ("as in `lla.mixers.create`") is the one that is
    documented there.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= documented(vars(base).get("__doc__") or "")
    return {name: _followed(name, text) for name, text in found.items()}


def documented(docstring: str) -> dict[str, str]:
    """Name -> meaning of what the sections "Attributes" and "Args" of a docstring document."""
    found = {}
    for section in _SECTION.finditer(inspect.cleandoc(docstring) + "\n"):
        pieces = _ENTRY.split(section[2])
        for names, text in zip(pieces[1::2], pieces[2::2], strict=True):
            for name in re.split(r",\s+", names):
                found[name.lstrip("*")] = " ".join(text.split())
    return found


def first_line(thing: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def commented(file: pathlib.Path) -> dict[str, str]:
    """Name -> comment of the first assignment to each field in a config file.

    The comment is on the first or last line of an assignment such as ``config.seed = 0  # of the
    data``, or on the lines directly above it.
    """
    source = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    lines = source.splitlines()
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        beside = [comments[n] for n in (node.lineno, node.end_lineno) if n in comments]
        above, number = [], node.lineno - 1
        while number in comments and lines[number - 1].lstrip().startswith("#"):
            above.insert(0, comments[number])
            number -= 1
        text = " ".join(comment.lstrip("# ") for comment in beside[:1] or above)
        for target in node.targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                found.setdefault(target.attr, text)
    return {name: text for name, text in found.items() if text}


def _followed(name, text, depth=3):
    match = _REFERENCE.match(text)
    if match is None or not depth:
        return text
    there = documented(inspect.getdoc(_resolved(match[1])) or "").get(name)
    return text if there is None else _followed(name, there, depth - 1)


def _resolved(path):
    """The object with a dotted name."""
    module, *names = path.split(".")
    found = importlib.import_module(module)
    for name in names:
        module = f"{module}.{name}"
        if not hasattr(found, name) and isinstance(found, ModuleType):
            importlib.import_module(module)
        found = getattr(found, name)
    return found
