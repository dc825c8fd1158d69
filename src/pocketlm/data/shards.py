"""Token shards on disk, and a tokenized data set read back from them.

    DIR/dataset.json          what the set is: source, tokenizer, split, and the counts of each shard
    DIR/tokenizer.json        the tokenizer that made it
    DIR/train-00000.tokens    a shard: the training documents of one piece (of `piece_documents` source documents)
    DIR/val-00000.tokens      its validation documents
    DIR/manifest.json         size and SHA-256 of each of these; written last, so a folder without it is unfinished

    a shard, little-endian:   magic "pocketlm"  u32 version  u32 bytes per token  u64 documents  u64 tokens  32 zeros
                              tokens (uint16, or uint32 for more than 65,536 ids), each document with its end id
                              zeros to a multiple of 8
                              start of each document among the tokens (uint64)

A shard is a pure function of its documents: no clock, no host, no number of workers. When a set is opened, all but
the shards is held against the manifest, and the shards' headers against dataset.json and their size on the disk. A
shard is held against the manifest when a process first reads it; then it is mapped, not loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import DataError, FileError
from pocketlm.reading import MANIFEST, Entry, read_json, read_manifest, read_text, verify_file
from pocketlm.text.tokenizer import Tokenizer

SCHEMA = 2
SHARD_VERSION = 1
MAGIC = b"pocketlm"
HEADER = struct.Struct("<8sIIQQ32x")
DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
MAX_INTEGER = 1 << 63
COUNT_TOKENS = 1 << 22

COUNTS = {"documents": int, "tokens": int, "text_bytes": int}
SPLIT = COUNTS | {"shards": [COUNTS | {"name": str}]}
INFO = {  # what dataset.json has at least, and of what types
    "schema": int,
    "source": {"spec": str, "fingerprint": str},
    "tokenizer": {"spec": str, "fingerprint": str, "vocab_size": int, "end_token": str, "end_id": int},
    "dtype": str,
    "split": {"words": str, "val_fraction": float},
    "piece_documents": int,
    "selection": (dict, ...),
    "dropped": dict,
    "train": SPLIT,
    "val": SPLIT,
}

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
    yield HEADER.pack(MAGIC, SHARD_VERSION, dtype.itemsize, len(documents), num_tokens)
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
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, "a link or folder where a file should be")
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror}") from None
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise _damaged(path, "it is no token shard")
    _, version, itemsize, documents, tokens = HEADER.unpack(header)
    if version != SHARD_VERSION or itemsize not in (2, 4):
        raise _damaged(path, f"its format {version} with {itemsize} bytes a token is not known here")
    layout = Layout(np.dtype(f"<u{itemsize}"), documents, tokens)
    if status.st_size != layout.file_bytes:
        raise _damaged(path, f"it has {status.st_size} bytes, its header says {layout.file_bytes}")
    if not 1 <= documents <= tokens:
        raise _damaged(path, f"{documents} documents cannot have {tokens} tokens")
    return layout


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}; {_advice(path.parent)}")


def _advice(folder: Path) -> str:
    return f"restore it, or delete the folder {folder} and run the command again"


@contextlib.contextmanager
def _refused_with_advice(folder: Path) -> Iterator[None]:
    """What a file of a data set is refused for, and what to do about it."""
    try:
        yield
    except FileError as error:
        raise DataError(f"{error}; {_advice(folder)}") from None


class Shard:
    """One file of tokens; held against its entry in the manifest and mapped when it is first read."""

    def __init__(self, path: Path, entry: Entry, vocab_size: int) -> None:
        self.path = path
        self.entry = entry
        self.vocab_size = vocab_size
        self.layout = read_layout(path)

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        """The file, mapped; a hash that fits does not say that its documents lie in it, one after the other."""
        with _refused_with_advice(self.path.parent):
            verify_file(self.path, self.entry)
        data = np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r"))
        starts = data[self.layout.starts_offset :].view("<u8")
        if starts[0] != 0 or starts[-1] >= self.layout.tokens or not (starts[1:] > starts[:-1]).all():
            raise _damaged(self.path, "its documents do not follow each other")
        return data

    @cached_property
    def tokens(self) -> Tokens:
        """(layout.tokens,) ids, mapped; each is one of the tokenizer's."""
        end = HEADER.size + self.layout.tokens * self.layout.dtype.itemsize
        tokens = self._bytes[HEADER.size : end].view(self.layout.dtype)
        if tokens.max() >= self.vocab_size:
            raise _damaged(self.path, f"it has the id {tokens.max()}, its tokenizer has {self.vocab_size}")
        return tokens

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
        complete: whether these are all.
    """

    complete = True

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
    num_tokens = counts.sum()  # of a stream these are not all
    seen = counts > 0
    nats = np.zeros_like(counts)
    nats[seen] = -counts[seen] * np.log(counts[seen] / num_tokens)
    text = np.ones(len(counts), dtype=bool)
    text[list(special_ids)] = False
    text_bytes = float((counts * byte_lengths)[text].sum())
    per_token = float(nats.sum() / num_tokens) if num_tokens else math.nan
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
    files: dict[str, Entry]
    """manifest.json."""
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream

    @property
    def fingerprint(self) -> str:
        """Hex; of the content alone: equal sets prepared at other times and places have the same."""
        parts = [SHARD_VERSION, self.tokenizer.fingerprint]
        parts += [[shard.entry["sha256"] for shard in stream.shards] for stream in (self.train, self.val)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def verify(self) -> None:
        """Reads every shard.

        Raises:
            DataError: the first that is damaged.
        """
        for shard in (*self.train.shards, *self.val.shards):
            _ = shard.tokens

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
    """Opens a finished data set. The bytes of a shard are checked when it is first read.

    Raises:
        DataError: unfinished, of another version, or damaged, naming the file.
    """
    files, info = _read_info(path)
    end_token = info["tokenizer"]["end_token"]
    tokenizer = Tokenizer(read_text(path / TOKENIZER_FILE), end_token, str(path / TOKENIZER_FILE))
    own = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "end_id": tokenizer.end_id}
    if not own.items() <= info["tokenizer"].items():
        raise _damaged(path / DATASET_FILE, f"it was not made with this {TOKENIZER_FILE}")
    train, val = (_open_split(path, name, info, files) for name in ("train", "val"))
    return Dataset(path, info, files, tokenizer, train, val)


def _read_info(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The manifest and dataset.json, after everything but the shards was held against the manifest."""
    if not os.path.lexists(path / MANIFEST):
        raise _without_manifest(path)
    with _refused_with_advice(path):
        files = read_manifest(path)
        if not {DATASET_FILE, TOKENIZER_FILE} <= files.keys():
            raise DataError(f"{path} is no data set: its {MANIFEST} has no {DATASET_FILE} and {TOKENIZER_FILE}")
        for name in (DATASET_FILE, TOKENIZER_FILE):
            verify_file(path / name, files[name])
        info = read_json(path / DATASET_FILE)
    if info.get("schema") != SCHEMA:
        raise _other_format(path, info)
    if wrong := misfit(info, INFO):
        raise _damaged(path / DATASET_FILE, f"{wrong} is missing or of another type")
    shards = {shard["name"] for split in ("train", "val") for shard in info[split]["shards"]}
    if files.keys() != shards | {DATASET_FILE, TOKENIZER_FILE}:
        raise _damaged(path / MANIFEST, f"its files are not those of {DATASET_FILE}")
    return files, info


def _without_manifest(path: Path) -> DataError:
    """Why a folder is not opened: an older pocketlm wrote no manifest, and an unfinished set has none yet."""
    if not os.path.lexists(path / DATASET_FILE):
        return DataError(
            f"{path} is no finished data set: it has no {DATASET_FILE}; run the command that made it again"
        )
    with contextlib.suppress(FileError):
        info = read_json(path / DATASET_FILE)
        if info.get("schema") != SCHEMA:
            return _other_format(path, info)
    return DataError(f"{path / MANIFEST} is missing: the set is damaged or was never finished; {_advice(path)}")


def _other_format(path: Path, info: Mapping[str, Any]) -> DataError:
    given = f"{path / DATASET_FILE} has format {info.get('schema')!r:.20}"
    return DataError(f"{given}, this pocketlm reads {SCHEMA}; delete the folder {path} and run the command again")


def misfit(value: Any, shape: Any, name: str = DATASET_FILE) -> str | None:
    """The name of the first part of a JSON value that is missing or of another type than `shape` has there.

    In a shape, [x] is any number of x, (x, y) is x or y, ... is nothing at all, and a string or None stands for itself.
    """
    if isinstance(shape, tuple):
        return None if any(misfit(value, one) is None for one in shape) else name
    if isinstance(shape, dict):
        inner = [(value.get(key, ...), shape[key], key) for key in shape] if isinstance(value, dict) else None
    elif isinstance(shape, list):
        inner = [(item, shape[0], name) for item in value] if isinstance(value, list) else None
    elif shape is None or shape is ... or isinstance(shape, str):
        return None if value == shape else name
    else:  # bool is an int for Python, a count is none
        fits = type(value) is shape and (shape is not int or 0 <= value < MAX_INTEGER)
        return None if fits else name
    return name if inner is None else next(filter(None, (misfit(*part) for part in inner)), None)


def _open_split(path: Path, split: str, info: Mapping[str, Any], files: Mapping[str, Entry]) -> TokenStream:
    """A split's shards in their order, each as long as dataset.json says."""
    entries, vocab_size = info[split]["shards"], info["tokenizer"]["vocab_size"]
    names = [entry["name"] for entry in entries]
    if names != sorted(set(names)) or not all(re.fullmatch(rf"{split}-\d{{5}}\.tokens", name) for name in names):
        raise _damaged(path / DATASET_FILE, f"the names of its {split} shards are not in order")
    if any(info[split][count] != sum(entry[count] for entry in entries) for count in COUNTS):
        raise _damaged(path / DATASET_FILE, f"the counts of its {split} shards do not add up")
    shards = [Shard(path / name, files[name], vocab_size) for name in names]
    for shard, entry in zip(shards, entries, strict=True):
        said = Layout(token_dtype(vocab_size), entry["documents"], entry["tokens"])
        if shard.layout != said or info["dtype"] != said.dtype.name:
            raise _damaged(shard.path, f"its header does not say what {DATASET_FILE} says")
    return TokenStream(shards)


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
        **({"selection": info["selection"]} if "selection" in info else {}),
        "dropped": info["dropped"],
        "train": _totals(info["train"]),
        "val": _totals(info["val"]),
        "samples": sample_documents(dataset.train, dataset.tokenizer, samples),
    }


def _totals(split: dict[str, Any]) -> dict[str, Any]:
    counts = {name: split[name] for name in ("documents", "tokens", "text_bytes")}
    return counts | {"bytes_per_token": split["text_bytes"] / max(1, split["tokens"]), "shards": len(split["shards"])}
