"""What a model is scored on: a text source with the model's own tokenizer, or the held-out part of a data set.

A checkpoint knows what it was trained on: the data set's fingerprint is in its state, where it lay in its
configuration. So without a source its own held-out text can be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.checkpoint import CONFIG, STATE, read_state
from pocketlm.config import Config, DataConfig
from pocketlm.data.loader import Stream
from pocketlm.data.opened import mixed
from pocketlm.data.pieces import PLAN_FILE
from pocketlm.data.shards import DATASET_FILE, Dataset, open_dataset
from pocketlm.data.streamed import open_streamed
from pocketlm.errors import DataError, FileError, UsageError
from pocketlm.reading import read_json
from pocketlm.text.documents import Document
from pocketlm.text.sources import open_source
from pocketlm.text.tokenizer import Tokenizer


class ArrayStream:
    """Tokens in memory."""

    complete = True

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens.astype(np.int64)
        self.num_tokens = len(tokens)
        self.piece_starts = [0, len(tokens)]

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def open_stream(
    source: str,
    tokenizer: Tokenizer,
    model_folder: Path,
    *,
    limit: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Stream:
    """The tokens to score.

    Args:
        source: a SOURCE, whose documents are joined with the end-of-text token; or a data set folder, whose held-out
            part is taken.
        tokenizer: the model's.
        model_folder: where the model lies.
        limit: how many tokens are scored; of a source no document after these is read. 0 for all.
        say: is told in a line what the network did.

    Raises:
        UsageError: the source is on a network, and there is no limit.
        DataError: the source is refused, has under 2 tokens, or was prepared with another tokenizer.
    """
    if not Path(source).is_dir():
        opened = open_source(source, say=say)
        if opened.remote and not limit:
            raise UsageError(
                f"--data {source} may be larger than memory; give --limit N, or prepare the text "
                "(pocketlm data prepare --max-documents N) and give its folder"
            )
        documents = opened.documents()
        tokens = first_tokens(documents, tokenizer, limit + 1) if limit else encode_documents(documents, tokenizer)
        return checked(ArrayStream(tokens), source)
    dataset = open_dataset(Path(source))
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{source} was prepared with another tokenizer than {model_folder} has; give its text as files:GLOB"
        )
    return checked(dataset.val, source)


def own_dataset(model_folder: Path) -> Dataset:
    """The data set that a checkpoint was trained on.

    Raises:
        UsageError: the folder is no checkpoint, or the data set is not where it was.
        DataError: the data set is damaged.
    """
    if not (model_folder / STATE).is_file():
        raise UsageError(f"{model_folder} was not trained here; give the text to score: --data stdlib or files:GLOB")
    data, fingerprint = _data_settings(model_folder), read_state(model_folder).get("data_fingerprint")
    if (dataset := find_dataset(fingerprint, data)) is None:
        raise UsageError(
            f"the data set that {model_folder} was trained on is not in {data.dir or 'data/'}; "
            "give the text to score: --data with its folder, or with stdlib or files:GLOB"
        )
    return dataset


def own_source(model_folder: Path) -> str | None:
    """The SOURCE that a checkpoint was trained on; None where nothing says so."""
    if not (model_folder / STATE).is_file():
        return None
    data = _data_settings(model_folder)
    if data.sources:
        return None
    return _source_of(Path(data.dir)) if data.dir else data.source


def find_dataset(fingerprint: object, data: DataConfig) -> Dataset | None:
    """The data set with this fingerprint, in the folder that a run's settings name, or among those of its source; of
    several sources, all together.

    Raises:
        DataError: it was not found, and one of those looked at is damaged, so it may be that.
    """
    problems = list[DataError]()
    for parts in product(*(_candidates(part, problems) for part in data.parts)):
        dataset = mixed(parts, data) if data.sources else parts[0]
        if dataset.fingerprint == fingerprint:
            return dataset
    if problems:
        raise problems[0]
    return None


def _candidates(data: DataConfig, problems: list[DataError]) -> list[Dataset]:
    """What stands where the set of one source may be; what is damaged goes to `problems`."""
    made = (path for path in sorted(Path("data").glob("*")) if _source_of(path) == data.source)
    found = list[Dataset]()
    for path in [Path(data.dir)] if data.dir else made:
        try:
            if dataset := _standing(path, data):
                found.append(dataset)
        except DataError as error:
            problems.append(error)
    return found


def _standing(folder: Path, data: DataConfig) -> Dataset | None:
    """The set in a folder as a run with these settings sees it; None where it could not see one."""
    if data.validation_tokens:
        return open_streamed(folder, data) if _source_of(folder) else None
    return open_dataset(folder) if (folder / DATASET_FILE).is_file() else None


def _source_of(folder: Path) -> str | None:
    """The SOURCE of a data set's folder; None where there is none, nor one in the making."""
    for name, path in ((DATASET_FILE, ("source", "spec")), (PLAN_FILE, ("inputs", "source", "spec"))):
        with suppress(FileError, KeyError, TypeError):
            value: Any = read_json(folder / name)
            for key in path:
                value = value[key]
            return str(value)
    return None


def _data_settings(checkpoint: Path) -> DataConfig:
    """The table [data] of a verified checkpoint's configuration."""
    return Config.from_toml(checkpoint / CONFIG).data


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """All documents' tokens in a line, each document followed by the end-of-text id, as in training.

    A model of others that wants another token before a text gets it before each.
    """
    begin_id, end_id = tokenizer.begin_id, tokenizer.end_id
    begin, end = np.array([] if begin_id in (None, end_id) else [begin_id], dtype=np.int64), np.array([end_id])
    texts = [document.text for document in documents]
    return np.concatenate([part for ids in tokenizer.encode_batch(texts) for part in (begin, ids, end)] or [end[:0]])


def first_tokens(documents: Iterable[Document], tokenizer: Tokenizer, enough: int) -> np.ndarray:
    """As `encode_documents`, of the first documents that have so many tokens together, or of all."""
    parts, count = [np.array([], dtype=np.int64)], 0
    for document in documents:
        parts.append(encode_documents([document], tokenizer))
        count += len(parts[-1])
        if count >= enough:
            break
    return np.concatenate(parts)


def checked(stream: Stream, source: str) -> Stream:
    """
    Raises:
        DataError: there is nothing to score.
    """
    if stream.num_tokens < 2:
        raise DataError(f"{source} has {stream.num_tokens} tokens; a loss needs at least 2")
    return stream
