"""A run that begins with the weights of another model instead of chance: continued pretraining.

The model is a folder (a checkpoint, one of Hugging Face, an exported or imported one) or a Hub id. Its shape is the
run's. The tokenizer need not be: then a token that both know keeps its row of the embedding, and of the head where that
is another one; a new token begins at the mean of the rows that were there, plus what chance gave it (that mean keeps
new tokens as unlikely as the others: Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
Tokens are the same if they stand for the same bytes; special ones, if they have the same text; and what ends a text
there ends it here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.checkpoint import find_checkpoint, read_config, read_release
from pocketlm.config import Config, ModelConfig
from pocketlm.errors import ConfigError
from pocketlm.formats.hub_model import fetch_model, is_hub_id
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.training.state import TrainState

BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
POSITIONS = ("max_position_embeddings", "rope_theta", "rope_llama3")
"""With rotary positions the weights say nothing of these: a longer context begins with other ones."""


def fields_of(spec: str) -> dict[str, Any]:
    """What a configuration has of the model that it begins with, by dotted names: its shape, and its tokenizer.

    Raises:
        ConfigError: a run, whose newest checkpoint changes, or a file.
        FileError: no model is there.
    """
    path = Path(spec)
    if (path / "checkpoints").is_dir():
        newest = max((path / "checkpoints").glob("step-*"), default=path / "checkpoints" / "step-N")
        raise ConfigError(f"init.model: given the run {spec}, allowed is one of its checkpoints, as {newest}")
    if path.is_file():
        raise ConfigError(f"init.model: given the file {spec}, allowed is a folder; pocketlm import makes one of it")
    folder = fetch_model(spec, weights=False) if is_hub_id(spec) else find_checkpoint(path, lambda line: None)
    model = read_config(folder).model_dump()
    return {f"model.{name}": value for name, value in model.items()} | {"data.tokenizer": spec}


def begin_with(state: TrainState, config: Config, tokenizer: Tokenizer) -> str:
    """Gives a state that has just begun the weights of `config.init.model`, and says what was taken.

    Raises:
        ConfigError: it is another kind of model.
        FileError, DataError: there is none, or its tokenizer is of a kind that is not known.
    """
    spec = config.init.model
    assert spec is not None
    words = ""

    @torch.no_grad()
    def read() -> None:
        nonlocal words
        there = read_release(find_checkpoint(Path(spec), lambda line: None))
        _check_same_kind(config, there.model)
        source = rows_kept(there.tokenizer, tokenizer, there.model.vocab_size, config.model.vocab_size)
        words = _in_words(config, there.model, there.tokenizer, tokenizer, source)
        rows = state.rows() or {}
        for name, parameter in state.precision.parameters.items():
            own = rows.get(name, range(len(parameter)))
            if name in BY_TOKEN:
                put_rows(parameter, there.weights[name], source[own.start : own.stop])
            else:
                parameter.copy_(there.weights[name][own.start : own.stop])

    state.take(read)
    return f"begun with the weights of {spec}: {words}"


def put_rows(table: Tensor, old: Tensor, source: Tensor) -> None:
    """Fills a table (rows, C), which chance has filled, from an old one (V, C).

    Args:
        source: (rows,) int64: which old row each row gets; -1 for the mean of all, added to what stands there.
    """
    old, source = old.to(table.device), source.to(table.device)
    new = source < 0
    fresh = table[new] + old.mean(0)
    table.copy_(old[source.clamp(min=0)])
    table[new] = fresh


def rows_kept(old: Tokenizer, new: Tokenizer, old_rows: int, num_rows: int) -> Tensor:
    """For each row of a new embedding the row of the old one that it gets, (num_rows,) int64; -1 for a new token.

    With the same tokenizer these are the same rows, those without a token among them.
    """
    if old.fingerprint == new.fingerprint:
        source = torch.arange(num_rows)
        return torch.where(source < old_rows, source, -1)
    known = _tokens(old)  # where several stand for the same bytes, the last: in SentencePiece these are whole pieces
    source = torch.full((num_rows,), -1)
    for token, number in _tokens(new).items():
        source[number] = known.get(token, -1)
    source[new.end_id] = old.end_id
    return source


def _tokens(tokenizer: Tokenizer) -> dict[tuple[str, bytes], int]:
    plain = {("text", token): number for number, token in enumerate(tokenizer.token_bytes) if token}
    return plain | {("special", token.encode()): number for token, number in tokenizer.special_tokens.items()}


def _check_same_kind(config: Config, there: ModelConfig) -> None:
    """
    Raises:
        ConfigError: the weights fit, or mean, another model.
    """
    here, free = config.model, {"vocab_size", *(POSITIONS if there.position == "rope" else ())}
    names = [name for name in ModelConfig.model_fields if name not in free]
    other = [
        f"model.{n}: {getattr(here, n)}, {getattr(there, n)}" for n in names if getattr(here, n) != getattr(there, n)
    ]
    if other:
        raise ConfigError(
            f"init.model {config.init.model} is another model (given, there): {'; '.join(other)}; "
            f"leave these fields out, or give the values there"
        )


def _in_words(config: Config, there: ModelConfig, old: Tokenizer, new: Tokenizer, source: Tensor) -> str:
    here, ids = config.model, new.vocab_size
    same = old.fingerprint == new.fingerprint
    kept = int((source[:ids] >= 0).sum())
    tokens = "its own tokenizer" if same else f"another tokenizer, {kept:,} of whose {ids:,} tokens keep their rows"
    moved = [
        f"{n} {getattr(here, n)} for {getattr(there, n)}" for n in POSITIONS if getattr(here, n) != getattr(there, n)
    ]
    return ", ".join([tokens, *moved])
