"""Figures at the size of print: ticks, marks, legends, and all that are committed."""

import importlib
import pathlib

import numpy as np
import pytest

from lla.runs import figures, styles
from tests.experiments import printable

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
pytest.importorskip("matplotlib")
LLA, SOFTMAX = styles.style("lla"), styles.style("softmax")


@pytest.fixture
def axis():
    return figures.new(width=figures.COLUMN, height=2.0)[1][0, 0]


@pytest.mark.parametrize("low", [3e-14, 2e-4, 0.03, 0.6, 4.0])
@pytest.mark.parametrize("ratio", [1.02, 1.3, 2.5, 7.0, 60.0, 900.0, 1e6, 1e13])
def test_logarithmic_ticks_are_between_three_and_seven(low, ratio):
    ticks = figures.log_ticks(low, low * ratio)
    assert 3 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    assert low <= ticks[0] and ticks[-1] <= low * ratio


def test_logarithmic_ticks_are_round():
    assert figures.log_ticks(0.05, 1.2) == [0.05, 0.1, 0.2, 0.5, 1.0]
    assert figures.log_ticks(0.002, 1.5) == [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    assert figures.log_ticks(3e-5, 2.0) == [1e-4, 1e-3, 1e-2, 0.1, 1.0]
    assert figures.log_ticks(0.11, 0.6) == [0.15, 0.2, 0.3, 0.5]
    assert figures.log_ticks(2e-4, 0.3, powers=True) == [1e-3, 1e-2, 1e-1]
    with pytest.raises(ValueError, match="0 < low < high"):
        figures.log_ticks(0.0, 1.0)


def labels(side):
    low, high = sorted(side.get_view_interval())
    ticks = [tick for tick in side.get_majorticklocs() if low <= tick <= high]
    return side.get_major_formatter().format_ticks(ticks)


def test_labels_of_a_logarithmic_axis(axis):
    axis.plot([1, 2], [0.11, 0.6])
    figures.log_axis(axis)
    assert labels(axis.yaxis) == ["0.15", "0.2", "0.3", "0.5"]
    axis.plot([1], [1e-9])
    axis.relim()
    axis.autoscale()
    figures.log_axis(axis)
    assert 3 <= len(labels(axis.yaxis)) <= 7 and all("10^" in text for text in labels(axis.yaxis))


def test_a_logarithmic_axis_has_its_grid(axis):
    axis.plot([1, 2], [0.11, 0.6])
    axis.grid(True, axis="both")
    for _ in range(2):  # axes that share a scale are set more than once
        figures.log_axis(axis)
        for side in (axis.xaxis, axis.yaxis):
            assert all(line.get_visible() for line in side.get_gridlines())


def test_every_length_has_a_tick_and_the_longest_a_label(axis):
    values = [2**power for power in range(9, 17)]
    axis.plot(values, values)
    figures.length_axis(axis, values[::-1])
    assert axis.get_xticks().tolist() == values
    shown = [label.get_text() for label in axis.get_xticklabels()]
    assert shown == ["", "1k", "", "4k", "", "16k", "", "64k"]


def test_marks_are_at_their_place_and_two_have_no_line(axis):
    axis.set_yscale("log")
    figures.marks(axis, LLA, [1, 2], [0.5, 0.6], [0.9, 0.1])
    figures.marks(axis, SOFTMAX, [1, 2, 4], [0.5, 0.6, 0.7], [0.1] * 3, [0.2] * 3)
    two, three = axis.containers
    assert two.lines[0].get_linestyle() == "None" and three.lines[0].get_linestyle() == "-"
    assert two.lines[0].get_xdata().tolist() == [1, 2]
    first, second = two.lines[2][0].get_segments()
    assert first[:, 1] == pytest.approx([0.05, 1.4])  # cut, or it would reach zero
    assert second[:, 1] == pytest.approx([0.5, 0.7])
    assert three.lines[2][0].get_segments()[0][:, 1] == pytest.approx([0.4, 0.7])


def test_the_legend_has_series_in_order_and_the_rest_behind(axis):
    axis.axhline(1, label="chance")
    figures.marks(axis, styles.style("gated_deltanet", 0), [1], [1], [0.1])
    figures.marks(axis, SOFTMAX, [1], [1], [0.1])
    figures.marks(axis, styles.style("gated_deltanet"), [1], [1], [0.1])
    figures.marks(axis, SOFTMAX, [2], [1], [0.1])
    figures.marks(axis, LLA, [1], [1], [0.1])
    figure = axis.figure
    figures.legend(figure, [axis])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["LLA", "Softmax"] and names[-1] == "chance"
    assert sorted(names[2:4]) == ["Gated DeltaNet", "Gated DeltaNet, no conv."]


# ---------------------------------------------------------------------------------------------
# What can be printed


def good():
    figure, axes = figures.new(width=figures.COLUMN, height=2.0)
    figures.marks(axes[0, 0], LLA, [1, 2, 4], [0.1, 0.2, 0.5], [0.01] * 3)
    figures.log_axis(axes[0, 0])
    figures.legend(figure, axes.flat)
    return figure, axes[0, 0]


def break_width(figure, axis):
    figure.set_size_inches(9, 2)


def break_font(figure, axis):
    axis.set_title("small", fontsize=5)


def break_overlap(figure, axis):
    axis.text(1, 0.2, "one")
    axis.text(1, 0.2, "on another")


def break_clipped(figure, axis):
    figure.text(0.9, 0.5, "beyond the right end of the figure")


def break_ticks(figure, axis):
    axis.set_yticks([0.1, 0.5])


def break_line(figure, axis):
    axis.errorbar([1, 2], [0.2, 0.2], [0.1, 0.1])


def break_legend(figure, axis):
    figure.legend(["LLA"], loc="center")


def test_a_figure_that_can_be_printed():
    printable.check(good()[0])


@pytest.mark.parametrize(
    "change",
    [break_width, break_font, break_overlap, break_clipped, break_ticks, break_line, break_legend],
)
def test_one_that_cannot(change):
    figure, axis = good()
    change(figure, axis)
    with pytest.raises(AssertionError):
        printable.check(figure)


def test_marks_of_trained_figures_are_on_their_ticks():
    for name in ("in_context_regression", "state_tracking"):
        plot = importlib.import_module(f"lla.experiments.{name}.plot")
        results = plot.summary.EXPERIMENT.folder / "results"
        figure = plot.draw(plot.summary.EXPERIMENT.points(results), results)["figure"]
        for axis in figure.axes:
            for bars in axis.containers:
                assert np.isin(bars.lines[0].get_xdata(), axis.get_xticks()).all()
                assert bars.has_yerr
