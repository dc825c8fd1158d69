"""How many rows go through the model at once: chosen by memory and speed, and halved when memory runs out all the same.

The tokens of a step stay; fewer rows at once only change the rounding of a sum. Closed-form memory (`model/sizes.py`)
against what is available bounds the choice. Within the bound a GPU takes all that fits. A CPU gains nothing above some
thousand tokens at once, so it takes the fewest that reach full speed, and leaves the memory to others; so does an mps,
whose memory is the machine's.

Of several ranks each has its rows of a step, and on a CPU its part of the host's memory; what one holds of the state
depends on their strategy. `Team` says all that.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

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


def choose(
    config: Config, device: torch.device, dtype: Dtype, attention: AttentionKernel, team: Team = ALONE
) -> tuple[int, str]:
    """Rows at once, on each rank, and why so many.

    Raises:
        ConfigError: not even one row fits, or not as many as were asked for.
    """
    return chosen(config, device.type, dtype, attention, available_bytes(device) // team.here, team)


def chosen(
    config: Config, device: str, dtype: Dtype, attention: AttentionKernel, available: int, team: Team = ALONE
) -> tuple[int, str]:
    """The same as a function of what is available to each rank, in bytes."""
    rows, given = rows_of_a_rank(config, team), config.train.micro_batch
    if given != "auto":
        return _as_given(config, min(given, rows), dtype, attention, available, device, team), "as given"
    fits = largest_that_fits(config, dtype, attention, int(available * USABLE[device]), device, team)
    if fits == 0 and not largest_that_fits(config, dtype, attention, available, device, team):
        raise ConfigError(refusal(config, 1, dtype, attention, available, device, team))
    wanted = rows if device in COUNTED else max(1, FULL_SPEED_TOKENS // config.data.context)
    micro_batch = evenly(rows, max(1, min(rows, wanted, fits)))
    bounded = f", all that fits in {_gb(available)}" if fits < min(rows, wanted) else ""
    tokens = micro_batch * config.data.context
    return micro_batch, f"{tokens} tokens at once, of {rows * config.data.context} a step{bounded}"


def rows_of_a_rank(config: Config, team: Team) -> int:
    """The most rows of a step that one of them has."""
    return len(share(config.rows_per_step, 0, team.ranks))


def warning(
    config: Config,
    micro_batch: int,
    dtype: Dtype,
    attention: AttentionKernel,
    device: torch.device,
    team: Team = ALONE,
) -> str | None:
    """What to say of a run that goes on with the rows it had, where there is less memory than they need."""
    available = available_bytes(device) // team.here
    if (total := needs(config, micro_batch, dtype, attention, device.type, team).total) <= available:
        return None
    return (
        f"this run goes on with {micro_batch} row(s) at once, which need about {_gb(total)}{_each(team)}; "
        f"{_gb(available)} are free{_for_each(team)}: it may be killed"
    )


def _as_given(
    config: Config,
    micro_batch: int,
    dtype: Dtype,
    attention: AttentionKernel,
    available: int,
    device: str,
    team: Team,
) -> int:
    if needs(config, micro_batch, dtype, attention, device, team).total > available:
        raise ConfigError(refusal(config, micro_batch, dtype, attention, available, device, team))
    return micro_batch


def needs(
    config: Config, micro_batch: int, dtype: Dtype, attention: AttentionKernel, device: str, team: Team = ALONE
) -> sizes.TrainingMemory:
    """Bytes on a device of this type. Folded attention keeps probabilities; a save copies to the host's memory."""
    folded, on_gpu = attention == "folded", device in COUNTED
    return sizes.training_memory(
        config, micro_batch, dtype, folded=folded, snapshot=not on_gpu, on_gpu=on_gpu, team=team
    )


def largest_that_fits(
    config: Config, dtype: Dtype, attention: AttentionKernel, room: int, device: str, team: Team = ALONE
) -> int:
    """The most rows, of a rank's in a step, whose training takes no more than `room` bytes; 0 if one takes more."""
    low, high = 0, rows_of_a_rank(config, team)
    while low < high:  # memory grows with the rows: bisection
        middle = (low + high + 1) // 2
        if needs(config, middle, dtype, attention, device, team).total <= room:
            low = middle
        else:
            high = middle - 1
    return low


def evenly(rows: int, most: int) -> int:
    """At most `most` at once, in turns as even as they can be: 62 rows, 40 at most, are 31 and 31.

    All turns alike are worth up to a third more turns: another shape is compiled anew, and computes otherwise.
    """
    in_fewest_turns = math.ceil(rows / math.ceil(rows / most))
    alike = max(size for size in range(1, most + 1) if rows % size == 0)
    return alike if 4 * alike >= 3 * in_fewest_turns else in_fewest_turns


def refusal(
    config: Config,
    micro_batch: int,
    dtype: Dtype,
    attention: AttentionKernel,
    available: int,
    device: str,
    team: Team = ALONE,
) -> str:
    """One line: what it needs, what there is, and what would help."""
    memory = needs(config, micro_batch, dtype, attention, device, team)
    kept = memory.per_parameter
    what = (
        f"{config.name} needs about {_gb(memory.total)}{_each(team)} to train with {micro_batch} row(s) of "
        f"{config.data.context} at once ({_gb(kept)} for the parameters, {_gb(memory.total - kept)} for the rows), "
        f"{_gb(available)} are free{_for_each(team)}"
    )
    if fits := largest_that_fits(config, dtype, attention, available, device, team):
        return f"{what}; add --train.micro-batch {min(fits, micro_batch - 1)}, or leave it to auto"
    return f"{what}; {_advice(config, dtype, attention, available, device, team)}"


def _advice(config: Config, dtype: Dtype, attention: AttentionKernel, available: int, device: str, team: Team) -> str:
    """What makes the state or a row smaller, as far as it would; else a smaller model."""

    def fits(changed: Config, among: Team = team) -> bool:
        return needs(changed, 1, dtype, attention, device, among).total <= available

    train, data, rows = config.train, config.data, config.rows_per_step
    if team.ranks > 1 and not team.shares and fits(config, replace(team, strategy="fsdp")):
        return "add --train.strategy fsdp"
    recomputed = train.model_copy(update={"gradient_checkpointing": True})
    if fits(config.model_copy(update={"train": recomputed})):
        return "add --train.gradient-checkpointing true"
    for context in (data.context // 2, data.context // 4):
        if context and fits(config.model_copy(update={"data": data.model_copy(update={"context": context})})):
            return f"add --data.context {context} --train.tokens-per-step {rows * context}"
    return "take a smaller preset, or a machine with more memory"


def _each(team: Team) -> str:
    return f" on each of {team.ranks} ranks" if team.ranks > 1 else ""


def _for_each(team: Team) -> str:
    return " for each" if team.ranks > 1 else ""


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
