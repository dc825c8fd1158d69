"""Fields of a configuration that are right alone and wrong together: one line each, with what to type."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketlm.config import Config


def clashes(config: Config) -> Iterator[str]:
    """Fields that are right alone and wrong together."""
    data, train, model = config.data, config.train, config.model
    if data.context > model.max_position_embeddings:
        yield (
            f"data.context {data.context} is above model.max_position_embeddings {model.max_position_embeddings}; "
            f"add --model.max-position-embeddings {data.context}"
        )
    if train.tokens_per_step % data.context:
        nearest = max(1, round(train.tokens_per_step / data.context)) * data.context
        yield (
            f"train.tokens_per_step {train.tokens_per_step} is no multiple of data.context {data.context}; "
            f"the nearest is --train.tokens-per-step {nearest}"
        )
    if config.init.previous_token_layers and (missing := _previous_token_misses(config)):
        yield (
            f"init.previous_token_layers {config.init.previous_token_layers} takes {', '.join(missing)}; change these, "
            f"or add --init.previous-token-layers 0"
        )
    ids = _known_ids(data.tokenizer)
    if ids and ids > model.vocab_size:
        yield (
            f"model.vocab_size {model.vocab_size} is below the {ids} ids of the tokenizer {data.tokenizer}; "
            f"add --model.vocab-size {ids}"
        )
    yield from _steps(config)


def _known_ids(tokenizer: str) -> int | None:
    """How many ids a tokenizer has whose name says so; others are counted once they are read."""
    kind, _, size = tokenizer.partition(":")
    return int(size) if kind == "bpe" and size.isdecimal() else {"gpt2": 50257, "byte": 257}.get(tokenizer)


def _previous_token_misses(config: Config) -> list[str]:
    """What a head that begins by reading the token before needs of a model, and this one has not."""
    model, init = config.model, config.init
    wanted = {
        "model.position rope": model.position == "rope",
        "model.qk_norm true": model.qk_norm,
        "as many key-value as query heads": model.num_key_value_heads == model.num_attention_heads,
        "init.output_projections zero": init.output_projections == "zero",
        f"at least {init.previous_token_layers} layers": model.num_hidden_layers >= init.previous_token_layers,
    }
    return [name for name, has in wanted.items() if not has]


def _steps(config: Config) -> Iterator[str]:
    """What the schedule cannot have of steps and rates."""
    schedule, total, peak = config.schedule, config.train.total_steps, config.optim.lr
    ends = (*schedule.continued_at, total)
    if schedule.warmup_steps is not None and schedule.warmup_steps > ends[0]:
        yield (
            f"schedule.warmup_steps {schedule.warmup_steps} is above train.total_steps {ends[0]}; "
            f"lower it with --schedule.warmup-steps"
        )
    if any(later <= earlier for earlier, later in pairwise(ends)):
        yield f"schedule.continued_at {list(schedule.continued_at)}: allowed are steps that rise, below {total}"
    if len(schedule.continued_at) != len(schedule.continued_to):
        yield (
            f"schedule.continued_to {list(schedule.continued_to)}: allowed is one factor for each step of "
            f"schedule.continued_at {list(schedule.continued_at)}"
        )
    if schedule.continue_lr is None:
        return
    lowest = schedule.final_factor * peak
    if schedule.kind in ("wsd", "constant"):
        yield f"schedule.continue_lr is for cosine and linear: {schedule.kind} goes on at the peak; leave it out"
    elif not lowest <= schedule.continue_lr <= peak:
        yield (
            f"schedule.continue_lr: given {schedule.continue_lr:g}, allowed is {lowest:g} to {peak:g}, "
            f"from the rate at the end to that at the peak"
        )
