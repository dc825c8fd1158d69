"""A run, live in a terminal: a bar, the numbers, the curve and what the model last wrote.

    tiny  2,623,104 parameters · runs/tiny
    ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  1,240 / 2,600  47 %  1 min 50 s left

    ━ train loss      2.8410    6.12 ┤⠸⡄
    ● validation      2.9120         │ ⢧
      bits/byte       1.3012    4.07 ┤  ⢳⡀●
      ...                            │   ⠈⠙⠲⠤⣀⣀●⣀⣀

`Panel` listens and keeps what it has heard; `view` makes text of that, a pure function. The panel has no thread: it is
drawn when a record comes, twice a second at most and for at most one per cent of the time, so between records nothing
runs beside the training. What a model writes goes through `inert`: a terminal never gets an escape code from it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TextIO

import psutil  # type: ignore[import-untyped]
import torch
from rich.cells import chop_cells
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pocketlm.devices import in_use
from pocketlm.journal import Journal
from pocketlm.training import curve
from pocketlm.training.log import Record, RunInfo, describe, duration, figure, inert
from pocketlm.training.memory import peak_bytes

REFRESH_S = 0.5
MOST_OF_TIME = 0.01
MAX_WIDTH = 120
CHART_FROM_WIDTH = 76
NUMBERS_WIDTH = 30
SAMPLE_LINES = 5
CURVE_POINTS = 512
RATE_STEPS = 20
STEPS = ("train", "skip", "overflow")
"""Kinds of records of which each step has one."""
Pairs = list[tuple[str, str]]
"""Labels and values."""

TRAIN, VALIDATION, FAINT = "cyan", "yellow", "dim"


@dataclass
class Heard:
    """What a run has said so far."""

    info: RunInfo
    losses: deque[float]
    """Of the last steps, as many as are averaged."""
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_STEPS))
    line: list[curve.Point] = field(default_factory=list)
    """(tokens, mean loss)."""
    marks: list[curve.Point] = field(default_factory=list)
    """(tokens, validation loss)."""
    last: dict[str, Record] = field(default_factory=dict)
    """By kind."""
    saved: str = "none yet"
    """Name of the newest checkpoint."""

    @property
    def step(self) -> int:
        steps: list[int] = [self.last[kind]["step"] for kind in (*STEPS, "rollback") if kind in self.last]
        return max(steps, default=self.info.first_step)

    def hear(self, record: Record) -> None:
        self.last[record["kind"]] = record
        if record["kind"] == "train":
            self.losses.append(record["loss"])
            self.step_seconds.append(self.info.tokens_per_step / record["tokens_per_s"])
            self._remember(self.line, (self._tokens(record), sum(self.losses) / len(self.losses)))
        elif record["kind"] == "eval":
            self._remember(self.marks, (self._tokens(record), record["loss"]))
        elif record["kind"] == "rollback":
            self._forget_after(self._tokens(record))

    def _tokens(self, record: Record) -> float:
        return float(record["step"] * self.info.tokens_per_step)

    def _forget_after(self, tokens: float) -> None:
        """What was drawn of steps that the run goes through again."""
        self.line[:] = [point for point in self.line if point[0] <= tokens]
        self.marks[:] = [point for point in self.marks if point[0] <= tokens]
        self.losses.clear()
        for kind in STEPS:
            self.last.pop(kind, None)

    @staticmethod
    def _remember(points: list[curve.Point], point: curve.Point) -> None:
        """Twice as coarse whenever the list is full, so that drawing never becomes slow."""
        if len(points) >= CURVE_POINTS:
            del points[1::2]
        points.append(point)


@dataclass(frozen=True)
class Clock:
    """What time it is in a run: seconds since this process began to train, and seconds left."""

    elapsed_s: float
    left_s: float | None


class Panel:
    """The listener for a terminal. Notes scroll by above it; its last state stays."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.now = now
        self.heard: Heard | None = None
        self.live: Live | None = None
        self._draw_at = self._started_at = self._measured_at = now()
        self._measured_from = 0

    def note(self, text: str) -> None:
        self.console.print(Text(inert(text)), highlight=False, soft_wrap=True)

    def started(self, info: RunInfo) -> None:
        for line in info.lines:
            self.note(line)
        self.note("")
        saved = f"step-{info.first_step:08d}" if info.first_step else "none yet"
        self.heard = Heard(info, deque(maxlen=curve.span_of(info.total_steps)), saved=saved)
        for record in Journal.read(info.folder / "metrics.jsonl"):  # of the steps before a resume
            self.heard.hear(record)
        self.heard.step_seconds.clear()
        self._started_at = self._measured_at = self.now()
        self._measured_from = info.first_step
        self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
        self.live.start()
        self.console.show_cursor(True)  # a second Ctrl-C ends the process at once, and nobody would show it again
        self._draw()

    def record(self, record: Record) -> None:
        assert self.heard is not None
        self.heard.hear(record)
        if record["kind"] == "micro_batch":
            self.note(describe(record))
        if record["step"] == self.heard.info.first_step + 1 and record["kind"] == "train":
            self._measured_from, self._measured_at = record["step"], self.now()  # the first step warms up
        if record["kind"] != "train" or self.now() >= self._draw_at:
            self._draw()

    def saved(self, folder: Path) -> None:
        assert self.heard is not None
        self.heard.saved = folder.name
        self._draw()

    def finished(self) -> None:
        if self.live is not None:
            self._draw()
            self.live.stop()
            self.note("")

    def _draw(self) -> None:
        assert self.heard is not None
        assert self.live is not None
        began_at = self.now()
        text = view(self.heard, self._clock(), memory(), self.console.width, self.console.height)
        self.live.update(text, refresh=True)
        self._draw_at = self.now() + max(REFRESH_S, (self.now() - began_at) / MOST_OF_TIME)

    def _clock(self) -> Clock:
        """Seconds left at the pace of this process, evaluations and checkpoints included."""
        assert self.heard is not None
        done, left = self.heard.step - self._measured_from, self.heard.info.total_steps - self.heard.step
        pace_s = (self.now() - self._measured_at) / done if done > 0 else None
        return Clock(self.now() - self._started_at, pace_s if pace_s is None else pace_s * left)


def terminal(stream: TextIO) -> Console | None:
    """The console behind a stream; None where no panel can be drawn: a file, a pipe, a dumb or non-UTF terminal."""
    console = Console(file=stream)
    able = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return console if able else None


def memory() -> Pairs:
    """What this process holds: of the machine's memory, and the peak on a GPU where one is in use."""
    held = [("memory", psutil.Process().memory_info().rss)]
    held += [("GPU memory", peak_bytes(torch.device(kind))) for kind in in_use()]
    return [(name, f"{size / 2**30:.2f} GiB") for name, size in held]


# --- the picture


def view(heard: Heard, clock: Clock, memory: Pairs, width: int, height: int) -> Text:
    """The panel, under `height` lines and `width` cells; what does not fit is left out, the sample first."""
    width = min(width, MAX_WIDTH) - 1
    body = _body(numbers(heard, clock, memory), heard, width)
    lines = [_header(heard.info), _bar(heard, clock, width), Text(), *body]
    sample = _sample(heard, width)
    if sample and len(lines) + 1 + len(sample) < height:
        lines += [Text(), *sample]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True, overflow="crop").join(lines[: max(1, height - 1)])


def numbers(heard: Heard, clock: Clock, memory: Pairs) -> Pairs:
    """Labels and values, in the order of their weight."""
    train, validation = heard.last.get("train"), heard.last.get("eval")
    seconds = sum(heard.step_seconds) / len(heard.step_seconds) if heard.step_seconds else None
    rate = heard.info.tokens_per_step / seconds if seconds else None
    return [
        ("train loss", f"{heard.line[-1][1]:.4f}" if heard.line else "-"),
        ("validation", f"{validation['loss']:.4f}" if validation else "-"),
        ("bits/byte", figure(validation["bits_per_byte"]) if validation else "-"),
        ("learning rate", f"{train['lr']:.2e}" if train else "-"),
        ("gradient norm", f"{train['grad_norm']:.2f}" if train else "-"),
        ("tokens/s", f"{rate:,.0f}" if rate else "-"),
        ("MFU", f"{100 * rate * heard.info.flops_per_token / heard.info.peak_flops:.0f} %" if rate else "-"),
        ("tokens", curve.short(train["tokens"]) if train else "-"),
        *_place(heard.info, train or {}),
        ("elapsed", duration(clock.elapsed_s)),
        *memory,
        ("checkpoint", heard.saved),
    ]


def _place(info: RunInfo, train: Record) -> Pairs:
    """Where in the text the run is: the segment, where there are any, and the epoch, where it is known."""
    segment = [("segment", f"{train['segment'] + 1:,}")] if "segment" in train else []
    if segment and "epoch" not in train:
        return segment
    of = "" if info.epochs is None else f" of {info.epochs:.2f}"
    return [*segment, ("epochs", f"{train['epoch']:.2f}{of}" if "epoch" in train else "-")]


def _header(info: RunInfo) -> Text:
    return Text.assemble(
        (inert(info.name), "bold"), (f"  {info.parameters:,} parameters · {inert(str(info.folder))}", FAINT)
    )


def _bar(heard: Heard, clock: Clock, width: int) -> Text:
    step, total = heard.step, heard.info.total_steps
    left = "" if clock.left_s is None else f"{duration(clock.left_s)} left"
    left = "done" if step >= total else left
    words = f"  {step:,} / {total:,}  {100 * step // total} %  {left}"
    cells = max(8, min(width - len(words), 64))
    done = cells * step // total
    return Text.assemble(("━" * done, "green"), ("─" * (cells - done), FAINT), words)


def _body(pairs: Pairs, heard: Heard, width: int) -> list[Text]:
    """Numbers beside the chart; without it in as many columns as there is room for."""
    cells = [_cell(label, value) for label, value in pairs]
    if width + 1 >= CHART_FROM_WIDTH:
        chart = curve.terminal_chart(heard.line, heard.marks, width - NUMBERS_WIDTH - 4, len(cells), x_label="tokens")
        rows = [_chart_row(row) for row in chart] or [Text() for _ in cells]
        return [_beside(cell, row) for cell, row in zip(cells, rows, strict=True)]
    if width < 2 * NUMBERS_WIDTH:
        return cells
    half = -(-len(cells) // 2)
    return [_beside(*pair) for pair in zip(cells, [*cells[half:], *[Text()] * (half * 2 - len(cells))], strict=False)]


def _cell(label: str, value: str) -> Text:
    """The two that are in the chart carry the mark that they have there."""
    mark, color = {"train loss": ("━ ", TRAIN), "validation": (f"{curve.MARK} ", VALIDATION)}.get(label, ("  ", ""))
    return Text.assemble((mark, color), (f"{label:<14}", FAINT), value)


def _beside(left: Text, right: Text) -> Text:
    joined = left.copy()
    joined.truncate(NUMBERS_WIDTH, overflow="ellipsis", pad=True)
    return joined.append("    ").append_text(right)


def _chart_row(row: str) -> Text:
    text = Text(row)
    text.highlight_regex("[\u2801-\u28ff]+", TRAIN)
    text.highlight_regex(curve.MARK, VALIDATION)
    text.highlight_regex(r"^[^┤│└]*[┤│]|^ *└─*$|^ +[^\s┤│└]\S*( +\S+)+$", FAINT)
    return text


def _sample(heard: Heard, width: int) -> list[Text]:
    """The last sample, as the terminal would wrap it, its prompt pale."""
    record = heard.last.get("sample")
    if record is None:
        return []
    text = Text.assemble((inert(record["prompt"]), FAINT), inert(record["text"]))
    lines = [line for line in text.split("\n") if line.plain.strip()]
    shown = [part for line in lines for part in _folded(line, width)][:SAMPLE_LINES]
    return [Text(f"the model at step {record['step']:,}", FAINT), *shown]


def _folded(line: Text, width: int) -> list[Text]:
    """Pieces of at most `width` cells; a wide character is two."""
    ends = accumulate(map(len, chop_cells(line.plain, width)))
    return list(line.divide(list(ends)[:-1]))
