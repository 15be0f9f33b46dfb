"""Tables of MAD, from the result files alone, beside the published numbers.

python experiments/mad/summary.py                                # of the committed results
python experiments/mad/summary.py runs/mad_sweep
python experiments/mad/summary.py --write  # renew the README; --check compares
"""

import argparse
import dataclasses
import pathlib
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lla.configs.mad import LEVELS
from lla.runs import styles, tables
from lla.tasks.mad import KINDS
from lla.training.results import FINAL, read_results, select

FOLDER = pathlib.Path(__file__).resolve().parent
MECHANISM, HEADS = "model.mixer.name", "model.num_heads"
SELECTED, REPORTED = "validation/macro_accuracy", "final:test/macro_accuracy"
SHORT = {
    "compression": "compress", "fuzzy_in_context_recall": "fuzzy recall",
    "in_context_recall": "recall", "memorization": "memorize",
    "noisy_in_context_recall": "noisy recall", "selective_copying": "copy",
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end generated -->)", re.DOTALL)

# Percent, in the order of `SHORT`, and the average; None where it is not given by itself.
DELTANET = "DeltaNet: arXiv 2406.06484"
MESANET = "MesaNet: arXiv 2506.05233"
RWKV = "RWKV-7: arXiv 2503.14456"
JBARA = "lin-attn-bench: github.com/HassanJbara/lin-attn-bench, branch mad"
PARALLAX = "Parallax: arXiv 2605.29157"
PUBLISHED = (
    ("Transformer", DELTANET, (51.6, 29.8, 94.1, 85.2, 86.8, 99.6), 74.5),
    ("Hyena", DELTANET, (45.2, 7.9, 81.7, 89.5, 78.8, 93.1), 66.0),
    ("multi-head Hyena", DELTANET, (44.8, 14.4, 99.0, 89.4, 98.6, 93.0), 73.2),
    ("Mamba", DELTANET, (52.7, 6.7, 90.4, 89.5, 90.1, 86.3), 69.3),
    ("GLA", DELTANET, (38.8, 6.9, 80.8, 63.3, 81.6, 88.6), 60.0),
    ("DeltaNet", DELTANET, (42.2, 35.7, 100.0, 52.8, 100.0, 100.0), 71.8),
    ("RWKV-7", RWKV, (44.5, 43.2, 100.0, 89.1, 100.0, 98.8), 79.3),
    ("Transformer", MESANET, (49.5, 48.6, 100.0, 84.7, 100.0, 96.0), 75.8),
    ("Mamba-2", MESANET, (41.3, 51.2, 100.0, 42.0, 100.0, 95.4), 66.0),
    ("GLA", MESANET, (42.3, 39.0, 100.0, 82.5, 100.0, 96.1), 72.0),
    ("DeltaNet", MESANET, (43.3, 55.5, 100.0, 40.8, 100.0, 98.8), 67.7),
    ("Gated DeltaNet", MESANET, (45.0, 32.7, 100.0, 81.7, 100.0, 95.7), 71.0),
    ("MesaNet", MESANET, (45.4, 58.5, 100.0, 77.2, 100.0, 99.2), 76.1),
    ("Transformer", JBARA, (43.2, 56.5, 90.5, 78.8, 89.7, 99.8), 76.4),
    ("MesaNet", JBARA, (34.7, 51.5, 99.9, 75.0, 99.9, 89.4), 75.1),
    ("Mamba", JBARA, (49.1, 12.3, 99.3, 89.6, 99.7, 88.7), 73.1),
    ("Gated DeltaNet", JBARA, (43.5, 28.6, 99.9, 55.2, 99.9, 99.7), 71.2),
    ("DeltaNet", JBARA, (39.6, 39.3, 99.9, 39.4, 99.9, 99.7), 69.7),
    ("GLA", JBARA, (40.8, 15.5, 91.8, 77.1, 93.1, 89.1), 67.9),
    ("softmax attention", PARALLAX, (None,) * 6, 67.2),
    ("Parallax", PARALLAX, (None,) * 6, 71.6),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Score:
    """A mechanism in one setting of a task, at the settings selected.

    Attributes:
      mechanism, heads: which, with that many heads; None where the files do not say.
      case: of the config: the kind of task and, away from its baseline setting, the level.
      learning_rate, weight_decay: selected on the validation split.
      values: macro accuracy on the test split, by seed; empty if runs diverged at all settings.
    """

    mechanism: str
    heads: int | None
    case: str
    learning_rate: float
    weight_decay: float
    values: tuple[float, ...]

    @property
    def kind(self) -> str:
        """Of the task."""
        return next(kind for kind in KINDS if self.case.startswith(kind))

    @property
    def label(self) -> str:
        """Mechanism and heads as printed."""
        name = styles.style(self.mechanism).name
        return name if self.heads is None else f"{name}, {self.heads} heads"

    @property
    def mean(self) -> float:
        """Over the seeds; NaN if runs diverged."""
        return float(np.mean(self.values)) if self.values else float("nan")


def scores(folder: pathlib.Path) -> list[Score]:
    """Those of the CSV files in `folder`, mechanisms in the order of `lla.runs.styles`.

    Of every mechanism and case, learning rate and weight decay are those that
    `lla.training.results.select` takes by the validation split.

    Raises:
      ValueError: there are no results, or they are not those of this experiment.
    """
    rows = []
    for file in sorted(folder.glob("*.csv")):
        for row in read_results(file):
            if row.get("metric") != SELECTED or REPORTED not in row:
                raise ValueError(f"{file} is no result file of mad: it must have {SELECTED}.")
            if row["phase"] == FINAL:
                rows.append(row)
    if not rows:
        raise ValueError(f"{folder} has no results: no CSV file with rows in it.")
    columns = dict.fromkeys(column for row in rows for column in row)
    rows = [dict.fromkeys(columns) | row for row in rows]
    found = []
    for best in select(
        rows, [column for column in (MECHANISM, HEADS, "case") if column in columns]
    ):
        names = [name for name in best if name in columns and name not in ("best", "metric")]
        chosen = [row for row in rows if all(row[name] == best[name] for name in names)]
        sound = best["mean"] is not None
        found.append(
            Score(
                best[MECHANISM],
                best.get(HEADS),
                best["case"],
                best["learning_rate"],
                best["optimizer.weight_decay"],
                tuple(row[REPORTED] for row in chosen) if sound else (),
            )
        )

    def place(one):
        return styles.rank(one.mechanism), one.mechanism, one.heads or 0, one.case

    return sorted(found, key=place)


def result_tables(found: Sequence[Score]) -> list[str]:
    """The baseline settings, the averages over all levels, and what was selected; Markdown."""
    labels = list(dict.fromkeys(one.label for one in found))
    heads = ["mechanism", *SHORT.values()]
    baseline = {(one.label, one.case): one for one in found}

    def row(label, cell):
        return [label, *(cell(baseline.get((label, kind))) for kind in SHORT)]

    lines = []
    for label in labels:
        here = [baseline.get((label, kind)) for kind in SHORT]
        whole = all(one is not None and one.values for one in here)
        average = f"{np.mean([one.mean for one in here]):.3f}" if whole else "–"
        lines.append([*row(label, _value), average])
    parts = [
        "Macro accuracy on the test split after training, baseline setting of each task, mean ± "
        f"standard deviation; {_seeds(found)}:",
        tables.markdown([*heads, "average"], lines),
    ]
    if levels := _levels(found, labels):
        parts += [
            "Averages over all levels of difficulty, which are the benchmark's scores; where not "
            "all levels were run, how many were:",
            tables.markdown([*heads, "average"], levels),
        ]
    parts += [
        "Learning rate and weight decay selected, in the baseline settings:",
        tables.markdown(heads, [row(label, _choice) for label in labels]),
    ]
    return parts


def _levels(found, labels):
    """Rows of averages over levels; none if nothing but baseline settings was run."""
    if all(one.case in KINDS for one in found):
        return []
    lines = []
    for label in labels:
        means, cells = [], []
        for kind in SHORT:
            here = [one.mean for one in found if (one.label, one.kind) == (label, kind)]
            most = 1 + sum(map(len, LEVELS[kind].values()))
            if len(here) == most:
                means.append(float(np.mean(here)))
            cells.append(
                f"{means[-1]:.3f}" if len(here) == most else f"({len(here)} of {most} levels)"
            )
        average = f"{np.mean(means):.3f}" if len(means) == len(SHORT) else "–"
        lines.append([label, *cells, average])
    return lines


def _value(score):
    if score is None:
        return "–"
    if not score.values:
        return "diverged"
    spread = float(np.std(score.values, ddof=1)) if len(score.values) > 1 else 0.0
    return f"{score.mean:.3f} ± {spread:.3f}"


def _choice(score):
    return "–" if score is None else f"{score.learning_rate:.3g}, {score.weight_decay:.3g}"


def _seeds(found):
    counts = sorted({len(one.values) for one in found if one.values}) or [0]
    text = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{text} seed{'' if counts == [1] else 's'}"


def published_table() -> str:
    """The numbers of other authors, as fractions."""

    def shown(percent):
        return "–" if percent is None else f"{percent / 100:.3f}"

    return tables.markdown(
        ["model", *SHORT.values(), "average", "source"],
        [
            [model, *map(shown, values), shown(average), source.partition(":")[0]]
            for model, source, values, average in PUBLISHED
        ],
    )


def renewed(text: str, results: pathlib.Path) -> str:
    """The README `text` with its blocks "published" and "results" made anew.

    Raises:
      ValueError: a block is missing or there are others.
    """
    names = [match[2] for match in _BLOCK.finditer(text)]
    if sorted(names) != ["published", "results"]:
        raise ValueError(f"the README must have the blocks published and results; it has {names}.")
    made: Mapping[str, Sequence[Any]] = {"published": [published_table()], "results": []}
    if any(results.glob("*.csv")):
        image = "![macro accuracy of the mechanisms](results/figure.png)"
        made = {**made, "results": [image, *result_tables(scores(results))]}

    def block(match):
        wrapped = (p if p[0] in "|!" else textwrap.fill(p, 100) for p in made[match[2]])
        parts = "".join(f"\n{part}\n" for part in wrapped)
        return match[1] + parts + ("\n" if parts else "") + match[3]

    return _BLOCK.sub(block, text)


def main(argv: Sequence[str]) -> int:
    """`summary.py [FOLDER]`, `summary.py --check` and `summary.py --write`; the exit status."""
    command = argparse.ArgumentParser(description="Prints the tables of a folder of results.")
    command.add_argument("folder", nargs="?", type=pathlib.Path, default=FOLDER / "results")
    action = command.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="1 if the README is out of date")
    action.add_argument("--write", action="store_true", help="renew the README's tables")
    options = command.parse_args(argv)
    file = FOLDER / "README.md"
    try:
        if not (options.check or options.write):
            print(*result_tables(scores(options.folder)), sep="\n\n")
            return 0
        if options.folder != FOLDER / "results":
            command.error("the README has the tables of the committed results: give no other.")
        text = file.read_text(encoding="utf-8")
        new = renewed(text, options.folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif new != text:
        print("README.md is out of date")
    return int(options.check and new != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
