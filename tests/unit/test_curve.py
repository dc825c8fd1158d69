"""Curves: every number here is worked out by hand, and the SVG is read back by an XML parser."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from pocketlm.training import curve
from pocketlm.training.curve import Series

SVG = "{http://www.w3.org/2000/svg}"


def test_points_that_are_no_numbers_are_left_out() -> None:
    nan, infinity = math.nan, math.inf
    assert curve.finite([(1, 2), (2, nan), (3, infinity), (nan, 1), (4, 0)]) == [(1, 2), (4, 0)]


def test_thinning_keeps_the_extremes_of_each_stretch_in_their_order() -> None:
    ys = [5, 9, 1, 4, 7, 7, 2, 3]
    points = [(float(x), float(y)) for x, y in enumerate(ys)]
    assert curve.thinned(points, 4) == [(1, 9), (2, 1), (4, 7), (6, 2)]
    assert curve.thinned(points, 8) == points
    flat = [(float(x), 1.0) for x in range(6)]
    assert curve.thinned(flat, 4) == [(0, 1), (3, 1)]


def test_smoothing_is_the_mean_of_the_last_ones() -> None:
    points = [(0.0, 8.0), (1.0, 4.0), (2.0, 0.0), (3.0, 2.0)]
    assert curve.smoothed(points, 2) == [(0, 8), (1, 6), (2, 2), (3, 1)]
    assert curve.smoothed(points, 1) == points
    assert [curve.span_of(steps) for steps in (10, 60, 2600, 1_000_000)] == [1, 1, 52, 100]


def test_the_ceiling_cuts_the_fall_of_the_first_steps_only() -> None:
    falling = [(0.0, 10.0), (4.0, 8.0), (50.0, 3.0), (100.0, 2.0)]
    assert curve.ceiling([falling]) == 3  # 5 % of 0..100: the points at 0 and 4 are not asked
    assert curve.ceiling([falling, [(60.0, 6.0)]]) == 6
    assert curve.ceiling([[(7.0, 5.0)]]) == 5


@pytest.mark.parametrize(
    ("low", "high", "most", "wanted"),
    [
        (0, 1, 6, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1.83, 4.7, 6, [2, 2.5, 3, 3.5, 4, 4.5]),
        (0, 5.3e6, 6, [0, 1e6, 2e6, 3e6, 4e6, 5e6]),
        (0, 3e-4, 4, [0, 1e-4, 2e-4, 3e-4]),
        (2, 2, 4, [2]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, most: int, wanted: list[float]) -> None:
    assert curve.ticks(low, high, most) == pytest.approx(wanted)


def test_numbers_on_axes() -> None:
    values = (0, 0.02, 2.5, 999, 40_000, 1.5e6, 2e9, 3e12, 1e-5)
    assert [curve.short(value) for value in values] == ["0", "0.02", "2.5", "999", "40k", "1.5M", "2B", "3T", "1e-05"]
    assert curve.tick_labels([2, 2.5, 3]) == ["2.0", "2.5", "3.0"]
    assert curve.tick_labels([0, 500_000, 1_000_000]) == ["0", "500k", "1M"]


def test_a_frame_places_points_as_shares_of_it() -> None:
    shown = curve.Frame(0, 10, 1, 3)
    assert shown.place((0, 3)) == (0, 0)
    assert shown.place((5, 2)) == (0.5, 0.5)
    assert shown.place((10, 1)) == (1, 1)
    assert shown.place((0, 5)) == (0, -1)


def test_a_terminal_chart_to_the_character() -> None:
    """y is framed from 1 - 0.08 to 3 + 0.08; a row is 0.54 high and labelled at its middle: 2.81, 1.73 and 1.19.

    The mark (9, 2) lies in the last column, half way down. The line is flat, then falls evenly to the last dot but
    one row: 1 lies 0.08 above the lower edge.
    """
    assert curve.terminal_chart([(0.0, 3.0), (1.0, 3.0), (9.0, 1.0)], [(9.0, 2.0)], 12, 6) == [
        "2.81 ┤⠒⢄    ",
        "     │ ⠈⠢⡀  ",
        "1.73 ┤   ⠑⢄●",
        "1.19 ┤    ⠈⠢",
        "     └──────",
        "      0    9",
    ]


def test_what_is_cut_leaves_the_terminal_chart_at_its_top() -> None:
    falling = [(float(x), 100.0 / (1 + x)) for x in range(101)]  # the ceiling is that of step 6: 14.29
    chart = curve.terminal_chart(falling, [(0.0, 100.0)], 60, 10)
    assert chart[0].startswith("13.92")  # half of an eighth below 14.29 + 4 % of (14.29 - 0.99)
    assert chart[0].strip()[-1] not in "┤│"
    assert curve.MARK not in "".join(chart)


def test_a_chart_of_one_point_or_none() -> None:
    assert curve.terminal_chart([], [], 40, 8) == []
    assert any("⠁" <= character <= "⣿" for row in curve.terminal_chart([(1.0, 5.0)], [], 40, 8) for character in row)
    assert curve.svg_chart([Series("", [], "line")], title="t", x_label="x") == ""
    assert "<polyline" in curve.svg_chart([Series("", [(1.0, 5.0)], "line")], title="t", x_label="x")


def drawing(**options: object) -> ElementTree.Element:
    series = [
        Series("each step", [(0.0, 4.0), (50.0, 3.0), (100.0, 2.0)], "line"),
        Series("<held> & out", [(100.0, 2.5)], "dots"),
    ]
    text = curve.svg_chart(series, title="a < b", x_label="x & y", standalone=True, width=178, height=176, **options)  # type: ignore[arg-type]
    return ElementTree.fromstring(text)


def test_svg_points_stand_where_they_belong() -> None:
    """The plot is 100 x 100 and x goes from 0 to 100; y from 2, the lowest, to 3, the ceiling, and 4 % on each side."""
    inner = drawing().find(f"{SVG}svg")
    assert inner is not None
    line = inner.find(f"{SVG}polyline")
    dot = inner.find(f"{SVG}circle")
    assert line is not None
    assert dot is not None
    # 3 is 0.04 / 1.08 = 3.7 % from the top, 2 is 96.3 %, 4 is -88.9 %; every x is moved by the radius of a dot
    assert line.get("points") == "3.5,-88.9 53.5,3.7 103.5,96.3"
    assert (dot.get("cx"), dot.get("cy")) == ("103.5", "50.0")
    assert [dot_title.text for dot_title in dot] == ["2.5000 at 100"]


def test_svg_axes_and_words() -> None:
    svg = drawing()
    texts = [element.text for element in svg.iter(f"{SVG}text")]
    assert texts[:6] == ["2.0", "2.2", "2.4", "2.6", "2.8", "3.0"]
    assert {"a < b", "x & y", "each step", "<held> & out"} <= set(texts)
    assert svg.get("aria-label") == "a < b"
    grid = [path.get("d") for path in svg.iter(f"{SVG}path")]
    assert grid[-1] == "M58 37.7H158"  # 3.0, at 3.7 of 100 under the upper margin of 34


def test_svg_is_of_one_piece() -> None:
    svg = ElementTree.tostring(drawing(), encoding="unicode")
    assert "prefers-color-scheme: dark" in svg
    assert svg.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert "script" not in svg
    assert "url(" not in svg
    inline = curve.svg_chart([Series("", [(1.0, 2.0)], "line")], title="t", x_label="x")
    assert "xmlns" not in inline
    assert "<style" not in inline
