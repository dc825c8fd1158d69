"""Tokens/s and MFU on a GPU, in rounds: each contestant a block of steps in an order drawn anew, the others waiting.

A waiting contestant holds its weights and moments and no more, so that each takes as many rows at once as if it were
nearly alone. They warm up one after another, as compiling one beside another's steps would need the memory of both.

    MFU = tokens/s x (6 N + 6 L T h d) / dense bf16 rate of the chip          the causal half counts once

The ratio is over the better peer: the one with the most tokens/s in the same table.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gpu_contestants import Block, Failed, Ready, split, work
from gpu_device import Device
from pocketlm.config import Config
from pocketlm.model import sizes
from report import FIRST_LOSS_WITHIN, markdown, spread
from rounds import Summary, receive, spawned, summary
from worker import Task

Say = Callable[[str], None]

BLOCK_S, ROUNDS = 0.5, 7
REHEARSED_S, REHEARSED_ROUNDS = 0.02, 3
SHARE_OF_ROUNDS = 0.2
"""Of the time, kept for them while contestants warm up."""
NUM_BATCHES = 16
SIZE_WITHIN = 0.01
MFU_FLOOR, MFU_GOAL, RATIO_GOAL = 0.35, 0.50, 2.0
NAMES = (
    *("pocketlm+eager", "pocketlm+compile", "transformers", "litgpt", "pocketlm+eager+bitwise"),
    *("pocketlm+compile+bitwise", "transformers+compile", "litgpt+compile"),
)
"""In the order in which they are got ready: what comes last is left out first."""


@dataclass
class Entry:
    """A contestant, and what it has measured."""

    name: str
    pipe: Connection
    end: Callable[[], None]
    """Ends its process, whatever it is at."""
    ready: Ready | None = None
    blocks: list[Block] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        return split(self.name)[0] == "pocketlm"

    def rates(self, tokens: int) -> list[float]:
        """Tokens/s of each block."""
        return [tokens * block.steps / block.seconds for block in self.blocks]


def task_of(preset: str, folder: Path) -> Task:
    """The preset's own context and tokens of a step, with rows that every contestant reads."""
    config = Config.preset(preset)
    task = Task(preset, config.rows_per_step, config.data.context, 1, folder, folder / f"{preset}.npy")
    np.save(task.batches, token_ids(config.model.vocab_size, (NUM_BATCHES, task.rows, task.context + 1)))
    return task


def token_ids(vocab_size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Ids of the whole vocabulary as often as words are (Zipf's law), the same each time: there may be no text here."""
    shares = 1 / np.arange(2.7, vocab_size + 2.7)
    ids = np.random.default_rng(0).choice(vocab_size, size=shape, p=shares / shares.sum())
    return ids.astype(np.int32)


def measure(task: Task, device: Device, names: Sequence[str], until: float, say: Say) -> tuple[list[Entry], list[str]]:
    """The contestants with what they measured until then, by time.monotonic, and why others are missing."""
    missing = list[str]()
    with ExitStack() as stack:
        started = [_started(name, task, device, stack.enter_context(ExitStack())) for name in names]
        ready = _warmed_up(started, until, missing, say)
        if ready:
            most, block_s = (ROUNDS, BLOCK_S) if device.is_gpu else (REHEARSED_ROUNDS, REHEARSED_S)
            _rounds(ready, most, block_s, until, missing, say)
    return [entry for entry in ready if entry.blocks], missing


def _started(name: str, task: Task, device: Device, stack: ExitStack) -> Entry:
    pipe = stack.enter_context(spawned(work, name, task, device, patience_s=0.0))
    return Entry(name, pipe, stack.close)


def _warmed_up(entries: Sequence[Entry], until: float, missing: list[str], say: Say) -> list[Entry]:
    """Those that were ready in time; the rounds after it need a part of the time that is left."""
    rounds_s = SHARE_OF_ROUNDS * (until - time.monotonic())
    ready = list[Entry]()
    for entry in entries:
        left = until - rounds_s - time.monotonic()
        if left <= 0:
            missing.append(f"{entry.name}: left out, the time was over")
            continue
        alike = [each.ready for each in ready if split(each.name)[0] == split(entry.name)[0] and not each.is_ours]
        entry.pipe.send(("warm", alike[0].rows_at_once if alike and alike[0] else None))
        got = _heard(entry, Ready, left, missing)
        if isinstance(got, Ready):
            entry.ready = got
            ready.append(entry)
            say(f"{entry.name}: first step {got.first_s:.1f} s, step {1000 * got.step_s:.1f} ms, loss {got.loss:.3f}")
    return ready


def _rounds(entries: list[Entry], most: int, block_s: float, until: float, missing: list[str], say: Say) -> None:
    """Up to `most` blocks of each, of so many steps as the fastest makes in about `block_s`."""
    order = random.Random(0)
    fastest = min(entry.ready.step_s for entry in entries if entry.ready)
    steps = max(2, round(block_s / fastest))
    longest = 0.0
    for number in range(most):
        began_at = time.monotonic()
        if began_at + longest > until:
            say(f"{number} rounds: the time is over")
            return
        for entry in order.sample(entries, len(entries)):
            entry.pipe.send(("block", steps))
            got = _heard(entry, Block, max(1.0, until - time.monotonic()), missing)
            if isinstance(got, Block):
                entry.blocks.append(got)
            else:
                entries.remove(entry)
        longest = max(longest, time.monotonic() - began_at)
    say(f"{most} rounds of {steps} steps")


def _heard(entry: Entry, kind: type[Any], seconds: float, missing: list[str]) -> Ready | Block | None:
    """What it sends; a contestant that fails, or says nothing for so long, is ended."""
    try:
        got = receive(entry.name, entry.pipe, (kind, Failed), seconds)  # type: ignore[arg-type]
    except SystemExit as error:
        got = Failed(str(error))
    if not isinstance(got, Failed):
        return got  # type: ignore[no-any-return]
    missing.append(f"{entry.name}: {got.reason}")
    entry.end()
    return None


def table(entries: Sequence[Entry], task: Task, peak_flops: float) -> list[str]:
    """What each did."""
    head = ["contestant", "rows at once", "tokens/s, median (spread)", "MFU", "host at work", "peak memory, GiB"]
    rows = [[*head, "said, GiB", "first step, s", "loss: first, last", "parameters"]]
    for entry in entries:
        assert entry.ready
        rate, at_once = summary(entry.rates(task.tokens)), entry.ready.rows_at_once
        host = summary([block.launch_s / block.seconds for block in entry.blocks]).median
        said = entry.ready.said_bytes
        rows.append(
            [
                entry.name,
                f"{at_once} of {task.rows}",
                spread(rate, 0),
                f"{mfu(rate.median, entry.ready.flops_per_token, peak_flops):.1%}",
                f"{host:.0%}",
                f"{max(block.peak_bytes for block in entry.blocks) / 2**30:.2f}",
                "-" if said is None else f"{said / 2**30:.2f}",
                f"{entry.ready.first_s:.1f}",
                f"{entry.ready.loss:.3f}, {entry.blocks[-1].loss:.3f}",
                f"{entry.ready.parameters:,}",
            ]
        )
    return markdown(rows)


def problems(entries: Sequence[Entry], task: Task) -> list[str]:
    """What makes a comparison void: models of other sizes, or a contestant that does not train."""
    config = Config.preset(task.preset)
    size, entropy, found = sizes.parameters(config.model).total, math.log(config.model.vocab_size), list[str]()
    for entry in entries:
        assert entry.ready
        first, last = entry.ready.loss, entry.blocks[-1].loss
        if abs(entry.ready.parameters / size - 1) > SIZE_WITHIN:
            found.append(f"{entry.name} has {entry.ready.parameters:,} parameters, {task.preset} {size:,}")
        if not (abs(first - entropy) < FIRST_LOSS_WITHIN and last < first):
            found.append(f"the loss of {entry.name} goes from {first:.3f} to {last:.3f}, ln V is {entropy:.3f}")
    return found


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilization."""
    return tokens_per_s * flops_per_token / peak_flops


def better_peer(entries: Sequence[Entry], tokens: int) -> Entry | None:
    """The peer with the most tokens/s, whichever flags it needs for that."""
    peers = [entry for entry in entries if not entry.is_ours]
    return max(peers, key=lambda entry: summary(entry.rates(tokens)).median, default=None)


def ratios(ours: Entry, peer: Entry, tokens: int) -> Summary:
    """How many times as fast ours was, round by round."""
    pairs = zip(ours.rates(tokens), peer.rates(tokens), strict=False)
    return summary([mine / theirs for mine, theirs in pairs])


def comparison(entries: Sequence[Entry], task: Task, peak_flops: float, *, has_goal: bool) -> list[str]:
    """Ours over the better peer, and what was to be reached."""
    peer = better_peer(entries, task.tokens)
    rows = [["pocketlm", "times the better peer, median (spread)", "verdict"]]
    for ours in (entry for entry in entries if entry.is_ours):
        assert ours.ready
        share = mfu(summary(ours.rates(task.tokens)).median, ours.ready.flops_per_token, peak_flops)
        ratio = ratios(ours, peer, task.tokens) if peer else None
        words = verdict(share, ratio.median if ratio else None) if has_goal else ""
        rows.append([ours.name, f"{spread(ratio, 2)} over {peer.name if peer else 'nobody'}", words])
    return markdown(rows)


def verdict(share: float, ratio: float | None) -> str:
    """Floor and goal of MFU, and of the ratio."""
    word = "goal reached" if share >= MFU_GOAL else "floor reached" if share >= MFU_FLOOR else "floor missed"
    times = "not measured" if ratio is None else "reached" if ratio >= RATIO_GOAL else "missed"
    return f"MFU {MFU_FLOOR:.0%}, {MFU_GOAL:.0%}: {word}; {RATIO_GOAL:.0f} times: {times}"


def tree(entries: Sequence[Entry], task: Task, peak_flops: float) -> dict[str, Any]:
    """All of it as plain numbers."""
    return {
        "preset": task.preset,
        "rows": task.rows,
        "context": task.context,
        "peak_flops": peak_flops,
        "contestants": {entry.name: _plain(entry, task, peak_flops) for entry in entries},
    }


def _plain(entry: Entry, task: Task, peak_flops: float) -> Mapping[str, Any]:
    assert entry.ready
    rates = entry.rates(task.tokens)
    median = summary(rates).median
    return {
        "tokens_per_s": median,
        "mfu": mfu(median, entry.ready.flops_per_token, peak_flops),
        "rates": rates,
        "ready": vars(entry.ready),
        "blocks": [vars(block) for block in entry.blocks],
    }
