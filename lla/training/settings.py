"""The settings of a run: frozen dataclasses, their defaults, and how a config becomes one.

A config has the sections `task`, `model`, `mixers`, `optimizer`, `training`, `sharding` and
`sweep`. `mixers` holds the options of every mixer; only those of `model.mixer.name` and
`model.layers` are used and recorded, so that changing this name swaps the mixer.
"""

import copy
import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from lla import mixers, tasks
from lla.models import ModelConfig
from lla.runs.config import check_keys, check_types, from_config, plain
from lla.typed import LARGEST_SEED, conform

_LARGEST_COUNT = 2**31 - 1  # steps are int32
# Options are recorded where they differ from the defaults if they came after the first runs, whose
# directories can then still be resumed.
_LATER = {
    "model": {"layers": (), "other_mixers": {}, "remat": False},
    "optimizer": {"schedule": "cosine", "decay_fraction": 0.2},
    "training": {"micro_batches": 1},
}
_SECTIONS = ("task", "model", "mixers", "optimizer", "training", "sharding", "sweep")


@dataclasses.dataclass(frozen=True)
class Named:
    """A registered name with all its options."""

    name: str
    options: dict[str, Any]

    def record(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


@dataclasses.dataclass(frozen=True)
class Model:
    """The part of `lla.models.ModelConfig` that the task does not determine.

    `other_mixers` are those of `layers` besides `mixer`, with their options from the section
    `mixers`.
    """

    mixer: Named
    width: int = 128
    depth: int = 2
    num_heads: int = 4
    mlp_ratio: float = 0.0
    mlp_type: str = "gelu"
    mlp_multiple_of: int = 1
    positions: str = "auto"
    tie_embeddings: bool = False
    embedding_std: float | None = None
    head_bias: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    layers: tuple[str, ...] = ()
    other_mixers: tuple[Named, ...] = ()
    remat: bool = False

    @property
    def mixer_names(self) -> tuple[str, ...]:
        """All mixers of the model."""
        return (self.mixer.name, *(other.name for other in self.other_mixers))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon with a schedule of the learning rate.

    Attributes:
      name: "adamw", or "muon" for the kernels of linear maps and AdamW for the rest.
      learning_rate: the peak of the schedule.
      schedule: after the warm-up, "cosine" decays from the peak to the end; "wsd" (warm-up, stable,
        decay: arXiv 2404.06395) stays at the peak, and decays linearly at the end. Only a run with
        "wsd" can be trained further (`lla.training.extension`).
      warmup_fraction: fraction of all steps in which the rate rises linearly from 0.
      decay_fraction: fraction of all steps in which "wsd" decays.
      final_fraction: the rate after the last step, as a fraction of the peak.
      weight_decay: decoupled and multiplied by the rate; of the kernels of linear maps only.
      decay_embeddings: whether embedding tables decay as well.
      clip_norm: largest global norm of the gradients; 0 for no clipping.
      b1, b2: decay rates of the first and second moments.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self):
        _choice("optimizer.name", self.name, ("adamw", "muon"))
        _range("optimizer.learning_rate", self.learning_rate, 0.0, math.inf, open_low=True)
        _choice("optimizer.schedule", self.schedule, ("cosine", "wsd"))
        _range("optimizer.warmup_fraction", self.warmup_fraction, 0.0, 1.0)
        _range("optimizer.decay_fraction", self.decay_fraction, 0.0, 1.0)
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                "optimizer.warmup_fraction and optimizer.decay_fraction must add up to at most 1, "
                f"got {self.warmup_fraction} and {self.decay_fraction}."
            )
        _range("optimizer.final_fraction", self.final_fraction, 0.0, 1.0)
        _range("optimizer.weight_decay", self.weight_decay, 0.0, math.inf)
        _range("optimizer.clip_norm", self.clip_norm, 0.0, math.inf)
        _range("optimizer.b1", self.b1, 0.0, 1.0)
        _range("optimizer.b2", self.b2, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Training:
    """Length of training, batch sizes, and how often to evaluate, log and checkpoint.

    Attributes:
      steps: updates.
      batch_size: sequences per update, over all devices.
      micro_batches: parts of a batch whose gradients are computed one after another and added up,
        so that memory is needed for one of them; the mean is over the whole batch.
      seed: of parameters and data, below 2^32.
      log_every: steps that one record of training metrics averages over.
      eval_every: steps between evaluations; one comes before the first step, one after the last.
      eval_batches: batches per evaluation and split, the same ones every time.
      eval_batch_size: sequences per batch of an evaluation; 0 for `batch_size`.
      checkpoint_every: steps between checkpoints; one comes after the last step.
      keep_checkpoints: how many of the latest checkpoints stay.
      steps_per_call: steps per call of the compiled function; a call ends at every record.
      stop_at: value of the task's primary metric on the validation split at which training stops
        early; None for never. Each run of a sweep stops by itself.
    """

    steps: int = 1000
    batch_size: int = 64
    micro_batches: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    eval_batch_size: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    steps_per_call: int = 10
    stop_at: float | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int:
                low = 0 if field.name in ("seed", "eval_batch_size") else 1
                high = LARGEST_SEED if field.name == "seed" else _LARGEST_COUNT
                _range(f"training.{field.name}", getattr(self, field.name), low, high)
        if self.batch_size % self.micro_batches:
            raise ValueError(
                "training.batch_size must be a multiple of training.micro_batches, got "
                f"{self.batch_size} and {self.micro_batches}."
            )
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(
                    f"training.{name} must be a multiple of training.log_every, got "
                    f"{getattr(self, name)} and {self.log_every}."
                )


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Devices along the two axes of the mesh; -1, for one of them, means all that are left.

    Attributes:
      data: devices that the batch is split over, with all parameters on each.
      fsdp: devices that the batch is split over as well as parameters and optimiser state.
    """

    data: int = -1
    fsdp: int = 1

    def __post_init__(self):
        for name in ("data", "fsdp"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ValueError(f"sharding.{name} must be >= 1 or -1, got {getattr(self, name)}.")
        if self.data == self.fsdp == -1:
            raise ValueError("only one of sharding.data and sharding.fsdp may be -1.")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid of settings, and the seeds and learning rates of every point.

    Attributes:
      seeds, learning_rates: trained at once, each seed with each rate, at every point of the grid.
      selection_seeds: if given, these seeds are trained first, with all learning rates, until all
        of them have reached `training.stop_at` at one rate, or to the end. Then `seeds` are trained
        at the rate that `results.select` returns. The two sets must be disjoint.
      grid: nested like the config. Its leaves are tuples of values, and every combination is a
        point. Options of a mixer multiply the points of that mixer only.
      cases: name -> nested overrides that belong together; every case has the whole grid. Empty for
        a single case without overrides.
    """

    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = (1e-3,)
    selection_seeds: tuple[int, ...] = ()
    grid: dict[str, Any] = dataclasses.field(default_factory=dict)
    cases: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("seeds", "learning_rates"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or len(set(values)) != len(values):
                raise ValueError(f"sweep.{name} must be different values, got {values!r}.")
        for name in ("seeds", "selection_seeds"):
            for seed in getattr(self, name):
                _range(f"sweep.{name}", seed, 0, LARGEST_SEED)
        for rate in self.learning_rates:
            _range("sweep.learning_rates", rate, 0.0, math.inf, open_low=True)
        if both := set(self.seeds) & set(self.selection_seeds):
            raise ValueError(
                f"sweep.selection_seeds must be others than sweep.seeds; both have {both}."
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one run."""

    task: Named
    model: Model
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    training: Training = dataclasses.field(default_factory=Training)
    sharding: Sharding = dataclasses.field(default_factory=Sharding)

    def __post_init__(self):
        model = self.model_config(self.create_task())  # both check their options
        options = dict(model.mixer_options)
        if mixers.options(model.mixer).keys() != options.keys():
            raise ValueError(f"incomplete options of mixer {model.mixer!r}: {options}.")

    def create_task(self):
        """The task, see `lla.tasks`."""
        return tasks.create(self.task.name, **self.task.options)

    def model_config(self, task) -> ModelConfig:
        """The model for `task`."""
        fields = {
            field.name: getattr(self.model, field.name) for field in dataclasses.fields(Model)
        }
        mixer, others = fields.pop("mixer"), fields.pop("other_mixers")
        return ModelConfig(
            other_mixers={other.name: other.options for other in others},
            mixer=mixer.name,
            mixer_options=mixer.options,
            vocab_size=task.vocab_size,
            input_dim=task.input_dim,
            output_dim=task.output_dim,
            max_length=task.max_length,
            readout=getattr(task, "readout", "each"),
            **fields,
        )

    def record(self) -> dict[str, Any]:
        """The settings as plain dicts, as in `config.json`; `_LATER` says what may be missing."""
        record = dataclasses.asdict(self)
        record["task"] = self.task.record()
        record["model"]["mixer"] = self.model.mixer.record()
        record["model"]["other_mixers"] = {
            other.name: other.options for other in self.model.other_mixers
        }
        for section, names in _LATER.items():
            for name, default in names.items():
                if record[section][name] == default:
                    del record[section][name]
        return record


def defaults(task: str) -> dict[str, Any]:
    """All keys of a config of this task with their defaults, as nested dicts."""
    model = {
        field.name: field.default
        for field in dataclasses.fields(Model)
        if field.name not in ("mixer", "other_mixers")
    }
    return {
        "task": {"name": task, **tasks.options(task)},
        "model": {"mixer": {"name": "lla"}, **model},
        "mixers": {name: dict(mixers.options(name)) for name in mixers.names()},
        "optimizer": dataclasses.asdict(Optimizer()),
        "training": dataclasses.asdict(Training()),
        "sharding": dataclasses.asdict(Sharding()),
        "sweep": dataclasses.asdict(Sweep()),
    }


def resolve(config: Mapping[str, Any]) -> Settings:
    """The settings of the single run that `config` describes; the section `sweep` is ignored.

    Args:
      config: nested mappings, such as `defaults(task)`; sections and fields may be missing.

    Raises:
      ValueError: an unknown key or name (the nearest valid one is named), or an impossible value.
    """
    config = copy.deepcopy({key: plain(entry) for key, entry in config.items()})
    check_keys("config", config, _SECTIONS)
    for key, entry in config.items():
        _section(f"config.{key}", entry)
    _section("config.model.mixer", config.get("model", {}).get("mixer", {}))
    for path in ("task", "model.mixer"):
        section = config
        for key in path.split("."):
            section = section.get(key, {})
        if "name" not in section:
            raise ValueError(f"config.{path} lacks a name.")
        conform(section["name"], str, f"config.{path}.name")
    table, mixer = config.pop("mixers", {}), config["model"].pop("mixer")
    check_keys("config.model.mixer", mixer, ("name",))
    check_keys("config.mixers", table, mixers.names())
    for name, entry in table.items():
        _section(f"config.mixers.{name}", entry)
    sections = {
        name: from_config(kind, config.get(name, {}), f"config.{name}")
        for name, kind in (("optimizer", Optimizer), ("training", Training), ("sharding", Sharding))
    }
    task = config["task"].pop("name")
    fields = {field.name for field in dataclasses.fields(Model)} - {"mixer", "other_mixers"}
    check_keys("config.model", config["model"], fields)
    model = check_types("config.model", config["model"], typing.get_type_hints(Model))

    def named(name):
        path = f"config.mixers.{name}"
        return _named(mixers.registry, path, name, table.get(name, {}))

    others = [name for name in dict.fromkeys(model.get("layers", ())) if name != mixer["name"]]
    return Settings(
        task=_named(tasks.registry, "config.task", task, config["task"]),
        model=Model(
            mixer=named(mixer["name"]),
            other_mixers=tuple(map(named, others)),
            **model,
        ),
        **sections,
    )


def override(config: Mapping[str, Any], changes: Mapping[str, Any], path: str = "config") -> dict:
    """`config` with the leaves of `changes` in place of its own; both are nested mappings.

    Raises:
      ValueError: `changes` has a key that `config` lacks; the nearest one is named.
    """
    check_keys(path, changes, config)
    merged = {key: plain(entry) for key, entry in config.items()}
    for key, entry in changes.items():
        inner = isinstance(merged[key], dict)
        if inner != isinstance(entry, Mapping):
            raise ValueError(f"{path}.{key} is {'a section' if inner else 'no section'}.")
        merged[key] = override(merged[key], entry, f"{path}.{key}") if inner else plain(entry)
    return merged


def _section(path, entry) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{path} is a section, got {entry!r}.")


def _named(registry, path, name, given) -> Named:
    valid = registry.options(name)
    check_keys(path, given, valid)
    return Named(name, {**valid, **check_types(path, given, registry.option_types(name))})


def _choice(name, value, valid) -> None:
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name} is {value!r}; did you mean {near!r}? Valid: {', '.join(valid)}.")


def _range(name, value, low, high, open_low=False) -> None:
    if not low <= value <= high or (open_low and value == low) or value == math.inf:
        raise ValueError(
            f"{name} must be {'>' if open_low else '>='} {low}"
            f"{' and finite' if high == math.inf else f' and <= {high}'}, got {value}."
        )
