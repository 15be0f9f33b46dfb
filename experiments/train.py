"""Trains one model on one task.

    python experiments/train.py --config=configs/mqar.py --workdir=runs/mqar

The same command resumes a run that was killed. Any field of the config can be overridden:
`--config.model.mixer.name=gla --config.mixers.gla.expand_k=1.0`.
"""

import jax
from absl import app, flags
from ml_collections import config_flags

from lla import training
from lla.runs import WorkdirError, command
from lla.runs.workdir import directory
from lla.training.unused import check_used

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `:argument` for a variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; rerunning resumes.")
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "Calls of the compiled step to trace into WORKDIR/profile.", lower_bound=0
)
_MULTI_HOST = flags.DEFINE_bool(
    "multi_host", False, "Start JAX's distributed runtime: one process per host, one command each."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        settings = training.resolve(_CONFIG.value.to_dict())
        check_used(command.overrides(), [settings.model.mixer.name], sweeps=False)
        path = directory(_WORKDIR.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if _MULTI_HOST.value:
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise app.UsageError(
                f"--multi_host needs a cluster that JAX can find, such as SLURM's: {error}"
            ) from error
    try:
        trainer = training.Trainer(settings)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    try:
        result = training.train(trainer, path, profile=_PROFILE.value)
    except (WorkdirError, training.RefusedError) as error:
        raise app.UsageError(str(error)) from error
    except training.NonFiniteError as error:
        raise SystemExit(str(error)) from error
    final, best = (_shown(result[name]) for name in ("final", "best"))
    test = "".join(f", {name} {_shown(value)}" for name, value in result["test"].items())
    print(
        f"{result['status']} at step {result['steps']}: {result['headline']} {final}, best "
        f"{best}{test}"
    )


def _shown(value):
    """A metric of a result; None stands for a value that is not finite."""
    return "not finite" if value is None else f"{value:.6g}"


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
