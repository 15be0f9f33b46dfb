"""Answers test questions, or continues a text, with a model trained by lla-train.

    lla-generate --workdir=runs/mqar
    lla-generate --workdir=runs/language_model --prompt="It was"
    python experiments/generate.py --workdir=runs/mqar             # the same

A language model prints the continuation of the prompt, drawn token by token, or that of the
beginning of the split if there is no prompt. Of the other tasks, each sequence is read at once up
to its first question, and from there token by token, with the state of the model. The answers are
compared with those of the parallel form, which reads everything at once.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from lla import generate, training
from lla.runs import command, workdir
from lla.training.checkpoint import Checkpoints
from lla.training.settings import Sharding
from lla.training.sharding import make_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run of experiments/train.py.")
_EXAMPLES = flags.DEFINE_integer("examples", 4, "Test examples to answer.", lower_bound=1)
_SPLIT = flags.DEFINE_string("split", "test", "Where they come from, such as test_long.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue, for a language model.")
_TOKENS = flags.DEFINE_integer("tokens", 100, "Tokens to draw, for a language model.", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 for the likeliest token.", 0.0)
_TOP_P = flags.DEFINE_float("top_p", None, "Probability of the tokens to draw from.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)

# Largest difference of logits, relative to their size: both forms round, TF32 products included.
_TOLERANCES = {"float64": 1e-2, "float32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}
_SHOWN = 40  # tokens of a prompt that are printed


def restore(path) -> tuple[training.Trainer, training.TrainState]:
    """Restores the run in the work directory `path` from its last checkpoint, on one device.

    Changes nothing there: the run may still be training.

    Raises:
      ValueError: no such run, or one of a sweep, or a run without a checkpoint that can be read.
    """
    if (path / "cells").is_dir():
        raise ValueError(f"{path} holds a sweep; --workdir is a directory of experiments/train.py.")
    record = workdir.read_config(path)
    if "runs" in record:
        raise ValueError(
            f"{path} is a point of a sweep, which holds several runs; --workdir is a directory of "
            "experiments/train.py."
        )
    if not isinstance(record.get("model", {}).get("mixer"), dict):
        raise ValueError(f"{path} holds another experiment than a run of experiments/train.py.")
    mixer = dict(record["model"]["mixer"])
    name = mixer.pop("name")
    others = record["model"].pop("other_mixers", {})
    record["model"]["mixer"], record["mixers"] = {"name": name}, {name: mixer, **others}
    mesh = make_mesh(Sharding(data=1, fsdp=1))
    trainer = training.Trainer(training.resolve(record), mesh)
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(trainer.abstract_state)
    if state is None:
        raise ValueError(f"{path} has no checkpoint yet.")
    return trainer, state


@nnx.jit
def in_parallel(model, batch):
    """Float32 logits ``[B, Q, vocab]`` at the questions."""
    return model(batch["inputs"], batch["positions"]).astype(jnp.float32)


@nnx.jit
def token_by_token(model, batch, first):
    """The same; `first` int ``[B]`` is the position of a sequence's first question."""
    inputs, positions = batch["inputs"], batch["positions"]
    size, length = inputs.shape
    # Sequences have their first questions at different positions, so the last steps only matter for
    # those with an early one.
    _, state = model.decode(inputs, model.init_state(size, length), first)

    def step(state, index):
        at = first + index
        token = jnp.take_along_axis(inputs, jnp.minimum(at, length - 1)[:, None], axis=1)
        logits, state = model.decode(token, state, (at < length).astype(jnp.int32))
        return state, logits[:, 0].astype(jnp.float32)

    _, logits = jax.lax.scan(step, state, jnp.arange(length, dtype=jnp.int32))
    since = jnp.maximum(positions - first[:, None], 0)
    return jnp.take_along_axis(jnp.moveaxis(logits, 0, 1), since[:, :, None], axis=1)


def continued(trainer, state, prompt: str | None, split: str) -> str:
    """A prompt and its continuation by a language model, as the flags say.

    Without a prompt it is the first quarter of the first sequence of `split`.

    Raises:
      ValueError: a prompt that leaves no room for the tokens to draw.
    """
    task, model = trainer.task, trainer.model(state.params)
    data = task.corpus
    if prompt is None:
        tokens = [int(token) for token in data.tokens[split][: max(1, task.length // 4)]]
    else:
        tokens = data.encode(prompt)
    draws = {} if _TEMPERATURE.value == 0 else {"key": jax.random.key(_SEED.value)}
    found = generate(
        model,
        jnp.asarray([tokens], jnp.int32),
        max_new_tokens=_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        eos_id=data.separator,
        pad_id=data.separator,
        **draws,
    )
    new = np.asarray(found.tokens[0, : int(found.lengths[0])])
    return data.decode([*tokens, *new])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _PROMPT.value == "":
        raise app.UsageError("--prompt is empty.")
    try:
        path = workdir.directory(_WORKDIR.value)
        trainer, state = restore(path)
        if hasattr(trainer.task, "corpus"):
            sys.stdout.write(continued(trainer, state, _PROMPT.value, _SPLIT.value) + "\n")
            return
        if _PROMPT.value is not None:
            raise ValueError(f"task {trainer.settings.task.name!r} takes no --prompt.")
        batch = trainer.task.batch(trainer.settings.training.seed, 0, _EXAMPLES.value, _SPLIT.value)
    except (ImportError, OSError, ValueError) as error:
        raise app.UsageError(str(error)) from error
    if trainer.task.vocab_size is None:
        raise app.UsageError(f"task {trainer.settings.task.name!r} has no tokens to generate.")

    asked = np.asarray(batch["weights"]) > 0
    inputs, positions, labels = (
        np.asarray(batch[name]) for name in ("inputs", "positions", "labels")
    )
    first = np.where(asked, positions, inputs.shape[1] - 1).min(axis=1)
    model = trainer.model(state.params)
    found = np.asarray(token_by_token(model, batch, jnp.asarray(first, jnp.int32)))
    expected = np.asarray(in_parallel(model, batch))
    answers = found.argmax(-1)

    for row, prompt in enumerate(inputs):
        prompt = prompt[: first[row]]
        print("prompt", *prompt[:_SHOWN], "..." if len(prompt) > _SHOWN else "")
        for at in np.argsort(positions[row]):
            if asked[row, at]:
                answer, label = answers[row, at], labels[row, at]
                wrong = "" if answer == label else f"(not {label})"
                print(f"  {inputs[row, positions[row, at]]} -> {answer}", wrong)
    correct = int((answers == labels)[asked].sum())
    print(f"step {int(state.step)}: {correct} of {int(asked.sum())} answers are right")
    difference = np.abs(found - expected)[asked].max() / np.abs(expected)[asked].max()
    equal = int((answers == expected.argmax(-1))[asked].sum())
    print(f"parallel form: {equal} answers equal, logits differ by {difference:.2g} of the largest")
    if not difference <= _TOLERANCES[trainer.model_config.dtype]:
        raise SystemExit("the two forms do not agree.")


def run() -> None:
    """The command `lla-generate`."""
    command.run(main, {"workdir": ()})


if __name__ == "__main__":
    run()
