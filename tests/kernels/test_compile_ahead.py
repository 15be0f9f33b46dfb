"""Every Hopper kernel compiles for an H200 with few spills; steps launch few kernels; memory.

Needs the packages named in compile_ahead.py, which include NVIDIA's assembler, but no GPU:
``python -m pytest tests/kernels/test_compile_ahead.py -m slow``.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11"),
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="compiling for a GPU needs jax-cuda13-plugin",
    ),
]

# Largest number of spilled bytes per thread, measured with ptxas 13.0 and rounded up; 0 if missing.
SPILLS = {
    # Three consumers have 160 registers per thread. The loops over full tiles spill nothing.
    "solve_32": 96,
    "adjoint_32": 80,
    "solve_bf16x2_32": 192,
    "adjoint_bf16x2_32": 224,
    "solve_mixed_32": 320,
    "adjoint_mixed_32": 288,
    "query_gradients_32": 64,
    "solve_64": 64,
    "adjoint_64": 64,
    "solve_bf16x2_64": 32,
    "adjoint_bf16x2_64": 96,
    "solve_mixed_64": 64,
    "adjoint_mixed_64": 96,
    "parallax_64": 128,
    "solved_64": 32,
    "solve_128": 672,
    "solve_bf16x2_128": 640,
    "adjoint_128": 850,
    "adjoint_bf16x2_128": 900,
    # These contain the code for one and for two parts, of which a tile runs one.
    "solve_mixed_128": 2100,
    "adjoint_mixed_128": 2200,
    "solved_bf16x2_128": 32,
    "solved_mixed_128": 32,
    "parallax_128": 224,
    "query_gradients_128": 256,
    "key_gradients_64": 64,
    "key_gradients_split_64": 64,
    "key_gradients_128": 64,
    "key_gradients_split_128": 64,
    "decode_lla_128": 64,
    "decode_lla_bf16x2_128": 64,
    "decode_parallax_group_4_128": 168,
    # Recurrences: a single warpgroup holds a whole chunk.
    "delta_forward_64": 256,
    "delta_backward_64": 600,
    "delta_forward_128": 512,
    "delta_backward_128": 1300,
    "retention_backward_64": 352,
    "retention_backward_128": 736,
    "linear_backward_32": 600,
    "linear_backward_64": 1800,
    "mesa": 256,
    "scan_backward": 80,
}

# Kernels whose products wait for one another because registers are short.
SERIALIZED = {"delta_backward_128"}


# Most kernels that a decoding step of one sequence may launch: launching dominates its time.
MOST_LAUNCHES = {"softmax": 5, "lla": 8}


def test_spills_and_launches():
    script = Path(__file__).parent / "compile_ahead.py"
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    spills = {}
    for part in re.split(r"^kernel ", done.stdout, flags=re.MULTILINE)[1:]:
        found = re.findall(r"(\d+) bytes spill stores", part)
        assert found, part
        spills[part.split()[0]] = max(map(int, found))
        assert "serialized" not in part or part.split()[0] in SERIALIZED, part
    assert SPILLS.keys() <= spills.keys()
    assert {k: v for k, v in spills.items() if v > SPILLS.get(k, 0)} == {}
    steps = dict(re.findall(r"^step (\w+) (\d+)$", done.stdout, flags=re.MULTILINE))
    assert steps.keys() == MOST_LAUNCHES.keys()
    assert all(int(count) <= MOST_LAUNCHES[name] for name, count in steps.items())
    memory = re.findall(r"^layers (\d) (\d+)$", done.stdout, flags=re.MULTILINE)
    assert [count for count, _ in memory] == ["2", "3"]
    # A layer more keeps its residuals, but not its inverses.
    inverses = 1024 * 4 * 32 * 32 * 4  # bytes
    assert int(memory[1][1]) - int(memory[0][1]) < inverses / 2
