"""The picture of README.md, and tables of it and of two other pages, from committed results.

python experiments/front_page.py           # draws the picture and renews the tables
python experiments/front_page.py --check   # exit status 1 if a table is out of date
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from collections.abc import Sequence

import numpy as np

from lla.experiments.benchmarks.results import load
from lla.experiments.in_context_regression.summary import EXPERIMENT as in_context_regression
from lla.experiments.mqar.summary import EXPERIMENT as mqar
from lla.experiments.state_tracking.summary import EXPERIMENT as state_tracking
from lla.experiments.test_time_regression import summary as test_time_regression
from lla.runs import blocks, figures, styles, tables
from lla.runs.workdir import read_config, read_records

FOLDER = pathlib.Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
FIGURES = FOLDER / "README.md"
SPEED = FOLDER.parent / "docs" / "speed.md"
PICTURE = FOLDER.parent / "docs" / "assets"
MEASURED = FOLDER / "benchmarks" / "results"
REGRESSION = FOLDER / "test_time_regression" / "results" / "full"
HEAD_DIMS = (64, 128)


def speed(every: bool = False) -> str:
    """Milliseconds and errors on an H200, with the kernels that the authors of LLA published.

    Args:
      every: all ridges, and those that are not known when the call is compiled.
    """
    found = {
        (
            r["implementation"],
            r["mechanism"],
            r["ridge"],
            r["ridge_kind"],
            r["head_dim"],
            r["pass"],
        ): r
        for r in load(MEASURED / "hopper_h200.json")["records"]
        if r["group"] == "speed" and r["inputs"] == "normal"
    } | {
        (r["implementation"], r["mechanism"], r["ridge"], "static", r["head_dim"], r["pass"]): r
        for r in load(MEASURED / "peers_h200.json")["records"]
        if r["implementation"] == "flash_lla" and r["status"] == "timed"
    }
    ridges = (10.0, 1.0, 0.1, 0.01) if every else (10.0, 1.0, 0.1)
    lines = [
        ("softmax attention, cuDNN", "cudnn", "softmax", None, None),
        ("softmax attention, lla", "mosaic_gpu", "softmax", None, None),
        ("Parallax, lla", "mosaic_gpu", "parallax", None, None),
        *((f"LLA, ridge {ridge:g}", "mosaic_gpu", "lla", ridge, "static") for ridge in ridges),
    ]
    if every:
        name = "LLA, ridge {:g}, traced"
        lines += [(name.format(r), "mosaic_gpu", "lla", r, "array") for r in (10.0, 0.01)]
    name = "LLA, ridge {:g}, the authors' kernels"
    lines += [(name.format(r), "flash_lla", "lla", r, "static") for r in (10.0, 0.1)]
    rows = []
    for name, *key in lines:
        row = [name]
        for head_dim in HEAD_DIMS:
            passes = [found[(*key, head_dim, one)] for one in ("forward", "forward_backward")]
            row += [_digits(1e3 * record["time_median_s"]) for record in passes]
            row.append(f"{max(passes[1]['errors'].values()):.1e}".replace("e-0", "e-"))
        rows.append(row)
    head = [""]
    for head_dim in HEAD_DIMS:
        head += [f"d = {head_dim}: forward", "with gradients", "worst error"]
    return tables.markdown(head, rows)


def _digits(number):
    """Three digits of a number, or all of them before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def cpu() -> str:
    """Milliseconds and MiB with all gradients on a CPU."""
    records = [
        r
        for r in load(MEASURED / "operator_scaling_cpu.json")["records"]
        if r["head_dim"] == 64 and r["pass"] == "forward_backward"
    ]
    found = {(r["implementation"], r["n"]): r for r in records}
    rows = []
    for length in (512, 1024, 2048, 4096, 8192):
        row = [length]
        for name in ("reference", "xla_cg", "jax_softmax"):
            record = found[name, length]
            timed = record["status"] == "timed"
            memory = _digits(record["temp_bytes"] / 2**20)
            row += [_digits(1e3 * record["time_median_s"]) if timed else "not run", memory]
        rows.append(row)
    head = ["n"]
    for name in ("dense reference", "LLA, blockwise", "`jax.nn.dot_product_attention`"):
        head += [f"{name}: ms", "MiB"]
    return tables.markdown(head, rows)


def decoding() -> str:
    """Microseconds of a step on an H200."""
    found = {
        (r["head_dim"], r["batch"], r["n"], r["implementation"]): r
        for r in load(MEASURED / "decoding_h200.json")["records"]
        if r["dtype"] == "bfloat16" and r["group"] == 1 and r["status"] == "timed"
    }
    columns = {
        "softmax, cuDNN": "cudnn",
        "softmax, lla": "softmax",
        "Parallax": "parallax",
        "LLA, ridge 10": "lla_10",
        "LLA, ridge 0.1": "lla_0.1",
    }
    rows = [
        [
            head_dim,
            batch,
            f"{length // 1024}k",
            *(f"{1e6 * found[head_dim, batch, length, c]['time_median_s']:.0f}"
              for c in columns.values()),
        ]
        for head_dim in HEAD_DIMS
        for batch, length in ((1, 4096), (1, 16384), (32, 4096), (32, 16384))
    ]  # fmt: skip
    return tables.markdown(["d", "sequences", "tokens in the cache", *columns], rows)


def accuracy() -> str:
    """Results on four tasks, for a few mechanisms."""
    chosen = {
        label: test_time_regression.mean_and_band(record["per_sequence"])
        for (kind, dim, length, label), record in test_time_regression.select(
            read_records(REGRESSION)
        ).items()
        if (kind, dim, length) == ("piecewise", 64, 256)
    }
    columns = [
        _trained(in_context_regression, {"task.segment_length": 64}),
        _trained(mqar, {"case": "length_256", "model.width": 128}, updates=True),
        _trained(state_tracking, {"task.num_items": 5}),
    ]
    rows = []
    for name, estimator, mixer in (
        ("LLA", "lla", "LLA"),
        ("softmax attention", "softmax", "Softmax"),
        ("Parallax", None, "Parallax"),
        ("MesaNet with decay", "mesanet_decay", "MesaNet"),
        ("Gated DeltaNet", "gated_deltanet", "Gated DeltaNet"),
    ):
        first = "–"
        if estimator is not None:
            mean, half = chosen[estimator]
            first = f"{mean:.3f} ± {half:.3f}"
        rows.append([name, first, *(column.get(mixer, "–") for column in columns)])
    head = [
        "",
        "test-time regression: error",
        "in-context regression: error",
        "MQAR: updates to 99 %",
        "state tracking: accuracy",
    ]
    return tables.markdown(head, rows)


def _trained(experiment, choices, updates=False):
    """Label -> mean ± standard deviation over seeds, at the point with these choices."""
    cells = {}
    for point in experiment.points(experiment.folder / "results"):
        if choices.items() <= point.choices.items():
            values = point.updates if updates else point.values
            if not values or (updates and len(values) < len(point.rows)):
                continue
            digits = ",.0f" if updates else ".3f"
            mean, spread = statistics.mean(values), statistics.stdev(values)
            cells[point.label] = f"{mean:{digits}} ± {spread:{digits}}"
    return cells


def recall() -> str:
    """How many cases of MQAR are trained and solved, and in how many updates."""
    found: dict[str, list] = {}
    for point in mqar.points(mqar.folder / "results"):
        found.setdefault(point.label, []).append(point)
    rows = []
    for label, points in found.items():
        solved = [point for point in points if len(point.updates) == len(point.rows)]
        means = sorted(statistics.mean(point.updates) for point in solved)
        rows.append([label, len(points), len(solved), _between(means)])
    head = ["mechanism", "cases trained, of 6", "solved by all five seeds"]
    return tables.markdown([*head, "updates to 0.99, mean of the seeds, by case"], rows)


def _between(numbers):
    if not numbers:
        return "–"
    low, high = f"{numbers[0]:,.0f}", f"{numbers[-1]:,.0f}"
    return low if low == high else f"{low} to {high}"


TABLES = {
    README: {"speed": speed, "accuracy": accuracy},
    FIGURES: {"recall": recall},
    SPEED: {"gpu": lambda: speed(every=True), "cpu": cpu, "decoding": decoding},
}


def renewed(path: pathlib.Path) -> str:
    """The text of a file with its tables made again."""
    makers = TABLES[path]
    text = path.read_text(encoding="utf-8")
    return blocks.renew(text, lambda name: f"\n{makers[name]()}\n\n", makers)


def draw():
    """The picture: one fit of each kind, and errors of both along a sequence."""
    figure, axes = figures.new(1, 2, height=2.4)
    _fits(axes[0, 0])
    _along_a_sequence(axes[0, 1])
    figure.set_layout_engine("constrained", w_pad=0.06)
    return figure


def _fits(axis):
    """Both operators on the same pairs of keys and values in one dimension."""
    import jax.numpy as jnp

    import lla

    rng = np.random.default_rng(0)
    keys = np.concatenate([rng.uniform(0, 0.4, 14), rng.uniform(0.6, 1, 14)]).astype(np.float32)
    noise = 0.03 * rng.standard_normal(len(keys))
    values = (2 * keys - 0.8 * keys**2 + noise).astype(np.float32)
    queries = np.linspace(-0.15, 1.2, 200, dtype=np.float32)
    bandwidth = 0.15

    def attend(function, **options):
        # The weights of both are a Gaussian window: -|q - k|² / 2 b² without its part in q alone
        # is a product and a bias.
        bias = -(keys**2) / (2 * bandwidth**2)
        out = function(
            *(jnp.asarray(a)[:, None, None] for a in (queries, keys, values)),
            scale=1 / bandwidth**2,
            bias=jnp.asarray(bias)[None, None, :],
            is_causal=False,
            **options,
        )
        return np.asarray(out)[:, 0, 0]

    axis.plot(keys, values, linestyle="none", marker="o", markersize=3, color="0.6", label="pairs")
    for label, name, found in (
        ("softmax", "softmax attention: weighted mean", attend(lla.softmax_attention)),
        ("lla", "LLA: weighted line", attend(lla.local_linear_attention, ridge=1e-4)),
    ):
        dash = "--" if label == "softmax" else "-"
        colour = styles.style(label).colour
        axis.plot(queries, found, color=colour, linewidth=1.6, linestyle=dash, label=name)
    axis.legend(loc="lower right")
    axis.set(xlabel="key, or query", ylabel="value, or output", xlim=(-0.15, 1.2))
    axis.set_title("One dimension: what a query reads")


def _along_a_sequence(axis):
    """Errors of a figure of experiments/test_time_regression."""
    config, records = read_config(REGRESSION), read_records(REGRESSION)
    chosen = test_time_regression.select(records)
    axis.set_yscale("log")
    for label in ("softmax", "lla"):
        error = chosen["piecewise", config["dim"], config["segment_length"], label]["by_position"]
        x = (np.arange(len(error)) + 0.5) * config["position_bin"]
        style = styles.style(label)
        axis.plot(x, error, color=style.colour, linewidth=1.5, label=style.name)
        axis.text(config["length"], error[-1], f" {style.name}", color=style.colour, va="center")
    for start in range(config["segment_length"], config["length"], config["segment_length"]):
        axis.axvline(start, color="0.75", linewidth=0.8, zorder=0)
    axis.set(xlabel="position (grey: a new linear map begins)", ylabel="mean squared error")
    axis.set(xlim=(0, config["length"]))
    axis.set_title("64 dimensions: error along a sequence")
    figures.log_axis(axis)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    options = parser.parse_args(argv)
    status = 0
    for path in TABLES:
        new = renewed(path)
        if not options.check:
            path.write_text(new, encoding="utf-8")
        elif new != path.read_text(encoding="utf-8"):
            print(f"{path.name} is out of date")
            status = 1
    if options.check:
        return status
    paths = figures.save(draw(), PICTURE, "front page", name="local_linear_attention")
    print(*paths, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
