"""The TPU kernels compile for v5e and v6e, within the vector memory that a kernel has by default.

Needs libtpu (``pip install "jax[tpu]"``), but no TPU:
``python -m pytest tests/kernels/test_tpu_compile_ahead.py -m slow``.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu"
    ),
]

ROOT = Path(__file__).parents[2]
VECTOR_MEMORY = 16 * 2**20  # what a kernel may use by default
TEMPORARY = 512 * 2**20  # for 65536 queries and two heads, with gradients


def test_every_program_compiles():
    command = [sys.executable, "-m", "tests.kernels.tpu_compile_ahead"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    chips = {line["chip"] for line in lines}
    programs = {(line["name"], line["chip"]) for line in lines}
    assert len(chips) > 1 and len(programs) == len(lines)
    assert programs == {(name, chip) for name, _ in programs for chip in chips}
    for line in lines:
        assert max(line["vmem_bytes"].values()) < VECTOR_MEMORY, line
        assert line["temp_bytes"] < TEMPORARY, line
