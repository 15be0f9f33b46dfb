"""The cells of `hopper_stages.py`, the work of every stage, and the tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import report

# Units of a call without iterations and of one iteration, a unit being a product of all visible
# pairs with the head dimension; see kernels/HOPPER.md.
FIRST = {
    "solve": 2, "solve_precise": 3, "adjoint": 3,
    "one_part": 3, "two_parts": 4, "precise": 6, "softmax": 2,
}  # fmt: skip
EACH = {"solve": 3, "solve_precise": 5, "adjoint": 3}
FULL = "full"
VARIANTS = {
    "no_exp": "exponentials",
    "no_sum_product": "last product",
    "no_scores_product": "product beside the logits",
    "no_reload": "copies of tiles",
    "no_weights": "logits and exponentials",
}
_BESIDE_LOGITS = ("no_scores_product", "no_weights")  # variants that need a second product
COUNTS = (0, 1, 3, 5)  # iterations of full calls
_VARIANT_COUNTS = (0, 1, 5)
_BALANCE = ("solve", 3)  # the call that is timed for more heads, and its iterations
_BALANCE_FACTORS = (2, 4)
_ROWS = (
    ("first pass", "solve", False),
    ("iteration", "solve", True),
    ("first pass, two parts everywhere", "solve_precise", False),
    ("iteration, two parts everywhere", "solve_precise", True),
    ("adjoint: first pass", "adjoint", False),
    ("adjoint: iteration", "adjoint", True),
    ("output, probe in one part", "one_part", False),
    ("output, probe in two parts", "two_parts", False),
    ("output, weights in two parts, too", "precise", False),
    ("output without a probe (softmax)", "softmax", False),
)


class Cell(NamedTuple):
    """A call with heads of `n` queries and keys."""

    stage: str
    variant: str
    iterations: int
    batch: int
    heads: int
    n: int
    head_dim: int

    def fields(self) -> dict[str, Any]:
        which = "adjoint" if self.stage == "adjoint" else "forward"
        return {"implementation": "mosaic_gpu", "pass": which, **self._asdict()}

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.n, self.head_dim

    @property
    def solves(self) -> bool:
        return self.stage in EACH


def make_cells(options: argparse.Namespace) -> list[Cell]:
    cells = []
    for d in options.head_dims:
        size = (options.batch, options.heads, options.length, d)
        for stage in FIRST:
            solves = stage in EACH
            cells += [Cell(stage, FULL, t, *size) for t in (COUNTS if solves else (0,))]
            for variant in options.variants:
                for t in _VARIANT_COUNTS if solves else (0,):
                    # An online softmax has no product beside the logits.
                    online = stage == "softmax" or (stage.startswith("solve") and not t)
                    if not (online and variant in _BESIDE_LOGITS):
                        cells.append(Cell(stage, variant, t, *size))
        stage, t = _BALANCE
        for factor in _BALANCE_FACTORS:
            heads = factor * options.heads
            cells.append(Cell(stage, FULL, t, options.batch, heads, options.length, d))
    return cells


def units(stage: str, iterations: int) -> int:
    """Of a whole call."""
    return FIRST[stage] + iterations * EACH.get(stage, 0)


def flops(units: float, batch: int, heads: int, n: int, head_dim: int) -> float:
    """A causal product has half of the ``2 n^2 d`` operations of a full one."""
    return float(units) * batch * heads * n**2 * head_dim


def slope(seconds: Mapping[int, float]) -> float | None:
    """Seconds of an iteration, by least squares over the calls with at least one; None for fewer.

    Args:
      seconds: of a call, by its number of iterations.
    """
    counts = sorted(count for count in seconds if count >= 1)
    if len(counts) < 2:
        return None
    return float(np.polyfit(counts, [seconds[count] for count in counts], 1)[0])


def matmul_rate(records: Sequence[Mapping]) -> float | None:
    """Operations in a second of the plain matrix product, if it was timed."""
    found = [r for r in records if r["stage"] == "matmul" and r["status"] == "timed"]
    return found[0]["flops"] / found[0]["time_median_s"] if found else None


def amount(records: Sequence[Mapping], stage: str, variant: str, each: bool, field: str):
    """`field` of a call without iterations, or of an iteration; None if that was not timed."""
    found = {
        r["iterations"]: r[field]
        for r in records
        if (r["stage"], r["variant"], r["status"]) == (stage, variant, "timed")
    }
    return slope(found) if each else found.get(0)


def markdown(document: Mapping) -> str:
    """Provenance and tables of a result file of `hopper_stages.py`."""
    records, settings = document["records"], document["header"]["settings"]
    rate = matmul_rate(records)
    parts = [report.provenance(document)]
    if rate is not None:
        parts.append(f"Matrix product on the same card: {rate / 1e12:.0f} TFLOP/s.")
    size = settings["batch"], settings["heads"], settings["length"]
    ours = [r for r in records if r["stage"] in FIRST]
    for head_dim in sorted({r["head_dim"] for r in ours}):
        here = [r for r in ours if r["head_dim"] == head_dim]
        main = [r for r in here if (r["batch"], r["heads"], r["n"]) == size]
        if main:
            parts.append(_stages(main, head_dim, size, rate))
    if balance := _balance(ours, settings["length"]):
        parts.append(balance)
    missing = [
        f"- {r['stage']}, {r['variant']}, {r['iterations']} iterations, head dimension "
        f"{r['head_dim']}: {r['status']}: {r['reason']}"
        for r in records
        if r["status"] != "timed"
    ]
    return "\n\n".join([*parts, "\n".join(missing)] if missing else parts)


def _stages(records: Sequence[Mapping], head_dim: int, size, rate: float | None) -> str:
    rows = []
    measured = {r["variant"] for r in records}
    variants = {name: what for name, what in VARIANTS.items() if name in measured}
    for label, stage, each in _ROWS:
        seconds = amount(records, stage, FULL, each, "time_median_s")
        if seconds is None:
            continue
        reached = amount(records, stage, FULL, each, "flops") / seconds
        share = "" if rate is None else f"{reached / rate:.0%}"
        row = [label, f"{1e3 * seconds:.3f}", f"{reached / 1e12:.0f}", share]
        for variant in variants:
            less = amount(records, stage, variant, each, "time_median_s")
            row.append("" if less is None else f"{1e3 * less:.3f} ({less / seconds - 1:+.0%})")
        rows.append(row)
    batch, heads, n = size
    head = ["stage", "ms", "TFLOP/s", "of the matrix product"]
    head += [f"without {what}" for what in variants.values()]
    return (
        f"**Head dimension {head_dim}**, batch {batch}, {heads} heads, n = {n}: median ms of every "
        "stage, and when something is left out (exponentials and last product stay in the tiles on "
        f"the border of the mask, {2 / (n / 128 + 1):.0%} of all).\n\n" + report.table(head, rows)
    )


def _balance(records: Sequence[Mapping], n: int) -> str:
    """Time of a head against the number of heads, where more than one number was timed."""
    full = [r for r in records if r["variant"] == FULL and r["status"] == "timed" and r["n"] == n]
    rows = []
    for case in dict.fromkeys((r["head_dim"], r["stage"], r["iterations"]) for r in full):
        here = [r for r in full if (r["head_dim"], r["stage"], r["iterations"]) == case]
        here.sort(key=lambda r: r["batch"] * r["heads"])
        if len(here) < 2:
            continue
        head_dim, stage, iterations = case
        for r in here:
            count, seconds = r["batch"] * r["heads"], r["time_median_s"]
            rate = flops(units(stage, iterations), r["batch"], r["heads"], n, head_dim) / seconds
            rows.append(
                [
                    str(head_dim),
                    f"{stage}, {iterations} iterations",
                    str(count),
                    f"{1e3 * seconds:.3f}",
                    f"{1e6 * seconds / count:.2f}",
                    f"{rate / 1e12:.0f}",
                ]
            )
    if not rows:
        return ""
    head = ["d", "call", "batch x heads", "ms", "µs a head", "TFLOP/s"]
    return f"**Balance of load**, n = {n}.\n\n" + report.table(head, rows)
