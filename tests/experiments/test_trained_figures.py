"""Figures of trained models: selection, tables and drawing, on made-up results."""

import csv
import pathlib

import pytest

from experiments import trained_figures as shared
from experiments.in_context_regression import plot as regression_plot
from experiments.in_context_regression import summary as regression
from experiments.mqar import plot as mqar_plot
from experiments.mqar import summary as mqar
from experiments.state_tracking import plot as tracking_plot
from experiments.state_tracking import summary as tracking

EXPERIMENTS = [module.EXPERIMENT for module in (regression, mqar, tracking)]
LONG = shared.FURTHER + tracking.LONG


def write(path, experiment, rows):
    """Writes rows (choices, seed, rate, final), where no final stands for a run that diverged."""
    mode = "min" if experiment is regression.EXPERIMENT else "max"
    made = [
        {
            **choices,
            "seed": seed,
            "learning_rate": rate,
            "status": "diverged" if final is None else "finished",
            "steps": 10,
            "headline": experiment.headline,
            "mode": mode,
            "final": final,
            "best": final,
        }
        for choices, seed, rate, final in rows
    ]
    columns = dict.fromkeys(column for row in made for column in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(made)


def regression_rows(mechanism, length, finals, seeds=(0, 1)):
    """`finals`: learning rate -> value of each seed."""
    choices = {"model.mixer.name": mechanism, "task.segment_length": length}
    return [
        (choices, seed, rate, final)
        for rate, values in finals.items()
        for seed, final in zip(seeds, values, strict=True)
    ]


def mqar_rows(mechanism, case, width, finals):
    choices = {"model.mixer.name": mechanism, "model.width": width}
    choices |= {"case": case} if case else {}
    return [(choices, seed, 0.01, final) for seed, final in enumerate(finals)]


def tracking_rows(mechanism, items, finals, long=None):
    choices = {"model.mixer.name": mechanism, "task.num_items": items}
    further = [{} if long is None else {LONG: value} for value in long or finals]
    return [
        (choices | further[seed], seed, rate, final - rate)
        for seed, final in enumerate(finals)
        for rate in (0.01, 0.02)
    ]


def test_selection_is_by_the_mean_over_seeds(tmp_path):
    experiment = regression.EXPERIMENT
    rows = regression_rows("softmax", 32, {0.1: (0.2, 0.9), 0.2: (0.5, 0.4), 0.3: (None, 0.1)})
    rows += regression_rows("lla", 32, {0.1: (None, 0.2)})
    write(tmp_path / "results.csv", experiment, rows)
    lla, softmax = experiment.points(tmp_path)
    assert (lla.mechanism, lla.values, lla.diverged) == ("lla", (), 1) and not lla.edge
    assert softmax.learning_rate == 0.2 and softmax.values == (0.5, 0.4) and not softmax.edge
    assert (softmax.diverged, softmax.runs) == (1, 6)
    assert shared.mean_std(softmax.values) == pytest.approx((0.45, 0.005**0.5))
    assert shared.value_cell(softmax.values) == "0.450 ± 0.071"
    assert shared.value_cell(lla.values) == "diverged"
    assert shared.rate_cell(softmax) == "0.2 (1 of 6 diverged)"


def test_a_rate_with_fewer_seeds_is_no_candidate(tmp_path):
    experiment = regression.EXPERIMENT
    write(
        tmp_path / "a.csv", experiment, regression_rows("lla", 32, {0.1: (0.5,), 0.2: (0.1,)}, (0,))
    )
    write(tmp_path / "b.csv", experiment, regression_rows("lla", 32, {0.1: (0.5,)}, (1,)))
    (point,) = experiment.points(tmp_path)
    assert point.learning_rate == 0.1 and point.values == (0.5, 0.5) and point.runs == 3


def test_a_run_that_is_there_twice_is_refused(tmp_path):
    experiment = regression.EXPERIMENT
    rows = regression_rows("lla", 32, {0.1: (0.5, 0.6)})
    write(tmp_path / "one.csv", experiment, rows)
    write(tmp_path / "two.csv", experiment, regression_rows("lla", 64, {0.1: (0.5, 0.6)}))
    assert len(experiment.points(tmp_path)) == 2
    # An option that one file lacks is no other choice where it is empty.
    again = [(choices | {"mixers.lla.ridge": None}, *run) for choices, *run in rows[1:]]
    write(tmp_path / "two.csv", experiment, again)
    with pytest.raises(ValueError, match=r"twice, in \S+one\.csv and in \S+two\.csv.*seed 1"):
        experiment.points(tmp_path)


def test_other_files_are_refused(tmp_path, capsys):
    assert shared.summary_command(mqar.EXPERIMENT, [str(tmp_path)]) == 1
    assert "no CSV file" in capsys.readouterr().err
    write(tmp_path / "r.csv", regression.EXPERIMENT, regression_rows("lla", 8, {1: (1, 1)}))
    with pytest.raises(ValueError, match=r"r\.csv is no result file of mqar: .*model\.width"):
        mqar.EXPERIMENT.points(tmp_path)
    write(tmp_path / "r.csv", regression.EXPERIMENT, mqar_rows("lla", "length_64", 64, [1.0]))
    with pytest.raises(ValueError, match="test/mse, mqar shows test/accuracy"):
        mqar.EXPERIMENT.points(tmp_path)


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
    assert "<!-- LLA -->" in svg and "<!-- softmax -->" in svg and "oracle" in svg
    floor = regression.baselines(tmp_path)
    assert sorted(floor) == [8, 16] and floor[8]["dim"] == 4
    assert 0 < floor[16]["oracle"] < floor[8]["oracle"] < 1
    text = printed(regression.EXPERIMENT, capsys, tmp_path)
    assert "| mechanism | S = 8 | S = 16 |" in text
    assert "| LLA | 0.250 ± 0.071 | 0.100 ± 0.000 |" in text
    assert "| softmax | 0.450 ± 0.071 | – |" in text and "| softmax | 0.2\\* | – |" in text
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
    assert "<!-- N = 64, D = 4 -->" in svg and "<!-- width 64 -->" in svg
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
    assert "<!-- width 32 -->" in svg and "model width" not in svg


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
    with pytest.raises(ValueError, match="settings and results"):
        shared.renewed(mqar.EXPERIMENT, "<!-- generated: results -->\n<!-- end generated -->")


def test_printed_names_and_styles():
    looks = [style[1:] for style in shared.STYLES.values()]
    assert len({marker for _, marker, _ in looks}) == len(
        {colour + line for colour, _, line in looks}
    )
    assert len(looks) == len(set(looks)) == 11
    folder = pathlib.Path(shared.__file__).parent
    assert all(experiment.folder.parent == folder for experiment in EXPERIMENTS)
