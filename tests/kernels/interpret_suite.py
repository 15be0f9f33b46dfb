"""One case of the suite on the Hopper kernels, interpreted in a process of its own.

    python -m tests.kernels.interpret_suite SHAPE MECHANISM MASK DTYPE FILE

Pickles the fields of a `tests.ops.harness.Result` to FILE. MASK may be "none". A barrier that is
never reached blocks the interpreter for good, so that the caller has to set a time limit.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import sys
from pathlib import Path

# As in interpret.py.
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

from jax.experimental.pallas import mosaic_gpu as plgpu

from lla.ops import Backend
from lla.ops.mosaic_gpu import hopper
from tests.ops import harness, suite


def main(shape: str, mechanism: str, mask: str, dtype: str, file: str) -> None:
    attend = functools.partial(hopper.attend, interpret=plgpu.InterpretGPUParams())
    backend = Backend("mosaic_gpu_interpreted", hopper.unsupported_shape, attend)
    with harness.registered(backend):
        result = suite.evaluate(
            harness.Implementation(backend.name),
            shape,
            mechanism,
            None if mask == "none" else mask,
            dtype,
        )
    Path(file).write_bytes(pickle.dumps(tuple(result)))
    print(json.dumps({"written": file}))


if __name__ == "__main__":
    main(*sys.argv[1:])
