"""Squared bias of local-constant and local-linear fits against the bandwidth, on uniform keys.

    python experiments/run_study.py --config=configs/bias_exponents.py:full \\
        --workdir=runs/bias_exponents

Time: seconds; `:full` half a minute on two CPU cores.

Variants: `VARIANTS`, below.
Any field can be overridden: `--config.seeds='(0,)' --config.replicates=16`.
"""

from ml_collections import ConfigDict

from lla.runs import check_variant

VARIANTS = {
    "": "one target, seconds",
    "smoke": "seconds; the numbers mean nothing",
    "full": "what the figure shows, half a minute: more targets, ridges and random keys",
}


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is a key of `VARIANTS`."""
    check_variant(variant, VARIANTS)
    config = ConfigDict()
    config.experiment = "bias_exponents"  # a study of experiments/run_study.py

    # Exact integrals: target, dimension, ridge. A ridge (factor, power): factor * bandwidth^power.
    config.settings = (("sine", 1, (0.0, 0)),)
    config.bandwidths = tuple(2e-4 * 10 ** (i / 8) for i in range(25))  # of the integrals
    config.fit_ranges = ((2e-4, 2e-3), (2e-3, 2e-2), (2e-2, 2e-1))  # bandwidths of an exponent

    # The operators of `lla` on an equidistant grid of keys on an arc of length 1.
    config.operator_target = "sine"  # the target of the operators
    config.operator_circles = ((100.0, (0.01, 4)),)  # radius of the circle of keys, and ridge
    config.operator_keys = 16384  # keys on the arc
    config.operator_bandwidths = tuple(2e-3 * 10 ** (i / 4) for i in range(9))  # of the operators
    config.operator_range = (2e-3, 2e-2)  # bandwidths that the operators' exponent is fitted to

    # The same on random keys: a band over seeds, each the statistics of `replicates` data sets.
    config.seeds = ()  # of the random keys; none leaves them out
    config.sample_keys = 4096  # random keys of a data set
    config.replicates = 64  # data sets of a seed
    config.noise = 0.1  # standard deviation of the noise of the values at random keys
    config.sample_circle = (100.0, (0.01, 4))  # radius of the circle of random keys, and ridge
    config.sample_bandwidths = tuple(1e-2 * 10 ** (i / 8) for i in range(9))  # for random keys

    if variant == "smoke":
        config.bandwidths = tuple(2e-3 * 10 ** (i / 2) for i in range(5))
        config.fit_ranges = ((2e-3, 2e-2), (2e-2, 2e-1))
        config.operator_keys, config.operator_bandwidths = 512, (0.1, 0.2)
        config.operator_range = (0.1, 0.2)
        config.seeds, config.sample_keys, config.replicates = (0,), 64, 4
        config.sample_bandwidths = (0.1, 0.2)
    elif variant == "full":
        exact = (0.0, 0)
        others = (("exponential", 1, exact), ("rational", 1, exact), ("flat_ends", 1, exact))
        dims = (("sine", 2, exact), ("sine", 3, exact))
        ridges = (("sine", 1, (1e-4, 0)), ("sine", 1, (0.1, 2)), ("sine", 1, (0.1, 3)))
        config.settings = (*config.settings, *others, *dims, *ridges)
        config.operator_circles = (*config.operator_circles, (1.0, (1e-6, 4)))
        config.seeds = (0, 1, 2)
    return config.lock()
