"""Curves as text: rows of characters for a terminal, SVG for a page. Pure functions of their points.

    finite, thinned, smoothed   points made fit to draw: no NaN, not too many, less noise
    at, reached                 a curve's height at an x, and where it comes down to a height
    ceiling                     where to cut the fall of the first steps, so that the rest is seen
    ticks, short                round numbers for axes, and how they are written
    terminal_chart              a line in braille dots and round marks, with axes
    terminal_curves             several curves, each in a character of its own, with axes
    svg_chart                   lines and dots, with axes; light and dark by CSS classes

A point is (x, y), both finite. Points come in the order of x. What lies above the ceiling is cut, and both charts
leave the line running out at the top, so that it is seen to be cut.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle, pairwise
from typing import Literal

Point = tuple[float, float]
Points = Sequence[Point]

SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
MARK = "●"
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille cell, by row and column
DOT_RADIUS = 3.5
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 58, 20, 34, 42

SVG_STYLE = """
  .chart { --surface: #ffffff; --ink: #3f4754; --faint: #e6e8ec; --train: #2f6fde; --val: #d4620f; }
  @media (prefers-color-scheme: dark) {
    .chart { --surface: #15181d; --ink: #b3bac5; --faint: #2b3038; --train: #74a7ff; --val: #ffa657; }
  }
  .chart { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
  .chart text { fill: var(--ink); }
  .chart .surface { fill: var(--surface); }
  .chart .grid { stroke: var(--faint); }
  .chart polyline { fill: none; stroke-linejoin: round; stroke: var(--train); }
  .chart .raw { stroke-width: 1; opacity: 0.35; }
  .chart .line { stroke-width: 2; }
  .chart .dots { fill: var(--val); }
  .chart .hue-1 { stroke: #d4620f; } .chart .hue-2 { stroke: #2a9d5c; } .chart .hue-3 { stroke: #b44bc2; }
  .chart .hue-4 { stroke: #c23b4b; } .chart .hue-5 { stroke: #8a7a1f; }
"""
HUES = 6


@dataclass(frozen=True)
class Series:
    """Points and their look: a thin pale line, a strong line, or dots."""

    name: str
    points: Points
    look: Literal["raw", "line", "dots"]
    hue: int = 0
    """Which colour, where several runs are in one chart: 0 to HUES - 1."""


# --- points


def finite(points: Iterable[Point]) -> list[Point]:
    """The points whose two numbers are finite."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Points, limit: int) -> Points:
    """At most `limit` points: the lowest and the highest of each of limit / 2 equal stretches, in order."""
    if len(points) <= limit:
        return points
    buckets = limit // 2
    kept: list[Point] = []
    for bucket in range(buckets):
        stretch = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        lowest, highest = min(stretch, key=_y), max(stretch, key=_y)
        kept += [lowest] if lowest == highest else sorted([lowest, highest])
    return kept


def smoothed(points: Points, span: int) -> list[Point]:
    """Each y replaced by the mean of the last `span` of them; of fewer at the beginning."""
    means, total = [], 0.0
    for index, (x, y) in enumerate(points):
        total += y - (points[index - span][1] if index >= span else 0.0)
        means.append((x, total / min(span, index + 1)))
    return means


def at(points: Points, x: float) -> float | None:
    """The height at x, straight from point to point; None before the first and after the last."""
    after = bisect_left(points, x, key=_x)
    if after == len(points) or (after == 0 and points[0][0] > x):
        return None
    right_x, right_y = points[after]
    left_x, left_y = points[max(0, after - 1)]
    share = (x - left_x) / (right_x - left_x) if right_x > left_x else 1.0
    return left_y + share * (right_y - left_y)


def reached(points: Points, y: float) -> float | None:
    """The first x at which the height is y or less, straight from point to point; None where it never is."""
    if points and points[0][1] <= y:
        return points[0][0]
    for (left_x, left_y), (right_x, right_y) in pairwise(points):
        if right_y <= y:
            return left_x + (left_y - y) / (left_y - right_y) * (right_x - left_x)
    return None


def span_of(total_steps: int) -> int:
    """Steps that are averaged for the eye: a fiftieth of the run, at most 100."""
    return max(1, min(100, total_steps // 50))


def ceiling(curves: Sequence[Points], share: float = 0.05, *, from_x: float | None = None) -> float:
    """The highest y after the first `share` of the x axis, over all curves; the highest of all if nothing is there."""
    every = [point for points in curves for point in points]
    low, high = min(every)[0], max(every)[0]
    low = low if from_x is None else min(from_x, low)
    return max([y for x, y in every if x > low + share * (high - low)] or [y for _, y in every])


def _x(point: Point) -> float:
    return point[0]


def _y(point: Point) -> float:
    return point[1]


# --- axes


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, both included: multiples of 1, 2 or 5 times a power of ten, at most `most`."""
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 5, 10, 20, 50, 100)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [round(index * step, 12) for index in range(first, last + 1)]
    raise AssertionError((low, high, most))


def short(value: float) -> str:
    """`0`, `0.02`, `2.5`, `40k`, `1.5M`, `2B`."""
    for size, suffix in SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def tick_labels(values: Sequence[float]) -> list[str]:
    """The values with equally many digits after the point, where none has a suffix or an exponent."""
    plain = [short(value) for value in values]
    if any(not text.lstrip("-").replace(".", "", 1).isdigit() for text in plain):
        return plain
    digits = max(len(text.partition(".")[2]) for text in plain)
    return [f"{value:.{digits}f}" for value in values]


@dataclass(frozen=True)
class Frame:
    """The stretch of both axes that is shown."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, point: Point) -> Point:
        """Both as shares of the frame: x from the left, y from the top; outside [0, 1] is outside."""
        x, y = point
        return (x - self.x_low) / (self.x_high - self.x_low), (self.y_high - y) / (self.y_high - self.y_low)


def frame(curves: Sequence[Points], *, from_x: float | None = None, from_y: float | None = None) -> Frame:
    """A frame around the points up to their ceiling, widened to begin at from_x and from_y where they are given."""
    xs = [x for points in curves for x, _ in points]
    low = min(y for points in curves for _, y in points)
    high = ceiling(curves, from_x=from_x)
    pad = 0.04 * (high - low) or 0.05 * abs(high) or 1.0  # a flat line still gets a height
    bottom = low - pad if from_y is None else min(from_y, low)
    left = min(xs) if from_x is None else min(from_x, *xs)
    return Frame(left, max(xs) if max(xs) > left else left + 1, bottom, high + pad)


# --- the terminal


def terminal_chart(line: Points, marks: Points, width: int, height: int, *, x_label: str = "") -> list[str]:
    """A chart of `height` rows of exactly `width` characters; empty without points.

    The line is drawn in braille, 2 x 4 dots to a character; marks are round and lie over it.
    """
    curves = [points for points in (line, marks) if points]
    if not curves:
        return []
    sheet = _Sheet(frame(curves), width, height)
    cells = [[0] * sheet.columns for _ in range(sheet.rows)]
    for column, row in _line_dots(line, sheet.shown, 2 * sheet.columns, 4 * sheet.rows):
        cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    grid = [[chr(0x2800 + cell) if cell else " " for cell in cells_row] for cells_row in cells]
    for x, y in map(sheet.shown.place, marks):
        if 0 <= y <= 1:
            grid[min(sheet.rows - 1, int(y * sheet.rows))][min(sheet.columns - 1, int(x * sheet.columns))] = MARK
    return sheet.with_axes(grid, x_label)


def terminal_curves(curves: Mapping[str, Points], width: int, height: int, *, x_label: str = "") -> list[str]:
    """Curves, each drawn in the character that it goes by, in a chart as `terminal_chart`'s; x begins at 0.

    Of n curves each has every n-th column to itself, so that none hides another.
    """
    curves = {mark: points for mark, points in curves.items() if points}
    if not curves:
        return []
    sheet = _Sheet(frame(list(curves.values()), from_x=0), width, height)
    grid = [[" "] * sheet.columns for _ in range(sheet.rows)]
    turns = zip(range(sheet.columns), cycle(curves.items()), strict=False)
    for column, (mark, points) in turns:
        x = sheet.shown.x_low + column / (sheet.columns - 1) * (sheet.shown.x_high - sheet.shown.x_low)
        height_here = at(points, x)
        if height_here is not None and 0 <= (y := sheet.shown.place((x, height_here))[1]) <= 1:
            grid[min(sheet.rows - 1, int(y * sheet.rows))][column] = mark
    return sheet.with_axes(grid, x_label)


class _Sheet:
    """The room for a chart of `height` rows of `width` characters, and its axes."""

    def __init__(self, shown: Frame, width: int, height: int) -> None:
        self.shown = shown
        self.rows = height - 2
        step = (shown.y_high - shown.y_low) / self.rows
        self.labels = {row: f"{shown.y_high - (row + 0.5) * step:.2f}" for row in (0, self.rows // 2, self.rows - 1)}
        self.gutter = max(map(len, self.labels.values()))
        self.columns = width - self.gutter - 2
        assert min(self.columns, self.rows) >= 3, f"no chart fits into {width} x {height}"

    def with_axes(self, grid: list[list[str]], x_label: str) -> list[str]:
        """The grid with its axes; what x counts stands in the middle, where there is room."""
        plot = [
            f"{self.labels.get(row, ''):>{self.gutter}} {'┤' if row in self.labels else '│'}{''.join(cells)}"
            for row, cells in enumerate(grid)
        ]
        left, right = short(self.shown.x_low), short(self.shown.x_high)
        middle = self.columns - len(left) - len(right)
        words = f"{x_label if len(x_label) + 4 <= middle else '':^{middle}}"
        return [*plot, f"{'':{self.gutter}} └{'─' * self.columns}", f"{'':{self.gutter}}  {left}{words}{right}"]


def _line_dots(line: Points, shown: Frame, columns: int, rows: int) -> Iterator[tuple[int, int]]:
    """The dots (column, row) that a line through the points passes; none above the frame."""
    dots = [(round(x * (columns - 1)), round(y * (rows - 1))) for x, y in map(shown.place, line)]
    for (column, row), (next_column, next_row) in pairwise(dots or []):
        steps = max(abs(next_column - column), abs(next_row - row), 1)
        for step in range(steps):
            share = step / steps
            at = round(column + share * (next_column - column)), round(row + share * (next_row - row))
            if 0 <= at[1] < rows:
                yield at
    if dots and 0 <= dots[-1][1] < rows:
        yield dots[-1]


# --- SVG


def svg_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    from_y: float | None = None,
    width: int = 760,
    height: int = 320,
    legend: bool = True,
    standalone: bool = False,
) -> str:
    """An SVG element: series in the order given, the later over the earlier; "" without points.

    Args:
        series: what is drawn; their names go into the legend.
        title: what it shows, over the chart and for screen readers.
        x_label: what the x axis counts.
        from_y: where the y axis begins; by default a little under the lowest point. The x axis begins at 0.
        width, height: user units, pixels where it is not scaled.
        legend: whether there is one; it needs a width of about 600.
        standalone: a file of its own, with style and background; otherwise the page has `SVG_STYLE`.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    shown = frame([one.points for one in series], from_x=0, from_y=from_y)
    box = Frame(MARGIN_LEFT, width - MARGIN_RIGHT, MARGIN_TOP, height - MARGIN_BOTTOM)
    head = f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}"'
    if standalone:
        style = f'<style>{SVG_STYLE}</style>\n<rect class="surface" width="{width}" height="{height}" rx="8"/>'
        head += f' xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">\n{style}'
    else:
        head += ">"
    parts = [head, *_svg_axes(shown, box, x_label), *_svg_words(series if legend else [], title, box)]
    # an inner svg element cuts what leaves it, without an id that a page with several charts would have twice
    inner_width, inner_height = box.x_high - box.x_low, box.y_high - box.y_low
    x, inner = box.x_low - DOT_RADIUS, inner_width + 2 * DOT_RADIUS  # a dot at either end stays whole
    parts.append(f'<svg x="{x}" y="{box.y_low}" width="{inner}" height="{inner_height}">')
    for one in series:
        parts += _svg_series(one, shown, inner_width, inner_height)
    return "\n".join([*parts, "</svg>", "</svg>"]) + "\n"


def _svg_axes(shown: Frame, box: Frame, x_label: str) -> Iterator[str]:
    values = ticks(shown.y_low, shown.y_high, 6)
    for value, label in zip(values, tick_labels(values), strict=True):
        y = box.y_low + shown.place((shown.x_low, value))[1] * (box.y_high - box.y_low)
        yield f'<path class="grid" d="M{box.x_low} {y:.1f}H{box.x_high}"/>'
        yield f'<text x="{box.x_low - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for value in ticks(shown.x_low, shown.x_high, max(2, int((box.x_high - box.x_low) / 80))):
        x = box.x_low + shown.place((value, shown.y_low))[0] * (box.x_high - box.x_low)
        yield f'<text x="{x:.1f}" y="{box.y_high + 18}" text-anchor="middle">{short(value)}</text>'
    yield f'<text x="{box.x_high}" y="{box.y_high + 35}" text-anchor="end">{escape(x_label)}</text>'


def _svg_words(series: Sequence[Series], title: str, box: Frame) -> Iterator[str]:
    """The title at the left; at the right each name after its line or dot, in the row of the title."""
    yield f'<text x="{box.x_low}" y="18" font-weight="600">{escape(title)}</text>'
    right = box.x_high
    for one in reversed(series):
        yield f'<text x="{right}" y="18" text-anchor="end">{escape(one.name)}</text>'
        left = right - 6.6 * len(one.name) - 10  # the width of a text is not known here; this is a little more
        if one.look == "dots":
            yield f'<circle class="dots" cx="{left + 2:.0f}" cy="14" r="{DOT_RADIUS}"/>'
        else:
            yield f'<polyline class="{_classes(one)}" points="{left - 12:.0f},14 {left + 5:.0f},14"/>'
        right = left - 28


def _svg_series(one: Series, shown: Frame, width: float, height: float) -> Iterator[str]:
    places = [(DOT_RADIUS + x * width, y * height) for x, y in map(shown.place, one.points)]
    if one.look == "dots":
        for (x, y), (raw_x, raw_y) in zip(places, one.points, strict=True):
            hover = f"<title>{raw_y:.4f} at {short(raw_x)}</title>"
            yield f'<circle class="dots" cx="{x:.1f}" cy="{y:.1f}" r="{DOT_RADIUS}">{hover}</circle>'
    else:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline class="{_classes(one)}" points="{line}"/>'


def _classes(one: Series) -> str:
    return f"{one.look} hue-{one.hue}" if one.hue else one.look
