"""Tables and figures of the committed results, from the JSON files alone.

python experiments/benchmarks/report.py            # README.md and figures/
python experiments/benchmarks/report.py --check    # exit status 1 if README.md is out of date
python experiments/benchmarks/report.py --add FILE # take in a result file that has no block yet
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence

import measure
import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parent
README = FOLDER / "README.md"
FIGURES = FOLDER / "figures"
DRAWN = {
    "operator_scaling": "Time and memory against length",
    "hopper": "Time against length and ridge",
    "decoding": "Time of a decoding step against the length of the cache",
    "decoding_traffic": "Bytes that a decoding step moves against the length of the cache",
}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}

# Implementations: name in tables, and the series that they are in figures.
LABELS = {
    "reference": ("reference", "dense"),
    "xla_cg": ("xla, cg", "lla_cg"),
    "xla_direct": ("xla, direct", "lla_direct"),
    "xla_softmax": ("xla, softmax", "softmax"),
    "jax_softmax": ("jax.nn softmax", "jax_softmax"),
    "jax_softmax_cudnn": ("cuDNN softmax", "cudnn"),
}
_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


# ---------------------------------------------------------------------------------------------
# Numbers from records


def fit_exponent(sizes: Sequence[float], amounts: Sequence[float]) -> float | None:
    """Least-squares exponent b of ``amount = a * size^b``; None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(amounts), 1)[0])


def series(records, implementation: str, which: str, head_dim: int, field: str) -> dict[int, float]:
    """`field` by length, where it was measured."""
    return {
        record["n"]: record[field]
        for record in sorted(records, key=lambda record: record["n"])
        if record["implementation"] == implementation
        and (record["pass"], record["head_dim"]) == (which, head_dim)
        and field in record
    }


def faster_from(fast: Mapping[int, float], slow: Mapping[int, float]) -> int | None:
    """The length from which on `fast` takes less time wherever both were measured."""
    first = None
    for n in sorted(set(fast) & set(slow)):
        if fast[n] >= slow[n]:
            first = None
        elif first is None:
            first = n
    return first


def break_even(direct: Mapping[float, float], cg: Mapping[float, float]) -> dict[str, float | None]:
    """Where the direct solver takes over as the ridge falls.

    Args:
      direct, cg: time by ridge.

    Returns:
      "measured": the largest ridge at which, and below which, direct is faster at every measured
      ridge (None: at none); "estimate": the crossing between it and the next larger ridge, by
      interpolation of the logarithms (None where direct never or always wins).
    """
    ridges = sorted(set(direct) & set(cg))
    gains = [math.log(cg[ridge] / direct[ridge]) for ridge in ridges]
    wins = next((i for i, gain in enumerate(gains) if gain <= 0), len(gains))
    if wins == 0:
        return {"measured": None, "estimate": None}
    measured, estimate = ridges[wins - 1], None
    if wins < len(ridges):
        share = gains[wins - 1] / (gains[wins - 1] - gains[wins])
        estimate = measured * (ridges[wins] / measured) ** share
    return {"measured": measured, "estimate": estimate}


def _worst(errors: Mapping[str, float | None]) -> float | None:
    """The output's error of a forward pass, else the largest of the gradients."""
    gradients = [error for name, error in errors.items() if name != "output"]
    if None in errors.values():
        return None
    return max(gradients) if gradients else errors["output"]


# ---------------------------------------------------------------------------------------------
# Text


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cell_text(record: Mapping | None) -> str:
    """Median and fastest time, and error."""
    if record is None:
        return ""
    if record["status"] != "timed":
        return record["status"]
    times = f"{_milliseconds(record['time_median_s'])} ({_milliseconds(record['time_min_s'])})"
    return f"{times}; {_worst(record['errors']):.0e}"


def progress_line(record: Mapping, key_fields: Sequence[str]) -> str:
    where = ", ".join(f"{name} {record[name]}" for name in key_fields)
    if record["status"] == "timed":
        return f"{where}: ms (fastest); error: {cell_text(record)}"
    return f"{where}: {record['status']}: {record['reason']}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def provenance(document: Mapping) -> str:
    header = document["header"]
    device, versions = header["device"], header["versions"]
    settings = ", ".join(f"{name} {value}" for name, value in header["settings"].items())
    machine = f"{device['cpu']}, {device['cores']} cores"
    if header["platform"] != "cpu":
        machine = f"{device['kind']} ({machine})"
    commits = sorted({(record["commit"] or "unknown")[:10] for record in document["records"]})
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Measured on {machine}; {names}; {header['date'][:10]}; commit {', '.join(commits)}"
        f"{' with uncommitted changes' if header['uncommitted_changes'] else ''}; {settings}.\n"
        f"Command: `{header['command']}`"
    )


def exponents(values: Mapping[int, float]) -> str:
    """Fitted over all lengths, and over the last doubling."""
    whole = fit_exponent(list(values), list(values.values()))
    if whole is None:
        return ""
    last = dict(list(values.items())[-2:])
    return f"{whole:.2f} ({fit_exponent(list(last), list(last.values())):.2f})"


def scaling_markdown(document: Mapping) -> str:
    """Tables of `operator_scaling.py`."""
    records = document["records"]
    parts = [provenance(document)]
    names = [name for name in LABELS if any(r["implementation"] == name for r in records)]
    labels = [LABELS[name][0] for name in names]
    cells = {(r["head_dim"], r["pass"], r["n"], r["implementation"]): r for r in records}
    lengths = sorted({record["n"] for record in records})
    for head_dim in sorted({record["head_dim"] for record in records}):
        for which, title in PASSES.items():
            what = "output" if which == "forward" else "gradients, the worst"
            rows = [
                [str(n), *(cell_text(cells.get((head_dim, which, n, name))) for name in names)]
                for n in lengths
            ]
            parts.append(
                f"**Head dimension {head_dim}, {title}**: median (fastest) ms; relative error of "
                f"the {what}.\n\n" + table(["n", *labels], rows)
            )
            rows = []
            for n in lengths:
                found = [cells.get((head_dim, which, n, name)) for name in names]
                amounts = [f"{r['temp_bytes'] / 2**20:.4g}" if r else "" for r in found]
                rows.append([str(n), *amounts])
            parts.append(
                f"Head dimension {head_dim}, {title}: compiled temporary memory, MiB.\n\n"
                + table(["n", *labels], rows)
            )
        parts.append(_growth(records, names, head_dim))
    return "\n\n".join(parts)


def _growth(records, names: Sequence[str], head_dim: int) -> str:
    rows, sentences = [], []
    for which, title in PASSES.items():
        times = {n: series(records, n, which, head_dim, "time_median_s") for n in names}
        floor = times.get("jax_softmax", {})
        for name in names:
            memory = series(records, name, which, head_dim, "temp_bytes")
            common = sorted(set(times[name]) & set(floor))
            ratio = f"{times[name][common[-1]] / floor[common[-1]]:.1f}" if common else ""
            at = str(common[-1]) if common else ""
            growth = [exponents(times[name]), exponents(memory)]
            rows.append([LABELS[name][0], title, *growth, ratio, at])
        for name in ("xla_cg", "xla_direct"):
            common = set(times.get(name, {})) & set(times.get("reference", {}))
            if common:
                first = faster_from(times[name], times["reference"])
                where = "nowhere" if first is None else f"from n = {first}"
                sentences.append(
                    f"{LABELS[name][0]}, {title}: faster than the reference {where} (both timed "
                    f"for n = {min(common)} to {max(common)})."
                )
    head = ["implementation", "pass", "time exponent", "memory exponent", "time / jax.nn", "at n"]
    return (
        f"Head dimension {head_dim}: fitted exponents in n (in brackets: the last doubling alone), "
        "and time relative to `jax.nn.dot_product_attention`.\n\n"
        + table(head, rows)
        + "".join(f"\n\n- {s}" if i == 0 else f"\n- {s}" for i, s in enumerate(sentences))
    )


SOLVERS = {"xla_cg": "cg", "xla_direct": "direct", "mosaic_gpu": "kernel (cg)"}


def choice_markdown(document: Mapping) -> str:
    """Tables of `solver_choice.py`."""
    records = document["records"]
    parts = [provenance(document), _break_even_table(records)]
    fields = ("dtype", "head_dim", "ridge", "implementation", "pass")
    cells = {tuple(record[name] for name in fields): record for record in records}
    systems = sorted(
        {(r["dtype"], r["head_dim"], r["ridge"]) for r in records if r["ridge"] is not None},
        key=lambda system: (system[0], system[1], -system[2]),
    )
    for dtype in sorted({record["dtype"] for record in records}, reverse=True):
        rows = []
        measured = {r["implementation"] for r in records if r["dtype"] == dtype}
        solvers = [name for name in SOLVERS if name in measured]
        for system in systems:
            if system[0] != dtype:
                continue
            row = [str(system[1]), f"{system[2]:g}"]
            for name in solvers:
                pair = [cells.get((*system, name, which)) for which in PASSES]
                count = next((f"{r['mean_iterations']:.1f}" for r in pair if r), "")
                row += [count, *map(cell_text, pair)]
            rows.append(row)
        head = ["d", "ridge"]
        for name in solvers:
            head += [f"{SOLVERS[name]}: iterations", "forward", "forward + backward"]
        parts.append(
            f"**{dtype}**: mean forward iterations; median (fastest) ms; relative error of the "
            "output, or of the worst gradient.\n\n" + table(head, rows)
        )
    floor = [record for record in records if record["ridge"] is None]
    if floor:
        keys = sorted({(r["dtype"], r["head_dim"], r["implementation"]) for r in floor})
        rows = [
            [
                d,
                str(h),
                LABELS[name][0],
                *(cell_text(cells.get((d, h, None, name, w))) for w in PASSES),
            ]
            for d, h, name in sorted(keys, key=lambda key: (key[0] != "float32", *key[1:]))
        ]
        parts.append(
            "Softmax attention on the same tensors.\n\n"
            + table(["dtype", "d", "implementation", *PASSES.values()], rows)
        )
    return "\n\n".join(parts)


def times_by_ridge(records, name: str, which: str, head_dim: int, dtype: str) -> dict[float, float]:
    """Median seconds by ridge; a refused cell counts as infinitely slow."""
    wanted = (name, which, head_dim, dtype)
    return {
        record["ridge"]: record.get("time_median_s", math.inf)
        for record in records
        if (record["implementation"], record["pass"], record["head_dim"], record["dtype"]) == wanted
    }


def measured_break_even(
    records, which: str, head_dim: int, dtype: str, iterative: str = "xla_cg"
) -> dict:
    """`break_even` over the ridges at which both solvers were timed, and their "range"."""
    cg, direct = (
        times_by_ridge(records, name, which, head_dim, dtype) for name in (iterative, "xla_direct")
    )
    both = {r for r in set(cg) & set(direct) if math.isfinite(cg[r] + direct[r])}
    found = break_even({r: direct[r] for r in both}, {r: cg[r] for r in both})
    return {**found, "range": (min(both), max(both)) if both else None}


def _break_even_table(records) -> str:
    rows = []
    systems = {
        (r["head_dim"], r["dtype"], r["implementation"])
        for r in records
        if r["ridge"] is not None and r["implementation"] != "xla_direct"
    }
    for head_dim, dtype, name in sorted(systems, key=lambda s: (s[1] != "float32", s[2], *s[:2])):
        row = [dtype, str(head_dim), SOLVERS[name]]
        for which in PASSES:
            found = measured_break_even(records, which, head_dim, dtype, name)
            if found["range"] is None:
                text = "not measured"
            elif found["measured"] is None:
                text = f"never (down to {found['range'][0]:g})"
            elif found["estimate"] is None:
                text = f"always (up to {found['range'][1]:g})"
            else:
                text = f"<= {found['measured']:g}, crossing near {found['estimate']:.2g}"
            row.append(text)
        rows.append(row)
    return "Ridge below which the direct solver is faster.\n\n" + table(
        ["dtype", "d", "than", *PASSES.values()], rows
    )


# ---------------------------------------------------------------------------------------------
# Files


def variants_markdown(document: Mapping) -> str:
    """Table of `blockwise_variants.py`."""
    rows = [
        [record["implementation"], cell_text(record), f"{record['temp_bytes'] / 2**20:.1f}"]
        for record in document["records"]
    ]
    head = ["variant", "median (fastest) ms; relative error", "temporary memory, MiB"]
    sizes = {(record["n"], record["head_dim"]) for record in document["records"]}
    text = ", ".join(f"n {n}, head dimension {head_dim}" for n, head_dim in sorted(sizes))
    return f"{provenance(document)}\n\nForward, {text}.\n\n{table(head, rows)}"


def markdown(document: Mapping) -> str:
    """The tables of any result file."""
    import decoding_tables  # here, because they use this module
    import hopper_tables
    import mixers_tables
    import peers_tables
    import solvers_tables
    import stages_tables

    makers = {
        "operator_scaling": scaling_markdown,
        "solver_choice": choice_markdown,
        "hopper": hopper_tables.markdown,
        "peers": peers_tables.markdown,
        "hopper_solvers": solvers_tables.markdown,
        "hopper_stages": stages_tables.markdown,
        "mixers": mixers_tables.markdown,
        "mixer_updates": mixers_tables.updates_markdown,
        "decoding": decoding_tables.markdown,
        "decoding_solvers": decoding_tables.solvers_markdown,
        "decoding_traffic": decoding_tables.traffic_markdown,
        "blockwise_variants": variants_markdown,
    }
    return makers[document["header"]["benchmark"]](document)


def render(text: str, results: pathlib.Path) -> str:
    """README text with every generated block renewed from its result file.

    Raises:
      ValueError: if a result file has no block, or a block no result file.
    """
    found = {path.stem: path for path in sorted(results.glob("*.json"))}
    blocks = {match[2] for match in _BLOCK.finditer(text)}
    if blocks != set(found):
        raise ValueError(
            f"README.md has blocks {sorted(blocks)}, results/ has files {sorted(found)}."
        )

    def renew(match):
        figure = ""
        document = measure.load(found[match[2]])
        if document["header"]["benchmark"] in DRAWN:
            caption = DRAWN[document["header"]["benchmark"]]
            figure = f"\n\n![{caption}](figures/{match[2]}.png)"
        return f"{match[1]}{markdown(document)}{figure}\n{match[3]}"

    return _BLOCK.sub(renew, text)


def add(path: pathlib.Path, results: pathlib.Path, text: str) -> str:
    """Copies the result file at `path` to `results`; README text with an empty block for it."""
    device = measure.load(path)["header"]["device"]["kind"]
    destination = results / path.name
    if path.resolve() != destination.resolve():
        shutil.copyfile(path, destination)
    if any(match[2] == path.stem for match in _BLOCK.finditer(text)):
        return text
    begin, end = f"<!-- generated: {path.stem} -->", "<!-- end generated -->"
    return f"{text.rstrip()}\n\n### {path.stem}, {device}\n\n{begin}\n{end}\n"


def _draw_scaling(records):
    """Time and memory against length."""
    from lla.runs import figures, styles

    head_dims = sorted({record["head_dim"] for record in records})
    panels = [(which, field) for field in ("time_median_s", "temp_bytes") for which in PASSES]
    figure, axes = figures.new(
        len(head_dims), len(panels), height=0.85 + 1.75 * len(head_dims), sharex=True
    )
    for row, head_dim in zip(axes, head_dims, strict=True):
        for axis, (which, field) in zip(row, panels, strict=True):
            axis.set_yscale("log")
            unit = 1e3 if field == "time_median_s" else 2.0**-20
            for name, (_, series_name) in LABELS.items():
                values = series(records, name, which, head_dim, field)
                if not values:
                    continue
                values = {n: unit * value for n, value in values.items()}
                bars = None
                if field == "time_median_s":
                    least = series(records, name, which, head_dim, "time_min_s")
                    bars = [values[n] - unit * least[n] for n in values]
                figures.marks(
                    axis, styles.style(series_name), list(values), list(values.values()), bars,
                    bars and [0.0] * len(bars),
                )  # fmt: skip
            figures.length_axis(axis, [record["n"] for record in records], most=4)
            figures.log_axis(axis, most=6)
            axis.grid(True, axis="x")
        row[0].set_ylabel(f"d = {head_dim}: time, ms")
        row[2].set_ylabel(f"d = {head_dim}: memory, MiB")
    for axis, (which, field) in zip(axes[0], panels, strict=True):
        what = "time" if field == "time_median_s" else "temporary memory"
        axis.set_title(f"{what},\n{PASSES[which]}")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length n")
    figures.legend(figure, axes.flat)
    return figure


def make(document: dict):
    """The figure of a result file."""
    import decoding_tables
    import hopper_tables

    drawers = {
        "hopper": hopper_tables.draw,
        "decoding": decoding_tables.draw,
        "decoding_traffic": decoding_tables.draw_traffic,
    }
    return drawers.get(document["header"]["benchmark"], _draw_scaling)(document["records"])


def draw(path: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """The figure of a result file as PNG and SVG; returns the paths."""
    from lla.runs import figures

    figure = make(measure.load(path))
    return figures.save(figure, folder, path.stem, name=path.stem, png_metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--add", type=pathlib.Path, help="take in a result file with a new block")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    if options.add is not None:
        text = add(options.add, measure.RESULTS, text)
    renewed = render(text, measure.RESULTS)
    if options.check:
        print("README.md is up to date" if renewed == text else "README.md is out of date")
        return int(renewed != text)
    README.write_text(renewed, encoding="utf-8")
    for path in sorted(measure.RESULTS.glob("*.json")):
        if measure.load(path)["header"]["benchmark"] in DRAWN:
            print(*draw(path, FIGURES), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
