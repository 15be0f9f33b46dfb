"""The TPU kernels compile for v5e and v6e, in the vector memory that a kernel has by default.

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
VECTOR_MEMORY = 16 * 2**20  # what a kernel may use on the smallest of the chips unless it asks
TEMPORARY = 512 * 2**20  # of 65536 queries, two heads, with gradients


def test_every_program_compiles():
    command = [sys.executable, "-m", "tests.kernels.tpu_compile_ahead"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 30 and len({(line["name"], line["chip"]) for line in lines}) == 30
    for line in lines:
        kernels = 1 if line["name"] == "lla_decoding" else 3
        assert len(line["vmem_bytes"]) == kernels, line
        assert max(line["vmem_bytes"].values()) < VECTOR_MEMORY, line
        assert line["temp_bytes"] < TEMPORARY, line
