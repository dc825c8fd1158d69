"""A model in a GGUF file, read: its architecture, weights, tokenizer, chat template and sampling."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError

from pocketlm.clashes import problems
from pocketlm.config import ModelConfig, SampleConfig
from pocketlm.errors import FileError
from pocketlm.formats import gguf_model
from pocketlm.formats.gguf_file import Header, read_header, read_tensors
from pocketlm.formats.gguf_tokenizer import eot_id, token_in, tokenizer_in
from pocketlm.formats.release import Release

CHAT_TEMPLATE = "tokenizer.chat_template"
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p"}
"""Ours, and what stands behind `general.sampling.` in a file."""
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
    sample, template = _sample(header), _chat_template(header)
    tokenizer = tokenizer_in(header)
    eot = eot_id(header)
    others = frozenset() if eot in (None, tokenizer.end_id) else frozenset([eot])
    arch = str(header.fields["general.architecture"])
    weights = gguf_model.from_tensors(model, arch, read_tensors(header))
    if HEAD in weights and torch.equal(weights[HEAD], weights[EMBEDDING]):
        del weights[HEAD]
        model = model.model_copy(update={"tie_word_embeddings": True})
    return Release(model, weights, tokenizer, sample, template, others, token_names=_token_names(header))


def read_config(path: Path) -> ModelConfig:
    """The architecture in a GGUF file; no weights are read.

    Raises:
        FileError: as `read_gguf`.
    """
    return gguf_model.model_config(read_header(path))


def sampling_fields(sample: SampleConfig) -> dict[str, int | float]:
    """How a model speaks, as a file says it; llama.cpp would cut off unlikely tokens if not told otherwise."""
    ours = {f"general.sampling.{theirs}": getattr(sample, name) for name, theirs in SAMPLING.items()}
    return ours | {"general.sampling.min_p": 0.0}


def _sample(header: Header) -> SampleConfig:
    fields = {name: header.fields.get(f"general.sampling.{theirs}") for name, theirs in SAMPLING.items()}
    try:
        return SampleConfig.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise FileError(f"{header.path} is damaged: {problems(error)[0]}") from None


def _token_names(header: Header) -> dict[str, str]:
    """The two special tokens that llama.cpp gives to chat templates."""
    texts = {name: token_in(header, f"{name}_id") for name in ("bos_token", "eos_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _chat_template(header: Header) -> str | None:
    template = header.fields.get(CHAT_TEMPLATE)
    if not isinstance(template, str | None):
        raise FileError(f"{header.path} is damaged: its chat template is no text")
    return template
