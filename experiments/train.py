"""Trains one model on one task.

    lla-train --config=mqar:short                            # results in runs/mqar_short
    lla-train --config=mqar:short --workdir=runs/mqar        # or wherever you say
    python experiments/train.py --config=configs/mqar.py:short --workdir=runs/mqar   # the same

The same command resumes a run that was killed. Any field of the config can be overridden:
`--config.model.mixer.name=gla --config.mixers.gla.expand_k=1.0`. A run with
`--config.optimizer.schedule=wsd` goes on to more steps with `--config.training.steps=N --extend`.
What there is:

    lla-train --list                          # configs, variants, tasks, mixers
    lla-train --config=mqar:short --describe  # every field, its value and meaning
    lla-train --config=mqar:short --dry_run   # the resolved config, parameters, memory, steps
"""

import jax
from absl import app, flags
from ml_collections import config_flags

from lla import training
from lla.runs import WorkdirError, command
from lla.runs.workdir import directory
from lla.training import describe
from lla.training.extension import differs_by_length
from lla.training.unused import check_used

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Name or file of a config; `:NAME` behind it for a variant."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of results, by default runs/NAME_VARIANT; rerunning resumes."
)
_LIST = flags.DEFINE_bool("list", False, "Print configs, variants, tasks and mixers.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every field of the config, explained.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the resolved config, parameters, memory and steps; train nothing."
)
_EXTEND = flags.DEFINE_bool(
    "extend", False, "Train a run of fewer steps further, if its schedule allows that."
)
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "Calls of the compiled step to trace into WORKDIR/profile.", lower_bound=0
)
_MULTI_HOST = flags.DEFINE_bool(
    "multi_host", False, "Start JAX's distributed runtime: one process per host, one command each."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With --multi_host: HOST:PORT of process 0, where JAX finds no cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "With --coordinator: the number of processes.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator: which process this is, from 0.", lower_bound=0
)

_HOW_TO_EXTEND = "\nTo train that run further, add --extend."


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _LIST.value:
        print(*describe.catalogue(command.configs()), sep="\n")
        return
    config = _CONFIG.value.to_dict()
    try:
        describe.check_trains(config)
        settings = training.resolve(config)
        check_used(command.overrides(), settings.model.mixer_names, sweeps=False)
        if _DESCRIBE.value:
            print(*describe.lines(describe.fields(config)), sep="\n")
            return
        path = None if _DRY_RUN.value else directory(command.workdir(_WORKDIR.value))
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    _join_hosts()
    try:
        trainer = training.Trainer(settings)
        if _DRY_RUN.value:
            trainer.check()
            print(*describe.dry_run(trainer), sep="\n")
            return
    except (ImportError, OSError, ValueError, training.RefusedError) as error:
        raise app.UsageError(str(error)) from error
    try:
        result = training.train(trainer, path, profile=_PROFILE.value, extend=_EXTEND.value)
    except (WorkdirError, training.RefusedError) as error:
        hint = "" if _EXTEND.value or not differs_by_length(settings, path) else _HOW_TO_EXTEND
        raise app.UsageError(f"{error}{hint}") from error
    except training.NonFiniteError as error:
        raise SystemExit(str(error)) from error
    final, best = (_shown(result[name]) for name in ("final", "best"))
    test = "".join(f", {name} {_shown(value)}" for name, value in result["test"].items())
    print(
        f"{result['status']} at step {result['steps']}: {result['metric']} {final}, best "
        f"{best}{test}"
    )
    print(path)
    command.warn_of_smoke()


def _join_hosts():
    """Starts JAX's distributed runtime if --multi_host asks for it."""
    cluster = {
        "coordinator": _COORDINATOR.value,
        "num_processes": _NUM_PROCESSES.value,
        "process_id": _PROCESS_ID.value,
    }
    missing = [f"--{name}" for name, value in cluster.items() if value is None]
    if not _MULTI_HOST.value:
        if len(missing) < len(cluster):
            given = [f"--{name}" for name, value in cluster.items() if value is not None]
            raise app.UsageError(f"{', '.join(given)} needs --multi_host.")
        return
    if 0 < len(missing) < len(cluster):
        raise app.UsageError(f"--multi_host without a cluster also needs {', '.join(missing)}.")
    if not missing and _PROCESS_ID.value >= _NUM_PROCESSES.value:
        raise app.UsageError(
            f"--process_id={_PROCESS_ID.value} must be less than "
            f"--num_processes={_NUM_PROCESSES.value}."
        )
    try:
        jax.distributed.initialize(*cluster.values())
    except (RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise app.UsageError(
            "--multi_host found no cluster such as SLURM's; without one give "
            f"--coordinator=HOST:PORT, --num_processes and --process_id. JAX says: {told}"
            if missing
            else f"--multi_host with --coordinator={_COORDINATOR.value}: {told}"
        ) from error


def _shown(value):
    """A metric of a result; None stands for a value that is not finite."""
    return "not finite" if value is None else f"{value:.6g}"


def run() -> None:
    """The command `lla-train`."""
    command.run(main, {"config": ("list",)})


if __name__ == "__main__":
    run()
