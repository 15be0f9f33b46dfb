"""Tables of multi-query associative recall, from the result files alone.

python experiments/mqar/summary.py                               # of the committed results
python experiments/mqar/summary.py runs/mqar_sweep
python experiments/mqar/summary.py --write  # renew the README; --check compares
"""

import pathlib
import sys
from collections.abc import Sequence

from lla.experiments.trained import tables as shared

WIDTH = "model.width"
SOLVED = 0.99  # the accuracy at which Zoology's training stops
# Setting: values that Zoology has for it, at one of the lengths.
_ZOOLOGY = {
    "task.length": (64, 128, 256, 512), "task.pairs": (4, 8, 16, 64), "task.power_a": (0.01,),
    "task.train_examples": (100_000,), "task.test_examples": (3_000,), "model.depth": (2,),
    "model.mlp_ratio": (0.0,), "model.tie_embeddings": (True,),
    "optimizer.name": ("adamw",), "optimizer.weight_decay": (0.1,),
    "training.batch_size": (512, 256, 128), "training.steps": (12_500, 25_000, 50_000),
    "training.stop_at": (SOLVED,), "model.width": (64, 128, 256, 512, (64, 128, 256, 512)),
    "learning rates": ((1e-4, 10 ** (-10 / 3), 10 ** (-8 / 3), 1e-2),),
}  # fmt: skip
# Options that are there as published, and changed.
_BOTH = {
    "mixers.softmax.qk_norm": (False, True),
    "mixers.hyena.short_conv": (3, 0),
    **{
        f"mixers.{name}.short_conv": (4, 0)
        for name in ("deltanet", "gated_deltanet", "mesanet", "mamba", "mamba2")
    },
}


def case_tasks(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> dict:
    """Case -> its task, shortest sequences first; None is the case of files without that column."""
    settings = shared.task_settings(EXPERIMENT, folder, variant)
    choices = {point.choices["case"]: point.choices for point in found}
    made = {case: shared.task(settings, chosen) for case, chosen in choices.items()}
    return dict(sorted(made.items(), key=lambda item: item[1].length))


def accuracy_cell(point: shared.Point) -> str:
    """Mean ± standard deviation, and how many of the seeds solved the task.

    Those did whose training stopped, since their accuracy on the validation split was `SOLVED`; on
    the test split it may be a little less. In older files, which have no phase, runs stopped
    together: there the accuracy that is shown decides.
    """
    text = shared.value_cell(point.values)
    if not point.values:
        return text
    if point.phase is None:
        solved = sum(value >= SOLVED for value in point.values)
    else:
        solved = len(point.updates)
    return f"{text} ({solved}/{len(point.values)})"


def tables(
    found: Sequence[shared.Point], folder: pathlib.Path, variant: str | None = None
) -> list[str]:
    """For each case: accuracies by mechanism and width; then the updates and the rates."""

    def width(point):
        return point.choices[WIDTH]

    parts = [
        "Accuracy on the test split after the last step, mean ± standard deviation of "
        f"{shared.seeds(found)}, {shared.protocol(found)}; in brackets how many of them got to "
        f"{SOLVED} on the validation split, where training stops."
    ]
    updates = [
        f"Updates to an accuracy of {SOLVED}, mean ± standard deviation of those seeds that got "
        "there, and how many these are:"
    ]
    rates = [shared.RATES_CAPTION]
    for case, task in case_tasks(found, folder, variant).items():
        here = [point for point in found if point.choices["case"] == case]
        heads = {number: f"width {number}" for number in sorted({width(point) for point in here})}
        more = [["a value of the context", *[f"{task.baselines()['context']:.3f}"] * len(heads)]]
        name = f"N = {task.length}, D = {task.pairs}:"
        parts += [name, shared.grid_table(here, width, heads, accuracy_cell, more)]
        updates += [name, shared.grid_table(here, width, heads, shared.updates_cell)]
        rates += [name, shared.grid_table(here, width, heads, shared.rate_cell)]
    return [*parts, *(updates if any(point.updates for point in found) else ()), *rates]


EXPERIMENT = shared.Experiment(
    name="mqar",
    columns=(shared.MECHANISM, "case", WIDTH),
    optional=("case",),
    metric="test/accuracy",
    published={
        "task.vocab_size": ((8192,), "[paper], Zoology"),
        **{key: (values, "Zoology") for key, values in _ZOOLOGY.items()},
        **{key: ((values,), "as published; [ours]") for key, values in _BOTH.items()},
    },
    tables=tables,
    goal=f"validation/accuracy {SOLVED}",
)

if __name__ == "__main__":
    sys.exit(shared.summary_command(EXPERIMENT, sys.argv[1:]))
