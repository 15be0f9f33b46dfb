"""A Griffe extension: examples and lists of arguments as the parser of docstrings expects them."""

import re

import griffe


class Docstrings(griffe.Extension):
    """Makes fenced blocks of examples, and one line of names that share a description."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = _example(_names(obj.docstring.value))


def _names(text: str) -> str:
    """Joins "scale, is_causal," with the next line, which continues the names before a colon."""
    return re.sub(r"^( +(?:\w+, )*\w+,)\n +(?=(?:\w+, )*\w+(?:,$|: ))", r"\1 ", text, flags=re.M)


def _example(text: str) -> str:
    """Replaces "Example::" and the indented block after it."""

    def fence(match):
        indent, head, code = match.groups()
        head = "**Example**" if head == "Example" else f"{head}:"
        code = re.sub(rf"^{indent}    ", indent, code.rstrip(), flags=re.M)
        return f"{indent}{head}\n\n{indent}```python\n{code}\n{indent}```\n\n"

    return re.sub(r"^( *)(.*\S)::\n\n((?:\1    .*\n?|\n)+)", fence, text, flags=re.M)
