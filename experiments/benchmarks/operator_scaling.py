"""Time and memory of the operator against the sequence length; see README.md beside this file.

    python experiments/benchmarks/operator_scaling.py [--max_length N] [--repeats R] [--output FILE]

Every implementation is compared with the exact result in float64 before it is timed, and not timed
if it is wrong; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import measure
import report
import subjects
from subjects import SUBJECTS

NAMES = ("reference", "xla_cg", "xla_direct", "xla_softmax", "jax_softmax")
KEY_FIELDS = ("implementation", "pass", "n", "head_dim")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--min_length", type=int, default=256)
    add("--max_length", type=int, default=8192, help="lengths are min_length times powers of two")
    add("--head_dims", type=int, nargs="+", default=[64])
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=4)
    add("--ridge", type=float, default=1.0)
    add("--implementations", nargs="+", choices=NAMES, default=list(NAMES))
    add("--repeats", type=int, default=9)
    add("--budget", type=float, default=20.0, help="seconds for the repeats of one cell")
    add("--memory_limit_gib", type=float, default=6.0, help="compiled only beyond this, not run")
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, help="default: results/operator_scaling_<platform>.json")
    add("--resume", action="store_true", help="keep finished cells, whatever code they measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = options.output
    if output is None:
        output = measure.RESULTS / f"operator_scaling_{jax.default_backend()}.json"
    settings = {
        name: getattr(options, name)
        for name in ("batch", "heads", "ridge", "repeats", "budget", "memory_limit_gib", "seed")
    }
    header = measure.make_header("operator_scaling", {**settings, "dtype": "float32"})
    results = measure.Results(output, header, KEY_FIELDS, options.resume)
    for head_dim in options.head_dims:
        length = options.min_length
        while length <= options.max_length:
            run_length(options, results, head_dim, length)
            length *= 2
    print(report.scaling_markdown(results.document()))
    refused = [record for record in results.records if record["status"] == "refused"]
    for record in refused:
        where = ", ".join(f"{name}={record[name]}" for name in KEY_FIELDS)
        print(f"not timed: {where}: {record['reason']}", file=sys.stderr)
    return 1 if refused else 0


def run_length(options, results: measure.Results, head_dim: int, length: int) -> None:
    """Both passes of all implementations at one length."""
    cells = {}
    for which in subjects.PASSES:
        for name in options.implementations:
            cell = {"implementation": name, "pass": which, "n": length, "head_dim": head_dim}
            if not results.finished(**cell):
                cells[which, name] = cell
    if not cells:
        return
    inputs = subjects.with_ridge(
        subjects.normal_inputs(
            options.batch, length, options.heads, head_dim, jnp.float32, options.seed
        ),
        options.ridge,
    )
    limit = options.memory_limit_gib * measure.GIB
    compiled, records = {}, []
    for (which, name), cell in cells.items():
        call, memory = subjects.compile_call(SUBJECTS[name], which, inputs)
        if memory["temp_bytes"] <= limit:
            compiled[which, name] = call, memory
            continue
        reason = f"temporary memory exceeds {options.memory_limit_gib:g} GiB"
        records.append({**cell, **memory, "status": "memory only", "reason": reason})
    members = {SUBJECTS[name].member for _, name in compiled}
    truths = {member: subjects.exact(member, inputs) for member in sorted(members)}
    for which in subjects.PASSES:
        chosen = {name: cells[w, name] for w, name in compiled if w == which}
        records += subjects.measure_group(
            chosen, SUBJECTS, inputs, truths, {name: compiled[which, name] for name in chosen},
            ridge=options.ridge, repeats=options.repeats, budget=options.budget,
        )  # fmt: skip
        load = os.getloadavg()[0]
        results.add([{**record, "load_average": round(load, 2)} for record in records])
        for record in records:
            print(report.progress_line(record, KEY_FIELDS), file=sys.stderr, flush=True)
        records = []


if __name__ == "__main__":
    sys.exit(main())
