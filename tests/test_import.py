"""`import lla` is cheap, and its subpackages are there when they are used, in fresh processes."""

import subprocess
import sys

import pytest

import lla

HEAVY = ("flax", "optax", "orbax", "ml_collections", "matplotlib", "pandas")
SUBPACKAGES = ("estimators", "mixers", "models", "nn", "tasks", "training")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.compat
def test_importing_lla_imports_jax_and_nothing_else_that_is_heavy():
    loaded = run("import sys, lla; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert "jax" in loaded.split()
    assert not set(HEAVY) & set(loaded.split())


@pytest.mark.compat
def test_subpackages_are_imported_when_they_are_used():
    code = f"""
import sys, lla
names = {SUBPACKAGES}
assert not [name for name in names if f"lla.{{name}}" in sys.modules]
for name in names:
    module = getattr(lla, name)
    assert module.__name__ == f"lla.{{name}}" and set(module.__all__) <= set(dir(module))
    assert name in dir(lla)
"""
    run(code)


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'lla' has no attribute 'nothing'"):
        lla.nothing  # noqa: B018
