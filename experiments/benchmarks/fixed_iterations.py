"""Error and time of a fixed number of solver iterations, at sizes that people train at.

    python experiments/benchmarks/fixed_iterations.py [--limit SECONDS] [--output FILE]

The kernels that `implementation="mosaic_gpu"` takes, with ridges 10 and 1 and one ridge for each
token: 1, 2 or 3 iterations in both passes, and as many as the default tolerance needs. Errors are
relative to the exact solution in float64; a fixed number is not held to the bounds of hopper.py,
which the status "refused" says. Cells, workers and options are those of portable.py.
"""

from __future__ import annotations

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from lla.experiments.benchmarks import portable

KERNELS = "mosaic_gpu"
COUNTS = (None, 1, 2, 3)  # None: the default tolerance decides
SIZES = (
    {"batch": 64, "queries": 1024, "keys": 1024, "heads": 8, "kv_heads": 8},
    {"batch": 16, "queries": 4096, "keys": 4096, "heads": 8, "kv_heads": 8},
)


def make_cells(options) -> list[portable.Cell]:
    """All cells, in the order in which they are wanted."""
    cells = []

    def add(kind, mechanism, implementation=KERNELS, count=None, **fields):
        given = () if count is None else (("num_iters", count),)
        cells.append(portable.Cell(kind, mechanism, implementation, options=given, **fields))

    problems = [
        {"ridge": ridge, "traced": traced, "count": count}
        for ridge, traced in ((10.0, False), (1.0, False), (10.0, True))
        for count in COUNTS
    ]
    for sizes in SIZES:
        for which in ("forward_backward", "forward"):
            for implementation in ("cudnn", KERNELS):
                add("speed", "softmax", implementation, which=which, **sizes)
            for problem in problems:
                add("speed", "lla", which=which, **sizes, **problem)
        if sizes is SIZES[0]:
            for problem in problems:
                add("accuracy", "lla", **problem)
    return [c for c in cells if c.kind in options.kinds and re.search(options.only, c.name())]


if __name__ == "__main__":
    sys.exit(portable.main(make_cells, "fixed_iterations"))
