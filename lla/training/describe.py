"""What there is to train, what the fields of a config mean, and what a run would need: as text."""

import dataclasses
import importlib
import json
import pathlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lla import docstrings, mixers, tasks
from lla.models import ModelConfig
from lla.runs.config import from_config, plain
from lla.training import sweep
from lla.training.settings import Sweep, resolve
from lla.training.trainer import Trainer, abstract_model

_WIDTH = 100


class Field(NamedTuple):
    """A field of a config: its dotted path, the value that it has, and what it means."""

    path: str
    value: Any
    meaning: str


def catalogue(configs: Mapping[str, pathlib.Path]) -> Iterator[str]:
    """Lines of text: configs and their variants, tasks and mixers.

    Args:
      configs: name -> file.
    """
    yield "Configs: --config=NAME, or --config=NAME:VARIANT"
    for name in configs:
        module = importlib.import_module(f"lla.configs.{name}")
        trains = "lla-train, lla-sweep" if is_training(module.get_config("")) else "lla-study"
        yield f"  {name}  ({trains})"
        yield from _wrapped(docstrings.first_line(module), 6)
        for variant, meaning in module.VARIANTS.items():
            yield from _wrapped(f":{variant}  {meaning}" if variant else meaning, 8)
    yield ""
    yield "Tasks: each has the config of its name (text: language_model)"
    yield from _named((name, tasks.registry.summary(name)) for name in tasks.names())
    yield ""
    yield "Mixers: --config.model.mixer.name=NAME, options --config.mixers.NAME.OPTION=VALUE"
    yield from _named((name, mixers.registry.summary(name)) for name in mixers.names())


def is_training(config: Mapping[str, Any]) -> bool:
    """Whether a config describes training rather than a study without trained parameters."""
    return "experiment" not in config


def check_trains(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a config that describes something else than training."""
    if not is_training(config):
        raise ValueError(
            f"this config is the study {config['experiment']!r}, which trains no model: use "
            "lla-study (experiments/run_study.py)."
        )


def fields(config: Mapping[str, Any]) -> list[Field]:
    """Every field of a config of training; of the mixers, those that it names.

    Raises:
      ValueError: see `resolve`.
    """
    config = {key: plain(entry) for key, entry in config.items()}
    settings = resolve(config)
    record = settings.record()
    task, model = record["task"].pop("name"), dataclasses.asdict(settings.model)
    del model["mixer"], model["other_mixers"]
    of_model = docstrings.meanings(ModelConfig)
    found = [Field("config.task.name", task, tasks.registry.summary(task))]
    found += _section("config.task", record["task"], tasks.registry.meanings(task))
    found.append(Field("config.model.mixer.name", settings.model.mixer.name, of_model["mixer"]))
    found += _section("config.model", model, of_model)
    for mixer in (settings.model.mixer, *settings.model.other_mixers):
        meanings = mixers.registry.meanings(mixer.name)
        found += _section(f"config.mixers.{mixer.name}", mixer.options, meanings)
    sections = {
        "optimizer": settings.optimizer,
        "training": settings.training,
        "sharding": settings.sharding,
        "sweep": from_config(Sweep, config.get("sweep", {}), "config.sweep"),
    }
    for name, section in sections.items():
        values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
        found += _section(f"config.{name}", values, docstrings.meanings(type(section)))
    return found


def study_fields(config: Mapping[str, Any], file: pathlib.Path) -> list[Field]:
    """Every field of the config of a study, which its file documents by comments."""
    meanings = docstrings.commented(file)
    return _section("config", {key: plain(entry) for key, entry in config.items()}, meanings)


def lines(described: Iterable[Field]) -> Iterator[str]:
    """Fields as text; a long value is cut."""
    for field in described:
        value = repr(field.value)
        head = f"{field.path} = {value}"
        yield head if len(head) <= _WIDTH else f"{head[: _WIDTH - 4]} ..."
        yield from _wrapped(field.meaning or "(not documented)", 4)


def dry_run(trainer: Trainer) -> Iterator[str]:
    """Lines of text: the resolved config, parameters, memory and steps of a run.

    Compiles an update, so that the memory is that of the program, and computes nothing.
    """
    options, settings = trainer.settings.training, trainer.settings
    yield json.dumps(settings.record(), indent=2)
    yield ""
    params = trainer.abstract_state.params
    yield f"parameters   {_count(params):,}"
    for part, inside in _parts(params).items():
        yield f"  {part:<11}{_count(inside):,}"
    state = trainer.abstract_state
    devices = trainer.mesh.size
    shared = f", {devices} devices share the batch" if devices > 1 else ""
    yield f"device       {jax.devices()[0].device_kind}{shared}"
    yield f"state        {_bytes(_size(state))}, parameters and optimiser"
    memory = trainer.compile(("advance",))["advance"].memory_analysis()
    if memory is not None:
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        yield (
            f"memory       {_bytes(total)} on each device in an update, of which "
            f"{_bytes(memory.temp_size_in_bytes)} temporary"
        )
    steps, tokens = options.steps, options.batch_size * trainer.task.max_length
    yield f"steps        {steps:,} of {options.batch_size:,} sequences, at most {tokens:,} tokens"
    evaluations = 1 + len({*range(options.eval_every, steps + 1, options.eval_every), steps})
    saved = len({*range(options.checkpoint_every, steps + 1, options.checkpoint_every), steps})
    yield f"evaluations  {evaluations:,} of {options.eval_batches} batches"
    yield f"checkpoints  {saved:,}, of which the last {options.keep_checkpoints} stay"
    if options.stop_at is not None:
        metric, mode = trainer.primary_metric, trainer.task.metric_mode
        sign = ">=" if mode == "max" else "<="
        yield f"ends early   at {metric} {sign} {options.stop_at}"


def dry_run_of_sweep(config: Mapping[str, Any]) -> Iterator[str]:
    """Lines of text: the points of a sweep with their parameters, runs and steps."""
    described, points = sweep.grid_points(config)
    grid = sweep.Grid(described, points, pathlib.Path())
    phases = grid.phases()
    runs = sum(len(phase.seeds) * len(phase.learning_rates) for phase in phases.values())
    updates = 0
    for point in points:
        settings = point.settings
        _, variables, _ = abstract_model(settings.model_config(settings.create_task()))
        count = sum(int(np.prod(leaf.shape)) for leaf in variables.values())
        steps = settings.training.steps
        yield f"{point.name}  {count:,} parameters, {runs} runs of at most {steps:,} steps"
        updates += runs * steps
    for name, phase in phases.items():
        rates = ", ".join(f"{rate:.3g}" for rate in phase.learning_rates)
        if name == "final" and described.selection_seeds:
            rates = "the selected one"
        yield f"phase {name}: seeds {', '.join(map(str, phase.seeds))}; learning rates {rates}"
    total = len(points) * runs
    yield f"{len(points)} points, {total:,} runs, at most {updates:,} updates"


def _section(path, values, meanings):
    return [Field(f"{path}.{key}", entry, meanings.get(key, "")) for key, entry in values.items()]


def _named(entries):
    for name, meaning in entries:
        yield from _wrapped(f"{name}  {meaning}", 2)


def _wrapped(text, indent):
    space = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=space, subsequent_indent=f"{space}    ")


def _parts(params):
    """The parameters by the part of the model that they belong to."""
    found: dict[str, dict] = {}
    for path, leaf in params.items():
        found.setdefault(path.partition(".")[0], {})[path] = leaf
    return found


def _count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _size(tree):
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes(size):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.3g} {unit}"
        size /= 1024
