"""A model that is one file: a GGUF, or a llama2.c `.bin` with its tokenizer beside it."""

from __future__ import annotations

from pathlib import Path

from pocketlm.config import ModelConfig
from pocketlm.errors import UsageError
from pocketlm.formats import gguf, llama2c
from pocketlm.formats.gguf_file import MAGIC, read_header
from pocketlm.formats.gguf_tokenizer import tokenizer_in
from pocketlm.formats.release import Release
from pocketlm.text.tokenizer import Tokenizer


def is_model_file(path: Path) -> bool:
    """Whether a path is meant as such a file: one by its name, or by how it begins. It may still be refused."""
    return path.is_file() and (path.suffix in (".gguf", ".bin") or is_gguf(path))


def read_model_file(path: Path, tokenizer: Path | None = None) -> Release:
    """The model in a file.

    Args:
        tokenizer: of a llama2.c model, where it does not lie beside it.

    Raises:
        FileError: damaged, or of a model that pocketlm does not have.
        DataError: its tokenizer is of a kind that is not known.
        UsageError: a tokenizer for a GGUF file, which has its own.
    """
    if not is_gguf(path) and path.suffix == ".bin":
        return llama2c.read_llama2c(path, tokenizer)
    if tokenizer is not None:
        raise UsageError(f"--tokenizer is for a llama2.c .bin; {path} is a GGUF file, which has its own; leave it out")
    return gguf.read_gguf(path)


def read_model_config(path: Path) -> ModelConfig:
    """The architecture alone; nothing of the weights is read but where they are.

    Raises:
        FileError: as `read_model_file`.
    """
    is_llama2c = not is_gguf(path) and path.suffix == ".bin"
    return llama2c.read_config(path) if is_llama2c else gguf.read_config(path)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer alone; a GGUF file may hold nothing else.

    Raises:
        FileError, DataError: as `read_model_file`.
    """
    return tokenizer_in(read_header(path)) if is_gguf(path) else read_model_file(path).tokenizer


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
