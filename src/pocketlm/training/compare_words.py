"""A comparison in words: tables for a terminal, and the same with charts as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from pocketlm.files import write_file
from pocketlm.training import curve, page
from pocketlm.training.compare import Axis, Comparison, Measure, Side
from pocketlm.training.log import duration

LONGEST = 40
CHART_POINTS = 1500
MEASURES: dict[Measure, str] = {"loss": "Validation loss, nats per token", "bits_per_byte": "Validation, bits per byte"}
AXES: dict[Axis, str] = {"tokens": "tokens trained on", "elapsed_s": "seconds in steps"}

Row = tuple[str, ...]
Table = tuple[str, Row, list[Row]]
"""What it is of, the names of its columns, and its rows."""


def tables(comparison: Comparison) -> list[Table]:
    """The figures, then what differs; a kind of difference that there is not has no table."""
    names = tuple(side.name for side in comparison.sides)
    parts = [
        (f"{name} that differ" if name == "settings" else name, ("", *names), _rows(values))
        for name, values in comparison.differences().items()
        if values
    ]
    return [("figures", ("", *names), _figures(comparison)), *parts]


def _rows(values: dict[str, list[Any]]) -> list[Row]:
    return [(name, *map(_word, each)) for name, each in values.items()]


def _word(value: Any) -> str:
    """A value as TOML would have it, not longer than fits beside others."""
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _figures(comparison: Comparison) -> list[Row]:
    figures = [side.figures() for side in comparison.sides]

    def row(label: str, name: str, word: Any) -> Row:
        return (label, *("-" if each[name] is None else word(each[name]) for each in figures))

    rows = [
        row("parameters", "parameters", "{:,}".format),
        row("step", "step", "{:,}".format),
        row("tokens", "tokens", "{:,}".format),
        row("time in steps", "elapsed_s", duration),
        row("tokens/s, median", "tokens_per_s", "{:,.0f}".format),
        row("training loss", "loss", "{:.4f}".format),
        row("validation loss", "val_loss", "{:.4f}".format),
        row("  best", "best_val_loss", "{:.4f}".format),
        row("  at step", "best_step", "{:,}".format),
        row("bits/byte", "bits_per_byte", "{:.4f}".format),
        row("  best", "best_bits_per_byte", "{:.4f}".format),
    ]
    if comparison.goal is None:
        return rows
    tokens = [curve.short(float(f"{x:.4g}")) if x else "-" for x in comparison.to_goal("tokens")]
    seconds = [duration(x) if x else "-" for x in comparison.to_goal("elapsed_s")]
    return [*rows, (f"tokens to {comparison.goal:.4f}", *tokens), (f"time to {comparison.goal:.4f}", *seconds)]


def write_page(comparison: Comparison, out: Path) -> None:
    """Writes the comparison as an HTML file.

    Raises:
        OSError: the disk refused.
    """
    values = {
        "title": " against ".join(side.name for side in comparison.sides),
        "lines": [*comparison.verdicts(), *comparison.notes],
        "charts": [Markup(chart) for chart in _charts(comparison) if chart],
        "tables": tables(comparison),
    }
    write_file(out, page.render("compare.html.jinja", values))


def _charts(comparison: Comparison) -> list[str]:
    title = MEASURES[comparison.measure]
    drawn = [
        curve.svg_chart(
            [
                curve.Series(side.name, points, "line", hue)
                for hue, (side, points) in enumerate(zip(comparison.sides, comparison.curves(axis), strict=True))
            ],
            title=title,
            x_label=label,
        )
        for axis, label in AXES.items()
    ]
    training = [curve.Series(side.name, _smooth(side), "line", hue) for hue, side in enumerate(comparison.sides)]
    return [*drawn, curve.svg_chart(training, title="Training loss, running mean", x_label=AXES["tokens"])]


def _smooth(side: Side) -> curve.Points:
    span = curve.span_of(side.story.config.train.total_steps)
    return curve.thinned(curve.smoothed(side.training(), span), CHART_POINTS)
