"""What is needed to repeat a run, besides its config: machine, versions, commit, command."""

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from lla.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe() -> dict[str, Any]:
    """The environment of this process in plain JSON; the commit is None outside a repository."""
    changes = _git("status", "--porcelain")
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
            "lla-jax": __version__,  # known even if the package is not installed
        },
    }


def _git(*arguments):
    folder = pathlib.Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
