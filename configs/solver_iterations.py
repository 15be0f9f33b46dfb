"""Error of local linear attention against the number of solver iterations and the ridge.

    python experiments/run_study.py --config=configs/solver_iterations.py \\
        --workdir=runs/solver_iterations

Time: two minutes on one CPU core, half of it for compilation.

Variants: `VARIANTS`, below.
Any field can be overridden: `--config.ridges='(1.0,)' --config.length=256`.
"""

from ml_collections import ConfigDict

from lla.runs import check_variant

VARIANTS = {
    "": "two kinds of inputs, two minutes on one CPU core",
    "smoke": "seconds; the numbers mean nothing",
    "full": "what the figure shows: clustered inputs and head dimension 128 as well",
}


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is a key of `VARIANTS`."""
    check_variant(variant, VARIANTS)
    config = ConfigDict()
    config.experiment = "solver_iterations"  # a study of experiments/run_study.py
    config.seeds = (0, 1, 2)  # of the inputs
    config.length = 512  # keys and queries; the dense reference takes time and memory of n^2 d
    config.heads = 2  # of the inputs; errors are over all
    config.settings = (("normal", 64), ("anisotropic", 64))  # inputs and head dimension
    config.dtypes = ("float32", "bfloat16")  # of query, key and value, and so of the output
    config.ridges = (10.0, 1.0, 0.1, 0.01)  # one curve each
    config.iterations = (1, 2, 4, 8, 16, 32, 64)  # of the solver, forced
    config.published_iterations = 32  # of the paper's kernels: a line in the figure

    if variant == "smoke":
        config.seeds, config.length = (0, 1), 16
        config.settings, config.ridges = (("normal", 8),), (1.0,)
        config.dtypes, config.iterations = ("bfloat16",), (1, 4)
    elif variant == "full":
        config.settings = (*config.settings, ("clustered", 64), ("normal", 128))
    return config.lock()
