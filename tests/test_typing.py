"""The types of the public functions: what a type checker makes of a user's script."""

import json
import pathlib
import runpy
import subprocess
import sys
import typing

import jax
import pytest

import lla
import lla.nn

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "typed_script.py"
OVERLOADED = (
    lla.local_linear_attention,
    lla.parallax_attention,
    lla.softmax_attention,
    lla.decode_step,
    lla.parallax_decode_step,
    lla.softmax_decode_step,
    lla.nn.LocalLinearAttention.__call__,
)


MISTAKES = """import jax
import lla

def attend(x: jax.Array) -> jax.Array:
    return lla.softmax_attention(x, x, x, return_stats=True)

def misspelt(x: jax.Array) -> jax.Array:
    return lla.softmax_attention(x, x, x, is_casual=True)
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, dict[int, str]]:
    """What Pyright finds with strict checks: file -> line -> message."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "correct.py").write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "mistakes.py").write_text(MISTAKES, encoding="utf-8")
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    found = {"correct.py": {}, "mistakes.py": {}}
    for entry in report["generalDiagnostics"]:
        lines = found[pathlib.Path(entry["file"]).name]
        lines[entry["range"]["start"]["line"] + 1] = entry["message"]
    return found


def test_a_typed_script_passes_strict_checks(errors):
    assert errors["correct.py"] == {}


def test_mistakes_are_found(errors):
    assert errors["mistakes.py"].keys() == {5, 8}


@pytest.mark.slow
def test_the_typed_script_runs():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("function", OVERLOADED, ids=lambda function: function.__qualname__)
def test_overloads_have_the_arguments_of_the_function(function):
    declared = typing.get_type_hints(function)
    del declared["return"]
    overloads = typing.get_overloads(function)
    assert len(overloads) == 3
    for overload in overloads:
        found = typing.get_type_hints(overload)
        (options,) = typing.get_args(found.pop("options"))
        flag = found.pop("return_stats")
        found |= typing.get_type_hints(options)
        returned = found.pop("return")
        assert found == {n: kind for n, kind in declared.items() if n != "return_stats"}
        if flag is not bool:
            with_stats = lla.Stats in typing.get_args(returned)
            assert with_stats == typing.get_args(flag)[0]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "lla" / "py.typed").read_text(encoding="utf-8") == ""
