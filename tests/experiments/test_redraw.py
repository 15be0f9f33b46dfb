"""Scripts that draw and print committed results: without arguments, and with wrong ones."""

import importlib
import pathlib

import pytest

from lla.experiments.benchmarks import report, results
from lla.runs import figures, tables
from tests.experiments import printable

pytest.importorskip("matplotlib")
slow = pytest.mark.slow
PLOTS = [
    "bias_exponents", "in_context_regression", "mad", "memory_and_time", "mqar",
    "solver_iterations", "state_tracking", pytest.param("test_time_regression", marks=slow),
]  # fmt: skip
NAMES = (
    "bias_exponents", "in_context_regression", "language_model", "mad", "memory_and_time", "mqar",
    "solver_iterations", "state_tracking", "test_time_regression",
)  # fmt: skip
SUMMARIES = ("bias_exponents", "language_model", "mad", "memory_and_time", "solver_iterations")


def script(name, kind="plot"):
    return importlib.import_module(f"lla.experiments.{name}.{kind}")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The files that would be written. Figures are checked and tables compared instead."""
    files = []

    def save(figure, folder, salt, *, name="figure", **options):
        printable.check(figure)
        files.extend(pathlib.Path(folder) / f"{name}.{kind}" for kind in ("png", "svg"))
        return files[-2:]

    def write_csv(file, rows, write=tables.write_csv, **options):
        assert write(tmp_path / "table.csv", rows, **options).read_bytes() == file.read_bytes()
        return file

    monkeypatch.setattr(figures, "save", save)
    monkeypatch.setattr(tables, "write_csv", write_csv)
    return files


@pytest.mark.parametrize("name", PLOTS)
def test_committed_results_are_drawn_without_arguments(name, drawn, capsys):
    assert script(name).main([]) == 0
    printed = capsys.readouterr().out.split()
    assert drawn and set(map(str, drawn)) <= set(printed)
    assert all(file.is_file() for file in drawn)
    if hasattr(script(name), "RESULTS"):  # one figure for each of the committed work directories
        committed = script(name).RESULTS.glob("*/config.json")
        assert {file.parent for file in drawn} == {file.parent for file in committed}


def test_committed_figures_of_benchmarks(drawn):
    for found in report.documents(results.RESULTS).values():
        for name, document in found.items():
            report.draw(name, document, report.FIGURES)
    assert drawn and all(file.is_file() for file in drawn)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "summary") for name in SUMMARIES] + [(name, "plot") for name in NAMES],
)
def test_help(name, kind, capsys):
    with pytest.raises(SystemExit) as end:
        script(name, kind).main(["--help"])
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("solver_iterations", "plot"),
        ("solver_iterations", "summary"),
        ("bias_exponents", "plot"),
        ("bias_exponents", "summary"),
        ("test_time_regression", "plot"),
    ],
)
def test_what_is_no_work_directory_is_a_line(name, kind, tmp_path, capsys):
    assert script(name, kind).main([str(tmp_path)]) == 1 and not list(tmp_path.iterdir())
    expected = f"FATAL {tmp_path} is no work directory: it has no config.json.\n"
    assert capsys.readouterr().err == expected


def test_without_committed_results_there_is_a_line(tmp_path, capsys, monkeypatch):
    plot = script("solver_iterations")
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    assert plot.main([]) == 1
    assert capsys.readouterr().err == f"FATAL {tmp_path} has no results; name a work directory.\n"
