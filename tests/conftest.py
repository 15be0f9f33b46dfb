"""Settings of every test: where JAX runs, how strict it is, and how float64 is reached."""

import atexit
import functools
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Read when a CPU back end starts, so before anything imports jax. A setting of the caller stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
HOST_DEVICES = "--xla_force_host_platform_device_count"
if HOST_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HOST_DEVICES}=8".strip()

# Compiling is most of what the tests cost. Without LLVM's optimisations, and with the emitters that
# JAX 0.10 can still choose, it takes a third of the time. The accuracy tests compile as users do,
# by `tests.ops.harness.OPTIMISED`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
EMITTERS = "xla_cpu_use_fusion_emitters"
if (
    importlib.metadata.version("jax").startswith("0.10.")
    and EMITTERS not in os.environ["XLA_FLAGS"]
):
    os.environ["XLA_FLAGS"] += f" --{EMITTERS}=false"

# NumPy's and SciPy's BLAS start a thread per core in every process of `pytest -n`. XLA's own pool
# is left as users have it: measured with two processes on two cores, it costs nothing.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, str(max(1, (os.cpu_count() or 1) // processes)))

# Token files of the task text, for the processes that tests start as well.
if "LLA_TEXT_CACHE" not in os.environ:
    cache = tempfile.mkdtemp(prefix="lla_text_")
    os.environ["LLA_TEXT_CACHE"] = cache
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

# Library code must promote neither dtypes nor ranks implicitly. A test of someone else's code that
# does opts out with `jax.numpy_dtype_promotion("standard")` around that code alone.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def float64():
    """A context manager under which JAX computes in float64: `with float64(): ...`.

    For references only: arrays made inside are float64 where their dtype is not given, and results
    have to leave as NumPy arrays, because outside JAX would cast them down at the next operation.
    """
    return functools.partial(jax.enable_x64, True)


# Every compiled program has memory maps of its own, of which Linux grants a process 65530 by
# default; beyond, compiling ends in a segmentation fault.
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Frees them after a module once there are many."""
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
