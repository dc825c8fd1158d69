"""A model as it is handed from one tool to another: what every format reads to and writes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.config import ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.formats import huggingface
from pocketlm.model.transformer import Transformer
from pocketlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Release:
    """A model with all that it takes to use it; how it was trained is no part of it."""

    model: ModelConfig
    weights: Mapping[str, Tensor]
    """float32, under our names; tied ones once."""
    tokenizer: Tokenizer
    sample: SampleConfig = field(default_factory=SampleConfig)
    """How it speaks unless told otherwise."""
    chat_template: str | None = None
    """Jinja, as it came: nothing here runs it."""
    other_end_ids: frozenset[int] = frozenset()
    """What ends a text beside the tokenizer's own id, as Instruct models have it."""
    document_masks: bool = False
    """Whether attention and positions began anew at each document in training. No format but our own says so."""
    token_names: Mapping[str, str] = field(default_factory=dict)
    """What the chat template calls special tokens (`bos_token`), where the model's files say it."""

    def transformer(self) -> Transformer:
        """The model itself, in evaluation mode; its weights are the release's own."""
        with torch.device("meta"):
            model = Transformer(self.model)
        model.load_state_dict(dict(self.weights), assign=True)
        model.document_end = self.tokenizer.end_id if self.document_masks else None
        return model.eval().requires_grad_(False)


def check_vocabulary(path: Path, release: Release) -> None:
    """
    Raises:
        FileError: the tokenizer makes ids that the model does not have.
    """
    ids, rows = release.tokenizer.vocab_size, release.model.vocab_size
    if ids > rows:
        raise FileError(f"{path}: its tokenizer has {ids} ids, its model {rows}")


def folder_texts(release: Release) -> dict[str, bytes]:
    """What stands beside the weights in a Hugging Face folder, by the names of the files."""
    tokenizer = release.tokenizer
    others = sorted(release.other_end_ids)
    ends = {"eos_token_id": [tokenizer.end_id, *others]} if others else {}
    texts = {
        "config.json": json_bytes(config_tree(release)),
        "generation_config.json": json_bytes(
            huggingface.generation_config_json(release.sample, tokenizer.end_id) | _begin(tokenizer) | ends
        ),
    } | tokenizer_texts(tokenizer, release.token_names, context=release.model.max_position_embeddings)
    if release.chat_template is not None:
        texts["chat_template.jinja"] = release.chat_template.encode()
    return texts


def config_tree(release: Release) -> dict[str, Any]:
    """config.json of a model and its tokenizer."""
    return huggingface.config_json(release.model, end_id=release.tokenizer.end_id) | _begin(release.tokenizer)


def _begin(tokenizer: Tokenizer) -> dict[str, int]:
    return {} if tokenizer.begin_id is None else {"bos_token_id": tokenizer.begin_id}


def json_bytes(tree: Mapping[str, Any]) -> bytes:
    """A JSON file as we write them."""
    return (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode()


def tokenizer_texts(
    tokenizer: Tokenizer, names: Mapping[str, str] | None = None, *, context: int | None = None
) -> dict[str, bytes]:
    """The two files of a tokenizer in a Hugging Face folder.

    Args:
        names: what files of its model called special tokens: `bos_token` and so on.
        context: tokens that its model takes.
    """
    begin = tokenizer.begin_token
    config = huggingface.tokenizer_config_json(tokenizer.end_token, begin_token=begin, context=context)
    given = {name: token for name, token in (names or {}).items() if token in tokenizer.special_tokens}
    if given and "bos_token" not in given:  # a template would write it before each conversation
        del config["bos_token"]
    own = {"eos_token": tokenizer.end_token} | ({"bos_token": begin} if begin else {})
    return {"tokenizer.json": tokenizer.to_json().encode(), "tokenizer_config.json": json_bytes(config | given | own)}
