"""Every portable kernel compiles for cards since Ampere, and needs no more than the table says.

Needs the packages named in compile_portable.py, which include NVIDIA's assembler, but no GPU:
``python -m pytest tests/kernels/test_portable_compile_ahead.py -m slow``.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.kernels.subprocesses import ROOT

needs_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the kernels need JAX 0.11.2"
)

TABLE = ROOT / "experiments" / "benchmarks" / "compiled" / "portable.json"
SCRIPT = Path(__file__).parent / "compile_portable.py"
SLACK = 64  # bytes by which versions of the assembler may differ
BEFORE_HOPPER = ("8.0", "8.6", "8.9")
CARDS = (*BEFORE_HOPPER, "9.0", "10.0", "10.3", "12.0")
SMALL = ("8.6", "8.9", "12.0")  # cards without kernels for head dimension 256
KERNELS = 18


def table() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]


def budgets() -> dict[str, dict[str, int]]:
    """By kernel, the largest numbers of all cards in the table."""
    found: dict[str, dict[str, int]] = {}
    for name, numbers in table().items():
        largest = found.setdefault(name.split()[1], dict(numbers))
        largest |= {what: max(largest[what], number) for what, number in numbers.items()}
    return found


@needs_kernels
def test_the_table_has_every_kernel_and_none_is_too_large():
    from lla.kernels.mosaic_gpu_mma import configs
    from lla.kernels.mosaic_gpu_mma.launch import SHARED_MEMORY

    found = table()
    for card in CARDS:
        capability = tuple(map(int, card.split(".")))
        for head_dim in configs.HEAD_DIMS:
            kernels = [k for k in found if k.startswith(f"{card} ") and k.endswith(f"_{head_dim}")]
            fits = configs.fits(head_dim, capability)
            assert fits == (head_dim < 256 or card not in SMALL)
            assert len(kernels) == (KERNELS if fits else 0), (card, head_dim)
            for kernel in kernels:
                assert found[kernel]["registers"] <= 255
                assert found[kernel]["shared"] <= SHARED_MEMORY[capability], kernel


@needs_kernels
@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0"])
def test_shared_memory_is_that_of_the_table(capability):
    """Traces the forward kernels of the solve; the numbers of the table are those of the code."""
    command = [sys.executable, str(SCRIPT), capability, "--trace", "--only", "solve", "softmax"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(re.findall(r"^kernel (\S+ \S+)\nshared (\d+)$", done.stdout, re.MULTILINE))
    assert len(found) == (6 if capability == "8.6" else 8)
    expected = table()
    assert {k: int(v) for k, v in found.items()} == {k: expected[k]["shared"] for k in found}


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="compiling for a GPU needs jax-cuda13-plugin",
)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("capability", CARDS)
def test_budgets(capability, head_dim, tmp_path):
    if head_dim == 256 and capability in SMALL:
        pytest.skip("they do not fit")
    if capability in BEFORE_HOPPER and jax.__version_info__ < (0, 12):
        pytest.skip("before Hopper the kernels need JAX 0.12")
    written = tmp_path / "table.json"
    command = [
        sys.executable, str(SCRIPT), capability, "--head_dims", str(head_dim),
        "--table", str(written),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(written.read_text())["kernels"]
    assert len(found) == KERNELS
    allowed = budgets()
    for name, numbers in found.items():
        most = allowed[name.split()[1]]
        assert numbers["spills"] <= most["spills"] + SLACK, name
        assert numbers["shared"] <= most["shared"], name
