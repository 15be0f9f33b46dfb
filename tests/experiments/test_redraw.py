"""Figures and tables of committed results, drawn again without arguments."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2] / "experiments"
DRAWN = ("summary.csv", "figure.png", "figure.svg")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_time_regression", "bias_exponents", "solver_iterations"])
def test_committed_results_are_drawn_without_arguments(name, tmp_path):
    """From a copy of the experiment, so that nothing is drawn into the repository."""
    copy = shutil.copytree(ROOT / name, tmp_path / name)
    committed = sorted(file.parent for file in copy.glob("results/*/config.json"))
    assert committed
    for folder in committed:
        for file in DRAWN:
            (folder / file).unlink()
    done = run(copy / "plot.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / file) for folder in committed for file in DRAWN]
    for folder in committed:
        original = ROOT / name / folder.relative_to(copy) / "summary.csv"
        assert (folder / "summary.csv").read_bytes() == original.read_bytes()
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    if (copy / "summary.py").read_text().count("__main__"):
        assert run(copy / "summary.py").stdout == "".join(
            run(copy / "summary.py", folder).stdout for folder in committed
        )


@pytest.mark.parametrize(
    "script",
    [
        "solver_iterations/plot.py",
        pytest.param("bias_exponents/plot.py", marks=pytest.mark.slow),
        pytest.param("bias_exponents/summary.py", marks=pytest.mark.slow),
        pytest.param("solver_iterations/summary.py", marks=pytest.mark.slow),
        pytest.param("test_time_regression/plot.py", marks=pytest.mark.slow),
    ],
)
def test_what_is_no_work_directory_is_a_line(script, tmp_path):
    done = run(ROOT / script, tmp_path)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr == f"FATAL {tmp_path} is no work directory: it has no config.json.\n"
