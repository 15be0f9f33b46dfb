"""In-context regression, trained: predict y_t at x_t from the pairs of the segment before it.

    python experiments/train.py --config=configs/in_context_regression.py \\
        --workdir=runs/in_context_regression
    python experiments/sweep.py --config=configs/in_context_regression.py \\
        --workdir=runs/in_context_regression_sweep

The mixer is `--config.model.mixer.name=gla`, its options are under `--config.mixers.gla`. The
primary metric is the squared error against the noiseless map, where predicting zero has 1;
`lla.tasks.create("in_context_regression").baselines()` has the error of the oracle that knows the
segments.

Variants: `VARIANTS`, below. See experiments/trained_tasks.
"""

from lla import training
from lla.runs import check_variant, to_config

VARIANTS = {
    "": "10 000 updates in float32",
    "full": "the whole budget, for GPUs",
    "figure": "what experiments/in_context_regression shows until :full is trained, scaled down",
    "smoke": "seconds; the numbers mean nothing",
    "short": "an hour on two CPU cores: error 0.109 for LLA, 0.180 for softmax attention",
}


def get_config(variant: str = ""):
    """The config; `variant` is a key of `VARIANTS`."""
    check_variant(variant, VARIANTS)
    config = to_config(training.defaults("in_context_regression"))

    # See lla/tasks/in_context_regression.py. Dimensions are the paper's, the rest is ours.
    config.task.dim = 32  # of x and y
    config.task.length = 512  # pairs, two tokens each
    config.task.segment_length = 128  # pairs
    config.task.noise = 0.1

    config.model.width = 128
    config.model.depth = 2  # [paper]
    config.model.num_heads = 4
    config.model.mlp_ratio = 0.0  # none [paper]

    config.optimizer.learning_rate = 1e-3
    config.training.steps = 10_000
    config.training.batch_size = 32
    config.training.log_every = 50
    config.training.eval_every = 500
    config.training.eval_batches = 8
    config.training.eval_batch_size = 64
    config.training.checkpoint_every = 1000
    config.training.steps_per_call = 50

    config.sweep.seeds = (0, 1, 2)
    config.sweep.learning_rates = (3e-4, 1e-3, 3e-3, 1e-2)
    config.sweep.grid = {
        "model": {
            "mixer": {
                "name": (
                    "lla",
                    "softmax",
                    "mesanet",
                    "gated_deltanet",
                    "deltanet",
                    "gla",
                    "mamba",
                    "mamba2",
                    "hyena",
                )
            }
        },
        "task": {"segment_length": (32, 64, 128, 256, 512)},
    }

    if variant == "full":
        config.model.dtype = "bfloat16"  # the Hopper kernels need 16 bits
        config.training.update(steps=20_000, log_every=250, eval_every=500, checkpoint_every=2500)
        config.training.steps_per_call = 250
        # Learning rates are chosen on two seeds, results are of five others.
        config.sweep.selection_seeds, config.sweep.seeds = (0, 1), (2, 3, 4, 5, 6)
        config.sweep.grid.model.mixer.name = (
            "lla",
            "softmax",
            "parallax",
            "mesanet",
            "gated_deltanet",
            "gla",
            "mamba2",
            "mamba",
            "hyena",
        )
        # The published recipe of a mechanism first, then [ours]: no convolution, as in the paper.
        with config.sweep.unlocked():
            config.sweep.grid.mixers = {
                "mesanet": {"short_conv": (4, 0)},
                "gated_deltanet": {"short_conv": (4, 0)},
                "mamba2": {"short_conv": (4, 0)},
                "mamba": {"short_conv": (4, 0)},
                "hyena": {"short_conv": (3, 0)},
            }
        config.mixers.mesanet.tol = 1e-4  # far below bfloat16; a third fewer iterations than 1e-6
    elif variant == "figure":
        config.task.dim, config.task.length = 16, 128
        config.model.dtype = "bfloat16"  # the Hopper kernels need 16 bits
        # Same numbers as the parallel form, which moves all states through memory several times.
        config.mixers.mamba.form = "recurrent"
        config.training.update(steps=2000, log_every=100, eval_every=500, checkpoint_every=2000)
        config.training.update(eval_batches=4, steps_per_call=100)
        config.sweep.learning_rates = (1e-3, 3e-3, 1e-2)
        config.sweep.grid.model.mixer.name = (
            "lla",
            "softmax",
            "parallax",
            "mesanet",
            "gated_deltanet",
            "gla",
            "hyena",
            "mamba",
        )
        config.sweep.grid.task.segment_length = (16, 32, 64, 128)
    elif variant == "smoke":
        config.task.dim, config.task.length, config.task.segment_length = 4, 16, 8
        config.model.width, config.model.num_heads = 16, 2
        config.training.update(steps=8, batch_size=8, log_every=2, eval_every=4)
        config.training.update(eval_batches=2, eval_batch_size=8, checkpoint_every=4)
        config.training.steps_per_call = 2
        config.sweep.seeds, config.sweep.learning_rates = (0, 1), (1e-3, 3e-3)
        config.sweep.grid.model.mixer.name = ("softmax", "linear")
        config.sweep.grid.task.segment_length = (8,)
    elif variant == "short":
        config.task.dim, config.task.length, config.task.segment_length = 4, 64, 32
        config.model.width, config.model.num_heads = 64, 2
        config.training.update(steps=2000, batch_size=32, log_every=20, eval_every=200)
        config.training.update(eval_batches=4, checkpoint_every=500, steps_per_call=20)
        config.sweep.learning_rates = (3e-3,)
        config.sweep.grid.model.mixer.name = ("lla", "softmax", "parallax", "gated_deltanet")
        config.sweep.grid.task.segment_length = (32,)
    return config.lock()
