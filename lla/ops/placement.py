"""Where the axes of operands and results lie on a mesh.

`DIMS` names the axes of every operand and result; nothing else here knows a single one of them. A
new operand is a new line of that table.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import PartitionSpec

# Axes behind the leading ones *B: t queries, s keys, n query heads, k key heads. Other letters are
# axes that every device needs as a whole: h the head dimension, a the keys of a mask or bias. An
# array may lack first axes or have 1 in their place where the operator broadcasts it.
DIMS: Mapping[str, str] = {
    "query": "tnh",
    "probe": "tnh",
    "key": "skh",
    "value": "skh",
    "ridge": "tn",
    "scale": "tn",
    "mask": "nta",
    "bias": "nta",
    "query_offset": "",
    "query_seq_lengths": "",
    "key_value_seq_lengths": "",
    "query_segments": "t",
    "key_segments": "s",
    "new_lengths": "",
    "cache_key": "skh",
    "cache_value": "skh",
    "cache_lengths": "",
    "out": "tnh",
    "lse": "tn",
    "iterations": "tn",
    "residual": "tn",
}
# In words, for messages.
_WORDS = {
    "h": "head dimension",
    "s": "key axis",
    "a": "key axis",
    "t": "query axis",
    "n": "heads",
    "k": "heads",
}

Axes = tuple[str, ...]
"""Names of mesh axes."""


def label(dims: str, shape: Sequence[int], leading: int, sizes: Mapping[str, int]) -> tuple:
    """The factor of every axis of an array of `shape`, None for axes that are broadcast.

    Factors are ``"b0"``, ``"b1"``, ... for leading axes and the letters of `DIMS`.

    Args:
      dims: what `DIMS` has for the array.
      shape: of the array.
      leading: number of leading axes of the call.
      sizes: of the factors.
    """
    factors = [f"b{i}" for i in range(leading)] + list(dims)
    factors = factors[len(factors) - len(shape) :]
    pairs = zip(factors, shape, strict=True)
    factors = ["t" if f == "q" and size == sizes["t"] else f for f, size in pairs]
    # With as many key heads as query heads, they are the same axis.
    factors = ["n" if f == "k" and "k" not in sizes else f for f in factors]
    return tuple(
        None if size == 1 and sizes.get(factor, 1) != 1 else factor
        for factor, size in zip(factors, shape, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Mesh axes by factor, and the sizes of all axes of the mesh.

    `keys_follow` tells whether key heads lie where their query heads do; else every device has all
    key heads and picks those of its query heads.
    """

    axes: Mapping[str, Axes]
    mesh: Mapping[str, int]
    keys_follow: bool

    def of(self, factor: str | None) -> Axes:
        """Mesh axes that a factor is split over."""
        if factor == "k":
            return self.axes.get("n", ()) if self.keys_follow else ()
        return self.axes.get(factor, ())

    def parts(self, factor: str) -> int:
        return math.prod(self.mesh[axis] for axis in self.of(factor))

    def spec(self, factors: Iterable[str | None]) -> PartitionSpec:
        entries = [self.of(factor) for factor in factors]
        return PartitionSpec(*(None if not e else e[0] if len(e) == 1 else e for e in entries))

    def axes_of(self, factors: Iterable[str | None]) -> set[str]:
        return {axis for factor in factors for axis in self.of(factor)}

    @property
    def used(self) -> set[str]:
        return {axis for axes in self.axes.values() for axis in axes}


def spec_axes(spec: PartitionSpec, ndim: int) -> tuple[Axes, ...]:
    """For every axis of an array the mesh axes that `spec` names."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )


def decide(
    operands: Sequence[tuple[str, tuple, tuple[Axes, ...]]],
    sizes: Mapping[str, int],
    mesh: Mapping[str, int],
    *,
    row_unit: int | None = 1,
    context: Axes = (),
) -> tuple[Placement, list[str]]:
    """What each device works on, and what has to be said about it.

    Batch axes, heads and queries stay where the queries have them; an axis that they leave whole
    lies where the first other operand has it split. Keys are whole on every device.

    Args:
      operands: name, factors and mesh axes by array axis; queries first.
      sizes: of the factors.
      mesh: sizes of the mesh axes.
      row_unit: the number of queries of a device has to be a multiple of it; None means that all of
        them have to be on one device.
      context: the mesh axes over which queries and keys are split on purpose.

    Returns:
      The placement and warnings.
    """
    axes: dict[str, Axes] = {"t": context, "s": context} if context else {}
    said = []
    taken: set[str] = set(context)

    def take(factor, wanted, name):
        if not wanted or factor in axes or set(wanted) & taken:
            return
        parts = math.prod(mesh[axis] for axis in wanted)
        unit = row_unit if factor == "t" else 1
        if unit is None or sizes[factor] % (parts * unit):
            if name is not None:
                said.append(_indivisible(name, factor, wanted, mesh, sizes[factor], unit))
            return
        axes[factor] = wanted
        taken.update(wanted)

    order = [*(f for f in sizes if f.startswith("b") or f[0] == "v"), "n", "t"]
    for factor in order:
        for name, factors, placed in operands:
            for own, wanted in zip(factors, placed, strict=True):
                if own == factor:
                    take(factor, wanted, name)
    for _, factors, placed in operands:
        if "k" in factors and "n" not in axes:
            take("n", placed[factors.index("k")], None)
    for name, factors, placed in operands:
        for position, (factor, where) in enumerate(zip(factors, placed, strict=True)):
            if where and factor in ("s", "h", "a", None) and (factor != "s" or where != context):
                said.append(_gathered(name, factor, position, where))
    parts = math.prod(mesh[axis] for axis in axes.get("n", ()))
    follow = "k" not in sizes or sizes["k"] % parts == 0
    return Placement(axes, dict(mesh), follow), said


def _names(axes: Axes) -> str:
    return " and ".join(repr(axis) for axis in axes)


def _gathered(name: str, factor: str | None, position: int, axes: Axes) -> str:
    what = f"{name} is sharded over the mesh axis {_names(axes)} along its "
    if factor == "s":
        return (
            f"{what}{_WORDS['s']} (axis {position}): every query needs all keys, so they are "
            f"gathered wherever the operator runs. Ask for context_axis={axes[0]!r} to split one "
            "sequence over devices, or shard batch or heads."
        )
    return (
        f"{what}{_WORDS.get(factor, 'broadcast axis')} (axis {position}), which every device needs "
        "as a whole, so it is gathered. Shard batch or heads instead."
    )


def _indivisible(name, factor, axes, mesh, size, unit) -> str:
    parts = math.prod(mesh[axis] for axis in axes)
    what = _WORDS.get(factor, "batch")
    remedy = f"Make the size a multiple of {parts * (unit or 1)}, or shard another axis."
    if unit is None:
        remedy = "Shard batch or heads instead."
    return (
        f"{name} is sharded over the mesh axis {_names(axes)} of size {parts} along its {what} of "
        f"size {size}, which cannot be split so: it is gathered. {remedy}"
    )


def warn(messages: Iterable[str]) -> None:
    """One warning for each different message."""
    for message in dict.fromkeys(messages):
        warnings.warn(message, UserWarning, stacklevel=2)
