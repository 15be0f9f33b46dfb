"""Keeping lowered kernels: within a process, and in the folder of JAX's compilation cache.

JAX's persistent cache saves compiling but not lowering, which takes as long for these kernels. If
``jax_compilation_cache_dir`` names a local folder, `jit` keeps each kernel that it lowers in
``lla-kernels`` below it, as the StableHLO of `jax.export`. A program that needs the kernel again,
in this process or in a later one, takes it from there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
from jax import export

from lla.compat import varying_axes

_FOLDER = "lla-kernels"
_CUSTOM_CALL = "mosaic_gpu_v2"  # a target that `jax.export` does not know to be stable


def jit(*static: str):
    """Decorates a function that launches kernels: `jax.jit`, and kernels that are kept.

    Args:
      *static: names of its static arguments; their ``repr`` has to tell them apart. One of them is
        ``interpret``.
    """

    def decorate(function):
        compiled = jax.jit(function, static_argnames=static)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            folder = _folder()
            if folder is None:
                return compiled(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arrays = dict(bound.arguments)
            options = tuple((name, arrays.pop(name)) for name in static)
            leaves, tree = jax.tree.flatten(arrays)
            if dict(options)["interpret"] is not None or _on_several_devices(leaves):
                return compiled(*args, **kwargs)
            types = [jax.typeof(leaf) for leaf in leaves]
            shapes = tuple((a.shape, a.dtype.name, a.weak_type) for a in types)
            kernel = _Kernel(compiled, options, tree, shapes, _environment())
            return _find(folder, kernel)(*leaves)

        return call

    return decorate


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A call of a launching function, without its arrays."""

    compiled: Any
    options: tuple[tuple[str, Any], ...]
    tree: Any
    shapes: tuple[tuple[tuple[int, ...], str, bool], ...]
    environment: str

    def run(self, *leaves):
        return self.compiled(**dict(self.options), **jax.tree.unflatten(self.tree, leaves))

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in self.shapes
        ]

    def key(self) -> str:
        function = self.compiled.__wrapped__
        name = f"{function.__module__}.{function.__qualname__}"
        text = repr((name, self.options, str(self.tree), self.shapes, self.environment))
        return hashlib.sha256(text.encode()).hexdigest()


def _folder() -> pathlib.Path | None:
    """Where lowered kernels are kept, None if they are not."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder or not jax.config.jax_enable_compilation_cache:
        return None
    return pathlib.Path(folder) / _FOLDER


def _on_several_devices(leaves) -> bool:
    """Whether a call is part of a program for several devices, which are lowered as before."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in leaves)]
    several = any(not mesh.empty and mesh.size > 1 for mesh in meshes)
    return several or bool(varying_axes(*leaves))


@functools.cache
def _sources() -> str:
    """A hash of everything in the package that a lowered kernel depends on."""
    folder = pathlib.Path(__file__).parent
    files = [*sorted(folder.rglob("*.py")), pathlib.Path(inspect.getfile(varying_axes))]
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def _environment() -> str:
    """What else a lowered kernel depends on."""
    settings = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    return repr((_sources(), jax.__version__, jaxlib.__version__, settings))


@functools.cache
def _find(folder: pathlib.Path, kernel: _Kernel):
    """A function of the arrays that calls the lowered kernel."""
    path = folder / kernel.key()
    stored = _read(path)
    if stored is None:
        stored = _lower(kernel)
        _write(path, stored)
    exported = _restore(stored, kernel)

    @jax.custom_batching.custom_vmap
    def call(*leaves):
        return exported.call(*leaves)

    @call.def_vmap
    def batched(axis_size, in_batched, *leaves):
        axes = [0 if batched else None for batched in in_batched]
        results = jax.vmap(kernel.run, axes, axis_size=axis_size)(*leaves)
        return results, jax.tree.map(lambda _: True, results)

    # Under jit, so that a program that calls a kernel several times contains it once.
    return jax.jit(call)


class _Stored(NamedTuple):
    """A lowered kernel: its module, and which of the arrays are arguments of it."""

    module: bytes
    arguments: tuple[int, ...]


def _export(function, kernel: _Kernel) -> export.Exported:
    """Lowers `function` for the arrays of `kernel`."""
    checks = [export.DisabledSafetyCheck.custom_call(_CUSTOM_CALL)]
    exporting = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
    return exporting(*kernel.arguments())


def _lower(kernel: _Kernel) -> _Stored:
    exported = _export(kernel.run, kernel)
    return _Stored(exported.mlir_module_serialized, tuple(exported.module_kept_var_idx))


def _restore(stored: _Stored, kernel: _Kernel) -> export.Exported:
    """What `_lower` exported.

    Its signature is that of a function of the same arrays and results that computes nothing. A
    kernel that was just lowered is restored as well, so that programs are the same text, hence the
    same key of JAX's cache, wherever their kernels come from.
    """
    results = jax.eval_shape(kernel.run, *kernel.arguments())

    def nothing(*leaves):
        del leaves
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), results)

    nothing.__name__ = kernel.compiled.__wrapped__.__name__  # programs show it
    return dataclasses.replace(
        _export(nothing, kernel),
        mlir_module_serialized=stored.module,
        module_kept_var_idx=stored.arguments,
    )


def _write(path: pathlib.Path, stored: _Stored) -> None:
    """Keeps a kernel and its checksum. A folder that cannot be written to is left alone."""
    checksum = hashlib.sha256(stored.module).hexdigest()
    head = json.dumps({"checksum": checksum, "arguments": stored.arguments})
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(head.encode() + b"\n" + stored.module)
        unfinished.replace(path)
    except OSError:
        pass


def _read(path: pathlib.Path) -> _Stored | None:
    """What `_write` wrote; None if it is not there or damaged."""
    try:
        head, module = path.read_bytes().split(b"\n", 1)
        head = json.loads(head)
        if head["checksum"] != hashlib.sha256(module).hexdigest():
            return None
        return _Stored(module, tuple(head["arguments"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
