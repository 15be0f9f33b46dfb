"""The tables and the figure of MAD on made-up results, and its levels of difficulty."""

import csv
import math

import pytest

from lla import tasks
from lla.configs.mad import LEVELS, get_config
from lla.experiments.mad import plot, summary
from lla.tasks.mad import KINDS
from lla.training import sweep
from tests.experiments import printable

README = summary.FOLDER / "README.md"


def write(file, runs, **changes):
    """Writes `runs`: (mechanism, case, decay, rate, seed, validation or None, test)."""
    columns = (
        summary.MECHANISM, summary.HEADS, "case", "optimizer.weight_decay", "learning_rate", "seed",
        "phase", "settings", "status", "steps", "metric", "mode", "final", "best",
        summary.REPORTED, "seconds", "eval_every", "curve",
    )  # fmt: skip
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns, restval="")
        writer.writeheader()
        for mechanism, case, decay, rate, seed, validation, test in runs:
            row = {
                summary.MECHANISM: mechanism, summary.HEADS: 16, "case": case,
                "optimizer.weight_decay": decay, "learning_rate": rate, "seed": seed,
                "phase": "final", "settings": "0123456789ab", "steps": 10,
                "status": "diverged" if validation is None else "finished",
                "metric": summary.SELECTED, "mode": "max", "final": validation,
                "best": validation, summary.REPORTED: test, "seconds": 1.0, "eval_every": 5,
                "curve": "0.1 0.2",
            }  # fmt: skip
            writer.writerow(row | changes)


def grid(mechanism, case, finals):
    """`finals`: (decay, rate) -> (validation, test) of each seed."""
    return [
        (mechanism, case, *setting, seed, *pair)
        for setting, pairs in finals.items()
        for seed, pair in enumerate(pairs)
    ]


def test_selection_is_by_validation_over_rates_and_decays(tmp_path):
    finals = {
        (0.0, 1e-3): ((0.5, 0.9), (0.5, 0.9)),
        (0.1, 1e-3): ((0.6, 0.4), (0.8, 0.6)),
        (0.1, 1e-4): ((0.9, 1.0), (None, None)),
    }
    runs = grid("softmax", "compression", finals)
    runs += grid("lla", "compression", {(0.0, 1e-3): ((None, None), (0.5, 0.5))})
    write(tmp_path / "results.csv", runs)
    lla, softmax = summary.scores(tmp_path)
    assert (softmax.learning_rate, softmax.weight_decay) == (1e-3, 0.1)
    assert softmax.values == (0.4, 0.6) and softmax.mean == 0.5 and softmax.kind == "compression"
    assert lla.values == () and math.isnan(lla.mean)
    text = "\n".join(summary.result_tables([lla, softmax]))
    assert "| Softmax, 16 heads | 0.500 ± 0.141 | – | – | – | – | – | – |" in text
    assert "| LLA, 16 heads | diverged |" in text and "| Softmax, 16 heads | 0.001, 0.1 |" in text
    assert "levels" not in text


def test_scores_are_averages_over_levels(tmp_path):
    cases = {kind: kind for kind in KINDS} | {
        f"{kind}_{option}_{value}".replace(".", "_"): kind
        for kind, levels in LEVELS.items()
        for option, values in levels.items()
        for value in values
    }
    assert len(cases) == 66
    value = {case: 0.2 if case in KINDS else 0.4 for case in cases}
    runs = [("softmax", case, 0.0, 1e-3, 0, value[case], value[case]) for case in cases]
    runs.append(("lla", "memorization", 0.0, 1e-3, 0, 0.3, 0.3))
    write(tmp_path / "results.csv", runs)
    text = "\n".join(summary.result_tables(summary.scores(tmp_path)))
    means = [(0.2 + 0.4 * (n - 1)) / n for n in (11, 11, 11, 6, 14, 13)]
    shown = " | ".join(f"{mean:.3f}" for mean in [*means, sum(means) / 6])
    assert f"| Softmax, 16 heads | {shown} |" in text
    counts = (0, 0, 0, 1, 0, 0), (11, 11, 11, 6, 14, 13)
    parts = " | ".join(f"({n} of {most} levels)" for n, most in zip(*counts, strict=True))
    assert f"| LLA, 16 heads | {parts} | – |" in text


def test_other_files_are_refused(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 1
    assert "no CSV file" in capsys.readouterr().err
    write(
        tmp_path / "r.csv",
        [("lla", "compression", 0.0, 1.0, 0, 1.0, 1.0)],
        metric="test/accuracy",
    )
    assert plot.main([str(tmp_path)]) == summary.main([str(tmp_path)]) == 1
    assert "r.csv is no result file of mad" in capsys.readouterr().err


def test_the_figure_has_every_mechanism_and_task(tmp_path, capsys):
    names = ("softmax", "parallax", "lla", "mesanet", "gated_deltanet", "gla", "mamba2", "unknown")
    runs = [
        (name, kind, 0.0, 1e-3, seed, 0.5, 0.4 + seed / 5)
        for name in names
        for kind in KINDS[:5]
        for seed in (0, 1)
    ]
    write(tmp_path / "results.csv", runs)
    printable.check(plot.draw(summary.scores(tmp_path)))
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    for text in (*summary.SHORT.values(), "LLA, 16 heads", "unknown, 16 heads"):
        assert f"<!-- {text} -->" in svg
    assert "figure.svg" in capsys.readouterr().out


def test_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert summary.renewed(text, summary.FOLDER / "results") == text
    assert summary.main(["--check"]) == 0
    with pytest.raises(ValueError, match="must have the blocks"):
        summary.renewed(text.replace("generated: results", "generated: result"), README)


def test_published_averages_are_those_of_the_tasks():
    for model, source, values, average in summary.PUBLISHED:
        if None in values:
            continue
        once = [*values[:4], values[5]] if source == summary.MESANET else values
        # One decimal, and recall and noisy recall counted once where they are one number.
        assert abs(sum(once) / len(once) - average) < 0.35, (model, source)


def test_sweeps_have_the_settings_of_the_benchmark():
    _, points = sweep.grid_points(get_config("").to_dict())
    assert {point.choices["case"] for point in points} == set(KINDS)
    assert {point.settings.model.num_heads for point in points} == {16}
    for point in points:
        settings = point.settings
        task, model = settings.create_task(), settings.model_config(settings.create_task())
        assert task == tasks.create("mad", kind=point.choices["case"])
        assert settings.training.steps == 200 * task.train_examples // 128
        assert model.mlp_width == 352 and model.positions == "none" and model.depth == 2
    assert get_config("full").to_dict() == get_config("").to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["two_heads", "protocol"])
def test_every_point_of_the_larger_sweeps_is_possible(variant):
    _, points = sweep.grid_points(get_config(variant).to_dict())
    kinds = {point.settings.create_task().kind for point in points}
    assert kinds == set(KINDS) and len(points) == len({point.name for point in points})
