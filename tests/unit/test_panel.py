"""The live panel in terminals that are not there: what it shows, how wide it is, and what it keeps from a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from pocketlm.journal import Journal
from pocketlm.training import panel
from pocketlm.training.log import RunInfo
from pocketlm.training.panel import Clock, Heard, Panel

WIDTHS = (20, 40, 60, 75, 76, 80, 120, 200)


class Time:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def info(folder: Path, first_step: int = 0, total_steps: int = 200) -> RunInfo:
    return RunInfo(
        name="little",
        folder=folder,
        parameters=1_234_567,
        total_steps=total_steps,
        first_step=first_step,
        tokens_per_step=1000,
        epochs=2.5,
        flops_per_token=3e6,
        peak_flops=1e11,
        lines=("the plan",),
    )


def train_record(step: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "lr": 0.0125,
        "grad_norm": 0.75,
        "tokens": 1000 * step,
        "epoch": step / 80,
        "tokens_per_s": 4000.0 if step % 2 else 12000.0,
        "mfu": 0.1,
        "elapsed_s": step * 0.25,
    }


def eval_record(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": loss, "bits_per_byte": 1.5432}


def sample_record(text: str) -> dict[str, Any]:
    return {"kind": "sample", "step": 100, "prompt": "def ", "text": text}


def heard_of(steps: int, folder: Path = Path("runs/little"), text: str = "read(path):\n    return 1") -> Heard:
    """A run of 200 steps with losses 5, 4.99, ...; four steps are averaged."""
    heard = Heard(info(folder), panel.deque(maxlen=4))
    for step in range(1, steps + 1):
        heard.hear(train_record(step, 5 - 0.01 * (step - 1)))
    heard.hear(eval_record(steps, 3.9876))
    heard.hear(sample_record(text))
    return heard


def console_of(width: int) -> tuple[Console, io.StringIO]:
    """A terminal without colours, and what was written to it."""
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, height=40, color_system=None), out


def test_the_numbers_are_those_of_the_run() -> None:
    shown = dict(panel.numbers(heard_of(100), Clock(61, 30), [("memory", "1.00 GiB")]))
    assert shown == {
        "train loss": "4.0250",  # the mean of 4.04, 4.03, 4.02 and 4.01
        "validation": "3.9876",
        "bits/byte": "1.5432",
        "learning rate": "1.25e-02",
        "gradient norm": "0.75",
        "tokens/s": "6,000",  # as many steps of 1/4 s as of 1/12 s: 1000 tokens in 1/6 s
        "MFU": "18 %",  # 6000 x 3e6 of 1e11
        "tokens": "100k",
        "epochs": "1.25 of 2.50",
        "elapsed": "1 min 1 s",
        "memory": "1.00 GiB",
        "checkpoint": "none yet",
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_says_the_same_at_any_width(width: int) -> None:
    text = panel.view(heard_of(100), Clock(61, 30), [("memory", "1.00 GiB")], width, 40)
    lines = text.plain.split("\n")
    assert max(map(cell_len, lines)) < width
    assert any("train loss" in line for line in lines)
    if width >= 40:
        assert {"4.0250", "3.9876", "1.5432", "6,000"} <= set(text.plain.split())
        assert "little" in text.plain
        assert "def read(path):" in text.plain
    assert any("⠁" <= character <= "⣿" for character in text.plain) == (width >= panel.CHART_FROM_WIDTH)
    if width >= 60:
        assert "100 / 200  50 %  30 s left" in text.plain


def test_a_low_terminal_gets_no_more_lines_than_it_has() -> None:
    for height in (3, 8, 16, 20):
        text = panel.view(heard_of(100), Clock(1, 1), [], 100, height)
        assert len(text.plain.split("\n")) < height
        assert ("the model at step" in text.plain) == (height == 20)


def test_before_the_first_step_nothing_is_invented() -> None:
    shown = panel.numbers(Heard(info(Path("r")), panel.deque(maxlen=4)), Clock(0, None), [])
    assert {value for label, value in shown if label not in ("elapsed", "checkpoint")} == {"-"}


def test_a_model_cannot_write_to_the_terminal() -> None:
    """Escape sequences, 8-bit ones, carriage returns, bells, reversed writing, markup and lone surrogates are text."""
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eabc[bold red]x[/]\ud800"
    assert panel.inert(evil) == "\ufffd]0;owned\ufffd\ufffd[2J\ufffd31m\ufffd\ufffdabc[bold red]x[/]\ufffd"
    assert panel.inert("a\tb\nc") == "a   b\nc"
    console, out = console_of(100)
    console.print(panel.view(heard_of(10, text=evil), Clock(1, 1), [], 100, 40))
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(out.getvalue())
    assert "[bold red]x[/]" in out.getvalue()


def test_wide_characters_are_folded_by_their_cells() -> None:
    text = panel.view(heard_of(10, text="漢" * 100), Clock(1, 1), [], 60, 40)
    assert max(map(cell_len, text.plain.split("\n"))) < 60
    assert text.plain.count("漢") == 100


def test_a_long_run_is_remembered_coarsely() -> None:
    heard = heard_of(5000)
    assert len(heard.line) <= panel.CURVE_POINTS
    assert heard.line[0][0] == 1000
    assert heard.line[-1][0] == 5_000_000


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    console, out = console_of(100)
    time = Time()
    live = Panel(console, time)
    live.note("reading [bold]text[/bold]")
    live.started(info(tmp_path, total_steps=3))
    for step in (1, 2, 3):
        time.now += 2.0
        live.record(train_record(step, 4.0))
    live.record(eval_record(3, 3.25))
    live.saved(tmp_path / "step-00000003")
    live.finished()
    written = out.getvalue()
    assert "reading [bold]text[/bold]" in written
    assert "the plan" in written
    assert "2 s left" in written  # after the second step, of 2 s as the one before; the first is not counted
    last = written[written.rindex("little") :]
    assert {"3.2500", "step-00000003", "done"} <= set(last.split())
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is there again


def test_the_cursor_stays_while_it_runs(tmp_path: Path) -> None:
    """A second Ctrl-C ends the process in the midst of it."""
    console, out = console_of(100)
    live = Panel(console, Time())
    live.started(info(tmp_path))
    live.record(train_record(1, 4.0))
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")
    live.finished()


def test_steps_do_not_each_draw(tmp_path: Path) -> None:
    console, out = console_of(100)
    time = Time()
    live = Panel(console, time)
    live.started(info(tmp_path))
    length = len(out.getvalue())
    for step in range(1, 100):
        time.now += 0.004
        live.record(train_record(step, 4.0))
    assert len(out.getvalue()) == length
    time.now += 0.2
    live.record(train_record(100, 4.0))
    assert len(out.getvalue()) > length
    live.finished()


def test_a_resumed_run_shows_its_past(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for record in (train_record(1, 5.0), train_record(2, 4.0), eval_record(2, 3.5)):
        journal.append(record)
    journal.close()
    console, out = console_of(100)
    live = Panel(console, Time())
    live.started(info(tmp_path, first_step=2))
    live.finished()
    assert live.heard is not None
    assert live.heard.line == [(1000, 5.0), (2000, 4.5)]
    assert {"3.5000", "step-00000002"} <= set(out.getvalue().split())


def test_no_panel_where_it_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    assert panel.terminal(io.StringIO()) is None
    assert panel.terminal(Terminal(io.BytesIO(), encoding="utf-8")) is not None
    assert panel.terminal(Terminal(io.BytesIO(), encoding="latin-1")) is None
    monkeypatch.setenv("TERM", "dumb")
    assert panel.terminal(Terminal(io.BytesIO(), encoding="utf-8")) is None
