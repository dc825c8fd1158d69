"""From a text source to a data set folder: survey, tokenizer, pieces.

    1. survey     one pass over the texts counts bytes and chooses the split (`data.split`)
    2. tokenizer  loaded, or for `bpe:SIZE` trained on the training texts only
    3. plan.json  fixes both, with fingerprints of everything that went in
    4. pieces     documents k*piece_documents .. (k+1)*piece_documents - 1 become train-0000k and val-0000k;
                  piece-0000k.json beside them says that they are whole and which plan they belong to
    5. dataset.json, last: the mark of a finished set

Each file appears whole or not at all. A run that was stopped goes on: a plan that still fits saves steps 1 and 2,
pieces that are whole are kept. Because a piece depends on its documents only, the finished bytes are the same however
often the work was interrupted. The tokens of one piece are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.config import DataConfig
from pocketlm.data.shards import DATASET_FILE, SCHEMA, TOKENIZER_FILE, Tokens, open_dataset, shard_chunks, token_dtype
from pocketlm.data.split import Split, Survey, survey, text_bytes
from pocketlm.errors import DataError, FileError
from pocketlm.files import read_json, read_text, remove_file, sha256_of, sweep, write_file
from pocketlm.text.sources import Document, Source, open_source
from pocketlm.text.tokenizer import Tokenizer, bpe_size, load_tokenizer, train_tokenizer

PLAN_FILE = "plan.json"
BATCH_CHARS = 1 << 21  # of text tokenized at once
REPORT_EVERY_S = 5.0

Progress = Callable[[str], None]
Tree = dict[str, Any]


def prepare(config: DataConfig, *, progress: Progress, root: Path = Path("data"), exact: bool = False) -> Path:
    """Makes the data set that `config` describes, or finds it finished, and returns its folder.

    The folder is `config.dir`, else root/NAME-FINGERPRINT. A finished set in `config.dir` is used as it is, whatever
    source the config names, and `progress` is told where they differ; with `exact` that is refused.

    Args:
        config: source, tokenizer, split and piece size.
        progress: called with one line for people, a few times a minute.
        root: where folders go that have no name of their own.
        exact: whether a set that stands in the folder, finished or not, must be the one that `config` describes.

    Raises:
        DataError: a source or tokenizer that is refused, no text, or a folder that holds something else.
    """
    if config.dir and not exact and (Path(config.dir) / DATASET_FILE).exists():
        return _existing(Path(config.dir), config, progress)
    source = open_source(config.source)
    tokenizer = None if bpe_size(config.tokenizer) else load_tokenizer(config.tokenizer)
    inputs = _inputs(config, source, tokenizer)
    folder = Path(config.dir) if config.dir else root / f"{source.name}-{_hash(inputs)[:12]}"
    if exact:
        _check_same(folder, inputs)
    if (folder / DATASET_FILE).exists():
        return folder
    _check_ours(folder)
    plan = _read_plan(folder, inputs) or _make_plan(folder, inputs, source, tokenizer, config, progress)
    pieces = _write_pieces(plan, source, progress)
    if source.fingerprint() != inputs["source"]["fingerprint"]:
        _clear(folder)
        raise DataError(f"source {config.source!r} changed while it was read; run the command again")
    write_file(folder / DATASET_FILE, _json_bytes(_info(plan, pieces)))
    progress(f"data set ready: {folder}")
    return folder


def _inputs(config: DataConfig, source: Source, tokenizer: Tokenizer | None) -> Tree:
    """Everything that the bytes of a data set follow from; a tokenizer still to be trained follows from the rest."""
    return {
        "schema": SCHEMA,
        "source": {"spec": config.source, "fingerprint": source.fingerprint()},
        "tokenizer": {"spec": config.tokenizer, "fingerprint": tokenizer.fingerprint if tokenizer else None},
        "val_fraction": config.val_fraction,
        "piece_documents": config.piece_documents,
    }


def _existing(folder: Path, config: DataConfig, progress: Progress) -> Path:
    """A finished set that the user names. A tokenizer given as a file must be the set's own."""
    dataset = open_dataset(folder)
    tokenizer, source = dataset.info["tokenizer"]["spec"], dataset.info["source"]["spec"]
    if os.path.exists(config.tokenizer):
        if load_tokenizer(config.tokenizer).fingerprint != dataset.tokenizer.fingerprint:
            raise DataError(
                f"{folder} was tokenized with {tokenizer!r}, not with {config.tokenizer}; "
                f"give --data.tokenizer {folder}, or another --data.dir"
            )
    elif config.tokenizer != tokenizer:
        progress(f"{folder} is used as it is: its tokenizer is {tokenizer}, not {config.tokenizer}")
    if config.source != source:
        progress(f"{folder} is used as it is: its source is {source}, not {config.source}")
    return folder


def _check_same(folder: Path, inputs: Tree) -> None:
    """What stands in the folder, if anything, was made as `inputs` say."""
    if (stands := _standing(folder)) is None:
        return
    pairs = {name: (inputs[name], stands[name]) for name in ("val_fraction", "piece_documents")}
    for name in ("source", "tokenizer"):
        pairs[name] = (_told(inputs[name], stands[name]), _told(stands[name], inputs[name]))
    changed = [f"{name}: {given}, {there}" for name, (given, there) in pairs.items() if given != there]
    if changed:
        raise DataError(
            f"{folder} holds another data set (given, there): {'; '.join(changed)}; give another folder, or delete it"
        )


def _standing(folder: Path) -> Tree | None:
    """What a set was made from, in the form of `_inputs`: a finished one, or one with a plan. None if there is none."""
    if (folder / DATASET_FILE).exists():
        info = open_dataset(folder).info
        return info | {"val_fraction": info["split"]["val_fraction"]}
    try:
        tree = read_json(folder / PLAN_FILE)
        inputs: Tree = tree["inputs"]
        return inputs | {
            "source": inputs["source"] | {"fingerprint": None},  # an unfinished set of text that changed is made anew
            "tokenizer": inputs["tokenizer"] | {"fingerprint": tree["tokenizer"]["fingerprint"]},
        }
    except (FileError, KeyError):
        return None


def _told(part: Tree, other: Tree) -> str:
    """A source or tokenizer as its user wrote it, told apart from `other` where only what it names has changed."""
    both = part["fingerprint"] and other["fingerprint"]
    if both and part["fingerprint"] == other["fingerprint"]:
        return ""
    return f"{part['spec']} ({part['fingerprint'][:8]})" if both and part["spec"] == other["spec"] else part["spec"]


def _check_ours(folder: Path) -> None:
    """A folder to work in is new, empty, or an unfinished data set."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give the name of a folder")
    if folder.is_dir():
        sweep(folder)
        names = {path.name for path in folder.iterdir()}
        if names and not names & {PLAN_FILE, TOKENIZER_FILE}:
            raise DataError(f"{folder} holds other files ({min(names)}); give a new folder")


# --- the plan


@dataclass(frozen=True)
class Plan:
    """What is decided before the first piece is written."""

    folder: Path
    tree: Tree
    """plan.json."""
    tokenizer: Tokenizer

    @property
    def split(self) -> Split:
        return Split(**self.tree["split"])

    @property
    def num_pieces(self) -> int:
        return -(-int(self.tree["documents"]) // int(self.tree["inputs"]["piece_documents"]))

    @property
    def hash(self) -> str:
        return _hash(self.tree)


def _make_plan(
    folder: Path, inputs: Tree, source: Source, tokenizer: Tokenizer | None, config: DataConfig, progress: Progress
) -> Plan:
    _clear(folder)
    progress(f"reading {config.source}")
    counted = survey((document.text for document in source.documents()), config.val_fraction)
    if counted.text_bytes == 0:
        raise DataError(f"source {config.source!r} holds no text ({counted.documents} empty documents)")
    progress(f"{counted.documents:,} documents, {counted.text_bytes / 1e6:,.1f} MB; {counted.split.words()}")
    if size := bpe_size(config.tokenizer):
        progress(f"training a tokenizer of {size:,} tokens on the training documents")
        tokenizer = train_tokenizer(_training_texts(source, counted.split), size)
    assert tokenizer is not None
    write_file(folder / TOKENIZER_FILE, tokenizer.to_json().encode())
    tree = _plan_tree(inputs, counted, source, tokenizer)
    write_file(folder / PLAN_FILE, _json_bytes(tree))
    return Plan(folder, tree, tokenizer)


def _plan_tree(inputs: Tree, counted: Survey, source: Source, tokenizer: Tokenizer) -> Tree:
    return {
        "inputs": inputs,
        "documents": counted.documents,
        "text_bytes": counted.text_bytes,
        "split": counted.split.tree(),
        "dropped": dict(source.dropped),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "end_token": tokenizer.end_token},
    }


def _training_texts(source: Source, split: Split) -> Iterator[str]:
    return (split.parts(number, document.text)[0] for number, document in enumerate(source.documents()))


def _read_plan(folder: Path, inputs: Tree) -> Plan | None:
    """The plan of an unfinished folder, if it is whole and was made from the same inputs."""
    try:
        tree = read_json(folder / PLAN_FILE)
        if tree["inputs"] != inputs:
            return None
        tokenizer = Tokenizer(read_text(folder / TOKENIZER_FILE), tree["tokenizer"]["end_token"])
        return Plan(folder, tree, tokenizer) if tokenizer.fingerprint == tree["tokenizer"]["fingerprint"] else None
    except (FileError, DataError, KeyError):
        return None


def _clear(folder: Path) -> None:
    """Removes what an earlier plan left, the plan first."""
    for pattern in (PLAN_FILE, TOKENIZER_FILE, "piece-*.json", "train-*.tokens", "val-*.tokens"):
        for path in folder.glob(pattern):
            remove_file(path)


# --- pieces


def _write_pieces(plan: Plan, source: Source, progress: Progress) -> list[Tree]:
    """Writes every piece that is not whole; returns what piece-*.json says of each."""
    documents = enumerate(source.documents())
    report = Report(plan.tree["text_bytes"], progress)
    entries = []
    for piece in range(plan.num_pieces):
        own = islice(documents, plan.tree["inputs"]["piece_documents"])
        if entry := _whole_piece(plan, piece):
            report.skip(sum(text_bytes(document.text) for _, document in own))
        else:
            entry = _write_piece(plan, piece, own, report)
        entries.append(entry)
    return entries


def _piece_file(plan: Plan, piece: int) -> Path:
    return plan.folder / f"piece-{piece:05d}.json"


def _whole_piece(plan: Plan, piece: int) -> Tree | None:
    """What piece-*.json says of a piece, if it belongs to this plan and its shards are as they were written."""
    try:
        entry = read_json(_piece_file(plan, piece))
        shards = [shard for split in ("train", "val") if (shard := entry[split])]
        whole = all(sha256_of(plan.folder / shard["name"]) == shard["sha256"] for shard in shards)
        return entry if whole and entry["plan"] == plan.hash else None
    except (FileError, OSError, KeyError, TypeError):
        return None


def _write_piece(plan: Plan, piece: int, documents: Iterable[tuple[int, Document]], report: Report) -> Tree:
    rule, tokenizer, empty = plan.split, plan.tokenizer, 0
    shards = {"train": Collected(), "val": Collected()}
    for batch in _batches(documents, BATCH_CHARS):
        split = [rule.parts(number, document.text) for number, document in batch]
        for collected, texts in zip(shards.values(), zip(*split, strict=True), strict=True):
            collected.add([text for text in texts if text_bytes(text)], tokenizer)
        sizes = [text_bytes(document.text) for _, document in batch]
        empty += sizes.count(0)
        report.add(sum(sizes))
    entry: Tree = {"plan": plan.hash, "empty_documents": empty}
    for name, collected in shards.items():
        entry[name] = collected.write(plan.folder / f"{name}-{piece:05d}.tokens", tokenizer.vocab_size)
    write_file(_piece_file(plan, piece), _json_bytes(entry))
    return entry


class Collected:
    """The documents of one shard in the making."""

    def __init__(self) -> None:
        self.documents: list[Tokens] = []
        self.text_bytes = 0

    def add(self, texts: list[str], tokenizer: Tokenizer) -> None:
        """Tokenizes documents; each ends with the end id."""
        end = np.array([tokenizer.end_id], dtype=np.uint32)
        dtype = token_dtype(tokenizer.vocab_size)
        for ids in tokenizer.encode_batch(texts):
            self.documents.append(np.concatenate([ids, end]).astype(dtype))
        self.text_bytes += sum(len(text.encode()) for text in texts)

    def write(self, path: Path, vocab_size: int) -> Tree | None:
        """Writes the shard and says what is in it; a shard without documents is not written."""
        if not self.documents:
            remove_file(path)
            return None
        write_file(path, shard_chunks(self.documents, token_dtype(vocab_size)))
        return {
            "name": path.name,
            "documents": len(self.documents),
            "tokens": sum(map(len, self.documents)),
            "text_bytes": self.text_bytes,
            "sha256": sha256_of(path),
        }


def _batches(documents: Iterable[tuple[int, Document]], chars: int) -> Iterator[list[tuple[int, Document]]]:
    batch, held = list[tuple[int, Document]](), 0
    for item in documents:
        batch.append(item)
        held += len(item[1].text)
        if held >= chars:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class Report:
    """Says every few seconds how far the tokenizing is."""

    def __init__(self, total_bytes: int, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_bytes, self.progress, self.clock = total_bytes, progress, clock
        self.started_at = self.said_at = clock()
        self.bytes = self.skipped_bytes = 0

    def skip(self, text_bytes: int) -> None:
        """Text that was tokenized in an earlier run."""
        self.bytes += text_bytes
        self.skipped_bytes += text_bytes

    def add(self, text_bytes: int) -> None:
        """Text tokenized now."""
        self.bytes += text_bytes
        now = self.clock()
        if now - self.said_at >= REPORT_EVERY_S or self.bytes == self.total_bytes:
            self.said_at = now
            rate = (self.bytes - self.skipped_bytes) / 1e6 / max(now - self.started_at, 1e-9)
            self.progress(f"tokenized {self.bytes / 1e6:,.1f} of {self.total_bytes / 1e6:,.1f} MB at {rate:.1f} MB/s")


# --- the finished set


def _info(plan: Plan, pieces: list[Tree]) -> Tree:
    """dataset.json. It holds no clock and no path but what the user wrote."""
    tokenizer = plan.tokenizer
    return {
        "schema": SCHEMA,
        "source": plan.tree["inputs"]["source"],
        "tokenizer": {
            "spec": plan.tree["inputs"]["tokenizer"]["spec"],
            "fingerprint": tokenizer.fingerprint,
            "sha256": sha256_of(plan.folder / TOKENIZER_FILE),
            "vocab_size": tokenizer.vocab_size,
            "end_token": tokenizer.end_token,
            "end_id": tokenizer.end_id,
        },
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "split": plan.tree["split"] | {"words": plan.split.words()},
        "piece_documents": plan.tree["inputs"]["piece_documents"],
        "dropped": plan.tree["dropped"] | {"empty_documents": sum(piece["empty_documents"] for piece in pieces)},
        "train": _split_entry(piece["train"] for piece in pieces),
        "val": _split_entry(piece["val"] for piece in pieces),
    }


def _split_entry(shards: Iterable[Tree | None]) -> Tree:
    own = [shard for shard in shards if shard]
    totals = {name: sum(shard[name] for shard in own) for name in ("documents", "tokens", "text_bytes")}
    return totals | {"shards": own}


def _json_bytes(tree: Tree) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


def _hash(tree: Tree) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
