"""What a figure has to fulfil to be printed, for the tests that draw figures."""

import itertools

from lla.runs import figures


def check(figure):
    """Asserts that all of it can be read at its size, and draws it for that.

    It is between a column and a page wide, texts have 6.5 to 8.5 points, lie inside and do not
    cover one another; logarithmic axes have at least three labels; a series of fewer than three
    points has no line; the legend of the figure covers no axis.
    """
    assert figures.COLUMN - 1e-6 <= figure.get_figwidth() <= figures.PAGE + 1e-6
    figure.set_dpi(220)  # as saved: text is wider or narrower at others
    figure.draw_without_rendering()
    boxes = _texts(figure)
    for text, box in boxes:
        assert 6.5 <= text.get_fontsize() <= 8.5, text
        inside = figure.bbox.padded(2)
        assert inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1), text
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, two)
    for axis in figure.axes:
        if axis.axison:
            _check_axis(axis)
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(axis.bbox.overlaps(box) for axis in figure.axes if axis.axison)


def _check_axis(axis):
    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == "log":
            low, high = sorted(side.get_view_interval())
            ticks = [at for at in side.get_majorticklocs() if low <= at <= high]
            labels = side.get_major_formatter().format_ticks(ticks)
            assert sum(map(bool, labels)) >= 3, (axis.get_title(), side)
    for container in axis.containers:
        line = container.lines[0]
        if len(line.get_xdata()) < 3:
            assert line.get_linestyle() == "None", container.get_label()


def _texts(figure):
    """All texts that are visible, with their boxes in pixels."""
    found = list(figure.texts) + [text for legend in figure.legends for text in legend.get_texts()]
    if figure._suptitle is not None and figure._suptitle not in found:
        found.append(figure._suptitle)
    for axis in figure.axes:
        if not axis.axison:
            continue
        found += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())
            found += [
                tick.label1
                for tick in side.get_major_ticks()
                if tick.label1.get_visible() and low <= tick.get_loc() <= high
            ]
        if axis.get_legend() is not None:
            found += axis.get_legend().get_texts()
    return [
        (text, text.get_window_extent())
        for text in found
        if text.get_visible() and text.get_text().strip()
    ]
