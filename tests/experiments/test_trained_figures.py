"""Tables and figures of trained models, on made-up results."""

import pytest

from lla.experiments.in_context_regression import plot as regression_plot
from lla.experiments.in_context_regression import summary as regression
from lla.experiments.mqar import plot as mqar_plot
from lla.experiments.mqar import summary as mqar
from lla.experiments.state_tracking import plot as tracking_plot
from lla.experiments.state_tracking import summary as tracking
from lla.experiments.trained import tables as shared
from tests.experiments.trained import mqar_rows, regression_rows, tracking_rows, write

EXPERIMENTS = [module.EXPERIMENT for module in (regression, mqar, tracking)]


def drawn(module, folder, *arguments):
    status = module.plots.plot_command(
        module.summary.EXPERIMENT, module.draw, [str(folder), *arguments]
    )
    assert status == 0
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    return (folder / "figure.svg").read_text(encoding="utf-8")


def printed(experiment, capsys, folder, *arguments):
    capsys.readouterr()
    assert shared.summary_command(experiment, [str(folder), *arguments]) == 0
    return capsys.readouterr().out


def test_in_context_regression(tmp_path, capsys):
    rows = regression_rows("softmax", 8, {0.1: (0.5, 0.6), 0.2: (0.4, 0.5)})
    rows += regression_rows("lla", 8, {0.1: (0.2, 0.3)}) + regression_rows(
        "lla", 16, {0.1: (0.1, 0.1)}
    )
    write(tmp_path / "results.csv", regression.EXPERIMENT, rows)
    svg = drawn(regression_plot, tmp_path, "--variant=smoke")
    assert "<!-- LLA -->" in svg and "<!-- Softmax -->" in svg and "Oracle" in svg
    floor = regression.baselines(tmp_path)
    assert sorted(floor) == [8, 16] and floor[8]["dim"] == 4
    assert 0 < floor[16]["oracle"] < floor[8]["oracle"] < 1
    text = printed(regression.EXPERIMENT, capsys, tmp_path)
    assert "| mechanism | S = 8 | S = 16 |" in text
    assert "| LLA | 0.250 ± 0.071 | 0.100 ± 0.000 |" in text
    assert "| Softmax | 0.450 ± 0.071 | – |" in text and "| Softmax | 0.2\\* | – |" in text
    assert f"| oracle | {floor[8]['oracle']:.3f} | {floor[16]['oracle']:.3f} |" in text
    # Drawn again from the files alone, to the byte.
    assert drawn(regression_plot, tmp_path) == svg


def test_mqar(tmp_path, capsys):
    rows = mqar_rows("lla", "length_64", 64, (1.0, 0.995)) + mqar_rows(
        "gla", "length_64", 64, (0.3,)
    )
    rows += mqar_rows("lla", "length_64", 128, (1.0, 0.4)) + mqar_rows(
        "lla", "length_128", 64, (0.9,)
    )
    write(tmp_path / "results.csv", mqar.EXPERIMENT, rows)
    svg = drawn(mqar_plot, tmp_path, "--variant=")
    for text in ("N = 64, D = 4", "N = 128, D = 8", "width 64", "width 128"):
        assert f"<!-- {text} -->" in svg
    text = printed(mqar.EXPERIMENT, capsys, tmp_path, "--variant=")
    first, second = text.split("N = 128, D = 8:")[:2]
    assert "N = 64, D = 4:" in first and "1 to 2 seeds" in first
    assert "| LLA | 0.998 ± 0.004 (2/2) | 0.700 ± 0.424 (1/2) |" in first
    assert "| GLA | 0.300 ± 0.000 (0/1) | – |" in first
    assert "| a value of the context | 0.125 |" in second
    assert "| LLA | 0.900 ± 0.000 (0/1) |" in second
    with pytest.raises(ValueError, match="unknown case 'length_"):
        mqar.case_tasks(mqar.EXPERIMENT.points(tmp_path), tmp_path, "short")


def test_mqar_without_cases(tmp_path):
    write(tmp_path / "results.csv", mqar.EXPERIMENT, mqar_rows("lla", None, 32, (1.0, 0.4)))
    svg = drawn(mqar_plot, tmp_path, "--variant=short")
    assert "<!-- N = 32, D = 4 -->" in svg and "<!-- width 32 -->" in svg


def test_state_tracking(tmp_path, capsys):
    rows = tracking_rows("lla", 3, (0.9, 0.8), long=(0.5, 0.7)) + tracking_rows(
        "gla", 3, (0.4, 0.5)
    )
    rows += tracking_rows("unheard_of", 2, (0.6,))
    write(tmp_path / "results.csv", tracking.EXPERIMENT, rows)
    svg = drawn(tracking_plot, tmp_path, "--variant=")
    assert "chance" in svg and "65 to 128 swaps" in svg and "unheard_of" in svg
    text = printed(tracking.EXPERIMENT, capsys, tmp_path, "--variant=")
    head, long, rates = text.split("\n\nThe same")[0], *text.split("The same")[1].split("Learning")
    assert "| LLA | – | 0.840 ± 0.071 |" in head and "| unheard_of | 0.590 ± 0.000 | – |" in head
    assert "| chance | 0.500 | 0.333 |" in head
    assert "| LLA | – | 0.600 ± 0.141 |" in long and "GLA" not in long
    assert "| GLA | – | 0.01\\* |" in rates


def test_without_the_long_test_there_is_one_panel(tmp_path, capsys):
    write(tmp_path / "results.csv", tracking.EXPERIMENT, tracking_rows("lla", 3, (0.9, 0.8)))
    assert "65 to 128" not in drawn(tracking_plot, tmp_path, "--variant=")
    assert "The same" not in printed(tracking.EXPERIMENT, capsys, tmp_path, "--variant=")


def test_settings_come_from_the_work_directory_where_there_is_one(tmp_path):
    cell = tmp_path / "cells" / "one"
    cell.mkdir(parents=True)
    record = '{"choices": {}, "task": {"name": "state_tracking", "min_swaps": 1, "max_swaps": 7}}'
    (cell / "config.json").write_text(record)
    write(tmp_path / "results.csv", tracking.EXPERIMENT, tracking_rows("lla", 3, (0.9, 0.8)))
    found = tracking.EXPERIMENT.points(tmp_path)
    assert tracking.swaps(found, tmp_path)[1] == "8 to 14 swaps"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_settings_are_complete(experiment):
    path, full = shared.config(experiment)
    text = "\n".join(shared.settings_tables(experiment))
    assert f"`{path}`" in text
    for key in ("task", "model", "optimizer", "training"):
        for name in full[key]:
            assert f"{key}.{name}" in text or f"{key}.{name}" in shared.NOT_SHOWN or name == "mixer"
    assert "[ours]" in text


def test_a_source_is_named_only_for_the_value_that_it_has():
    text = "\n".join(shared.settings_tables(regression.EXPERIMENT, ""))
    assert "| task.dim | 32 | [paper] |" in text and "| task.length | 512 | [ours] |" in text
    text = "\n".join(shared.settings_tables(regression.EXPERIMENT, "smoke"))
    assert "| task.dim | 4 | [ours] |" in text
    text = "\n".join(shared.settings_tables(mqar.EXPERIMENT, ""))
    assert "| task.vocab_size | 8192 | [paper], Zoology |" in text
    assert "training.batch_size 512 Zoology, training.steps 12500 Zoology" in text
    assert "| learning rates, each | 0.0001, 0.000464, 0.00215, 0.01 | Zoology |" in text


def test_settings_tell_what_is_swept(monkeypatch):
    path, full = shared.config(mqar.EXPERIMENT, "")
    full["sweep"]["grid"]["model"]["mixer"]["name"] = ("softmax", "gla")
    full["sweep"]["grid"]["mixers"] = {"softmax": {"qk_norm": (False, True)}}
    full["sweep"] |= {"seeds": (2, 3), "selection_seeds": (0, 1)}
    monkeypatch.setattr(shared, "config", lambda experiment, variant=None: (path, full))
    text = "\n".join(shared.settings_tables(mqar.EXPERIMENT))
    assert "| mixers.softmax.qk_norm, each | False, True | as published; [ours] |" in text
    assert "| Softmax | qk_norm as above, " in text
    assert "| seeds, each | 2, 3 | [ours] |" in text
    assert "| seeds that learning rates are selected on, each | 0, 1 | [ours] |" in text


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_readme_is_up_to_date(experiment):
    assert shared.summary_command(experiment, ["--check"]) == 0
    results = experiment.folder / "results"
    if any(results.glob("*.csv")):
        assert (results / "figure.png").is_file() and (results / "figure.svg").is_file()
        if experiment is regression.EXPERIMENT:
            lengths = {p.choices[regression.LENGTH] for p in experiment.points(results)}
            assert lengths <= regression.baselines(results).keys()


def test_a_block_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="generated blocks must be"):
        shared.renewed(mqar.EXPERIMENT, "<!-- generated: results -->\n<!-- end generated -->")
