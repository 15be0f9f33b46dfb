"""Points of the figures of trained models, on made-up result files."""

import random

import pytest

from lla.experiments.in_context_regression import plot as regression_plot
from lla.experiments.in_context_regression import summary as regression
from lla.experiments.mqar import plot as mqar_plot
from lla.experiments.mqar import summary as mqar
from lla.experiments.state_tracking import plot as tracking_plot
from lla.experiments.state_tracking import summary as tracking
from lla.experiments.trained import curves
from lla.experiments.trained import tables as shared
from tests.experiments import printable
from tests.experiments.trained import (
    mqar_rows,
    phase_rows,
    regression_rows,
    write,
    write_phases,
    write_rows,
)


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


# ---------------------------------------------------------------------------------------------
# Two phases

CELL = {"model.width": 64, "case": "length_64"}
VALIDATION = shared.FURTHER + "validation/accuracy"


def selected(mechanism, runs, **options):
    """Rows of the phase "select" at `CELL`; `runs`: learning rate -> validation accuracies."""
    return phase_rows("select", mechanism, rising(runs), **CELL, **options)


def final(mechanism, runs, **options):
    return phase_rows("final", mechanism, rising(runs), **CELL, **options)


def rising(runs):
    return {
        rate: [None if value is None else (0, value / 2, value) for value in values]
        for rate, values in runs.items()
    }


def mqar_points(tmp_path, rows):
    write_phases(tmp_path / "results.csv", mqar.EXPERIMENT, rows)
    return mqar.EXPERIMENT.points(tmp_path)


def test_final_runs_are_shown_by_their_test_split_and_trials_tell_the_edge(tmp_path):
    rows = selected("softmax", {0.001: (0.2, 0.3), 0.003: (0.9, 1.0), 0.01: (0.5, None)})
    rows += final("softmax", {0.003: (0.91, 0.92, 0.93, 0.94, 0.99)})
    rows += selected("lla", {0.001: (0.99, 1.0)}) + final("lla", {0.001: (1.0, None, 0.98)})
    rows += selected("gla", {0.001: (0.99, 1.0)})  # its final runs are still to come
    lla, softmax = mqar_points(tmp_path, rows)
    assert softmax.values == pytest.approx((0.909, 0.919, 0.929, 0.939, 0.989))
    assert softmax.further == {"validation/accuracy": (0.91, 0.92, 0.93, 0.94, 0.99)}
    assert softmax.learning_rate == 0.003 and not softmax.edge and softmax.phase == "final"
    assert (softmax.diverged, softmax.runs, softmax.updates) == (1, 11, (500,))
    assert lla.values == pytest.approx((0.999, 0.979)) and (lla.diverged, lla.runs) == (1, 5)
    assert shared.rate_cell(lla) == "0.001 (1 of 5 diverged)"
    assert shared.seeds([lla, softmax]) == "2 to 5 seeds"
    # A run that stopped for the validation split counts as one that got there.
    assert mqar.accuracy_cell(softmax) == "0.937 ± 0.031 (1/5)"


def test_a_run_that_ended_below_the_goal_has_not_solved_the_task(tmp_path):
    """Whatever its accuracy on the test split is: both tables count the same runs."""
    rows = selected("gla", {0.001: (0.99, 1.0)}) + final("gla", {0.001: (0.99, 0.985)})
    write_phases(tmp_path / "r.csv", mqar.EXPERIMENT, rows, shift=0.005)
    (point,) = mqar.EXPERIMENT.points(tmp_path)
    assert point.values == pytest.approx((0.995, 0.99))
    assert mqar.accuracy_cell(point).endswith("(1/2)")
    assert shared.updates_cell(point).endswith("(1/2)")


def test_runs_that_all_diverged_are_no_values(tmp_path):
    (point,) = mqar_points(tmp_path, final("lla", {0.001: (None, None)}))
    assert point.values == () and point.diverged == 2
    assert mqar.accuracy_cell(point) == "diverged"
    assert shared.updates_cell(point) == "none of 2"


def test_updates_to_the_goal(tmp_path):
    runs = {0.001: [(0, 0.5, 0.99), (0, 0.2, 0.5, 0.9, 0.99), (0, 0.1)]}
    (point,) = mqar_points(tmp_path, phase_rows("final", "lla", runs, **CELL))
    assert point.updates == (500, 1000)
    assert shared.updates_cell(point) == "750 ± 354 (2/3)"
    table = mqar.tables([point], tmp_path, "")
    assert "Updates to an accuracy of 0.99" in "\n".join(table)
    assert "| LLA | 750 ± 354 (2/3) |" in "\n".join(table)
    assert "that other seeds selected, by the validation split" in table[0]


def test_updates_are_drawn(tmp_path):
    runs = {0.001: [(0, 0.5, 0.99), (0, 0.2, 0.5, 0.9, 0.99), (0, 0.1)]}
    rows = phase_rows("final", "lla", runs, **CELL) + final("gla", {0.001: (0.9,)})
    drawn = mqar_plot.draw(mqar_points(tmp_path, rows), tmp_path, "")
    printable.check(drawn["updates"])
    (axis,) = drawn["updates"].axes
    (bar,) = axis.containers
    assert bar.lines[0].get_xydata().tolist() == [[750, 0]]
    (ends,) = [segment[:, 0].tolist() for segment in bar.lines[2][0].get_segments()]
    assert ends == [500, 1000]
    assert [text.get_text() for text in axis.texts] == ["2/3", "0/1"]
    # Where none got there, there is nothing to draw.
    found = mqar_points(tmp_path, final("gla", {0.001: (0.9,)}))
    assert mqar_plot.draw(found, tmp_path, "")["updates"] is None


def test_final_runs_at_the_lowest_rate_are_marked(tmp_path):
    rows = selected("lla", {0.001: (0.9,), 0.003: (0.8,)}) + final("lla", {0.001: (0.7,)})
    (point,) = mqar_points(tmp_path, rows)
    assert point.edge and point.values == pytest.approx((0.699,))


def test_final_runs_at_two_rates_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"final runs differ.*model\.mixer\.name=lla"):
        mqar_points(tmp_path, final("lla", {0.001: (0.9,), 0.003: (0.9,)}))


def test_trials_alone_are_no_result(tmp_path):
    with pytest.raises(ValueError, match="nothing to show yet"):
        mqar_points(tmp_path, selected("lla", {0.001: (0.9,)}))


def test_the_validation_split_alone_is_another_metric(tmp_path):
    write(tmp_path / "results.csv", mqar.EXPERIMENT, mqar_rows("lla", None, 64, (1.0,)))
    text = (tmp_path / "results.csv").read_text().replace("test/acc", "validation/acc")
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match="has the metric validation/accuracy"):
        mqar.EXPERIMENT.points(tmp_path)


def test_an_unknown_phase_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"phase 'finale'; known: select, final"):
        mqar_points(tmp_path, phase_rows("finale", "lla", rising({0.1: (1.0,)}), **CELL))


def test_files_without_phases_give_way_to_those_with_final_runs(tmp_path):
    old = mqar_rows("lla", "length_64", 64, (0.1, 0.2)) + mqar_rows("gla", "length_64", 64, (0.3,))
    write(tmp_path / "old.csv", mqar.EXPERIMENT, old)
    trials = selected("lla", {0.001: (0.9,)})
    write_phases(tmp_path / "trials.csv", mqar.EXPERIMENT, trials)
    gla = mqar.EXPERIMENT.points(tmp_path)[-1]
    assert (gla.mechanism, gla.values, gla.phase) == ("gla", (0.3,), None)
    (point,) = mqar_points(tmp_path, final("lla", {0.001: (0.7,)}))
    assert point.values == pytest.approx((0.699,)) and point.runs == 2


def test_without_phases_the_validation_split_selects(tmp_path):
    rows = [
        ({"model.mixer.name": "lla", "model.width": 64, VALIDATION: validation}, 0, rate, test)
        for rate, validation, test in ((0.001, 0.8, 0.7), (0.003, 0.7, 0.9))
    ]
    write(tmp_path / "results.csv", mqar.EXPERIMENT, rows)
    (point,) = mqar.EXPERIMENT.points(tmp_path)
    assert point.learning_rate == 0.001 and point.values == (0.7,)
    assert point.further == {"validation/accuracy": (0.8,)}


# ---------------------------------------------------------------------------------------------
# Mechanisms with and without options

CONV, NORM = "mixers.gated_deltanet.short_conv", "mixers.softmax.qk_norm"


def with_and_without():
    rows = final("gated_deltanet", {0.003: (1.0, 0.9)}, **{CONV: 4})
    rows += final("gated_deltanet", {0.001: (0.5, 0.3)}, **{CONV: 0})
    rows += final("softmax", {0.001: (0.8, 0.6)}, **{NORM: True})
    rows += final("softmax", {0.003: (0.7, 0.7)}, **{NORM: False})
    return rows + final("lla", {0.01: (1.0, 1.0)})


def test_with_other_options_a_mechanism_has_a_row_of_its_own(tmp_path, capsys):
    found = mqar_points(tmp_path, with_and_without())
    names = [
        "LLA", "Softmax", "Softmax, QK-norm", "Gated DeltaNet", "Gated DeltaNet, no conv."
    ]  # fmt: skip
    assert [point.label for point in found] == names
    assert [point.options["short_conv"] for point in found] == [None, None, None, 4, 0]
    assert [point.options["qk_norm"] for point in found] == [None, False, True, None, None]
    assert shared.summary_command(mqar.EXPERIMENT, [str(tmp_path), "--variant="]) == 0
    text = capsys.readouterr().out
    assert "| Gated DeltaNet | 0.949 ± 0.071 (1/2) |" in text
    assert "| Gated DeltaNet, no conv. | 0.399 ± 0.141 (0/2) |" in text
    assert "| Softmax, QK-norm | 0.699 ± 0.141 (0/2) |" in text
    figure = mqar_plot.draw(found, tmp_path, "")["figure"]
    printable.check(figure)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    bars = [container.lines[0] for container in axis.containers]
    assert [line.get_ydata().tolist() for line in bars] == [[0], [1], [2], [3], [4]]
    assert [line.get_xdata()[0] for line in bars] == pytest.approx(
        [0.999, 0.699, 0.699, 0.949, 0.399]
    )
    opened = [line.get_markerfacecolor() == "white" for line in bars]
    assert opened == [False, False, True, False, True]
    assert bars[1].get_color() == bars[2].get_color() != bars[3].get_color()
    assert bars[3].get_color() == bars[4].get_color()


def test_the_other_figures_draw_both(tmp_path):
    rows = []
    for items in (2, 3, 5):
        for taps, value in ((4, 1.0), (0, 0.4)):
            choices = {"task.num_items": items, CONV: taps}
            runs = {0.01: [(0, value), (0, value - 0.1)]}
            rows += phase_rows("final", "gated_deltanet", runs, **choices)
    write_phases(tmp_path / "results.csv", tracking.EXPERIMENT, rows)
    found = tracking.EXPERIMENT.points(tmp_path)
    figure = tracking_plot.draw(found, tmp_path, "")["figure"]
    printable.check(figure)
    both, without = (container.lines[0] for container in figure.axes[0].containers)
    assert both.get_linestyle() == "-" and without.get_linestyle() == ":"
    assert both.get_xdata().tolist() == without.get_xdata().tolist() == [2, 3, 5]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Gated DeltaNet", "Gated DeltaNet, no conv.", "chance, 1/N"]
    text = "\n".join(tracking.tables(found, tmp_path, ""))
    assert "| Gated DeltaNet | 250 ± 0 (1/2) |" in text


def test_options_of_other_mechanisms_choose_nothing(tmp_path):
    """Seeds of a point in two files, of which one has other mechanisms with options, too."""
    first, second = final("lla", {0.01: (1.0, 0.8)})
    write_phases(tmp_path / "a.csv", mqar.EXPERIMENT, [first])
    other = final("gated_deltanet", {0.01: (0.5,)}, **{CONV: 4})
    write_phases(tmp_path / "b.csv", mqar.EXPERIMENT, [second, *other])
    lla, _ = mqar.EXPERIMENT.points(tmp_path)
    assert lla.values == pytest.approx((0.999, 0.799))


CONVOLUTIONAL = ("mesanet", "deltanet", "gated_deltanet", "mamba", "mamba2", "hyena")
VARIANTS = [(name, {}) for name in ("lla", "parallax", "gla")]
VARIANTS += [("softmax", {NORM: value}) for value in (False, True)]
VARIANTS += [
    (name, {f"mixers.{name}.short_conv": taps}) for name in CONVOLUTIONAL for taps in (4, 0)
]
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
    draws, experiment = random.Random(0), module.summary.EXPERIMENT
    rows = []
    for name, options in VARIANTS:
        for cell in GRIDS[module]:
            lengths = [draws.randint(2, 60) for _ in range(5)]
            runs = [[draws.random() for _ in range(length)] for length in lengths]
            rows += phase_rows("final", name, {0.01: runs}, **options, **cell)
    write_phases(tmp_path / "results.csv", experiment, rows, goal=0.5)
    found = experiment.points(tmp_path)
    assert len(found) == len(VARIANTS) * len(GRIDS[module])
    drawn = module.draw(found, tmp_path, "")
    for figure in drawn.values():
        printable.check(figure)
    assert sum(bool(axis.lines) for axis in drawn["curves"].axes) == len(GRIDS[module])


# ---------------------------------------------------------------------------------------------
# Learning curves


def test_curves_in_the_result_files(tmp_path):
    runs = {0.001: [(0, 0.1, 0.5, 0.6), (0, 0.3, 0.995), None]}
    rows = phase_rows("final", "lla", runs, **CELL) + selected("lla", {0.001: (0.9,)})
    found = mqar_points(tmp_path, rows)
    metric, ((point, (steps, values)),) = curves.read(mqar.EXPERIMENT, found, tmp_path)
    assert metric == "validation/accuracy" and point.mechanism == "lla"
    assert steps.tolist() == [0, 250, 500, 750]
    # One that stopped keeps its last value; one that diverged is not drawn.
    assert values.tolist() == [[0, 0.1, 0.5, 0.6], [0, 0.3, 0.995, 0.995]]
    figure = mqar_plot.draw(found, tmp_path, "")["curves"]
    printable.check(figure)
    (axis,) = figure.axes
    assert axis.lines[0].get_xdata().tolist() == [250, 500, 750]
    assert axis.lines[0].get_ydata() == pytest.approx([0.2, 0.7475, 0.7975])
    assert axis.get_ylabel() == "validation accuracy"


def test_the_last_evaluation_is_after_the_last_update(tmp_path):
    write_phases(tmp_path / "a.csv", mqar.EXPERIMENT, final("lla", {0.001: (0.6,)}))
    text = (tmp_path / "a.csv").read_text().replace(",500,", ",400,")
    (tmp_path / "a.csv").write_text(text)
    found = mqar.EXPERIMENT.points(tmp_path)
    _, ((_, (steps, _)),) = curves.read(mqar.EXPERIMENT, found, tmp_path)
    assert steps.tolist() == [0, 250, 400]


@pytest.mark.parametrize("metric", ["validation/accuracy", "test/accuracy"])
def test_curves_beside_the_result_files(tmp_path, metric):
    rows = [
        ({**CELL, "model.mixer.name": name}, seed, rate, 1 - rate)
        for name in ("lla", "gla")
        for seed in (0, 1)
        for rate in (0.1, 0.3)
    ]
    write(tmp_path / "results.csv", mqar.EXPERIMENT, rows)
    found = mqar.EXPERIMENT.points(tmp_path)
    assert mqar_plot.draw(found, tmp_path, "")["curves"] is None
    runs = [(0, 0.1, (0.0, 0.1, 0.5)), (1, 0.1, (0.0, 0.3)), (0, 0.3, (0.0, 0.9))]
    (tmp_path / "curves").mkdir()
    evaluations = [
        {**CELL, "model.mixer.name": "lla", "seed": seed, "learning_rate": rate, "step": 500 * i,
         metric: value}
        for seed, rate, curve in runs
        for i, value in enumerate(curve)
    ]  # fmt: skip
    write_rows(tmp_path / "curves" / "results.csv", evaluations)
    named, ((point, (steps, values)),) = curves.read(mqar.EXPERIMENT, found, tmp_path)
    assert named == metric and point.mechanism == "lla"
    assert steps.tolist() == [0, 500, 1000]
    assert values.tolist() == [[0.0, 0.1, 0.5], [0.0, 0.3, 0.3]]
    # Curves of a file without results are in no figure.
    (tmp_path / "results.csv").rename(tmp_path / "other.csv")
    assert curves.read(mqar.EXPERIMENT, found, tmp_path)[1] == []
