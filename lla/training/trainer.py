"""The compiled part of training: init, steps and evaluation of one run, or of many at once.

Nothing here touches a file or waits for the device. Data are drawn from `(seed, step)` inside the
compiled steps, so a run depends on its settings alone and there is no data loader to restore.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lla.models import ModelConfig, SequenceModel
from lla.nn import weight_decay_mask
from lla.training import optimizer
from lla.training.settings import Settings
from lla.training.sharding import BATCH, make_mesh, replicated, shard_state

Sums = dict[str, tuple[jax.Array, jax.Array]]  # name: (weighted sum, weight)
VALIDATION = "validation"  # the split for early stopping and model selection
_INIT_STREAM = 0x696E6974  # separates the keys of parameters from those of the data


class RefusedError(ValueError):
    """The model does not support these settings."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "failed_at", "stopped_at", "params", "opt_state"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: int32, updates so far; one number for all runs.
      failed_at: int32, for each run the update whose loss or gradient was not finite, -1 if none.
        The run keeps the parameters and the optimiser state from before that update.
      stopped_at: int32, for each run the number of updates after which it reached its goal, -1 if
        it has not. The run keeps its parameters and optimiser state from then on.
      params: by path, such as "blocks.0.mixer.query.kernel".
      opt_state: the state of the optimiser, see `lla.training.optimizer`.
    """

    step: jax.Array
    failed_at: jax.Array
    stopped_at: jax.Array
    params: dict[str, jax.Array]
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs that are trained at once: every seed with every learning rate, axes in this order.

    Attributes:
      seeds, learning_rates: of the runs.
      one_rate: whether training ends as soon as all seeds of one learning rate have reached the
        goal, rather than all runs.
    """

    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    one_rate: bool = False


class Trainer:
    """The compiled functions that train and evaluate a model; each is compiled at its first call.

    Args:
      settings: what to train.
      mesh: the devices; None makes the mesh of `settings.sharding`.
      runs: seeds and learning rates to train at once, instead of those of `settings`. All arrays of
        state and metrics then have leading axes [seeds, learning rates]. Needs a single device.

    Raises:
      ValueError: a batch size that the mesh does not divide, or several runs on several devices.
    """

    def __init__(self, settings: Settings, mesh: Mesh | None = None, runs: Runs | None = None):
        self.settings = settings
        self.task = settings.create_task()
        self.mesh = make_mesh(settings.sharding) if mesh is None else mesh
        self.runs = runs
        self.shape = () if runs is None else (len(runs.seeds), len(runs.learning_rates))
        self.batch_size = settings.training.batch_size
        self.eval_batch_size = settings.training.eval_batch_size or self.batch_size
        if runs is not None and self.mesh.size > 1:
            raise ValueError(f"several runs at once need a mesh of one device, not {self.mesh}.")
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) % self.mesh.size:
                raise ValueError(
                    f"training.{name} must be a multiple of the {self.mesh.size} devices of the "
                    f"mesh, got {getattr(self, name)}."
                )
        micro_batches = settings.training.micro_batches
        if self.batch_size // micro_batches % self.mesh.size:
            raise ValueError(
                f"training.micro_batches ({micro_batches}) leaves parts of "
                f"{self.batch_size // micro_batches} sequences, no multiple of the "
                f"{self.mesh.size} devices of the mesh."
            )
        self.test_splits = tuple(
            split for split in self.task.splits if split not in ("train", VALIDATION)
        )
        self._alike = (VALIDATION, *filter(self._like_validation, self.test_splits))
        self.model_config = settings.model_config(self.task)
        self._graph, self._variables, spared = abstract_model(self.model_config)
        self._direction = optimizer.direction(settings.optimizer, spared)
        self._schedule = optimizer.schedule(settings.optimizer, settings.training.steps)

        placed = functools.partial(shard_state, mesh=self.mesh)
        abstract = jax.eval_shape(self._init)
        self._placement = placed(abstract) if runs is None else self._everywhere(abstract)
        everywhere = replicated(self.mesh)
        self._calls = {
            "init": jax.jit(self._init, out_shardings=self._placement),
            "advance": jax.jit(
                self._advance,
                donate_argnums=0,
                in_shardings=(self._placement, None, None),
                out_shardings=(self._placement, everywhere),
            ),
            "advance_some": jax.jit(self._advance_some, donate_argnums=0),
            "evaluate": jax.jit(self._evaluate, out_shardings=everywhere),
            "evaluate_others": jax.jit(self._evaluate_others, out_shardings=everywhere),
        }
        self.abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            self._placement,
        )

    @property
    def primary_metric(self) -> str:
        """Name of the metric for early stopping and selection, such as "validation/accuracy"."""
        return f"{VALIDATION}/{self.task.primary_metric}"

    @property
    def rates(self) -> np.ndarray:
        """The peak learning rates, float32: one number, or [learning rates] of `runs`."""
        if self.runs is None:
            return np.float32(self.settings.optimizer.learning_rate)
        return np.asarray(self.runs.learning_rates, np.float32)

    def compile(
        self, names: Sequence[str] = ("init", "advance", "evaluate", "evaluate_others")
    ) -> dict[str, jax.stages.Compiled]:
        """Compiles these functions now rather than at their first call; may run in a thread.

        Learning rates are arguments of the compiled functions: `runs` may later be replaced by runs
        with the same seeds and the same number of other rates.
        """
        given = self._arguments()
        compiled = {name: self._calls[name].lower(*given[name]).compile() for name in names}
        self._calls |= compiled
        return compiled

    def _arguments(self) -> dict[str, tuple]:
        """The arguments of the functions, as shapes and dtypes, by name of the function."""
        params = self.abstract_state.params
        count, rates = jax.ShapeDtypeStruct((), np.int32), self.rates
        rates = jax.ShapeDtypeStruct(rates.shape, rates.dtype)
        return {
            "init": (),
            "advance": (self.abstract_state, count, rates),
            "evaluate": (params, count),
            "evaluate_others": (params,),
        }

    def init(self) -> TrainState:
        """The state before the first step."""
        return self._calls["init"]()

    def advance(
        self, state: TrainState, count: np.int32, places: np.ndarray | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Makes `count` updates; donates `state`.

        Args:
          state: before the updates.
          count: number of updates.
          places: indices of the seeds of `runs` that are updated, in a program of their own, which
            is compiled at the first call with so many; all are if None.

        Returns:
          The new state, and {"sums": metrics summed over the updates, "failed_at": see
          `TrainState`}. Failed updates, and runs that have failed or stopped, add nothing to the
          sums.
        """
        if places is None:
            return self._calls["advance"](state, count, self.rates)
        return self._calls["advance_some"](state, count, self.rates, places)

    def evaluate(self, params: Mapping[str, jax.Array]) -> Sums:
        """Metrics of the validation split, named "validation/metric"."""
        return self._evaluate_like(VALIDATION, params)

    def test(self, params: Mapping[str, jax.Array]) -> Sums:
        """Metrics of the test splits, named "test/metric" and so on."""
        found = dict(self._calls["evaluate_others"](params))
        for split in self.test_splits:
            if split in self._alike:
                found |= self._evaluate_like(split, params)
        return found

    def _evaluate_like(self, split, params) -> Sums:
        sums = self._calls["evaluate"](params, np.int32(self._alike.index(split)))
        return {f"{split}/{name}": pair for name, pair in sums.items()}

    def check(self) -> None:
        """Traces a step and an evaluation, so that unsupported settings are found before any work.

        Nothing is compiled; the first calls use the same traces.

        Raises:
          RefusedError: options that do not go with each other, the sequences or the device.
        """
        given = self._arguments()
        try:
            for name in ("advance", "evaluate"):
                if not isinstance(self._calls[name], jax.stages.Compiled):
                    jax.eval_shape(self._calls[name], *given[name])
        except (NotImplementedError, ValueError) as error:
            raise RefusedError(f"mixer {self.model_config.mixer!r}: {error}") from error

    def model(self, params: Mapping[str, jax.Array]) -> SequenceModel:
        """The model with these parameters."""
        variables = {
            path: variable.replace(params[_name(path)])
            for path, variable in self._variables.items()
        }
        return nnx.merge(self._graph, nnx.from_flat_state(list(variables.items())))

    def _like_validation(self, split) -> bool:
        """Whether batches of this split have the shapes of validation batches."""

        def shapes(name):
            return jax.eval_shape(lambda: self.task.batch(0, 0, self.eval_batch_size, name))

        return shapes(split) == shapes(VALIDATION)

    def _everywhere(self, tree):
        return jax.tree.map(lambda _: replicated(self.mesh), tree)

    # The traced bodies of the public functions of the same names.

    def _init(self) -> TrainState:
        def init(seed):
            key = jax.random.fold_in(jax.random.key(seed), _INIT_STREAM)
            model = SequenceModel(self.model_config, rngs=nnx.Rngs(key))
            params = {
                _name(path): variable[...]
                for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
            }
            return params, self._direction.init(params)

        if self.runs is None:
            params, opt_state = init(jnp.uint32(self.settings.training.seed))
        else:
            rates = len(self.runs.learning_rates)
            each = jax.vmap(init)(jnp.asarray(self.runs.seeds, jnp.uint32))
            params, opt_state = jax.tree.map(
                lambda leaf: jnp.repeat(leaf[:, None], rates, axis=1), each
            )
        never = jnp.full(self.shape, -1, jnp.int32)
        return TrainState(jnp.int32(0), never, never, params, opt_state)

    def _advance(self, state: TrainState, count: jax.Array, rates: jax.Array, places=None):
        seeds = None if self.runs is None else jnp.asarray(self.runs.seeds, jnp.uint32)
        if places is not None:
            seeds = seeds[places]
        sums = jax.eval_shape(self._step, state, rates, seeds)[1]
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)

        def body(_, carry):
            state, sums = carry
            state, more = self._step(state, rates, seeds)
            return state, jax.tree.map(jnp.add, sums, more)

        state, sums = jax.lax.fori_loop(0, count, body, (state, sums))
        return state, {"sums": sums, "failed_at": state.failed_at}

    def _advance_some(self, state: TrainState, count: jax.Array, rates: jax.Array, places):
        def take(tree):
            return jax.tree.map(lambda leaf: leaf[places], tree)

        def put(tree, part):
            return jax.tree.map(lambda leaf, some: leaf.at[places].set(some), tree, part)

        def runs_of(state):
            return state.params, state.opt_state, state.failed_at, state.stopped_at

        params, opt_state, failed_at, stopped_at = take(runs_of(state))
        part = TrainState(state.step, failed_at, stopped_at, params, opt_state)
        part, metrics = self._advance(part, count, rates, places)
        params, opt_state, failed_at, stopped_at = put(runs_of(state), runs_of(part))
        state = TrainState(part.step, failed_at, stopped_at, params, opt_state)
        sums = jax.tree.map(
            lambda leaf: jnp.zeros((self.shape[0], *leaf.shape[1:]), leaf.dtype), metrics["sums"]
        )
        return state, {"sums": put(sums, metrics["sums"]), "failed_at": failed_at}

    def _evaluate(self, params, which: jax.Array) -> Sums:
        """Metrics of the split `self._alike[which]`; one program for all splits of equal shapes."""

        def draw(seed, index):
            branches = [
                functools.partial(self._batch, size=self.eval_batch_size, split=split)
                for split in self._alike
            ]
            return jax.lax.switch(which, branches, seed, index)

        return self._over_runs(draw, params)

    def _evaluate_others(self, params) -> Sums:
        found = {}
        for split in self.test_splits:
            if split not in self._alike:
                draw = functools.partial(self._batch, size=self.eval_batch_size, split=split)
                sums = self._over_runs(draw, params)
                found |= {f"{split}/{name}": pair for name, pair in sums.items()}
        return found

    def _over_runs(self, draw, params) -> Sums:
        sums = functools.partial(self._sums, draw)
        if self.runs is None:
            return sums(jnp.uint32(self.settings.training.seed), params)
        over_rates = jax.vmap(sums, in_axes=(None, 0))
        return jax.vmap(over_rates)(jnp.asarray(self.runs.seeds, jnp.uint32), params)

    def _sums(self, draw, seed, params) -> Sums:
        """Metrics of all batches of an evaluation."""

        def sums(index):
            batch = draw(seed, index)
            return self.task.metrics(self._outputs(params, batch), batch)

        def body(index, total):
            return jax.tree.map(jnp.add, total, sums(index))

        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sums, jnp.int32(0))
        )
        return jax.lax.fori_loop(0, self.settings.training.eval_batches, body, zero)

    def _step(self, state: TrainState, rates: jax.Array, seeds) -> tuple[TrainState, Sums]:
        factor = self._schedule(state.step)
        body = (state.params, state.opt_state, state.failed_at, state.stopped_at)
        update = functools.partial(self._update, state.step)
        if self.runs is None:
            seed = jnp.uint32(self.settings.training.seed)
            batch = self._batch(seed, state.step, self.batch_size, "train")
            new, sums = update(body, factor * rates, batch)
        else:
            rates = factor * rates

            def for_seed(body, seed):
                # All learning rates of a seed train on the same batch.
                batch = self._batch(seed, state.step, self.batch_size, "train")
                return jax.vmap(update, in_axes=(0, 0, None))(body, rates, batch)

            new, sums = jax.vmap(for_seed)(body, seeds)
        params, opt_state, failed_at, stopped_at = new
        return TrainState(state.step + 1, failed_at, stopped_at, params, opt_state), sums

    def _update(self, step, body, rate, batch):
        params, opt_state, failed_at, stopped_at = body
        loss, sums, gradients = self._gradients(params, batch)
        norm = _global_norm(gradients)
        direction, new_opt_state = self._direction.update(gradients, opt_state, params)
        new_params = jax.tree.map(
            lambda leaf, change: leaf - (rate * change.astype(jnp.float32)).astype(leaf.dtype),
            params,
            direction,
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        waits = (failed_at >= 0) | (stopped_at >= 0)
        going = finite & ~waits
        new_failed_at = jnp.where(finite | waits, failed_at, step)
        # A failed update is dropped, so that the state reproduces the failure. Runs that have
        # stopped are not updated either.
        new_params, new_opt_state = jax.tree.map(
            lambda new, old: jnp.where(going, new, old),
            (new_params, new_opt_state),
            (params, opt_state),
        )
        one = jnp.float32(1)
        sums |= {"gradient_norm": (norm, one), "learning_rate": (rate, one)}
        sums = jax.tree.map(lambda leaf: jnp.where(going, leaf, jnp.zeros_like(leaf)), sums)
        return (new_params, new_opt_state, new_failed_at, stopped_at), sums

    def _gradients(self, params, batch) -> tuple[jax.Array, Sums, dict[str, jax.Array]]:
        """The loss of a batch, its metrics, and the gradients of the loss."""

        def loss_of(params, batch):
            outputs = self._outputs(params, batch)
            return self.task.loss(outputs, batch), outputs

        def gradients_of(batch):
            found = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
            (loss, outputs), gradients = found
            return loss, dict(self.task.metrics(outputs, batch)), gradients

        count = self.settings.training.micro_batches
        if count == 1:
            return gradients_of(batch)

        def weighted(part):
            # A part may have fewer labels than another: the loss is a mean over the weight that
            # its metric has.
            loss, sums, gradients = gradients_of(part)
            weight = sums["loss"][1]
            gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * weight, gradients)
            return loss * weight, sums, gradients

        def add(total, part):
            return jax.tree.map(jnp.add, total, weighted(part)), None

        def parts_of(leaf):
            # Every part has sequences from all devices.
            return jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0)

        parts = jax.tree.map(parts_of, batch)
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(weighted, first)
        )
        (loss, sums, gradients), _ = jax.lax.scan(add, zero, parts)
        weight = jnp.where(sums["loss"][1] > 0, sums["loss"][1], jnp.float32(1))
        gradients = {
            path: (leaf / weight).astype(params[path].dtype) for path, leaf in gradients.items()
        }
        return loss / weight, sums, gradients

    def _batch(self, seed, index, size, split):
        batch = self.task.batch(seed, index, size, split)
        if self.mesh.size == 1:
            return batch
        place = NamedSharding(self.mesh, BATCH)
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, place), batch)

    def _outputs(self, params, batch) -> jax.Array:
        """Float32 outputs at the positions that count."""

        def forward(params, *inputs):
            return self.model(params)(*inputs)

        inputs = (batch["inputs"],)
        if "positions" in batch:
            inputs += (batch["positions"],)
        if self.mesh.size > 1:
            # Sequences are independent, and the compiler cannot partition kernels: each device runs
            # the whole model on its share of the batch and gathers parameters as needed. The loops
            # of mixers start from constants, which the check of varying values does not accept.
            forward = jax.shard_map(
                forward,
                mesh=self.mesh,
                in_specs=(PartitionSpec(), *[BATCH] * len(inputs)),
                out_specs=BATCH,
                check_vma=False,
            )
        return forward(params, *inputs).astype(jnp.float32)


def means(sums: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Weighted means in float64; NaN where the weight is zero."""
    found = {}
    for name, (total, weight) in sums.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        found[name] = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight != 0)
    return found


def abstract_model(config: ModelConfig) -> tuple[Any, dict, frozenset[str]]:
    """The abstract model: graph definition, variables by path, paths without weight decay.

    Raises:
      ValueError: options of the mixer that do not fit the model, or a mixer with variables that are
        no parameters.
    """
    model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise ValueError(f"mixer {config.mixer!r} has variables that are not parameters: {rest}.")
    variables = dict(nnx.to_flat_state(state))
    mask = nnx.to_flat_state(weight_decay_mask(state))
    spared = {_name(path) for path, decays in mask if not decays.get_value()}
    return graph, variables, frozenset(spared)


def _name(path) -> str:
    return ".".join(map(str, path))


def _global_norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in tree.values()))
