"""Tables as CSV files and as Markdown."""

import csv
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def write_csv(
    file: str | os.PathLike, rows: Sequence[Mapping[str, Any]], digits: int = 5
) -> pathlib.Path:
    """Writes `rows` below a line with the names of the columns; returns the path.

    Args:
      file: replaced if it exists.
      rows: column -> value. There is a column for every key, in order of first appearance. Where a
        row lacks a key, the cell is empty.
      digits: significant digits of floats.
    """
    file = pathlib.Path(file)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()}
            )
    return file


def markdown(head: Sequence[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table, without a newline at its end. Cells are converted by `str`.

    Args:
      head: names of the columns.
      rows: cells from left to right, as many as there are columns.
    """
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells):
    return f"| {' | '.join(map(str, cells))} |"
