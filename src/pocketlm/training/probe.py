"""What a configuration takes on this machine, measured: a few of the product's own steps over random token ids.

`pocketlm plan` and `pocketlm bench` share it. No data set is needed: how long a product takes does not depend on the
numbers in it. A step is some micro-batches and one update, so a short step tells of a long one:

    seconds of a step = update + micro-batches x seconds of each

Both are had from short steps of one and of several micro-batches, where a whole step is too long to be tried.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pocketlm.config import Config
from pocketlm.devices import gpu_name
from pocketlm.errors import ConfigError
from pocketlm.evaluate.loss import BATCH_TOKENS, target_losses
from pocketlm.machine import Runtime, cpu_name
from pocketlm.training.memory import forget_peak, peak_bytes
from pocketlm.training.meter import Meter
from pocketlm.training.micro_batch import OutOfMemory, evenly
from pocketlm.training.resolve import Resolved
from pocketlm.training.run import compile_if_wanted, new_state
from pocketlm.training.state import TrainState
from pocketlm.training.step import train_step

Hear = Callable[[str], None]


@dataclass
class Probed:
    """What was measured, so far: a probe that is broken off keeps what it has."""

    micro_batch: int
    num_micro_batches: int
    """Of one step of the run."""
    step_tokens: int
    """Of one step of the run."""
    first_s: float = 0.0
    """The first step, of one micro-batch: it makes memory, and compiles where that is wanted."""
    state_s: float = 0.0
    """Making model, optimizer and copies."""
    short_s: list[float] = field(default_factory=list)
    """Steps of one micro-batch."""
    long_s: list[float] = field(default_factory=list)
    """Steps of `long` micro-batches."""
    long: int = 1
    evaluation_s_per_token: float | None = None
    peak_bytes: int = 0
    """The most that the process has held, all that is not the model's included."""
    joules: float | None = None
    """Taken by the machine's processor or GPU in the seconds of `metered_s`; None without a meter."""
    metered_s: float = 0.0
    interrupted: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether there is a step to speak of."""
        return bool(self.long_s or self.short_s)

    @property
    def update_s(self) -> float:
        """What a step takes beside its micro-batches; 0 where only steps of one length were tried."""
        if self.long == 1 or not self.long_s or not self.short_s:
            return 0.0
        return max(0.0, _median(self.short_s) - self._micro_batch_s)

    @property
    def _micro_batch_s(self) -> float:
        if self.long == 1 or not self.long_s:
            return _median(self.short_s)
        if not self.short_s:
            return _median(self.long_s) / self.long
        return max(0.0, (_median(self.long_s) - _median(self.short_s)) / (self.long - 1))

    @property
    def step_s(self) -> float:
        """Seconds of one step of the run: tried, or made up of shorter ones."""
        if self.long == self.num_micro_batches and self.long_s:
            return _median(self.long_s)
        return self.update_s + self.num_micro_batches * self._micro_batch_s

    @property
    def rates(self) -> list[float]:
        """Tokens/s of a step of the run, as much above or below those of `step_s` as each of the longest tried."""
        seconds = self.long_s or self.short_s
        return [self.step_tokens / self.step_s * (_median(seconds) / each) for each in seconds]

    @property
    def extra_first_s(self) -> float:
        """What the first step takes more than another."""
        return max(0.0, self.first_s - _median(self.short_s)) if self.short_s else 0.0


def probe(
    config: Config, resolved: Resolved, runtime: Runtime, *, seconds: float, steps: int, hear: Hear = lambda text: None
) -> Probed:
    """Takes steps for about `seconds`: up to `steps` of the longest kind that fit into them.

    Where memory runs out it begins again with half as many rows at once, as a run would go on. A KeyboardInterrupt
    ends it with what was measured, if anything was.

    Raises:
        ConfigError: not even one row at once fits.
    """
    while True:
        rows, micro_batch = config.rows_per_step, resolved.micro_batch
        probed = Probed(micro_batch, -(-rows // micro_batch), config.train.tokens_per_step)
        try:
            _measure(probed, config, resolved, runtime, seconds, steps, hear)
            probed.peak_bytes = peak_bytes(runtime.device)
            return probed
        except OutOfMemory as error:
            reason = str(error)
        if micro_batch == 1:
            raise ConfigError(f"{config.name}: one row at once does not fit into memory ({reason})")
        fewer = evenly(rows, micro_batch // 2)
        hear(f"out of memory: {fewer} rows at once instead of {micro_batch}")
        resolved = resolved.model_copy(update={"micro_batch": fewer})
        if resolved.compile:
            torch.compiler.reset()


def _measure(
    probed: Probed, config: Config, resolved: Resolved, runtime: Runtime, seconds: float, steps: int, hear: Hear
) -> None:
    forget_peak(runtime.device)
    began_at = time.perf_counter()
    state = new_state(config, resolved, runtime)
    compile_if_wanted(state, config, resolved, hear)
    probed.state_s = time.perf_counter() - began_at
    try:
        _take_steps(probed, state, config, began_at + seconds, steps, hear)
        probed.evaluation_s_per_token = _evaluation_s(state, config)
    except KeyboardInterrupt:
        if not probed.is_measured:
            raise
        probed.interrupted = True


def _take_steps(probed: Probed, state: TrainState, config: Config, until: float, steps: int, hear: Hear) -> None:
    rows = RandomRows(config)

    def step(num_micro_batches: int) -> float:
        """Seconds of a step of so many micro-batches."""
        whole = num_micro_batches == probed.num_micro_batches
        cut = config if whole else _with_rows(config, num_micro_batches * probed.micro_batch)
        began_at = time.perf_counter()
        train_step(state, rows, cut, probed.micro_batch).loss.item()  # waits for a GPU
        return time.perf_counter() - began_at

    probed.first_s = step(1)
    probed.short_s.append(step(1))
    affordable = int((until - time.perf_counter()) / (steps * probed.short_s[0]))
    probed.long = min(probed.num_micro_batches, max(2, affordable))
    if probed.long == 1:  # it was a whole step, and the warm-up's second
        probed.short_s.clear()
    hear(f"up to {steps} steps of {probed.long} micro-batch(es) of {probed.micro_batch} row(s)")
    meter = Meter()
    for number in range(steps):
        if number and time.perf_counter() > until:
            break
        if probed.long > 1:
            probed.long_s.append(step(probed.long))
        if probed.long == 1 or probed.long < probed.num_micro_batches:
            probed.short_s.append(step(1))
    probed.joules, probed.metered_s = meter.joules(), meter.seconds()


def _with_rows(config: Config, rows: int) -> Config:
    train = config.train.model_copy(update={"tokens_per_step": rows * config.data.context})
    return config.model_copy(update={"train": train})


@torch.no_grad()
def _evaluation_s(state: TrainState, config: Config) -> float:
    """Seconds a token of validation: one batch as `evaluate_stream` cuts it, the better of two where that is quick."""
    model, context = state.precision.compute, config.data.context
    batch = RandomRows(config).read(0, max(1, BATCH_TOKENS // context)).to(model.head.device)
    best_s = float("inf")
    for _ in range(2):
        began_at = time.perf_counter()
        target_losses(model, batch).sum().item()
        best_s = min(best_s, time.perf_counter() - began_at)
        if best_s > 1.0:
            break
    return best_s / (len(batch) * context)


class RandomRows:
    """Rows of token ids that nobody wrote, in the shape of a run's: a function of the position."""

    def __init__(self, config: Config) -> None:
        self.vocab_size, self.context = config.model.vocab_size, config.data.context

    def read(self, position: int, count: int) -> Tensor:
        """(count, context + 1) int64."""
        generator = torch.Generator().manual_seed(position)
        return torch.randint(self.vocab_size, (count, self.context + 1), generator=generator)


def device_name(device: torch.device) -> str:
    """What a GPU or a CPU calls itself."""
    return cpu_name() if device.type == "cpu" else gpu_name(device)


def _median(values: list[float]) -> float:
    return statistics.median(values)
