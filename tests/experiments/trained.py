"""Made-up result files of trained models, in the old format and in that with phases."""

import csv

from lla.experiments.in_context_regression import summary as regression
from lla.experiments.state_tracking import summary as tracking
from lla.experiments.trained import tables as shared

LONG = shared.FURTHER + tracking.LONG


def write(path, experiment, rows):
    """Writes rows (choices, seed, rate, final), where no final stands for a run that diverged."""
    mode = "min" if experiment is regression.EXPERIMENT else "max"
    made = [
        {
            **choices,
            "seed": seed,
            "learning_rate": rate,
            "status": "diverged" if final is None else "finished",
            "steps": 10,
            "metric": experiment.metric,
            "mode": mode,
            "final": final,
            "best": final,
        }
        for choices, seed, rate, final in rows
    ]
    write_rows(path, made)


def regression_rows(mechanism, length, finals, seeds=(0, 1)):
    """`finals`: learning rate -> value of each seed."""
    choices = {"model.mixer.name": mechanism, "task.segment_length": length}
    return [
        (choices, seed, rate, final)
        for rate, values in finals.items()
        for seed, final in zip(seeds, values, strict=True)
    ]


def mqar_rows(mechanism, case, width, finals):
    choices = {"model.mixer.name": mechanism, "model.width": width}
    choices |= {"case": case} if case else {}
    return [(choices, seed, 0.01, final) for seed, final in enumerate(finals)]


def tracking_rows(mechanism, items, finals, long=None):
    choices = {"model.mixer.name": mechanism, "task.num_items": items}
    further = [{} if long is None else {LONG: value} for value in long or finals]
    return [
        (choices | further[seed], seed, rate, final - rate)
        for seed, final in enumerate(finals)
        for rate in (0.01, 0.02)
    ]


def phase_rows(phase, mechanism, runs, **choices):
    """Rows of mechanism `mechanism` for `write_phases`.

    Args:
      phase: "select" or "final".
      runs: learning rate -> for each seed its curve on the validation split, or None if the run
        diverged; seeds of the final phase begin at 2.
      choices: column -> value.
    """
    first = 0 if phase == "select" else 2
    return [
        ({**choices, shared.MECHANISM: mechanism, shared.PHASE: phase}, first + number, rate, curve)
        for rate, curves in runs.items()
        for number, curve in enumerate(curves)
    ]


def write_phases(path, experiment, rows, goal=0.99, shift=-0.001):
    """Writes `rows` of `phase_rows`, as lla/training/results.py does.

    The test split has the validation split's value plus `shift`. A run whose last value is `goal`
    stopped; evaluations are 250 updates apart.
    """
    validation = experiment.validation
    made = []
    for choices, seed, rate, curve in rows:
        last = None if curve is None else curve[-1]
        stopped = last is not None and last >= goal
        status = "diverged" if curve is None else "stopped" if stopped else "finished"
        row = {
            **choices,
            "settings": "12e4567890ab",
            "seed": seed,
            "learning_rate": rate,
            "status": status,
            "steps": 100 if curve is None else 250 * (len(curve) - 1),
            "metric": validation,
            "mode": "min" if validation.endswith("mse") else "max",
            "final": last,
            "best": last,
            shared.FURTHER + experiment.metric: None if last is None else last + shift,
            "seconds": 17.2,
            "eval_every": 250,
            "curve": "0" if curve is None else " ".join(map(str, curve)),
        }
        made.append(row)
    write_rows(path, made)


def write_rows(path, rows):
    """Writes rows, each a column -> value, as CSV."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
