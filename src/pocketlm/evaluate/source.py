"""What a model is scored on: a text source with the model's own tokenizer, or the held-out part of a data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pocketlm.data.loader import Stream
from pocketlm.data.shards import open_dataset
from pocketlm.errors import DataError, UsageError
from pocketlm.text.sources import Document, open_source
from pocketlm.text.tokenizer import Tokenizer


class ArrayStream:
    """Tokens in memory."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens.astype(np.int64)
        self.num_tokens = len(tokens)
        self.piece_starts = [0, len(tokens)]

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def open_stream(source: str | None, tokenizer: Tokenizer, model_folder: Path) -> Stream:
    """The tokens to score.

    Args:
        source: a SOURCE, whose documents are joined with the end-of-text token; or a data set folder, whose held-out
            part is taken.
        tokenizer: the model's.
        model_folder: where the model lies.

    Raises:
        UsageError: no source.
        DataError: the source is refused, has under 2 tokens, or was prepared with another tokenizer.
    """
    if source is None:
        raise UsageError(
            "give the text to score: --data stdlib, --data files:GLOB, or a prepared folder such as data/NAME"
        )
    if not Path(source).is_dir():
        return _checked(ArrayStream(encode_documents(open_source(source).documents(), tokenizer)), source)
    dataset = open_dataset(Path(source))
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{source} was prepared with another tokenizer than {model_folder} has; give its text as files:GLOB"
        )
    return _checked(dataset.val, source)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """All documents' tokens in a line, each document followed by the end-of-text id, as in training."""
    end = np.array([tokenizer.end_id])
    texts = [document.text for document in documents]
    return np.concatenate([part for ids in tokenizer.encode_batch(texts) for part in (ids, end)] or [end[:0]])


def _checked(stream: Stream, source: str) -> Stream:
    if stream.num_tokens < 2:
        raise DataError(f"{source} has {stream.num_tokens} tokens; a loss needs at least 2")
    return stream
