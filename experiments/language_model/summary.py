"""Tables of the language models, from the result files alone.

python experiments/language_model/summary.py                     # of the committed results
python experiments/language_model/summary.py runs/language_model/language_model_study
python experiments/language_model/summary.py --write  # renew the README; --check compares
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from lla.configs.language_model import get_config
from lla.experiments.trained import tables as shared
from lla.runs import blocks, styles, tables
from lla.runs.workdir import read_json, read_records
from lla.training.results import FINAL, read_results
from lla.training.settings import override, resolve
from lla.training.trainer import abstract_model

FOLDER = pathlib.Path(__file__).resolve().parent
BASE = "softmax"  # the case that others are compared with
METRIC, TEST = "validation/loss", "final:test/loss"
EVALUATIONS = "evaluations.json"
POSITION = "loss/position_"  # prefix of the loss of a part of the sequences
# Case of the config: its mixer, which gives the colour, and its name.
CASES = {
    "softmax": ("softmax", "Softmax"),
    "softmax_no_qk_norm": ("softmax", "Softmax, no QK-norm"),
    "lla_ridge_1": ("lla", "LLA, ridge 1"),
    "lla_ridge_3": ("lla", "LLA, ridge 3"),
    "lla_ridge_10": ("lla", "LLA, ridge 10"),
    "lla_ridge_30": ("lla", "LLA, ridge 30"),
    "lla_ridge_per_head": ("lla", "LLA, ridge per head"),
    "lla_ridge_per_token": ("lla", "LLA, ridge per token"),
    "lla_ridge_10_one_iteration": ("lla", "LLA, ridge 10, 1 iteration"),
    "lla_ridge_10_two_iterations": ("lla", "LLA, ridge 10, 2 iterations"),
    "lla_last_half": ("lla", "Softmax, last half LLA"),
    "hybrid": ("lla", "Gated DeltaNet, each 4th LLA"),
    "parallax": ("parallax", "Parallax"),
    "gated_deltanet": ("gated_deltanet", "Gated DeltaNet"),
    "mesanet": ("mesanet", "MesaNet"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that was trained to its end.

    Attributes:
      case: of the config.
      seed, learning_rate, steps: of the run.
      validation, test: losses after the last step, in nats a token.
      seconds: of the training, or None where other programs used the device.
    """

    case: str
    seed: int
    learning_rate: float
    steps: int
    validation: float
    test: float
    seconds: float | None

    @property
    def key(self) -> tuple[str, int, float]:
        """What no other run shares."""
        return self.case, self.seed, self.learning_rate


def read(folder: pathlib.Path) -> list[Run]:
    """The runs of all CSV files in `folder`, in the order of `CASES`.

    Times are read where `provenance.json` says of a file that the card was "alone".

    Raises:
      ValueError: there are no results, a file has another metric, a case is unknown or a run is
        there twice.
    """
    origin = folder / "provenance.json"
    known = json.loads(origin.read_text(encoding="utf-8")) if origin.exists() else {}
    found: dict[tuple, Run] = {}
    for file in sorted(folder.glob("*.csv")):
        alone = isinstance(known.get(file.name), dict) and known[file.name].get("alone") is True
        for row in read_results(file):
            if row.get("metric") != METRIC or TEST not in row or row["case"] not in CASES:
                raise ValueError(
                    f"{file} is no result file of language_model: it must have cases of its "
                    f"config, {METRIC} and {TEST}."
                )
            diverged = row["status"] == "diverged"
            run = Run(
                row["case"], row["seed"], row["learning_rate"], row["steps"],
                math.nan if diverged else row["final"], math.nan if diverged else row[TEST],
                row["seconds"] if alone else None,
            )  # fmt: skip
            if run.key in found:
                raise ValueError(f"a run is there twice, the second time in {file}: {run.key}.")
            found[run.key] = run
    if not found:
        raise ValueError(f"{folder} has no results: no CSV file with rows in it.")
    order = list(CASES)
    return sorted(found.values(), key=lambda r: (order.index(r.case), r.learning_rate, r.seed))


def evaluations(folder: pathlib.Path) -> list[dict[str, Any]]:
    """What the records of a sweep have beyond its `results.csv`.

    They come from the work directories of a sweep if `folder` is one, else from the file
    `EVALUATIONS` in it; without either there are none.

    Returns:
      For each run "case", "seed", "learning_rate", "validation" (a list over "steps") and "test",
      metric -> value, and "training", the losses of batches, means over "log_every" updates.
    """
    if (folder / "cells").is_dir():
        phases = sorted((folder / "cells").glob(f"*/{FINAL}"))
        return [record for phase in phases for record in _collected(phase)]
    file = folder / EVALUATIONS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def _collected(phase: pathlib.Path) -> Iterator[dict[str, Any]]:
    if not (phase / "result.json").exists():
        return
    config, records = read_json(phase / "config.json", ""), list(read_records(phase))

    def values(record, i, j):
        return {
            name.partition("/")[2]: value[i][j]
            for name, value in record.items()
            if name not in ("kind", "step")
        }

    by_kind = {
        kind: [record for record in records if record["kind"] == kind]
        for kind in ("eval", "train", "test")
    }
    for i, seed in enumerate(config["runs"]["seeds"]):
        for j, rate in enumerate(config["runs"]["learning_rates"]):
            yield {
                "case": config["choices"]["case"],
                "seed": seed,
                "learning_rate": rate,
                "steps": [record["step"] for record in by_kind["eval"]],
                "validation": [values(record, i, j) for record in by_kind["eval"]],
                "test": [values(record, i, j) for record in by_kind["test"]][-1],
                "log_every": by_kind["train"][0]["step"],
                "training": [record["loss"][i][j] for record in by_kind["train"]],
            }


def at_rate(found: Sequence[Run]) -> list[Run]:
    """The runs at the learning rate that all mechanisms have."""
    (rate,) = get_config("study").sweep.learning_rates
    return [run for run in found if run.learning_rate == rate]


def differences(found: Sequence[Run], case: str) -> dict[int, float]:
    """Seed -> validation loss of a case less that of softmax attention with the same seed."""
    base = {run.seed: run.validation for run in found if run.case == BASE}
    return {
        run.seed: run.validation - base[run.seed]
        for run in found
        if run.case == case and run.seed in base
    }


@functools.cache
def parameters(case: str) -> int:
    """Parameters of the model of a case."""
    config = get_config("study").to_dict()
    cases = config.pop("sweep")["cases"]
    settings = resolve(override(config, cases[case]))
    _, variables, _ = abstract_model(settings.model_config(settings.create_task()))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))


def result_tables(found: Sequence[Run], records: Sequence[dict[str, Any]] = ()) -> list[str]:
    """All tables, as Markdown."""
    same = at_rate(found)
    return [
        *_main(same, records),
        *_rates(found),
        *_positions(same, records),
    ]


def _spread(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    if any(map(math.isnan, values)):
        return "diverged"
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def _main(found, records):
    if not found:
        return []
    bits = {
        (r["case"], r["seed"], r["learning_rate"]): r["validation"][-1]["bits_per_byte"]
        for r in records
    }
    (steps,) = {run.steps for run in found if not math.isnan(run.validation)} or {0}
    config = get_config("study")
    tokens = steps * config.training.batch_size * config.task.length
    timed = any(run.seconds is not None for run in found)
    rows = []
    for case in dict.fromkeys(run.case for run in found):
        runs = [run for run in found if run.case == case]
        apart = list(differences(found, case).values())
        cells = [
            CASES[case][1],
            f"{parameters(case) / 1e6:.2f}M",
            len(runs),
            _spread([run.validation for run in runs]),
            "–" if case == BASE or not apart else _spread(apart, sign="+"),
            _spread([run.test for run in runs]),
        ]
        here = [bits[run.key] for run in runs if run.key in bits]
        cells.append(f"{statistics.mean(here):.4f}" if here else "–")
        if timed:
            seconds = [run.seconds for run in runs if run.seconds is not None]
            cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "–")
        rows.append(cells)
    head = [
        "mechanism", "parameters", "seeds", "validation", "less that of softmax", "test",
        "bits a byte",
    ]  # fmt: skip
    (rate,) = config.sweep.learning_rates
    text = (
        f"Loss in nats a token after {steps} updates, {tokens / 1e6:.1f}M tokens, at a learning "
        f"rate of {rate:g}; mean ± standard deviation where there are several seeds. Differences "
        "are between runs with the same seed; bits a byte are those of the validation split."
    )
    if timed:
        head.append("seconds")
        text += " Seconds are of training with its evaluations, with nothing else on the card."
    else:
        text += " There are no times: other programs used the card."
    return [text, tables.markdown(head, rows)]


def _rates(found):
    rates = sorted({run.learning_rate for run in found})
    several = [
        case
        for case in dict.fromkeys(run.case for run in found)
        if len({run.learning_rate for run in found if run.case == case}) > 1
    ]
    if not several:
        return []
    (seed,) = get_config("rates").sweep.seeds
    losses = {(r.case, r.learning_rate): r.validation for r in found if r.seed == seed}
    rows = [
        [
            CASES[case][1],
            *(
                _spread([losses[case, rate]]) if (case, rate) in losses else "–"
                for rate in rates
            ),
        ]
        for case in several
    ]  # fmt: skip
    return [
        f"Validation loss by learning rate, seed {seed}:",
        tables.markdown(["mechanism", *(f"{rate:g}" for rate in rates)], rows),
    ]


def by_position(records: Sequence[dict[str, Any]], keys) -> dict[str, dict[str, float]]:
    """Case -> part of a sequence -> validation loss, less that of softmax attention.

    Means over the seeds of `keys`; softmax attention has its losses themselves.
    """
    losses: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        if (record["case"], record["seed"], record["learning_rate"]) in keys:
            losses.setdefault(record["case"], {})[record["seed"]] = {
                name.removeprefix(POSITION): value
                for name, value in record["validation"][-1].items()
                if name.startswith(POSITION)
            }
    base, found = losses.get(BASE, {}), {}
    for case in CASES:
        common = sorted(losses.get(case, {}).keys() & base.keys())
        if common:
            found[case] = {
                part: statistics.mean(
                    losses[case][seed][part] - (0.0 if case == BASE else base[seed][part])
                    for seed in common
                )
                for part in sorted(base[common[0]], key=lambda part: int(part.split("-")[0]))
            }
    return found


def _positions(found, records):
    losses = by_position(records, {run.key for run in found})
    if not losses:
        return []
    rows = [
        [CASES[case][1], *(f"{v:{'' if case == BASE else '+'}.4f}" for v in parts.values())]
        for case, parts in losses.items()
    ]
    heads = [part.replace("-", " to ") for part in next(iter(losses.values()))]
    return [
        "Validation loss by the place of a token in its sequence; the first line is the loss of "
        "softmax attention, the others what is added to it (mean over seeds):",
        tables.markdown(["mechanism", *heads], rows),
    ]


def renewed(text: str, results: pathlib.Path) -> str:
    """The README `text` with its block "results" made anew.

    Raises:
      ValueError: the block is missing or there are others.
    """
    parts: list[str] = []
    if any(results.glob("*.csv")):
        image = "![Difference to softmax attention by mechanism and by update](results/figure.png)"
        parts = [image, *result_tables(read(results), evaluations(results))]
    wrapped = (p if p[0] in "|!" else textwrap.fill(p, 100) for p in parts)
    made = "".join(f"\n{part}\n" for part in wrapped)
    return blocks.renew(text, lambda name: made + ("\n" if made else ""), ["results"])


def style(case: str) -> styles.Style:
    """How a case is drawn: in the colour of its mixer."""
    mixer, name = CASES[case]
    return dataclasses.replace(styles.style(mixer), name=name)


def main(argv: Sequence[str]) -> int:
    """`summary.py [FOLDER]`, `summary.py --check` and `summary.py --write`; the exit status."""
    command = argparse.ArgumentParser(description="Prints the tables of a folder of results.")
    command.add_argument("folder", nargs="?", type=pathlib.Path, default=FOLDER / "results")
    action = command.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="1 if the README is out of date")
    action.add_argument("--write", action="store_true", help="renew the README's tables")
    options = command.parse_args(argv)
    if not (options.check or options.write):
        return shared.report(
            lambda: ["\n\n".join(result_tables(read(options.folder), evaluations(options.folder)))]
        )
    if options.folder != FOLDER / "results":
        command.error("the README has the tables of the committed results: give no other.")
    file = FOLDER / "README.md"
    text = file.read_text(encoding="utf-8")
    new = renewed(text, options.folder)
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif new != text:
        print("README.md is out of date")
    return int(options.check and new != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
