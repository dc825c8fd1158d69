"""How many rows go through the model at once: chosen by memory and speed, and halved when memory runs out all the same.

The tokens of a step stay; fewer rows at once only change the rounding of a sum. Closed-form memory (`model/sizes.py`)
against what is available bounds the choice. Within the bound a GPU takes all that fits. A CPU gains nothing above some
thousand tokens at once, so it takes the fewest that reach full speed, and leaves the memory to others; so does an mps,
whose memory is the machine's.

Of several ranks each has its rows of a step, and on a CPU its part of the host's memory; what one holds of the state
depends on their strategy. `Team` says all that; `Training` has all that memory depends on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel

from pocketlm.config import Config
from pocketlm.distributed import share
from pocketlm.errors import ConfigError
from pocketlm.field_types import AttentionKernel, Dtype
from pocketlm.model import sizes
from pocketlm.model.sizes import ALONE, Team
from pocketlm.training.memory import COUNTED, available_bytes

FULL_SPEED_TOKENS = 4096
"""At once on a CPU: within 2 % of the best tokens/s for every preset, while half of it is not (docs/plan.md)."""
USABLE = {"cpu": 0.85, "cuda": 0.92, "xpu": 0.85, "mps": 0.85}
"""Share of what is available that the closed form may fill: it is an estimate, and others live on the machine."""


REFUSALS = (
    "you tried to allocate",  # PyTorch's CPU allocator
    "out of memory",  # CUDA error, CUDA driver error
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
"""What a RuntimeError says that means it; only PyTorch's caching allocator on a GPU has an error of its own."""


class OutOfMemory(Exception):
    """A step's micro-batch did not fit: nothing was advanced and no gradient is left."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that memory ran out: on a GPU, in a library, or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in REFUSALS):
        return True
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return before is not None and is_out_of_memory(before)


@dataclass(frozen=True)
class Training:
    """What decides how much memory a rank takes: what is trained, where, how it is computed, and with how many."""

    config: Config
    device: torch.device
    dtype: Dtype
    attention: AttentionKernel
    team: Team = ALONE

    @property
    def rows(self) -> int:
        """The most rows of a step that one of the ranks has."""
        return len(share(self.config.rows_per_step, 0, self.team.ranks))

    def needs(self, micro_batch: int) -> sizes.TrainingMemory:
        """Bytes on the device. Folded attention keeps probabilities; a save copies to the host's memory."""
        folded, on_gpu = self.attention == "folded", self.device.type in COUNTED
        return sizes.training_memory(
            self.config, micro_batch, self.dtype, folded=folded, snapshot=not on_gpu, on_gpu=on_gpu, team=self.team
        )

    def largest_that_fits(self, room: int) -> int:
        """The most rows, of a rank's in a step, whose training takes no more than `room` bytes; 0 if one takes more."""
        low, high = 0, self.rows
        while low < high:  # memory grows with the rows: bisection
            middle = (low + high + 1) // 2
            if self.needs(middle).total <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def choose(self) -> tuple[int, str]:
        """Rows at once, on each rank, and why so many.

        Raises:
            ConfigError: not even one row fits, or not as many as were asked for.
        """
        return self.chosen(self._available())

    def chosen(self, available: int) -> tuple[int, str]:
        """The same as a function of what is available to each rank, in bytes."""
        rows, given, context = self.rows, self.config.train.micro_batch, self.config.data.context
        if given != "auto":
            return self._as_given(min(given, rows), available), "as given"
        fits = self.largest_that_fits(int(available * USABLE[self.device.type]))
        if fits == 0 and not self.largest_that_fits(available):
            raise ConfigError(self.refusal(1, available))
        wanted = rows if self.device.type in COUNTED else max(1, FULL_SPEED_TOKENS // context)
        micro_batch = evenly(rows, max(1, min(rows, wanted, fits)))
        bounded = f", all that fits in {_gb(available)}" if fits < min(rows, wanted) else ""
        return micro_batch, f"{micro_batch * context} tokens at once, of {rows * context} a step{bounded}"

    def warning(self, micro_batch: int) -> str | None:
        """What to say of a run that goes on with the rows it had, where there is less memory than they need."""
        available = self._available()
        if (total := self.needs(micro_batch).total) <= available:
            return None
        return (
            f"this run goes on with {micro_batch} row(s) at once, which need about {_gb(total)}{self._each()}; "
            f"{_gb(available)} are free{self._for_each()}: it may be killed"
        )

    def refusal(self, micro_batch: int, available: int) -> str:
        """One line: what it needs, what there is, and what would help."""
        memory = self.needs(micro_batch)
        kept = memory.per_parameter
        what = (
            f"{self.config.name} needs about {_gb(memory.total)}{self._each()} to train with {micro_batch} row(s) of "
            f"{self.config.data.context} at once ({_gb(kept)} for the parameters, {_gb(memory.total - kept)} for the "
            f"rows), {_gb(available)} are free{self._for_each()}"
        )
        if fits := self.largest_that_fits(available):
            return f"{what}; add --train.micro-batch {min(fits, micro_batch - 1)}, or leave it to auto"
        return f"{what}; {self._advice(available)}"

    def _as_given(self, micro_batch: int, available: int) -> int:
        if self.needs(micro_batch).total > available:
            raise ConfigError(self.refusal(micro_batch, available))
        return micro_batch

    def _advice(self, available: int) -> str:
        """What makes the state or a row smaller, as far as it would; else a smaller model."""
        team, train, data = self.team, self.config.train, self.config.data

        def fits(changed: Training) -> bool:
            return changed.needs(1).total <= available

        if team.ranks > 1 and not team.shares and fits(replace(self, team=replace(team, strategy="fsdp"))):
            return "add --train.strategy fsdp"
        recomputed = train.model_copy(update={"gradient_checkpointing": True})
        if fits(self._with({"train": recomputed})):
            return "add --train.gradient-checkpointing true"
        for context in (data.context // 2, data.context // 4):
            shorter = data.model_copy(update={"context": context})
            if context and fits(self._with({"data": shorter})):
                rows = self.config.rows_per_step
                return f"add --data.context {context} --train.tokens-per-step {rows * context}"
        return "take a smaller preset, or a machine with more memory"

    def _with(self, sections: Mapping[str, BaseModel]) -> Training:
        return replace(self, config=self.config.model_copy(update=sections))

    def _available(self) -> int:
        """Bytes that this rank can still take."""
        return available_bytes(self.device) // self.team.here

    def _each(self) -> str:
        return f" on each of {self.team.ranks} ranks" if self.team.ranks > 1 else ""

    def _for_each(self) -> str:
        return " for each" if self.team.ranks > 1 else ""


def evenly(rows: int, most: int) -> int:
    """At most `most` at once, in turns as even as they can be: 62 rows, 40 at most, are 31 and 31.

    All turns alike are worth up to a third more turns: another shape is compiled anew, and computes otherwise.
    """
    in_fewest_turns = math.ceil(rows / math.ceil(rows / most))
    alike = max(size for size in range(1, most + 1) if rows % size == 0)
    return alike if 4 * alike >= 3 * in_fewest_turns else in_fewest_turns


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
