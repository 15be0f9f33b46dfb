"""MAD: six small tasks on tokens, with the benchmark's training (arXiv 2403.17844, athms/mad-lab).

    python experiments/train.py --config=configs/mad.py --workdir=runs/mad \\
        --config.task.kind=compression
    python experiments/sweep.py --config=configs/mad.py --workdir=runs/mad_sweep

The task is `--config.task.kind`, the mixer `--config.model.mixer.name`, its options are under
`--config.mixers`. The primary metric is the benchmark's accuracy, averaged over classes. The sweep
has the six tasks in their baseline setting for softmax attention, Parallax and LLA, each with both
weight decays: 36 points, of which each trains three learning rates with two seeds at once. A point
takes 20 000 updates (200 epochs), of memorization 400.

Variants: `VARIANTS`, below.
"""

from lla import training
from lla.runs import check_variant, to_config
from lla.tasks.mad import BASELINES, KINDS

EPOCHS, BATCH = 200, 128
# What the benchmark departs to from each baseline setting, one option at a time.
_SIZES = {"vocab_size": (32, 64, 128), "train_examples": (6400, 3200, 1600, 800)}
_LONG = {"length": (256, 512, 1024)}
LEVELS = {
    "in_context_recall": {**_SIZES, **_LONG},
    "noisy_in_context_recall": {
        **_SIZES, **_LONG, "vocab_size": (48, 80, 144), "noise": (0.4, 0.6, 0.8)
    },
    "fuzzy_in_context_recall": {**_SIZES, **_LONG},
    "selective_copying": {**_SIZES, "length": (512, 1024), "copied": (32, 64, 96)},
    "compression": {**_SIZES, "length": (64, 128, 256)},
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}  # fmt: skip

VARIANTS = {
    "": "the six tasks in their baseline setting",
    "full": "the same",
    "two_heads": "two heads of 64 instead of sixteen of 8, and the recurrent mechanisms as well",
    "protocol": "all 66 settings of the benchmark, over which its scores are averaged; one seed",
    "smoke": "seconds; the numbers mean nothing",
}


def get_config(variant: str = ""):
    """The config; `variant` is a key of `VARIANTS`."""
    check_variant(variant, VARIANTS)
    config = to_config(training.defaults("mad"))

    # See lla/tasks/mad.py: None is the benchmark's baseline setting of the kind. The benchmark's
    # values where nothing else is said.
    config.task.kind = "in_context_recall"

    # Mixer, SwiGLU, mixer, SwiGLU: the benchmark counts four layers.
    config.model.width = 128
    config.model.depth = 2
    config.model.num_heads = 16
    config.model.mlp_type = "swiglu"
    config.model.mlp_ratio = 8 / 3
    config.model.mlp_multiple_of = 16
    config.model.positions = "none"
    config.model.embedding_std = 0.02
    config.model.head_bias = True
    config.model.dtype = "bfloat16"
    for name in ("softmax", "parallax", "lla"):
        config.mixers[name].rope_theta = 10_000.0
    for name in ("softmax", "parallax"):
        config.mixers[name].qk_norm = False
    config.mixers.gla.expand_k = 1.0
    config.mixers.mamba.update(state_size=4, short_conv=4, form="recurrent")
    config.mixers.hyena.short_conv = 3
    for name in ("mamba2", "deltanet", "gated_deltanet", "mesanet"):
        config.mixers[name].short_conv = 4
    config.mixers.mesanet.tol = 1e-4  # [ours], far below bfloat16

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.final_fraction = 2e-3  # [ours] 1e-6 at the middle one of the learning rates
    config.optimizer.weight_decay = 0.0
    config.optimizer.decay_embeddings = True
    config.optimizer.clip_norm = 0.0
    config.training.batch_size = BATCH
    config.training.eval_batch_size = BATCH
    config.training.eval_batches = 10  # all test examples, once
    config.training.stop_at = 0.999
    config.training.update(**_schedule("in_context_recall", {}))

    config.sweep.seeds = (0, 1)  # [ours]
    config.sweep.learning_rates = (1e-4, 5e-4, 1e-3)
    config.sweep.cases = {kind: _case(kind, {}) for kind in KINDS}
    config.sweep.grid = {
        "model": {"mixer": {"name": ("softmax", "parallax", "lla")}, "num_heads": (16,)},
        "optimizer": {"weight_decay": (0.0, 0.1)},
    }

    if variant == "two_heads":
        config.model.num_heads, config.sweep.grid.model.num_heads = 2, (2,)
        config.sweep.grid.model.mixer.name = (
            "softmax",
            "parallax",
            "lla",
            "mesanet",
            "gated_deltanet",
            "deltanet",
            "gla",
            "mamba",
            "mamba2",
            "hyena",
        )
    elif variant == "protocol":
        config.sweep.seeds = (0,)  # the benchmark has one, too
        with config.sweep.unlocked():
            config.sweep.cases = {
                **{kind: _case(kind, {}) for kind in KINDS},
                **{
                    f"{kind}_{option}_{value}".replace(".", "_"): _case(kind, {option: value})
                    for kind, levels in LEVELS.items()
                    for option, values in levels.items()
                    for value in values
                },
            }
    elif variant == "smoke":
        config.task.update(length=16, train_examples=64, test_examples=16, macro_batch=8)
        config.model.update(width=16, num_heads=2, dtype="float32")
        config.sweep.grid.model.num_heads = (2,)
        config.training.update(steps=8, batch_size=8, log_every=2, eval_every=4)
        config.training.update(eval_batches=2, eval_batch_size=8, checkpoint_every=4)
        config.training.steps_per_call = 2
        config.sweep.learning_rates = (1e-3, 3e-3)
        config.sweep.grid.model.mixer.name = ("softmax",)
        config.sweep.grid.optimizer.weight_decay = (0.0,)
        with config.sweep.unlocked():
            config.sweep.cases = {
                kind: {"task": {"kind": kind}} for kind in ("in_context_recall", "compression")
            }
    return config.lock()


def _case(kind: str, level: dict) -> dict:
    """Overrides for a kind of task with the options `level` away from the baseline."""
    return {"task": {"kind": kind, **level}, "training": _schedule(kind, level)}


def _schedule(kind: str, level: dict) -> dict:
    """Updates of `EPOCHS` epochs, and how often there are records."""
    examples = {**BASELINES[kind], **level}["train_examples"]
    steps = EPOCHS * examples // BATCH
    short = steps < 1000
    return {
        "steps": steps,
        "log_every": 20 if short else 100,
        "eval_every": 100 if short else 500,
        "checkpoint_every": 200 if short else 2500,
        "steps_per_call": 20 if short else 100,
    }
