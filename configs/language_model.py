"""Language models on text files.

    python experiments/train.py --config=configs/language_model.py:small \\
        --config.task.files="('books',)" --workdir=runs/language_model
    python experiments/sweep.py --config=configs/language_model.py:small \\
        --config.task.files="('books',)" --workdir=runs/language_model_sweep
    python experiments/generate.py --workdir=runs/language_model --prompt="It was"

The folder `books` has `train`, `validation` and `test` in it: folders of UTF-8 text, or one file
each, such as `train.txt`. lla/tasks/README.md says more. The mixer is
`--config.model.mixer.name=gla`, its options are under `--config.mixers.gla`. The primary metric is
the validation loss in nats a token; "bits_per_byte" compares vocabularies.

Variants: `VARIANTS`, below. All of it is ours. experiments/language_model/README.md has the results
of "study", "rates" and "seeds".
"""

import pathlib

import lla.tasks
from lla import training
from lla.runs import check_variant, to_config

VARIANTS = {
    "": "30M parameters with softmax attention, 52M tokens",
    "small": "the same",
    "base": "124M parameters, 500M tokens",
    "study": "a sweep over mechanisms with as many parameters, 33M tokens of the folder `books`",
    "rates": "the same for two of them, at half and at twice the learning rate",
    "seeds": "the same for three of them, with another seed",
    "smoke": "seconds, on a few kilobytes of text of the package; the numbers mean nothing",
}


def _lla(ridge: float, **options):
    return {
        "model": {"mixer": {"name": "lla"}},
        "mixers": {"lla": {"ridge": ridge, **options}},
    }


# Parallax and Gated DeltaNet have a fifth matrix in every layer; a narrower MLP makes up for it.
STUDY = {
    "softmax": {"model": {"mixer": {"name": "softmax"}}},
    "softmax_no_qk_norm": {  # all other layers with RoPE have it
        "model": {"mixer": {"name": "softmax"}},
        "mixers": {"softmax": {"qk_norm": False}},
    },
    "lla_ridge_10": _lla(10.0),
    "parallax": {"model": {"mixer": {"name": "parallax"}, "mlp_ratio": 3.5}},
    "lla_ridge_1": _lla(1.0),
    "lla_ridge_10_one_iteration": _lla(10.0, solver_num_iters=1),
    "gated_deltanet": {"model": {"mixer": {"name": "gated_deltanet"}, "mlp_ratio": 3.5}},
    "lla_ridge_30": _lla(30.0),
    "lla_ridge_per_token": _lla(10.0, ridge_type="per_token"),
    "lla_ridge_3": _lla(3.0),
    "lla_ridge_10_two_iterations": _lla(10.0, solver_num_iters=2),
    "lla_last_half": {
        "model": {"mixer": {"name": "lla"}, "layers": ("softmax",) * 4 + ("lla",) * 4},
        "mixers": {"lla": {"ridge": 10.0}},
    },
    "hybrid": {
        "model": {
            "mixer": {"name": "lla"},
            "layers": (("gated_deltanet",) * 3 + ("lla",)) * 2,
            "mlp_ratio": 3.625,
        },
        "mixers": {"lla": {"ridge": 10.0}},
    },
    "lla_ridge_per_head": _lla(10.0, ridge_type="per_head"),
    "mesanet": {"model": {"mixer": {"name": "mesanet"}}},
}


def get_config(variant: str = ""):
    """The config; `variant` is a key of `VARIANTS`."""
    check_variant(variant, VARIANTS)
    config = to_config(training.defaults("text"))

    config.task.vocab_size = 8192
    config.task.length = 1024

    config.model.update(width=512, depth=8, num_heads=8)
    config.model.mlp_ratio = 4.0
    config.model.tie_embeddings = True
    config.model.positions = "none"  # of tokens; RoPE or the recurrence knows them
    config.model.dtype = "bfloat16"  # parameters stay in float32
    for name in ("softmax", "lla", "parallax"):
        config.mixers[name].rope_theta = 10_000.0
    # As published: without positions, with short convolutions.
    config.mixers.gated_deltanet.short_conv = config.mixers.mesanet.short_conv = 4

    config.optimizer.learning_rate = 2e-3
    config.optimizer.update(b2=0.95, final_fraction=0.1)
    config.training.update(steps=1600, batch_size=32, log_every=20, eval_every=200)
    config.training.update(eval_batches=20, eval_batch_size=32)
    config.training.update(checkpoint_every=200, steps_per_call=20)

    config.sweep.seeds = (0,)
    config.sweep.learning_rates = (1e-3, 2e-3, 4e-3)
    config.sweep.grid = {
        "model": {"mixer": {"name": ("lla", "softmax", "parallax", "gated_deltanet", "mesanet")}},
        "optimizer": {"name": ("adamw", "muon")},
        "mixers": {"lla": {"ridge": (0.3, 1.0, 3.0, 10.0, 30.0)}},
    }

    if variant in ("study", "rates", "seeds"):
        config.task.files = ("books",)
        # Evaluations read all of the validation split, and of the test split.
        config.training.update(steps=1000, log_every=25, steps_per_call=25, eval_batches=30)
        config.training.update(eval_every=250, checkpoint_every=500)
        config.sweep.learning_rates = (2e-3,)
        config.sweep.cases, config.sweep.grid = STUDY, {}
        if variant == "rates":
            config.sweep.cases = {name: STUDY[name] for name in ("softmax", "lla_ridge_10")}
            config.sweep.learning_rates = (1e-3, 4e-3)
        elif variant == "seeds":
            names = ("softmax", "lla_ridge_10", "parallax")
            config.sweep.cases = {name: STUDY[name] for name in names}
            config.sweep.seeds = (1,)
    elif variant == "base":
        config.model.update(width=768, depth=12, num_heads=12)
        config.task.vocab_size = 50_304
        config.optimizer.learning_rate = 1e-3
        config.training.update(steps=3900, batch_size=128, micro_batches=4)
        config.model.remat = True
    elif variant == "smoke":
        sample = pathlib.Path(lla.tasks.__file__).parent / "sample_text"
        config.task.files = (str(sample),)
        config.task.update(vocab_size=300, length=32)
        config.model.update(width=32, depth=2, num_heads=2, dtype="float32")
        config.training.update(steps=8, batch_size=8, log_every=2, eval_every=4)
        config.training.update(eval_batches=2, eval_batch_size=8, checkpoint_every=4)
        config.training.steps_per_call = 2
        config.sweep.seeds, config.sweep.learning_rates = (0, 1), (1e-3, 3e-3)
        config.sweep.grid.model.mixer.name = ("softmax", "lla")
        config.sweep.grid.optimizer.name = ("adamw",)
        config.sweep.grid.mixers.lla.ridge = (1.0,)
    return config.lock()
