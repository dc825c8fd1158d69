"""What a run does and writes, counted from its configuration alone: steps, tokens, evaluations, checkpoints."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch

from pocketlm import checkpoint, machine
from pocketlm.config import Config
from pocketlm.data.shards import Dataset
from pocketlm.model import sizes
from pocketlm.model.transformer import Transformer
from pocketlm.optim.optimizer import Optimizer
from pocketlm.optim.schedule import ends, rests_on
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.training.guard import Guard
from pocketlm.training.resolve import Resolved
from pocketlm.training.state import SCHEMA, Scalars, random_states


@dataclass(frozen=True)
class Work:
    """What a run does, counted."""

    steps: int
    tokens: int
    flops: int
    evaluations: int
    evaluated_tokens: int | None
    """Of each evaluation; None where the data are not known."""
    checkpoints: int
    """Written in all."""
    kept: int
    """On the disk at the end, at most: the best may be among the last."""

    @property
    def most_kept(self) -> int:
        """On the disk at once: a new one is whole before an old one goes."""
        return min(self.checkpoints, self.kept + 1)


def work_of(config: Config, dataset: Dataset | None) -> Work:
    """Counts it."""
    train = config.train
    tokens = train.total_steps * train.tokens_per_step
    ending = set(ends(config.schedule, train.total_steps))
    rests = rests_on(config.schedule, train.total_steps)
    rest = set() if rests is None else {rests}
    saved = _times(train.total_steps, train.checkpoint_every, ending | rest) + 1  # the beginning is a checkpoint
    held_out = dataset.val.num_tokens - 1 if dataset else config.data.validation_tokens or None
    if train.eval_tokens:
        held_out = min(train.eval_tokens, held_out or train.eval_tokens)
    return Work(
        steps=train.total_steps,
        tokens=tokens,
        flops=tokens * sizes.flops_per_token(config.model, config.data.context),
        evaluations=_times(train.total_steps, train.eval_every, ending),
        evaluated_tokens=held_out,
        checkpoints=saved,
        kept=min(saved, train.keep_last + train.keep_best + len(rest)),
    )


def _times(steps: int, every: int, besides: Set[int]) -> int:
    """How often something is due: every so many steps (0: never), and besides."""
    if not every:
        return len(besides)
    return steps // every + sum(step % every > 0 for step in besides)


def checkpoint_bytes(config: Config, tokenizer: Tokenizer, resolved: Resolved) -> int:
    """What one checkpoint takes of the disk, in whole blocks: from the shapes alone, no tensor is made."""
    with torch.device("meta"):
        model = Transformer(config.model)
    parameters = dict(model.named_parameters())
    optimizer, guard = Optimizer(parameters, config.optim), Guard(config.guard, torch.device("meta"))
    scalars = Scalars(
        schema=SCHEMA,
        updates=config.train.total_steps,
        regular=True,
        records=2 * config.train.total_steps,
        journal_sha256="0" * 64,
        random=random_states(),
        versions=machine.versions(),
        data_fingerprint="0" * 64,
        resolved=resolved,
        step=config.train.total_steps,
    )
    return checkpoint.size_bytes(
        checkpoint.Snapshot(
            step=config.train.total_steps,
            model=config.model,
            sample=config.sample,
            tokenizer=tokenizer,
            weights=dict(model.named_parameters()),
            optimizer=optimizer.tensors() | guard.tensors(),
            config_toml=config.to_toml(),
            state=scalars.model_dump(by_alias=True),
        )
    )
