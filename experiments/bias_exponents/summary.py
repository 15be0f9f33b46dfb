"""Tables from the records alone: exponents, leading terms, operators, random keys.

python experiments/bias_exponents/summary.py               # the committed results
python experiments/bias_exponents/summary.py runs/bias_exponents
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lla.experiments.bias_exponents import population, study
from lla.runs import command, tables
from lla.runs.workdir import read_config, read_records

Row = dict[str, Any]


def table(path: str | os.PathLike) -> list[Row]:
    """One row for each setting, fit, quantity and bandwidth; random keys as a mean over seeds."""
    groups: dict[tuple, list[float]] = {}
    for record in read_records(path):
        ridge = study.ridge_name(record["ridge"])
        setting = (record["kind"], record["target"], record["dim"], ridge, record["radius"])
        for result in record["results"]:
            for fit in population.FITS:
                for quantity, amount in _flat(result[fit]).items():
                    key = (*setting, fit, quantity, result["bandwidth"])
                    groups.setdefault(key, []).append(amount)
    names = ("kind", "target", "dim", "ridge", "radius", "fit", "quantity", "bandwidth")
    return [
        dict(zip(names, key, strict=True))
        | {"value": float(np.mean(a)), "low": min(a), "high": max(a), "seeds": len(a)}
        for key, a in groups.items()
    ]


def _flat(entry, prefix=""):
    flat = {}
    for key, inner in entry.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}_")
        else:
            flat[prefix + key] = inner
    return flat


def curve(rows: list[Row], quantity: str, **where) -> tuple[np.ndarray, np.ndarray]:
    """Bandwidths and values of the rows with this quantity and the columns `where`.

    Raises:
      ValueError: they are not one curve.
    """
    where["quantity"] = quantity
    chosen = [row for row in rows if all(row[key] == wanted for key, wanted in where.items())]
    bandwidths = np.array([row["bandwidth"] for row in chosen])
    if len(set(bandwidths)) < len(bandwidths):
        raise ValueError(f"more than one curve has {where}.")
    return bandwidths, np.array([row["value"] for row in chosen])


def settings(rows: list[Row], kind: str) -> list[Row]:
    """The settings of a kind, in the order of the records, as arguments for `curve`."""
    names = ("kind", "target", "dim", "ridge", "radius")
    found = [tuple(row[name] for name in names) for row in rows if row["kind"] == kind]
    return [dict(zip(names, each, strict=True)) for each in dict.fromkeys(found)]


def markdown(path: str | os.PathLike) -> str:
    """The tables of the README."""
    config, rows = read_config(path), table(path)
    parts = [_exponents(config, rows), _leading(config, rows), _operators(config, rows)]
    if config["seeds"]:
        parts.append(_random(rows))
    return "\n\n".join(parts) + "\n"


def _exponents(config, rows):
    ranges = config["fit_ranges"]
    spans = [f"{low:g} to {high:g}" for low, high in ranges]
    columns = [f"{name}, {span}" for name in ("integrated", "boundary") for span in spans]
    head, lines = ["target", "d", "ridge", "fit", *columns], []
    for where in settings(rows, "integrals"):
        for fit in population.FITS:
            cells = [where["target"], where["dim"], where["ridge"], fit]
            for quantity in ("integrated", "boundary"):
                x, y = curve(rows, quantity, fit=fit, **where)
                for low, high in ranges:
                    inside = study.within(x, low, high)
                    cells.append(f"{population.exponent(x[inside], y[inside]):.2f}")
            lines.append(cells)
    return tables.markdown(head, lines)


def _leading(config, rows):
    """Bias divided by its leading term, which is known for one dimension and no ridge."""
    grid = np.array(config["bandwidths"])
    ends = sorted({end for span in config["fit_ranges"] for end in span})
    edges = list(dict.fromkeys(grid[np.abs(np.log(grid / end)).argmin()] for end in ends))
    columns = [f"{name}, b = {edge:g}" for name in ("integrated", "boundary") for edge in edges]
    head, lines = ["target", "fit", *columns], []
    for where in settings(rows, "integrals"):
        target = population.TARGETS[where["target"]]
        if where["dim"] > 1 or where["ridge"] != "0":
            continue
        for fit in population.FITS:
            if fit == "constant" and np.abs(target.slope(np.array([0.0, 1.0]))).max() < 1e-9:
                continue  # the leading term vanishes
            cells = [where["target"], fit]
            for quantity in ("integrated", "boundary"):
                x, y = curve(rows, quantity, fit=fit, **where)
                for edge in edges:
                    (at,) = np.flatnonzero(study.within(x, edge, edge))
                    theory = population.leading_terms(target, x[at])[fit][quantity]
                    cells.append(f"{y[at] / theory:.3f}")
            lines.append(cells)
    return tables.markdown(head, lines)


def _operators(config, rows):
    """Exponents of the attention call, of its integral, and of keys on a straight line."""
    kinds = {"lla": "", "integral": "_integral", "straight line": "_line"}
    columns = [f"{name}, {kind}" for name in ("integrated", "boundary") for kind in kinds]
    head, lines = ["radius", "ridge", "fit", *columns, "largest difference"], []
    for where in settings(rows, "grid"):
        for fit in population.FITS:
            cells = [f"{where['radius']:g}", where["ridge"], fit]
            for name in ("integrated", "boundary"):
                for end in kinds.values():
                    x, y = curve(rows, name + end, fit=fit, **where)
                    inside = study.within(x, *config["operator_range"])
                    cells.append(f"{population.exponent(x[inside], y[inside]):.2f}")
            _, worst = curve(rows, "worst_difference", fit=fit, **where)
            lines.append([*cells, f"{worst.max():.1e}"])
    return tables.markdown(head, lines)


def _random(rows):
    head = ["bandwidth", "fit", "squared bias, integral", "squared bias, random keys"]
    head, lines = [*head, "variance", "squared error"], []
    (where,) = settings(rows, "random")
    for bandwidth in dict.fromkeys(row["bandwidth"] for row in rows if row["kind"] == "random"):
        for fit in population.FITS:
            target = population.TARGETS[where["target"]]
            exact = population.squared_bias(target, 1, bandwidth)[fit]["integrated"]
            cells = [f"{bandwidth:.3f}", fit, f"{exact:.2e}"]
            for quantity in ("bias_integrated", "variance_integrated", "error_integrated"):
                wanted = where | {"fit": fit, "quantity": quantity, "bandwidth": bandwidth}
                (row,) = (r for r in rows if all(r[k] == v for k, v in wanted.items()))
                cells.append(f"{row['value']:.2e} [{row['low']:.2e}, {row['high']:.2e}]")
            lines.append(cells)
    return tables.markdown(head, lines)


def main(argv: Sequence[str]) -> int:
    """`summary.py [WORKDIR ...]`; returns the exit status."""
    results = pathlib.Path(__file__).parent / "results"

    def show(path):
        return [markdown(path).rstrip()]

    return command.for_each_result(show, results, argv, "Prints the tables of the README.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
