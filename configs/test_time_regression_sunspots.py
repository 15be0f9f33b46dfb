"""Test-time regression on real series: one-step-ahead prediction.

    python experiments/test_time_regression/main.py \\
        --config=configs/test_time_regression_sunspots.py --workdir=runs/sunspots

Hardware: 2 CPU cores. Time: 11 s, compilation included. Expected root mean squared error on the
sunspots: LLA 16.1, autoregression and MesaNet 16.6, softmax 20.5, DeltaNet 21.1, persistence 26.2;
on the temperature in degrees: LLA 0.475, autoregression and MesaNet 0.497, softmax 0.715.

Variants: `VARIANTS`, below.
"""

from ml_collections import ConfigDict

from lla.runs import check_variant

VARIANTS = {
    "": "two series, 11 seconds on two CPU cores",
    "smoke": "one grid point per estimator; the numbers mean nothing",
}


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is a key of `VARIANTS`."""
    check_variant(variant, VARIANTS)
    config = ConfigDict()
    config.experiment = "series"  # a study of experiments/run_study.py
    config.delays = {"sunspots": 11, "elnino": 12}  # values per embedding: about one cycle
    # Keys, an axis of every estimator's grid; see lla/tasks/series.py.
    config.embeddings = ("plain", "sphere")
    config.statistics_fraction = 0.2  # of the series: mean and deviation; no errors counted
    config.selection_fraction = 0.45  # up to here options are chosen, behind it errors reported
    config.block = {"sunspots": 22, "elnino": 24}  # time steps per block of the bootstrap
    config.resamples = 4000  # of the bootstrap

    scales, decays = (0.25, 1.0, 4.0, 16.0), (0.97, 0.99, 0.995, 0.998)
    # label: estimator and its grid, eight points on either embedding.
    config.estimators = {
        "lla": {
            "name": "lla",
            "grid": {"relative_scale": scales, "relative_ridge": (1e-4, 1e-3)},
        },
        "softmax": {
            "name": "softmax",
            "grid": {"relative_scale": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)},
        },
        "mesanet": {
            "name": "mesanet",
            "grid": {"relative_ridge": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)},
        },
        "mesanet_decay": {
            "name": "mesanet",
            "grid": {"decay": decays, "relative_ridge": (1e-2, 0.1)},
        },
        "linear_attention": {
            "name": "linear_attention",
            "grid": {"relative_rate": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)},
        },
        "gated_linear_attention": {
            "name": "gated_linear_attention",
            "grid": {"decay": decays, "relative_rate": (1.0, 3.0)},
        },
        "deltanet": {
            "name": "deltanet",
            "grid": {"beta": (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)},
        },
        "gated_deltanet": {
            "name": "gated_deltanet",
            "grid": {"decay": decays, "beta": (0.1, 0.4)},
        },
    }
    if variant == "smoke":
        for entry in config.estimators.values():
            entry.grid = {option: points[:1] for option, points in entry.grid.items()}
    return config.lock()
