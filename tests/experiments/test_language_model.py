"""Tables and figure of the language models on made-up results, and their study."""

import csv
import json
import math

import pytest

from lla.configs.language_model import STUDY, get_config
from lla.experiments.language_model import plot, summary
from tests.experiments import printable

README = summary.FOLDER / "README.md"
PARTS = ("0-127", "128-255", "256-511", "512-1023")


def write(file, runs):
    """Writes runs: (case, seed, rate, validation loss or None)."""
    columns = (
        "case", "phase", "settings", "seed", "learning_rate", "status", "steps", "metric", "mode",
        "final", "best", summary.TEST, "seconds", "eval_every", "curve",
    )  # fmt: skip
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(columns)
        for case, seed, rate, loss in runs:
            status = "finished" if loss else "diverged"
            shown, test = (loss, loss + 0.1) if loss else ("", "")
            writer.writerow(
                (case, "final", "0123456789ab", seed, rate, status, 1000, summary.METRIC, "min",
                 shown, shown, test, 30.0 + seed, 250, "9.8 4.1")
            )  # fmt: skip


def evaluation(case, seed, losses, rate=2e-3):
    """A record of `summary.evaluations`; each part of a sequence has 0.1 less than that before."""
    return {
        "case": case, "seed": seed, "learning_rate": rate, "steps": [0, 500, 1000],
        "validation": [
            {"loss": loss, "bits_per_byte": loss / 2}
            | {summary.POSITION + part: loss - n / 10 for n, part in enumerate(PARTS)}
            for loss in losses
        ],
        "test": {"loss": losses[-1] + 0.1}, "log_every": 500, "training": [5.0, 4.0],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    runs = [("softmax", 0, 2e-3, 3.8), ("lla_ridge_10", 0, 2e-3, 3.79)]
    runs += [("parallax", 0, 2e-3, 3.76), ("gated_deltanet", 0, 2e-3, None)]
    write(tmp_path / "study.csv", runs)
    runs = [("softmax", 1, 2e-3, 3.81), ("lla_ridge_10", 1, 2e-3, 3.78)]
    write(tmp_path / "seeds.csv", runs)
    write(tmp_path / "rates.csv", [("softmax", 0, 1e-3, 3.9), ("softmax", 0, 4e-3, 3.85)])
    records = [
        evaluation("softmax", 0, (9.8, 4.3, 3.8)), evaluation("softmax", 1, (9.9, 4.3, 3.81)),
        evaluation("lla_ridge_10", 0, (9.7, 4.2, 3.79)),
        evaluation("parallax", 0, (9.7, 4.1, 3.76)),
    ]  # fmt: skip
    (tmp_path / summary.EVALUATIONS).write_text(json.dumps(records))
    return tmp_path


def test_differences_are_between_runs_with_one_seed(folder):
    found = summary.at_rate(summary.read(folder))
    assert len(found) == 6 and {run.learning_rate for run in found} == {2e-3}
    apart = summary.differences(found, "lla_ridge_10")
    assert apart == pytest.approx({0: -0.01, 1: -0.03})
    assert all(math.isnan(run.test) for run in found if run.case == "gated_deltanet")
    text = "\n".join(summary.result_tables(summary.read(folder), summary.evaluations(folder)))
    assert "1000 updates, 32.8M tokens" in text
    assert (
        "| LLA, ridge 10 | 29.37M | 2 | 3.7850 ± 0.0071 | -0.0200 ± 0.0141 | 3.8850 ± 0.0071 "
        "| 1.8950 |" in text
    )
    assert "| Softmax | 29.37M | 2 | 3.8050 ± 0.0071 | – | 3.9050 ± 0.0071 | 1.9025 |" in text
    assert "| Gated DeltaNet | 29.48M | 1 | diverged | diverged | diverged | – |" in text
    assert "| Softmax | 3.9000 | 3.8000 | 3.8500 |" in text and "LLA, ridge 10 | –" not in text
    assert "| mechanism | 0 to 127 | 128 to 255 | 256 to 511 | 512 to 1023 |" in text
    assert "| Softmax | 3.8050 | 3.7050 | 3.6050 | 3.5050 |" in text
    assert "| LLA, ridge 10 | -0.0100 | -0.0100 | -0.0100 | -0.0100 |" in text


def test_times_are_shown_only_of_runs_that_were_alone(folder):
    def seconds():
        return [run.seconds for run in summary.read(folder)]

    assert set(seconds()) == {None}
    text = "\n".join(summary.result_tables(summary.read(folder)))
    assert "There are no times" in text and "seconds |" not in text
    known = {"study.csv": {"alone": True}, "seeds.csv": {"alone": False}}
    (folder / "provenance.json").write_text(json.dumps(known))
    assert sorted(s for s in seconds() if s is not None) == [30.0] * 4
    text = "\n".join(summary.result_tables(summary.read(folder)))
    assert "bits a byte | seconds |" in text and "| – | 30 |" in text


def test_other_files_and_runs_that_are_there_twice_are_refused(folder, capsys):
    write(folder / "again.csv", [("softmax", 1, 2e-3, 3.9)])
    assert summary.main([str(folder)]) == plot.main([str(folder)]) == 1
    assert "a run is there twice" in capsys.readouterr().err
    write(folder / "again.csv", [("unknown", 1, 2e-3, 3.9)])
    assert summary.main([str(folder)]) == 1
    assert "again.csv is no result file of language_model" in capsys.readouterr().err
    empty = folder / "empty"
    empty.mkdir()
    assert summary.main([str(empty)]) == 1 and "no CSV file" in capsys.readouterr().err


def test_records_of_a_sweep_are_collected(tmp_path):
    phase = tmp_path / "cells" / "case=softmax" / "final"
    phase.mkdir(parents=True)
    config = {"choices": {"case": "softmax"}, "runs": {"seeds": [3], "learning_rates": [0.1, 0.2]}}
    (phase / "config.json").write_text(json.dumps(config))
    records = [
        {"kind": "eval", "step": 0, "validation/loss": [[9.0, 9.5]]},
        {"kind": "train", "step": 20, "loss": [[8.0, 8.5]]},
        {"kind": "train", "step": 40, "loss": [[7.0, 7.5]]},
        {"kind": "eval", "step": 40, "validation/loss": [[6.0, 6.5]]},
        {"kind": "test", "step": 40, "test/loss": [[6.1, 6.6]]},
    ]
    (phase / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert summary.evaluations(tmp_path) == []  # it is not finished
    (phase / "result.json").write_text("{}")
    _, second = summary.evaluations(tmp_path)
    assert second == {
        "case": "softmax", "seed": 3, "learning_rate": 0.2, "steps": [0, 40],
        "validation": [{"loss": 9.5}, {"loss": 6.5}], "test": {"loss": 6.6}, "log_every": 20,
        "training": [8.5, 7.5],
    }  # fmt: skip


def test_the_figure_has_every_mechanism(folder, capsys):
    pytest.importorskip("matplotlib")
    printable.check(plot.draw(summary.read(folder), summary.evaluations(folder)))
    runs = [(case, 0, 2e-3, 3.8 + n / 100) for n, case in enumerate(summary.CASES)]
    write(folder / "study.csv", runs)
    printable.check(plot.draw(summary.read(folder), summary.evaluations(folder)))
    printable.check(plot.draw(summary.read(folder), []))
    assert plot.main([str(folder)]) == 0 and "figure.svg" in capsys.readouterr().out
    svg = (folder / "figure.svg").read_text(encoding="utf-8")
    for case, (_, name) in summary.CASES.items():
        assert (f"<!-- {name} -->" in svg) == (case != summary.BASE)


def test_without_softmax_attention_there_is_nothing_to_compare(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write(tmp_path / "study.csv", [("parallax", 0, 2e-3, 3.8)])
    assert plot.main([str(tmp_path)]) == 1
    assert "nothing to compare" in capsys.readouterr().err


def test_every_model_of_the_study_has_as_many_parameters():
    assert set(summary.CASES) == set(STUDY)
    base = summary.parameters(summary.BASE)
    for case in STUDY:
        assert abs(summary.parameters(case) - base) < 0.01 * base, case


@pytest.mark.parametrize("variant", ["rates", "seeds"])
def test_further_runs_are_of_points_of_the_study(variant):
    study, further = get_config("study").to_dict(), get_config(variant).to_dict()
    first, more = study.pop("sweep"), further.pop("sweep")
    assert study == further and more["cases"].items() <= first["cases"].items()
    runs = [(sweep["seeds"], sweep["learning_rates"]) for sweep in (first, more)]
    assert runs[0] != runs[1]


def test_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert summary.renewed(text, summary.FOLDER / "results") == text
    assert summary.main(["--check"]) == 0
