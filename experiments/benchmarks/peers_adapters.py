"""Adapters of the implementations that `peers.py` compares: how to call them, in which layout."""

from __future__ import annotations

import argparse
import functools
import importlib
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lla.experiments.benchmarks import hopper, truth
from lla.experiments.benchmarks.compilation import Compiled
from lla.experiments.benchmarks.hopper_programs import Case, Program, input_shapes
from lla.experiments.benchmarks.timing import error_line

MECHANISMS = ("softmax", "parallax", "lla", "mesanet")


class Sizes(NamedTuple):
    """Sizes and dtype of a comparison."""

    batch: int
    heads: int
    n: int
    head_dim: int
    dtype: str


def pick(array: np.ndarray, heads: Sequence[tuple[int, int]]) -> np.ndarray:
    """float64 ``[len(heads), T, H]`` of ``[B, T, N, H]``; scalars are unchanged."""
    if array.ndim < 4:
        return array.astype(np.float64)
    return np.stack([array[b, :, n].astype(np.float64) for b, n in heads])


class Adapter:
    """One implementation of one mechanism, in a framework.

    Attributes:
      name: the `implementation` of its records.
      mechanism: which exact result it is compared with.
      bounds: largest relative errors of output and gradients beside which a time is given.
    """

    name: str
    mechanism: str
    bounds: tuple[float, float] = (1e-2, 1e-1)

    def available(self) -> str | None:
        """Why it cannot run here, or None."""
        raise NotImplementedError

    def prepare(self, sizes: Sizes, ridge: float | None, arrays: Mapping[str, jax.Array]) -> Any:
        """Converts arrays ``[B, T, N, H]`` to inputs of the implementation; not timed."""
        raise NotImplementedError

    def forward(self, given: Any) -> dict[str, Any]:
        """``{"output": ...}``, in the layout and framework of the implementation."""
        raise NotImplementedError

    def forward_backward(self, given: Any) -> dict[str, Any]:
        """Output and gradients of query, key, value (and probe), by those names."""
        raise NotImplementedError

    def wait(self, results: Mapping[str, Any]) -> None:
        """Waits until `results` are computed."""
        raise NotImplementedError

    def collect(self, results, sizes: Sizes, heads: Sequence[tuple[int, int]]) -> dict:
        """float64 ``[len(heads), T, H]`` of every result; `heads` are pairs (sequence, head)."""
        raise NotImplementedError

    def limits(self, sizes: Sizes, ridge: float | None) -> tuple[float, float]:
        """The bounds at one size and ridge."""
        del sizes, ridge
        return self.bounds

    def memory(self, sizes: Sizes, ridge: float | None, which: str) -> dict[str, int]:
        """The memory of a pass as fields of a record, if it is known."""
        del sizes, ridge, which
        return {}


class JaxAdapter(Adapter):
    """A call of `attend`, compiled beforehand into the mapping `compiled`."""

    def __init__(self, name: str, mechanism: str, compiled: Mapping[Program, Compiled]):
        self.name, self.mechanism, self.compiled = name, mechanism, compiled

    @property
    def ours(self) -> bool:
        return self.name != "cudnn"

    def available(self) -> str | None:
        if self.name in ("mosaic_gpu", "cudnn") and jax.default_backend() != "gpu":
            return f"needs a GPU, and JAX has the {jax.default_backend()} only"
        return None

    def program(self, sizes: Sizes, ridge: float | None, which: str) -> Program:
        shape = (sizes.batch, sizes.heads, sizes.heads, sizes.n, sizes.head_dim)
        kind = None if ridge is None else "static"
        return Program(self.name, self.mechanism, which, *shape, ridge, kind, sizes.dtype)

    def prepare(self, sizes, ridge, arrays):
        given = {}
        for which in truth.PASSES:
            program = self.program(sizes, ridge, which)
            found = self.compiled[program]
            if found.call is None:
                raise RuntimeError(found.error)
            inputs = {name: arrays[name] for name in input_shapes(program)}
            given[which] = functools.partial(found.call, inputs)
        return given

    def forward(self, given):
        return given["forward"]()

    def forward_backward(self, given):
        return given["forward_backward"]()

    def wait(self, results):
        jax.block_until_ready(results)

    def collect(self, results, sizes, heads):
        return {name: pick(np.asarray(results[name]), heads) for name in results}

    def limits(self, sizes, ridge):
        if not self.ours:
            return self.bounds
        program = self.program(sizes, ridge, "forward_backward")
        limit = hopper.bound(Case("speed", "normal", program))
        return limit, 10 * limit

    def memory(self, sizes, ridge, which):
        return self.compiled[self.program(sizes, ridge, which)].memory


class TorchAdapter(Adapter):
    """An implementation in PyTorch; a subclass has its function and layout."""

    modules: tuple[str, ...] = ()
    device = "cuda"

    def available(self) -> str | None:
        try:
            import torch

            for name in self.modules:
                importlib.import_module(name)
        except Exception as error:  # a broken installation may raise anything
            return error_line(error)
        if self.device == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no GPU"
        return None

    def attend(self, query, key, value, probe, given):
        raise NotImplementedError

    def to_layout(self, array):
        """``[B, T, N, H]`` to the implementation's layout; tensors and NumPy arrays alike."""
        return array

    def from_layout(self, array, sizes: Sizes):
        """The inverse of `to_layout`."""
        del sizes
        return array

    def prepare(self, sizes, ridge, arrays):
        import torch

        given = {"case": sizes, "ridge": ridge}
        for name, array in arrays.items():
            # As bits, because NumPy has no bfloat16 that both frameworks know.
            bits = torch.from_numpy(np.array(array).view(np.int16))
            tensor = bits.view(getattr(torch, sizes.dtype)).to(self.device)
            given[name] = self.to_layout(tensor).contiguous()
        given["names"] = ("query", "key", "value", "probe")[
            : 4 if self.mechanism == "parallax" else 3
        ]
        for name in given["names"]:
            given[name].requires_grad_()
        return given

    def _call(self, given):
        return self.attend(*(given[name] for name in ("query", "key", "value", "probe")), given)

    def forward(self, given):
        import torch

        with torch.no_grad():
            return {"output": self._call(given)}

    def forward_backward(self, given):
        import torch

        out = self._call(given)
        inputs = [given[name] for name in given["names"]]
        gradients = torch.autograd.grad(out, inputs, given["cotangent"])
        return {"output": out, **dict(zip(given["names"], gradients, strict=True))}

    def wait(self, results):
        import torch

        del results
        if self.device == "cuda":
            torch.cuda.synchronize()

    def collect(self, results, sizes, heads):
        return {
            name: pick(self.from_layout(tensor.detach(), sizes).float().cpu().numpy(), heads)
            for name, tensor in results.items()
        }


class TorchSoftmax(TorchAdapter):
    """`torch.nn.functional.scaled_dot_product_attention` with one back end forced."""

    mechanism = "softmax"
    modules = ("torch.nn.attention",)

    def __init__(self, name: str, backend: str):
        self.name, self.backend = name, backend

    def to_layout(self, array):
        return array.swapaxes(1, 2)

    def from_layout(self, array, sizes):
        return array.swapaxes(1, 2)

    def attend(self, query, key, value, probe, given):
        import torch
        from torch.nn import attention

        with attention.sdpa_kernel(getattr(attention.SDPBackend, self.backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )


class FlaParallax(TorchAdapter):
    """The Triton kernels of flash-linear-attention for Parallax; their probe is not scaled."""

    name, mechanism = "fla", "parallax"
    modules = ("fla.ops.parallax",)

    def attend(self, query, key, value, probe, given):
        from fla.ops.parallax import parallel_parallax

        return parallel_parallax(query, probe, key, value)


class FlaMesaNet(TorchAdapter):
    """The Triton kernels of flash-linear-attention for MesaNet, with 30 iterations, their default.

    They round queries and keys to float16 after normalising them.
    """

    name, mechanism = "fla", "mesanet"
    modules = ("fla.ops.mesa_net",)

    def prepare(self, sizes, ridge, arrays):
        import torch

        given = super().prepare(sizes, ridge, arrays)
        make = functools.partial(torch.full, dtype=torch.float32, device=self.device)
        rows = (sizes.batch, sizes.n, sizes.heads)
        given["constants"] = {
            "g": make(rows, 0.0), "beta": make(rows, 1.0),
            "lamb": make((sizes.heads, sizes.head_dim), 1.0),
        }  # fmt: skip
        return given

    def attend(self, query, key, value, probe, given):
        from fla.ops.mesa_net import chunk_mesa_net

        constants = given["constants"]
        return chunk_mesa_net(query, key, value, use_qk_l2norm_in_kernel=True, **constants)[0]


class FlashLLA(TorchAdapter):
    """The kernels published with arXiv 2510.01450, as they are: 32 iterations, bfloat16 only.

    The ridge goes in as float32; given as a Python number, it would be rounded to bfloat16. Its
    bounds are wide: at small ridges the error is the finding, and what is beyond even these has no
    digit right.
    """

    name, mechanism = "flash_lla", "lla"
    modules = ("flashlla",)
    bounds = (0.1, 0.5)

    def __init__(self, folder: pathlib.Path | None):
        self.folder = folder

    def available(self):
        if self.folder is None:
            return "no --flash_lla folder was given"
        path = str(self.folder.expanduser().resolve())
        if path not in sys.path:
            sys.path.insert(0, path)
        return super().available()

    def to_layout(self, array):
        batch, length, heads, head_dim = array.shape
        return array.swapaxes(1, 2).reshape(batch * heads, length, head_dim)

    def from_layout(self, array, sizes):
        return array.reshape(sizes.batch, sizes.heads, sizes.n, sizes.head_dim).swapaxes(1, 2)

    def prepare(self, sizes, ridge, arrays):
        import torch

        given = super().prepare(sizes, ridge, arrays)
        given["ridge"] = torch.tensor(ridge, dtype=torch.float32, device=self.device)
        return given

    def attend(self, query, key, value, probe, given):
        from flashlla import lla_attention

        return lla_attention(query, key, value, ridge_lambda=given["ridge"])


def make_adapters(options: argparse.Namespace, compiled: Mapping) -> list[Adapter]:
    """All adapters, the most reliable first: after an error of the device nothing else runs."""
    adapters = [JaxAdapter(options.implementation, m, compiled) for m in MECHANISMS[:3]]
    adapters += [
        JaxAdapter("cudnn", "softmax", compiled),
        TorchSoftmax("torch_flash", "FLASH_ATTENTION"),
        TorchSoftmax("torch_cudnn", "CUDNN_ATTENTION"),
        FlaParallax(),
        FlaMesaNet(),
        FlashLLA(options.flash_lla),
    ]
    unknown = set(options.only or ()) - {adapter.name for adapter in adapters}
    if unknown:
        raise SystemExit(f"--only: unknown {sorted(unknown)}")
    return [a for a in adapters if not options.only or a.name in options.only]
