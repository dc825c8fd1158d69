"""Token shards on disk, and a tokenized data set read back from them.

    DIR/dataset.json          what the set is; written last, so a folder without it is unfinished
    DIR/tokenizer.json        the tokenizer that made it
    DIR/train-00000.tokens    a shard: the training documents of one piece (of `piece_documents` source documents)
    DIR/val-00000.tokens      its validation documents
    DIR/plan.json, piece-*    how far the preparation is (data/prepare.py); not read here

    a shard, little-endian:   magic "pocketlm"  u32 version  u32 bytes per token  u64 documents  u64 tokens  32 zeros
                              tokens (uint16, or uint32 for more than 65,536 ids), each document with its end id
                              zeros to a multiple of 8
                              start of each document among the tokens (uint64)

A shard is a pure function of its documents: no clock, no host, no number of workers. Sizes are checked against the
header when a set is opened, the SHA-256 when a shard is first read by a process; then the file is mapped, not loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import DataError
from pocketlm.files import read_json, read_text, sha256_of
from pocketlm.text.tokenizer import Tokenizer

SCHEMA = 1
MAGIC = b"pocketlm"
HEADER = struct.Struct("<8sIIQQ32x")
DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
COUNT_TOKENS = 1 << 22

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Ids = NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# --- one shard


def shard_chunks(documents: Sequence[Tokens], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The bytes of a shard, in chunks. documents: ids of each, its end id last."""
    lengths = np.array([len(document) for document in documents], dtype="<u8")
    starts = np.cumsum(lengths) - lengths
    num_tokens = int(lengths.sum())
    yield HEADER.pack(MAGIC, SCHEMA, dtype.itemsize, len(documents), num_tokens)
    for document in documents:
        yield document.astype(dtype, copy=False).tobytes()
    yield bytes(-num_tokens * dtype.itemsize % 8)
    yield starts.astype("<u8", copy=False).tobytes()


@dataclass(frozen=True)
class Layout:
    """What a shard's header says, checked against the size of the file."""

    dtype: np.dtype[Any]
    documents: int
    tokens: int

    @property
    def starts_offset(self) -> int:
        """Byte at which the document starts begin."""
        return HEADER.size + -(-self.tokens * self.dtype.itemsize // 8) * 8

    @property
    def file_bytes(self) -> int:
        return self.starts_offset + 8 * self.documents


def read_layout(path: Path) -> Layout:
    """Reads and checks a shard's header. Maps nothing.

    Raises:
        DataError: missing, not a shard, of another version, or not as long as its header says.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror}") from None
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise _damaged(path, "it is no token shard")
    _, version, itemsize, documents, tokens = HEADER.unpack(header)
    if version != SCHEMA or itemsize not in (2, 4):
        raise _damaged(path, f"its format {version} with {itemsize} bytes a token is not known here")
    layout = Layout(np.dtype(f"<u{itemsize}"), documents, tokens)
    if size != layout.file_bytes:
        raise _damaged(path, f"it has {size} bytes, its header says {layout.file_bytes}")
    return layout


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}; delete the folder {path.parent} and run the command again")


class Shard:
    """One file of tokens; hashed and mapped when it is first read."""

    def __init__(self, path: Path, sha256: str) -> None:
        self.path = path
        self.sha256 = sha256
        self.layout = read_layout(path)

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        if sha256_of(self.path) != self.sha256:
            raise _damaged(self.path, f"its SHA-256 is not the one in {DATASET_FILE}")
        return np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r"))

    @cached_property
    def tokens(self) -> Tokens:
        """(layout.tokens,) ids, mapped."""
        end = HEADER.size + self.layout.tokens * self.layout.dtype.itemsize
        return self._bytes[HEADER.size : end].view(self.layout.dtype)

    @property
    def document_starts(self) -> Ids:
        """(layout.documents,) int64: where each document begins among the tokens."""
        return self._bytes[self.layout.starts_offset :].view("<u8").astype(np.int64)


# --- a split of a data set


class TokenStream:
    """The tokens of a split in a line, shard after shard.

    Attributes:
        num_tokens: its length.
        piece_starts: the first token of each piece (a piece is a shard), and num_tokens last.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        ends = np.cumsum([0, *(shard.layout.tokens for shard in self.shards)])
        self.piece_starts: list[int] = ends.tolist()
        self.num_tokens = self.piece_starts[-1]

    def read(self, start: int, length: int) -> Ids:
        """Tokens start .. start + length - 1. (length,) int64."""
        assert 0 <= start <= start + length <= self.num_tokens, (start, length, self.num_tokens)
        result = np.empty(length, dtype=np.int64)
        piece = int(np.searchsorted(self.piece_starts, start, side="right")) - 1
        filled = 0
        while filled < length:
            inside = start + filled - self.piece_starts[piece]
            part = self.shards[piece].tokens[inside : inside + length - filled]
            result[filled : filled + len(part)] = part
            filled += len(part)
            piece += 1
        return result

    def counts(self, vocab_size: int) -> Ids:
        """How often each id occurs. (vocab_size,) int64."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, self.num_tokens, COUNT_TOKENS):
            tokens = self.read(start, min(COUNT_TOKENS, self.num_tokens - start))
            counts += np.bincount(tokens, minlength=vocab_size)
        return counts

    def documents(self) -> Iterator[Ids]:
        """The ids of each document, its end id last, in source order."""
        for shard in self.shards:
            bounds = [*shard.document_starts.tolist(), shard.layout.tokens]
            for start, end in pairwise(bounds):
                yield shard.tokens[start:end].astype(np.int64)


def unigram_entropy(
    stream: TokenStream, byte_lengths: NDArray[np.int64], special_ids: AbstractSet[int]
) -> tuple[float, float]:
    """What a model that knows only how often each token occurs would lose: (nats per token, bits per byte).

    nats per token = -sum p ln p over all ids with p = count / tokens, special ids among them. Bits per byte take the
    nats of the other ids only, over the bytes of their text, as `pocketlm eval` does; nan where there are none.
    """
    counts = stream.counts(len(byte_lengths)).astype(np.float64)
    seen = counts > 0
    nats = np.zeros_like(counts)
    nats[seen] = -counts[seen] * np.log(counts[seen] / stream.num_tokens)
    text = np.ones(len(counts), dtype=bool)
    text[list(special_ids)] = False
    text_bytes = float((counts * byte_lengths)[text].sum())
    per_token = float(nats.sum()) / stream.num_tokens if stream.num_tokens else math.nan
    return per_token, float(nats[text].sum()) / math.log(2) / text_bytes if text_bytes else math.nan


def sample_documents(stream: TokenStream, tokenizer: Tokenizer, count: int) -> list[str]:
    """The first `count` documents as text again, read back from the shards."""
    return [tokenizer.decode(document.tolist()) for document in islice(stream.documents(), count)]


# --- the data set


@dataclass(frozen=True)
class Dataset:
    """A finished data set folder."""

    path: Path
    info: dict[str, Any]
    """dataset.json."""
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream

    @property
    def fingerprint(self) -> str:
        """Hex; of the content alone: equal sets prepared at other times and places have the same."""
        parts = [self.info["schema"], self.info["tokenizer"]["fingerprint"]]
        parts += [[entry["sha256"] for entry in self.info[split]["shards"]] for split in ("train", "val")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check_context(self, context: int) -> None:
        """Refuses a context for which either split has not one row of context + 1 tokens.

        Raises:
            DataError: with the longest context that fits.
        """
        longest = min(self.train.num_tokens, self.val.num_tokens) - 1
        if context > longest:
            advice = f"use --data.context {longest} or give more text" if longest >= 1 else "give more text"
            raise DataError(
                f"context {context} is longer than the corpus: {self.path} has {self.train.num_tokens} training and "
                f"{self.val.num_tokens} validation tokens; {advice}"
            )


def open_dataset(path: Path) -> Dataset:
    """Opens a finished data set. Shards are checked by size now and by hash when first read.

    Raises:
        DataError: unfinished, of another version, or damaged, naming the file.
    """
    if not (path / DATASET_FILE).is_file():
        raise DataError(f"{path} is no finished data set: it has no {DATASET_FILE}; run the command that made it again")
    info = read_json(path / DATASET_FILE)
    if info.get("schema") != SCHEMA:
        given = f"{path / DATASET_FILE} has format {info.get('schema')!r}"
        raise DataError(f"{given}, this pocketlm reads {SCHEMA}; delete the folder and run the command again")
    try:
        if sha256_of(path / TOKENIZER_FILE) != info["tokenizer"]["sha256"]:
            raise _damaged(path / TOKENIZER_FILE, f"its SHA-256 is not the one in {DATASET_FILE}")
        end_token = info["tokenizer"]["end_token"]
        tokenizer = Tokenizer(read_text(path / TOKENIZER_FILE), end_token, str(path / TOKENIZER_FILE))
        streams = [
            TokenStream([Shard(path / entry["name"], entry["sha256"]) for entry in info[split]["shards"]])
            for split in ("train", "val")
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path / DATASET_FILE, f"no {error} where one is due") from None
    return Dataset(path, info, tokenizer, *streams)


def describe(dataset: Dataset, samples: int = 2) -> dict[str, Any]:
    """What `pocketlm data show` tells: counts, bytes per token, split rule, and some documents read back."""
    info = dataset.info
    return {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "source": info["source"]["spec"],
        "tokenizer": info["tokenizer"]["spec"],
        "vocab_size": dataset.tokenizer.vocab_size,
        "dtype": info["dtype"],
        "split": info["split"]["words"],
        "dropped": info["dropped"],
        "train": _totals(info["train"]),
        "val": _totals(info["val"]),
        "samples": sample_documents(dataset.train, dataset.tokenizer, samples),
    }


def _totals(split: dict[str, Any]) -> dict[str, Any]:
    counts = {name: split[name] for name in ("documents", "tokens", "text_bytes")}
    return counts | {"bytes_per_token": split["text_bytes"] / max(1, split["tokens"]), "shards": len(split["shards"])}
