"""Figures of trained models: selection, tables and drawing, on made-up results."""

import csv
import pathlib
import random

import pytest

from experiments import trained_curves
from experiments import trained_figures as shared
from experiments.in_context_regression import plot as regression_plot
from experiments.in_context_regression import summary as regression
from experiments.mqar import plot as mqar_plot
from experiments.mqar import summary as mqar
from experiments.state_tracking import plot as tracking_plot
from experiments.state_tracking import summary as tracking
from tests.experiments import printable

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


def test_experiments_are_folders_beside_what_they_share():
    folder = pathlib.Path(shared.__file__).parent
    assert all(experiment.folder.parent == folder for experiment in EXPERIMENTS)


# ---------------------------------------------------------------------------------------------
# Two phases, and mechanisms with and without short convolutions

CONV = "mixers.gated_deltanet.short_conv"
VALIDATION = shared.FURTHER + "validation/accuracy"


def phase(rows, name, **more):
    return [({**choices, shared.PHASE: name, **more}, *run) for choices, *run in rows]


def trials(mechanism, width, finals, **more):
    """Rows of the phase "select"; `finals`: learning rate -> validation accuracy of each seed."""
    choices = {"model.mixer.name": mechanism, "model.width": width, "case": "length_64", **more}
    return phase(
        [(choices, seed, rate, final) for rate, all_ in finals.items()
         for seed, final in enumerate(all_)],
        "select",
    )  # fmt: skip


def finals(mechanism, width, rate, values, **more):
    choices = {"model.mixer.name": mechanism, "model.width": width, "case": "length_64", **more}
    rows = [(choices, 100 + seed, rate, final) for seed, final in enumerate(values)]
    return phase(rows, "final")


def write_validated(path, rows):
    """`write`, with the validation accuracy as the headline of the phase "select"."""
    write(path, mqar.EXPERIMENT, rows)
    with path.open(encoding="utf-8") as file:
        made = list(csv.DictReader(file))
    for row in made:
        if row[shared.PHASE] == "select":
            row["headline"] = "validation/accuracy"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, made[0])
        writer.writeheader()
        writer.writerows(made)


def test_final_runs_are_shown_and_trials_tell_the_edge(tmp_path):
    rows = trials("softmax", 64, {0.001: (0.2, 0.3), 0.003: (0.9, 1.0), 0.01: (0.5, None)})
    rows += finals("softmax", 64, 0.003, (0.91, 0.92, 0.93, 0.94, 0.95))
    rows += trials("lla", 64, {0.001: (0.99, 1.0)}) + finals("lla", 64, 0.001, (1.0, None, 0.98))
    rows += trials("gla", 64, {0.001: (0.99, 1.0)})  # its final runs are still to come
    write_validated(tmp_path / "results.csv", rows)
    lla, softmax = mqar.EXPERIMENT.points(tmp_path)
    assert softmax.values == (0.91, 0.92, 0.93, 0.94, 0.95) and softmax.learning_rate == 0.003
    assert not softmax.edge and (softmax.diverged, softmax.runs) == (1, 11)
    assert lla.values == (1.0, 0.98) and (lla.diverged, lla.runs) == (1, 5)
    assert shared.rate_cell(lla) == "0.001 (1 of 5 diverged)"
    assert shared.seeds([lla, softmax]) == "2 to 5 seeds"


def test_final_runs_at_the_lowest_rate_are_marked(tmp_path):
    rows = trials("lla", 64, {0.001: (0.9,), 0.003: (0.8,)}) + finals("lla", 64, 0.001, (0.7,))
    write_validated(tmp_path / "results.csv", rows)
    (point,) = mqar.EXPERIMENT.points(tmp_path)
    assert point.edge and point.values == (0.7,)


def test_final_runs_at_two_rates_are_refused(tmp_path):
    rows = finals("lla", 64, 0.001, (0.9,)) + finals("lla", 64, 0.003, (0.9,))
    write(tmp_path / "results.csv", mqar.EXPERIMENT, rows)
    with pytest.raises(ValueError, match=r"final runs differ.*model\.mixer\.name=lla"):
        mqar.EXPERIMENT.points(tmp_path)


def test_trials_alone_are_no_result(tmp_path):
    write_validated(tmp_path / "results.csv", trials("lla", 64, {0.001: (0.9,)}))
    with pytest.raises(ValueError, match="nothing to show yet"):
        mqar.EXPERIMENT.points(tmp_path)
    # Without the phase, another split is another metric.
    write(tmp_path / "results.csv", mqar.EXPERIMENT, mqar_rows("lla", None, 64, (1.0,)))
    text = (tmp_path / "results.csv").read_text().replace("test/acc", "validation/acc")
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match="has the metric validation/accuracy"):
        mqar.EXPERIMENT.points(tmp_path)


def test_an_unknown_phase_is_refused(tmp_path):
    rows = phase(mqar_rows("lla", "length_64", 64, (1.0,)), "finale")
    write(tmp_path / "results.csv", mqar.EXPERIMENT, rows)
    with pytest.raises(ValueError, match=r"phase 'finale'; known: select, final"):
        mqar.EXPERIMENT.points(tmp_path)


def test_without_phases_the_validation_split_selects(tmp_path):
    rows = [
        ({"model.mixer.name": "lla", "model.width": 64, VALIDATION: validation}, 0, rate, test)
        for rate, validation, test in ((0.001, 0.8, 0.7), (0.003, 0.7, 0.9))
    ]
    write(tmp_path / "results.csv", mqar.EXPERIMENT, rows)
    (point,) = mqar.EXPERIMENT.points(tmp_path)
    assert point.learning_rate == 0.001 and point.values == (0.7,)
    assert point.further == {"validation/accuracy": (0.8,)}


def with_and_without():
    rows = finals("gated_deltanet", 64, 0.003, (1.0, 0.9), **{CONV: 4})
    rows += finals("gated_deltanet", 64, 0.001, (0.5, 0.3), **{CONV: 0})
    return rows + finals("lla", 64, 0.01, (1.0, 1.0))


def test_without_its_convolutions_a_mechanism_has_a_row_of_its_own(tmp_path, capsys):
    write(tmp_path / "results.csv", mqar.EXPERIMENT, with_and_without())
    found = mqar.EXPERIMENT.points(tmp_path)
    names = ["LLA", "Gated DeltaNet", "Gated DeltaNet, no conv."]
    assert [point.label for point in found] == names
    assert [point.taps for point in found] == [None, 4, 0]
    text = printed(mqar.EXPERIMENT, capsys, tmp_path, "--variant=")
    assert "| Gated DeltaNet | 0.950 ± 0.071 (1/2) |" in text
    assert "| Gated DeltaNet, no conv. | 0.400 ± 0.141 (0/2) |" in text
    figure = mqar_plot.draw(found, tmp_path, "")["figure"]
    printable.check(figure)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    bars = [container.lines[0] for container in axis.containers]
    assert [line.get_ydata().tolist() for line in bars] == [[0], [1], [2]]
    assert [line.get_xdata().tolist() for line in bars] == [[1.0], [0.95], [0.4]]
    assert [line.get_markerfacecolor() == "white" for line in bars] == [False, False, True]
    assert bars[1].get_color() == bars[2].get_color()


def test_the_other_figures_draw_both(tmp_path):
    rows = []
    for items in (2, 3, 5):
        for taps, value in ((4, 1.0), (0, 0.4)):
            choices = {"model.mixer.name": "gated_deltanet", "task.num_items": items, CONV: taps}
            rows += [(choices, seed, 0.01, value - 0.1 * seed) for seed in (0, 1)]
    write(tmp_path / "results.csv", tracking.EXPERIMENT, rows)
    figure = tracking_plot.draw(tracking.EXPERIMENT.points(tmp_path), tmp_path, "")["figure"]
    printable.check(figure)
    both, without = (container.lines[0] for container in figure.axes[0].containers)
    assert both.get_linestyle() == "-" and without.get_linestyle() == ":"
    assert both.get_xdata().tolist() == without.get_xdata().tolist() == [2, 3, 5]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Gated DeltaNet", "Gated DeltaNet, no conv.", "chance, 1/N"]


def test_options_of_other_mechanisms_choose_nothing(tmp_path):
    """Seeds of a point in two files, of which one has other mechanisms with options, too."""
    first, second = finals("lla", 64, 0.01, (1.0, 0.8))
    write(tmp_path / "a.csv", mqar.EXPERIMENT, [first])
    other = finals("gated_deltanet", 64, 0.01, (0.5,), **{CONV: 4})
    write(tmp_path / "b.csv", mqar.EXPERIMENT, [second, *other])
    lla, _ = mqar.EXPERIMENT.points(tmp_path)
    assert lla.values == (1.0, 0.8)


CONVOLUTIONAL = ("mesanet", "deltanet", "gated_deltanet", "mamba", "mamba2", "hyena")
MECHANISMS = ("lla", "parallax", "softmax", *CONVOLUTIONAL, "gla")
GRIDS = {
    regression_plot: [{"task.segment_length": 2**power} for power in range(5, 10)],
    tracking_plot: [{"task.num_items": items} for items in (2, 3, 4, 5, 6, 8)],
    mqar_plot: [
        {"case": f"length_{length}", "model.width": width}
        for length in (64, 128, 256, 512)
        for width in (64, 128)
    ],
}


@pytest.mark.parametrize("module", GRIDS, ids=lambda module: module.summary.EXPERIMENT.name)
def test_a_grid_of_all_mechanisms_can_be_printed(module, tmp_path):
    draws = random.Random(0)
    rows = [
        ({"model.mixer.name": name, f"mixers.{name}.short_conv": taps, **cell}, seed, 0.01, value)
        for name in MECHANISMS
        for taps in ((4, 0) if name in CONVOLUTIONAL else (0,))
        for cell in GRIDS[module]
        for seed, value in enumerate(draws.random() for _ in range(5))
    ]
    experiment = module.summary.EXPERIMENT
    write(tmp_path / "results.csv", experiment, phase(rows, "final"))
    found = experiment.points(tmp_path)
    assert len(found) == 16 * len(GRIDS[module])
    printable.check(module.draw(found, tmp_path, "")["figure"])


def write_curves(path, rows):
    """Rows (choices, seed, rate, step -> validation accuracy) as a file of curves."""
    made = [
        {**choices, "seed": seed, "learning_rate": rate, "step": step, "validation/accuracy": value}
        for choices, seed, rate, run in rows
        for step, value in run.items()
    ]
    path.parent.mkdir()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(c for row in made for c in row), restval="")
        writer.writeheader()
        writer.writerows(made)


def test_learning_curves(tmp_path):
    write(tmp_path / "results.csv", mqar.EXPERIMENT, with_and_without())
    found = mqar.EXPERIMENT.points(tmp_path)
    assert mqar_plot.draw(found, tmp_path, "")["curves"] is None
    choices = {"model.mixer.name": "gated_deltanet", "model.width": 64, "case": "length_64"}
    final, trial = ({**choices, shared.PHASE: name, CONV: 0} for name in ("final", "select"))
    runs = [
        (final, 100, 0.001, {0: 0.0, 500: 0.1, 1000: 0.5}),
        (final, 101, 0.001, {0: 0.0, 500: 0.3}),  # stopped: 0.3 from then on
        (trial, 100, 0.001, {0: 0.0, 500: 0.9}),
        (final, 102, 0.003, {0: 0.0, 500: 0.9}),
        ({**final, CONV: 4}, 100, 0.001, {0: 0.0, 500: 0.9}),
    ]
    write_curves(tmp_path / "curves" / "results.csv", runs)
    metric, ((point, (steps, values)),) = trained_curves.read(mqar.EXPERIMENT, found, tmp_path)
    assert metric == "validation/accuracy" and point.label == "Gated DeltaNet, no conv."
    assert steps.tolist() == [0, 500, 1000]
    assert values.tolist() == [[0.0, 0.1, 0.5], [0.0, 0.3, 0.3]]
    figure = mqar_plot.draw(found, tmp_path, "")["curves"]
    printable.check(figure)
    (axis,) = figure.axes
    assert axis.lines[0].get_xydata().tolist() == [[500, 0.2], [1000, 0.4]]
    assert axis.get_ylabel() == "validation accuracy"
    # Curves of a file without results are in no figure.
    (tmp_path / "results.csv").rename(tmp_path / "other.csv")
    assert trained_curves.read(mqar.EXPERIMENT, found, tmp_path)[1] == []
