"""One optimizer step: all the arithmetic of training. Rows -> micro-batches -> gradients -> verdict -> update.

The step is a function of the state alone: the same state gives the same next state, bit for bit at level `bitwise`.
Nothing in it depends on the clock, on earlier processes or on how often it was killed, and nothing in it waits for a
GPU: its figures stay on the device until the loop reads them, one step later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.config import Config
from pocketlm.data.loader import Loader
from pocketlm.model.loss import linear_cross_entropy
from pocketlm.optim.clip import clip_coefficient, global_norm
from pocketlm.optim.schedule import factor
from pocketlm.training.guard import APPLIED
from pocketlm.training.progress import Progress
from pocketlm.training.state import TrainState


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
    """() int64, the guard's."""
    seconds: float


def train_step(
    state: TrainState, loader: Loader, config: Config, micro_batch: int, check: Callable[[], None] = lambda: None
) -> Outcome:
    """One optimizer step; advances the state, also where the guard's verdict is to leave weights and moments alone.

    Args:
        check: called before each micro-batch; if it raises, nothing was advanced.
    """
    started_at = time.perf_counter()
    model, rows = state.precision.compute, config.rows_per_step
    batch = loader.read(state.progress.position, rows).to(model.head.device)  # (rows, T + 1)
    scale = 1.0 / (rows * config.data.context)  # every target of the step weighs the same, whatever the micro-batch
    loss = torch.zeros((), device=batch.device)
    parts = torch.split(batch, micro_batch)
    for part in parts:
        check()
        inputs, targets = part[:, :-1], part[:, 1:]
        hidden = model.hidden(inputs).flatten(0, 1)  # (B * T, C)
        part_loss = linear_cross_entropy(
            hidden,
            model.head,
            targets.flatten(),
            scale=scale,
            chunk=config.train.loss_chunk,
            softcap=config.model.logit_softcap,
            num_ids=config.model.vocab_size,
        )
        part_loss.backward()  # type: ignore[no-untyped-call]
        if len(parts) > 1:
            state.precision.collect_gradients()
        loss += part_loss.detach()

    gradients = state.precision.gradients()
    norm = global_norm(gradients.values())
    verdict = state.guard.verdict(loss, norm)
    now, total = state.progress, config.train.total_steps
    state.optimizer.step(
        gradients,
        factor(config.schedule, now.step, total),
        now.step,
        total,
        clip=clip_coefficient(norm, config.optim.clip) if config.optim.clip else None,
        skip=verdict != APPLIED,
    )
    state.precision.drop_gradients()
    now.step += 1
    now.position += rows
    now.tokens += rows * config.data.context
    return Outcome(now.model_copy(), loss, norm, verdict, time.perf_counter() - started_at)
