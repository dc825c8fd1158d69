"""One optimizer step: all the arithmetic of training. Rows -> micro-batches -> gradients -> verdict -> update.

The step is a function of the state alone: the same state gives the same next state, bit for bit at level `bitwise`.
Nothing in it depends on the clock, on earlier processes or on how often it was killed, and nothing in it waits for a
GPU: its figures stay on the device until the loop reads them, one step later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pocketlm.config import Config
from pocketlm.devices import COPIES_BESIDE, Told
from pocketlm.distributed import turns
from pocketlm.errors import one_line
from pocketlm.model.loss import IGNORED, linear_cross_entropy
from pocketlm.optim.clip import clip_coefficient
from pocketlm.optim.schedule import begun_with, factor
from pocketlm.training.guard import APPLIED
from pocketlm.training.micro_batch import OutOfMemory, is_out_of_memory
from pocketlm.training.progress import Progress
from pocketlm.training.scaler import LossScaler
from pocketlm.training.state import TrainState


class Rows(Protocol):
    """Where a step's tokens come from: the run's `Loader`, or invented ones where only the time is of interest."""

    def read(self, position: int, count: int) -> Tensor: ...


@dataclass(frozen=True)
class Outcome:
    """A step as it was computed; its figures are still on the device."""

    progress: Progress
    """After it."""
    loss: Tensor
    """() fp32, mean nats."""
    grad_norm: Tensor
    """() fp32, before clipping."""
    verdict: Tensor
    """() int64, the guard's, or the scaler's OVERFLOW."""
    loss_scale: Tensor | None
    """() fp32, what it was computed with in fp16."""
    told: Told
    """These figures, in this order, for who reads them when the next step has been begun."""
    started_at: float
    """By the clock of time.perf_counter."""
    ended_at: float | None
    """None on a GPU, which may still be at it."""


def train_step(
    state: TrainState, loader: Rows, config: Config, micro_batch: int, check: Callable[[], None] = lambda: None
) -> Outcome:
    """One optimizer step; advances the state, also where the guard's verdict is to leave weights and moments alone.

    Args:
        check: called before each micro-batch; if it raises, nothing was advanced.

    Raises:
        OutOfMemory: so many rows at once do not fit; nothing was advanced, and no gradient is left.
    """
    started_at = time.perf_counter()
    rows = config.rows_per_step
    loss = _gradients_or_nothing(state, loader, config, micro_batch, check)
    state.ranks.add(loss)
    gradients = state.precision.gradients()
    norm = _unscaled(state.precision.norm(gradients), state.scaler)
    multiplier = _multiplier(norm, config.optim.clip, state.scaler)
    verdict = state.guard.verdict(loss, norm)
    loss_scale = None
    if state.scaler:
        loss_scale = state.scaler.scale.clone()
        verdict = state.scaler.judge(verdict)
    now, total = state.progress, config.train.total_steps
    state.optimizer.step(
        gradients,
        factor(config.schedule, now.step, total),
        now.step,
        begun_with(config.schedule, total),
        clip=multiplier,
        skip=verdict != APPLIED,
    )
    del gradients
    state.precision.drop_gradients()
    now.step += 1
    now.position += rows
    now.tokens += rows * config.data.context
    told = Told([loss, norm, verdict] if loss_scale is None else [loss, norm, verdict, loss_scale])
    ended_at = time.perf_counter() if loss.device.type == "cpu" else None
    return Outcome(now.model_copy(), loss, norm, verdict, loss_scale, told, started_at, ended_at)


def _gradients_or_nothing(
    state: TrainState, loader: Rows, config: Config, micro_batch: int, check: Callable[[], None]
) -> Tensor:
    """The sums of a step's gradients, as `precision.gradients()` gives them; returns the loss, () fp32.

    Where memory runs out, here or on another rank, all of them are as before the step. Only here can it be done again:
    once the update has begun, weights and moments are no longer those before it.
    """
    count = turns(config.rows_per_step, state.ranks.size, micro_batch)
    losses = _micro_batches(state, loader, config, micro_batch, count)
    loss, reason = None, ""
    for _ in range(count):
        check()  # also where memory has run out: every rank says as many words
        if not reason:
            try:
                loss = next(losses)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or state.precision.shared:  # the others wait for its share of a block
                    raise
                reason = one_line(str(error)) or type(error).__name__
    if state.ranks.most(bool(reason)):
        state.precision.drop_gradients()
        raise OutOfMemory(reason or "on another rank")
    assert loss is not None
    return _unscaled(loss, state.scaler)


def _moved(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on the device; from pinned memory, for a copy from any other would wait for the GPU's last step."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type in COPIES_BESIDE else rows.to(device)


def _micro_batches(state: TrainState, loader: Rows, config: Config, micro_batch: int, count: int) -> Iterator[Tensor]:
    """Forward and backward of each micro-batch; gives the loss until there, () fp32. In fp16 all is times the scale."""
    model, rows = state.precision.compute, config.rows_per_step
    state.precision.before_reading()
    own = state.ranks.share(rows)
    batch = _moved(loader.read(state.progress.position + own.start, len(own)), model.head.device)  # (own rows, T + 1)
    mean = 1.0 / (rows * config.data.context)  # every target of the step weighs the same, whatever the micro-batch
    scale = mean * state.scaler.scale if state.scaler else mean
    loss = torch.zeros((), device=batch.device)
    for inputs, targets in _parts(batch, micro_batch, count):
        hidden = model.hidden(inputs).flatten(0, 1)  # (B * T, C)
        part_loss = linear_cross_entropy(
            hidden,
            model.head,
            targets.flatten(),
            scale=scale,
            chunk=state.loss_chunk,
            softcap=config.model.logit_softcap,
            num_ids=config.model.vocab_size,
        )
        part_loss.backward()  # type: ignore[no-untyped-call]
        if count > 1:
            state.precision.collect_gradients()
        loss += part_loss.detach()
        del hidden, part_loss  # the nodes of their graph lie between what it has freed, and keep it in pieces
        yield loss


def _parts(batch: Tensor, micro_batch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of a rank's micro-batches, each (rows, T), from its (rows, T + 1) of the step.

    Where another rank has more of them, this one goes with it: through a row of which no target counts.
    """
    parts = [(part[:, :-1], part[:, 1:]) for part in torch.split(batch, micro_batch)] if len(batch) else []
    if more := count - len(parts):
        nothing = batch.new_zeros(1, batch.shape[1] - 1)
        parts += [(nothing, torch.full_like(nothing, IGNORED))] * more
    return parts


def _multiplier(norm: Tensor, limit: float | None, scaler: LossScaler | None) -> Tensor | None:
    """By what the optimizer multiplies every gradient, in fp32, () fp32: it clips, and takes the loss scale out."""
    clip = clip_coefficient(norm, limit) if limit else None
    if scaler is None:
        return clip
    return _unscaled(torch.ones_like(norm) if clip is None else clip, scaler)


def _unscaled(value: Tensor, scaler: LossScaler | None) -> Tensor:
    """An fp32 value of the step, divided by its loss scale: a power of two, so that nothing is rounded."""
    return value / scaler.scale if scaler else value
