"""Test-time regression on synthetic data (the main job).

    python experiments/test_time_regression/main.py --config=configs/test_time_regression.py \\
        --workdir=runs/test_time_regression

Hardware: 2 CPU cores. Time: 50 to 80 s, compilation included. Expected error at dim 64 and
segment_length 256: LLA 0.169 +- 0.004, softmax 0.491, MesaNet 0.460 without and 0.177 with decay,
DeltaNet 0.372, Gated DeltaNet 0.327, oracle 0.082. A reduced grid: 64 sequences there, 16 at every
other point.

Variants: `VARIANTS`, below.
Any field can be overridden: `--config.dim=32 --config.estimators.mesanet_decay.decay=0.9`.
"""

from ml_collections import ConfigDict

from lla.runs import check_variant

VARIANTS = {
    "": "a reduced grid, 50 to 80 seconds on two CPU cores",
    "smoke": "seconds; the numbers mean nothing",
    "full": "every pair of dimension and segment length, 64 sequences each",
    "sweep": "every estimator tuned at every dimension",
    "ablation": "local weights and linear fit, one at a time",
}


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is a key of `VARIANTS`."""
    check_variant(variant, VARIANTS)
    config = ConfigDict()
    config.experiment = "test_time_regression"  # a study of experiments/run_study.py
    config.seed = 0  # of the data

    # The task, see lla/tasks/test_time_regression.py.
    config.dim = 64  # of keys, queries and values, wherever it is not scanned
    config.segment_length = 256  # pairs per segment, wherever it is not scanned
    config.length = 1024  # pairs per sequence
    config.spread = 1.0  # of keys around a segment's centre, relative to the centre's own spread
    config.noise = 0.1  # standard deviation of the values, whose signal has 1
    config.frequency = 1.0  # of the smooth target
    config.sequences = 64  # at (dim, segment_length)

    # The scans.
    config.dims = (8, 16, 32, 64)  # at segment_length; keep segment_length >= 4 dim
    config.segment_lengths = (64, 128, 256, 512, 1024)  # at dim
    config.kinds = ("iid_keys", "smooth")  # at (dim, segment_length), besides the task itself
    config.full_grid = False  # every dim with every segment length, kinds with every length
    config.scan_sequences = 16  # at every other point, other kinds included
    config.group = 16  # sequences computed at once: memory and compilation, not results
    config.position_bin = 8  # positions averaged in the record of an error by position

    # label: estimator, its options, and a grid to multiply out. Options are those of
    # lla.estimators. LLA and softmax have the bandwidth of attention (scale = 1 / sqrt(dim)),
    # MesaNet the Bayes ridge (noise^2); the rest is tuned at dim 64, segment_length 256: README.
    config.estimators = {
        "lla": {"name": "lla", "relative_scale": 1.0, "relative_ridge": 1e-3},
        "softmax": {"name": "softmax", "relative_scale": 1.0},
        "mesanet": {"name": "mesanet", "relative_ridge": 1e-2, "decay": 1.0},
        "mesanet_decay": {"name": "mesanet", "relative_ridge": 1e-2, "decay": 0.95},
        "linear_attention": {"name": "linear_attention", "relative_rate": 2.0},
        "gated_linear_attention": {
            "name": "gated_linear_attention",
            "decay": 0.95,  # per token
            "relative_rate": 2.0,
        },
        "deltanet": {"name": "deltanet", "beta": 0.75},
        "gated_deltanet": {"name": "gated_deltanet", "beta": 1.0, "decay": 0.995},
    }

    if variant == "smoke":
        config.dim, config.segment_length, config.length = 8, 32, 64
        config.dims, config.segment_lengths, config.kinds = (8,), (32, 64), ()
        config.sequences = config.scan_sequences = 2
    elif variant == "full":
        config.full_grid = True
        config.scan_sequences = 64
    elif variant == "sweep":
        config.seed = 1  # tuned on sequences that the figure does not show
        config.kinds, config.segment_lengths = (), ()
        config.sequences = config.scan_sequences = 32  # the first half selects, the rest reports
        config.estimators = sweep()
    elif variant == "ablation":
        config.kinds, config.segment_lengths = (), ()
        config.scan_sequences = 64
        # A scale of (almost) zero gives every pair the same weight: a global fit.
        config.estimators = {
            "local linear (LLA)": {"name": "lla"},
            "local constant (softmax)": {"name": "softmax"},
            "global linear": {"name": "lla", "relative_scale": 1e-6},
            "global constant": {"name": "softmax", "relative_scale": 1e-6},
        }
    return config.lock()


def sweep() -> dict:
    """Eight grid points for every estimator."""
    decays = (0.85, 0.9, 0.95, 0.98)
    return {
        "lla": {
            "name": "lla",
            "grid": {"relative_scale": (0.5, 1.0, 2.0, 4.0), "relative_ridge": (1e-4, 1e-3)},
        },
        "softmax": {
            "name": "softmax",
            "grid": {"relative_scale": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)},
        },
        "mesanet": {
            "name": "mesanet",
            "grid": {"relative_ridge": (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)},
        },
        "mesanet_decay": {
            "name": "mesanet",
            "grid": {"decay": decays, "relative_ridge": (1e-3, 1e-2)},
        },
        "linear_attention": {
            "name": "linear_attention",
            "grid": {"relative_rate": (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)},
        },
        "gated_linear_attention": {
            "name": "gated_linear_attention",
            "grid": {"decay": decays, "relative_rate": (1.0, 2.0)},
        },
        "deltanet": {
            "name": "deltanet",
            "grid": {"beta": (0.25, 0.5, 0.6, 0.75, 0.9, 1.0, 1.1, 1.25)},
        },
        "gated_deltanet": {
            "name": "gated_deltanet",
            "grid": {"decay": (0.97, 0.99, 0.995, 0.998), "beta": (0.75, 1.0)},
        },
    }
