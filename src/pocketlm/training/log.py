"""What a run says: records for the journal, and lines for a person.

A record is a plain dict with `step` and one of the kinds

    train     loss, smoothed_loss, lr, grad_norm, tokens, tokens_per_s, mfu, elapsed_s; epoch and segment, if known
    eval      loss, bits_per_byte, bits_per_byte_with_special, perplexity, tokens, bytes
    sample    prompt, text
    skip      reason, loss, grad_norm                   a step whose update was not applied, instead of its `train`
    overflow  loss, loss_scale                          the same in fp16, where the loss scale was too large: no trouble
    rollback  reason, from_step, rows_left_out, skipped   the run goes on from `step` again, with other data
    micro_batch  reason, micro_batch, before              memory ran out in the step after `step`: fewer rows at once
    weights   from_step                                 the run begins with the weights of that step of the one before

A figure that is not finite is None. `epoch` is how often the training text has been seen: 2.5 is half way through the
third time.

A `Listener` hears them as they happen. `PlainLines` is the one for files and pipes; `panel.py` has the live one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step."""

    name: str
    folder: Path
    parameters: int
    total_steps: int
    first_step: int
    tokens_per_step: int
    epochs: float | None
    """How often the whole plan sees the training text; None where it is not known how much there is."""
    flops_per_token: float
    peak_flops: float
    lines: tuple[str, ...]
    """The plan, for people."""


class Listener(Protocol):
    """Hears a run."""

    def note(self, text: str) -> None: ...
    def started(self, info: RunInfo) -> None: ...
    def record(self, record: Record) -> None: ...
    def saved(self, folder: Path) -> None: ...
    def finished(self) -> None: ...


class Relay:
    """Passes everything on to another listener; what hears a run beside it is made of this."""

    def __init__(self, to: Listener) -> None:
        self.to = to

    def note(self, text: str) -> None:
        self.to.note(text)

    def started(self, info: RunInfo) -> None:
        self.to.started(info)

    def record(self, record: Record) -> None:
        self.to.record(record)

    def saved(self, folder: Path) -> None:
        self.to.saved(folder)

    def finished(self) -> None:
        self.to.finished()


class PlainLines:
    """A line for every `every` steps, evaluation, sample and checkpoint."""

    def __init__(self, write: Callable[[str], None], every: int) -> None:
        self.write = write
        self.every = every
        self.info: RunInfo | None = None
        self._line_before: Record | None = None

    def note(self, text: str) -> None:
        self.write(text)

    def started(self, info: RunInfo) -> None:
        self.info = info
        for line in info.lines:
            self.write(line)

    def record(self, record: Record) -> None:
        assert self.info is not None
        if record["kind"] != "train":
            self._line_before = None if record["kind"] == "rollback" else self._line_before
            self.write(describe(record))
        elif record["step"] % self.every == 0 or record["step"] in (self.info.first_step + 1, self.info.total_steps):
            self._train_line(self.info, record)

    def _train_line(self, info: RunInfo, record: Record) -> None:
        """Rates are means since the line before: one step says little on a busy machine."""
        before, self._line_before = self._line_before, record
        if before is None:
            self.write(describe(record))
            return
        rate = (record["tokens"] - before["tokens"]) / (record["elapsed_s"] - before["elapsed_s"])
        left_s = (info.total_steps - record["step"]) * info.tokens_per_step / rate
        mfu = rate * info.flops_per_token / info.peak_flops
        self.write(f"{describe({**record, 'tokens_per_s': rate, 'mfu': mfu})}  {duration(left_s)} left")

    def saved(self, folder: Path) -> None:
        self.write(f"saved {folder}")

    def finished(self) -> None:
        return None


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        return None

    def started(self, info: RunInfo) -> None:
        return None

    def record(self, record: Record) -> None:
        return None

    def saved(self, folder: Path) -> None:
        return None

    def finished(self) -> None:
        return None


def describe(record: Record) -> str:
    """A record as a line."""
    step = f"step {record['step']:>6}"
    if record["kind"] == "eval":
        return f"{step}  validation loss {record['loss']:.4f}  bits/byte {figure(record['bits_per_byte'])}"
    if record["kind"] == "sample":
        return f"{step}  sample: {inert(record['prompt'] + record['text'])}"
    if record["kind"] == "skip":
        figures = f"loss {figure(record['loss'])}, norm {figure(record['grad_norm'])}"
        return f"{step}  skipped: {record['reason']} ({figures})"
    if record["kind"] == "overflow":
        return f"{step}  fp16 overflow: not applied, the loss scale of {record['loss_scale']:,.0f} is halved"
    if record["kind"] == "rollback":
        left_out = f"{record['rows_left_out']:,} rows are left out"
        return f"{step}  gone back from step {record['from_step']}: {record['reason']}; {left_out}"
    if record["kind"] == "weights":
        return f"{step}  begins with the weights of step {record['from_step']}; all else is new"
    if record["kind"] == "micro_batch":
        now = f"{record['micro_batch']} rows at once instead of {record['before']}"
        return f"{step}  out of memory: {now} from here on ({inert(record['reason'])})"
    return (
        f"{step}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  "
        f"{record['tokens_per_s']:,.0f} tok/s  MFU {100 * record['mfu']:.0f} %"
    )


def figure(value: float | None) -> str:
    """Four digits after the point, or that there is no number."""
    return "not finite" if value is None else f"{value:.4f}"


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a figure of a record is there, and is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def inert(text: str) -> str:
    """The text with its line ends, tabs as spaces, and every other character that is not printed as U+FFFD.

    Those are the control characters, with them every escape sequence, and invisible marks such as those that turn
    the direction of writing.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs(4))


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for unit, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"
