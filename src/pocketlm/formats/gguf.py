"""A model in a GGUF file, read: its architecture, weights, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import torch

from pocketlm.config import ModelConfig
from pocketlm.errors import FileError
from pocketlm.formats import gguf_model
from pocketlm.formats.gguf_file import Header, read_header, read_tensors
from pocketlm.formats.gguf_tokenizer import tokenizer_in
from pocketlm.formats.release import Release

CHAT_TEMPLATE = "tokenizer.chat_template"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_gguf(path: Path) -> Release:
    """The model in a GGUF file; weights that were rounded when it was written stay so.

    A head that is the embedding bit for bit is the embedding.

    Raises:
        FileError: no such file, damaged, or of a model that pocketlm does not have.
        DataError: its tokenizer is of a kind that is not known.
    """
    header = read_header(path)
    model = gguf_model.model_config(header)
    tokenizer = tokenizer_in(header)
    arch = str(header.fields["general.architecture"])
    weights = gguf_model.from_tensors(model, arch, read_tensors(header))
    if HEAD in weights and torch.equal(weights[HEAD], weights[EMBEDDING]):
        del weights[HEAD]
        model = model.model_copy(update={"tie_word_embeddings": True})
    return Release(model, weights, tokenizer, chat_template=_chat_template(header))


def read_config(path: Path) -> ModelConfig:
    """The architecture in a GGUF file; no weights are read.

    Raises:
        FileError: as `read_gguf`.
    """
    return gguf_model.model_config(read_header(path))


def _chat_template(header: Header) -> str | None:
    template = header.fields.get(CHAT_TEMPLATE)
    if not isinstance(template, str | None):
        raise FileError(f"{header.path} is damaged: its chat template is no text")
    return template
