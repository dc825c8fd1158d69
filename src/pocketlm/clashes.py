"""What is wrong with a configuration, a line each: in fields alone, and in those that do not go together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

if TYPE_CHECKING:
    from pocketlm.config import Config, DataConfig


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
    if config.init.previous_token_layers and not config.init.model and (missing := _previous_token_misses(config)):
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
    yield from _streams(data)
    if data.sources:
        yield from _mixture(data)
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
        "no model.rope_llama3": model.rope_llama3 is None,
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


def _mixture(data: DataConfig) -> Iterator[str]:
    total = sum(one.weight for one in data.sources)
    for one in data.sources:
        if round(one.weight / total * 1024) < 1:
            yield f"data.sources: {one.source} has weight {one.weight:g} of {total:g}, no row in 1,024; give it more"
    if data.dir:
        yield f"data.dir {data.dir} is the folder of one source; leave it out where there are data.sources"
    if data.max_documents:
        yield "data.max_documents is for one source; give it in each table of data.sources"
    if data.tokenizer.startswith("bpe:"):
        yield (
            f"data.tokenizer {data.tokenizer} is trained on one source; train one for all first: "
            f"pocketlm tokenizer train --source SOURCE --vocab-size {data.tokenizer[4:]} --out FILE"
        )


def _streams(data: DataConfig) -> Iterator[str]:
    if data.streams and data.order == "global":
        yield "data.shuffle global needs all text before the first step; add --data.stream off, or --data.shuffle piece"
    if data.streams and data.keep_segments and not data.segment_pieces:
        yield (
            f"data.keep_segments {data.keep_segments} is for text that streams in segments; "
            "add --data.segment-pieces N, or --data.keep-segments 0"
        )
    if data.keep_segments == 1:
        yield "data.keep_segments: given 1, allowed is 0 for all, or at least 2: one is read while the next one comes"


def unknown_field(name: str, fields: Sequence[str]) -> str:
    """One line that says that a field does not exist, and which one is nearest."""
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    same_ending = [field for field in fields if field.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = (same_ending or near or [""])[0]
    return f"no field {name!r}" + (
        f"; did you mean --{hint.replace('_', '-')}?" if hint else "; see pocketlm train --help"
    )


def problems(error: ValidationError) -> list[str]:
    """One line a field: where, what was given, what is allowed. A union reports each of its members."""
    reports: dict[str, tuple[Any, list[str]]] = {}
    for report in error.errors():
        name = ".".join(str(part) for part in report["loc"][:2])
        message = str(report["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
        reports.setdefault(name, (report["input"], []))[1].append(message)
    return [_problem(name, given, messages) for name, (given, messages) in reports.items()]


def _problem(name: str, given: Any, messages: list[str]) -> str:
    if isinstance(given, Mapping):  # a whole section whose fields do not go together
        return f"{name}: {'; '.join(messages)}"
    return f"{name}: given {given!r}, allowed is {' or '.join(messages)}"
