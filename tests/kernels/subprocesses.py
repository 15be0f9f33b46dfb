"""Runs a module of this folder as a process of its own.

A kernel that waits for a barrier forever blocks its whole process, which therefore gets a time
limit.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_json(module: str, *arguments: str, timeout: float) -> dict:
    """The JSON in the last line that ``python -m tests.kernels.MODULE`` prints."""
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
