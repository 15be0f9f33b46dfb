"""A call inside `jax.jit` over several devices, whose compiler decides where arrays lie.

JAX does not know at tracing time how the compiler will place the arrays. `custom_partitioning` asks
when it does: here the answer is that batch axes, heads and queries may lie anywhere, so that each
device runs the operator on its share. That knows no derivatives, so forward and backward pass are
two such functions around one `jax.custom_vjp`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding

from lla.ops.call import Call, run
from lla.ops.differentiation import RESIDUAL_NAMES, with_derivative
from lla.ops.handover import Handover
from lla.ops.placement import DIMS, Placement, decide, label, spec_axes, warn
from lla.ops.problem import compute_dtype

# Queries that a back end pads their number to a multiple of, in what it hands over. It can only be
# divided by the compiler if it is here.
ROW_UNITS = {"xla": 1, "mosaic_gpu": 128}

_WHOLE = Placement({}, {}, True)


@dataclasses.dataclass(frozen=True)
class _Function:
    """One of the two functions, or a `jax.vmap` of it; static.

    Attributes:
      call: what is computed.
      phase: which function.
      moving: the operands that are differentiated.
      saved: fields and axes of what the forward pass saves, see `lla.ops.handover`.
      tree: its structure.
      levels: for every `jax.vmap`, the innermost first, its size and which arguments it maps.
    """

    call: Call
    phase: Literal["forward", "backward"]
    moving: tuple[str, ...]
    saved: tuple[tuple[int, str], ...]
    tree: Any
    levels: tuple[tuple[int, tuple[bool, ...]], ...] = ()

    @property
    def hands_over(self) -> bool:
        return self.call.kind == "attend"

    @property
    def cotangents(self) -> tuple[str, ...]:
        """Results with a gradient."""
        return ("out",) if self.hands_over else ("out", "cache_key", "cache_value")

    @property
    def residuals(self) -> tuple[str, ...]:
        """Axes of what is saved, in the letters of `lla.ops.placement`."""
        return tuple(dims for _, dims in self.saved)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Axes of the arguments, behind the leading ones."""
        operands = tuple(DIMS[name] for name in self.call.names)
        if self.phase == "forward":
            return operands
        return (*operands, *self.residuals, *(DIMS[name] for name in self.cotangents))

    @property
    def results(self) -> tuple[str, ...]:
        if self.phase == "backward":
            return tuple(DIMS[name] for name in self.moving)
        return (*(DIMS[name] for name in self.call.results), *self.residuals)

    @property
    def sizes(self) -> dict[str, int]:
        mapped = {f"v{i}": size for i, (size, _) in enumerate(self.levels)}
        return dict(self.call.sizes) | mapped

    def labels(self, shapes, *, of_results: bool = False) -> list[tuple[str | None, ...]]:
        """The factors of all arguments or results."""
        found = []
        for i, (dims, shape) in enumerate(
            zip(self.results if of_results else self.arguments, shapes, strict=True)
        ):
            levels = reversed(list(enumerate(self.levels)))
            mapped = [f"v{j}" for j, (_, which) in levels if of_results or which[i]]
            inner = label(dims, shape[len(mapped) :], self.call.leading, dict(self.call.sizes))
            found.append((*mapped, *inner))
        return found

    def on_device(self, placement: Placement, labels=None):
        """The function of one device's arrays; `labels` are those of the whole arguments."""
        used = placement.axes_of(f for f in self.sizes if f[0] in "btn")
        sums = dict.fromkeys(self.moving, ())
        for name, own in zip(self.call.names, labels or (), strict=False):
            if name in sums:
                sums[name] = tuple(sorted(used - placement.axes_of(own)))
        inner = _forward_arrays if self.phase == "forward" else _backward_arrays
        inner = functools.partial(inner, self, placement, sums)
        for _, which in self.levels:
            inner = jax.vmap(inner, in_axes=tuple(0 if mapped else None for mapped in which))
        return inner


def _forward_arrays(function: _Function, placement: Placement, sums, *arrays):
    del sums
    call = function.call
    named = dict(zip(call.names, arrays, strict=True))
    leading = named["query"].shape[: call.leading]
    handover = Handover(math.prod(leading))
    with handover.active() if function.hands_over else contextlib.nullcontext():
        found = run(call, named, placement)
    saved = (a.reshape(*leading, *a.shape[1:]) for a in handover.arrays)
    return (*(found[name] for name in call.results), *saved)


def _backward_arrays(function: _Function, placement: Placement, sums, *arrays):
    """Gradients of the moving operands, summed over the mesh axes that `sums` has for them."""
    call = function.call
    count = len(call.names)
    named = dict(zip(call.names, arrays[:count], strict=True))
    residuals = arrays[count : count + len(function.residuals)]
    cotangents = arrays[count + len(function.residuals) :]
    batch = math.prod(named["query"].shape[: call.leading])
    saved = tuple(a.reshape(batch, *a.shape[call.leading :]) for a in residuals)
    handover = Handover(batch, saved, function.saved, function.tree, given=True)

    def forward(moving):
        with handover.active() if function.hands_over else contextlib.nullcontext():
            found = run(call, named | moving, placement)
        return tuple(found[name] for name in function.cotangents)

    moving = {name: named[name] for name in function.moving}
    _, pullback = jax.vjp(forward, moving)
    (gradients,) = pullback(tuple(cotangents))
    return tuple(_sum_over(gradients[name], axes) for name, axes in sums.items())


def _sum_over(gradient: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over devices, in float32 or better."""
    if not axes:
        return gradient
    wide = compute_dtype(gradient.dtype)
    return lax.psum(gradient.astype(wide), axes).astype(gradient.dtype)


# ---------------------------------------------------------------------------------------------
# What the compiler is told


def _factors(function: _Function, labels, prefix: str, links) -> list[str]:
    """Names of factors for the compiler, equal where axes have to lie alike."""
    names = []
    for i, factor in enumerate(labels):
        linked = factor is not None and factor in links
        names.append(factor if linked else f"{prefix}x{i}")
    return names


def _rule(function: _Function, mesh, arguments, results) -> SdyShardingRule:
    del mesh
    links = {f for f in function.sizes if f[0] in "bvtnk"}
    if function.call.kind == "decode" or not _may_split_rows(function):
        links.discard("t")

    def mappings(types, prefix, of_results):
        labels = function.labels([t.shape for t in types], of_results=of_results)
        return tuple(
            ArrayMapping(*_factors(function, own, f"{prefix}{i}", links))
            for i, own in enumerate(labels)
        )

    return SdyShardingRule(mappings(arguments, "a", False), mappings(results, "r", True))


def _may_split_rows(function: _Function) -> bool:
    return not any("q" in dims for dims in function.residuals) or (
        dict(function.call.sizes)["t"] % _row_unit(function) == 0
    )


def _row_unit(function: _Function) -> int | None:
    if function.call.kind == "decode":
        return None
    return ROW_UNITS.get(function.call.implementation, 1)


def _partition(function: _Function, mesh: Mesh, arguments, results):
    (arguments,) = arguments
    labels = function.labels([a.shape for a in arguments])
    if any(not isinstance(a.sharding, NamedSharding) for a in arguments):
        # Without a mesh nothing is known about the axes.
        devices = arguments[0].sharding._device_assignment
        mesh, placement = Mesh(np.array(devices), ("devices",)), _WHOLE
    else:
        names = (*function.call.names, *["saved"] * (len(labels) - len(function.call.names)))
        operands = [
            (name, own, spec_axes(a.sharding.spec, len(a.shape)))
            for name, own, a in zip(names, labels, arguments, strict=True)
        ]
        placement, said = decide(
            operands, function.sizes, dict(mesh.shape), row_unit=_row_unit(function)
        )
        if function.phase == "forward":
            warn(said)

    def place(factors):
        return NamedSharding(mesh, placement.spec(factors))

    of_results = function.labels([r.shape for r in results], of_results=True)
    inner = function.on_device(placement, labels)
    return (
        mesh,
        lambda arguments: inner(*arguments),
        tuple(place(own) for own in of_results),
        (tuple(place(own) for own in labels),),
    )


@functools.partial(custom_partitioning, static_argnums=(0,))
def _partitioned(function: _Function, arguments: tuple) -> tuple:
    return function.on_device(_WHOLE)(*arguments)


_partitioned.def_partition(_partition, sharding_rule=_rule)


def _mapped(function: _Function, arguments: tuple) -> tuple:
    """`_partitioned`, also under `jax.vmap`."""

    @jax.custom_batching.custom_vmap
    def call(*arguments):
        return _partitioned(function, arguments)

    @call.def_vmap
    def rule(size, which, *arguments):
        levels = (*function.levels, (size, tuple(which)))
        results = _mapped(dataclasses.replace(function, levels=levels), arguments)
        return results, (True,) * len(results)

    return call(*arguments)


# ---------------------------------------------------------------------------------------------
# Derivatives


def attend(call: Call, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """The results of a call by name, wherever the compiler places its arrays."""
    moving = tuple(n for n in call.names if jnp.issubdtype(arrays[n].dtype, jnp.floating))
    # Copied, which costs nothing when compiled: inside `jax.vmap` they may be NumPy arrays, which
    # JAX does not expect below.
    operands = tuple(jnp.array(arrays[name]) for name in call.names)
    shapes = tuple((a.shape, jnp.dtype(a.dtype).name) for a in operands)
    function = _Function(call, "forward", moving, *_saved_axes(call, shapes))
    results = _attend(function, operands)
    return dict(zip(call.results, results, strict=True))


@functools.lru_cache(maxsize=256)
def _saved_axes(call: Call, shapes: tuple) -> tuple:
    """Fields, axes and structure of what the forward pass of a call saves."""
    if call.kind != "attend":
        return (), None
    sizes = dict(call.sizes)
    handover = Handover(math.prod(sizes[f"b{i}"] for i in range(call.leading)))

    def forward(*arrays):
        with handover.active():
            return run(call, dict(zip(call.names, arrays, strict=True)))["out"]

    jax.eval_shape(forward, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return handover.dims, handover.tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(function: _Function, operands: tuple) -> tuple:
    return _forward(function, operands)[: len(function.call.results)]


def _attend_fwd(function: _Function, operands: tuple):
    count = len(function.call.results)
    results = _forward(function, operands)
    names = (RESIDUAL_NAMES[field] for field, _ in function.saved)
    pairs = zip(results[count:], names, strict=True)
    saved = tuple(checkpoint_name(a, name) for a, name in pairs)
    return results[:count], (operands, saved)


def _attend_bwd(function: _Function, residuals, cotangents):
    operands, saved = residuals
    backward = dataclasses.replace(function, phase="backward")
    by_name = dict(zip(function.call.results, cotangents, strict=True))
    given = tuple(by_name[name] for name in function.cotangents)
    gradients = _backward(backward, operands, saved, given)
    gradients = dict(zip(function.moving, gradients, strict=True))
    return (tuple(gradients.get(name) for name in function.call.names),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _plain(function: _Function, operands: tuple) -> tuple:
    """What `_attend` computes, by the functions that JAX differentiates further."""
    call = function.call
    found = run(call, dict(zip(call.names, operands, strict=True)))
    return tuple(found[name] for name in function.cotangents)


def _differentiable_forward(function: _Function, operands: tuple) -> tuple:
    # Not `_plain` itself: of that JAX would want a derivative in forward mode.
    found = jax.vjp(functools.partial(_plain, function), operands)[0]
    found = dict(zip(function.cotangents, found, strict=True))
    rest = (None,) * len(function.residuals)
    return (*(found.get(name) for name in function.call.results), *rest)


def _differentiable_backward(function: _Function, operands, saved, cotangents) -> tuple:
    del saved  # follows from the operands
    pullback = jax.vjp(functools.partial(_plain, function), operands)[1]
    gradients = dict(zip(function.call.names, pullback(cotangents)[0], strict=True))
    return tuple(gradients[name] for name in function.moving)


_forward = with_derivative(_mapped, _differentiable_forward)
_backward = with_derivative(
    lambda function, operands, saved, cotangents: _mapped(
        function, (*operands, *saved, *cotangents)
    ),
    _differentiable_backward,
)
