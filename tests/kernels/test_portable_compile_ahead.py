"""Every portable kernel compiles for cards since Ampere, with as few spills as in the table.

Needs the packages named in compile_portable.py, which include NVIDIA's assembler, but no GPU:
``python -m pytest tests/kernels/test_portable_compile_ahead.py -m slow``.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.kernels.subprocesses import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need JAX 0.11.2"),
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="compiling for a GPU needs jax-cuda13-plugin",
    ),
]

TABLE = ROOT / "experiments" / "benchmarks" / "compiled" / "portable.json"
SCRIPT = Path(__file__).parent / "compile_portable.py"
SLACK = 64  # bytes by which versions of the assembler may differ
BEFORE_HOPPER = ("8.0", "8.6", "8.9")
CARDS = (*BEFORE_HOPPER, "9.0", "10.0", "10.3", "12.0")


def budgets() -> dict[str, int]:
    """Bytes of spills by kernel, the largest of all cards in the table."""
    found: dict[str, int] = {}
    for name, numbers in json.loads(TABLE.read_text(encoding="utf-8"))["kernels"].items():
        kernel = name.split()[1]
        found[kernel] = max(found.get(kernel, 0), numbers["spills"])
    return found


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", CARDS)
def test_spills(capability, head_dim, tmp_path):
    if capability in BEFORE_HOPPER and jax.__version_info__ < (0, 12):
        pytest.skip("before Hopper the kernels need JAX 0.12")
    table = tmp_path / "table.json"
    command = [
        sys.executable, str(SCRIPT), capability, "--head_dims", str(head_dim),
        "--table", str(table),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(table.read_text())["kernels"]
    allowed = budgets()
    assert len(found) == 18
    spills = {name.split()[1]: numbers["spills"] for name, numbers in found.items()}
    assert {k: v for k, v in spills.items() if v > allowed[k] + SLACK} == {}
