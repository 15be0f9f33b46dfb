"""The benchmarks' scripts as modules."""

import importlib
import pathlib
import sys
import types

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture(scope="module")
def bench(request):
    """The scripts that a test module lists in `NAMES`, imported as they import each other."""
    names = request.module.NAMES
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            del sys.modules[name]
