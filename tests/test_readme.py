"""The README: its Python runs, its commands and links name files that exist."""

import re
import shlex
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_every_block_is_of_a_kind_that_is_tested():
    languages = re.findall(r"^```(\w*)\n.*?^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert set(languages) == {"sh", "python", "bibtex"}


@pytest.mark.compat
def test_python_runs():
    """In one namespace and in order, as a reader would, under JAX's own promotion rules."""
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in blocks("python"):
            exec(compile(code, "README.md", "exec"), namespace)


def test_commands_name_files_and_extras_that_exist():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    commands = blocks("sh")
    assert sum("pip install" in command for command in commands) == 2
    for word in shlex.split(" ".join(commands)):
        path = word.removeprefix("--config=")
        if path.endswith(".py"):
            assert (ROOT / path).is_file(), path
        for extra in re.findall(r"\.\[(\w+)\]", word):
            assert f'"{extra}": ' in setup, extra


def test_links_lead_to_files():
    targets = re.findall(r"\]\((?!https://)([^)#]+)\)", TEXT)
    assert len(targets) > 5
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
