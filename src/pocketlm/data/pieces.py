"""The work on an unfinished data set: its plan, and the pieces that are written one after the other.

plan.json and piece-*.json (sealed.py) say how far the work is, with the SHA-256 of what was written beside them. Where
copies are left out, piece-*.seen is what later pieces must know of this one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from pocketlm.data.sealed import Tree, hash_of, sealed, unsealed
from pocketlm.data.selection import COUNT, Selection, reasons
from pocketlm.data.shards import COUNTS, TOKENIZER_FILE, Tokens, shard_chunks, token_dtype
from pocketlm.data.split import Split, text_bytes
from pocketlm.errors import DataError, FileError
from pocketlm.files import remove_file, write_file
from pocketlm.reading import Entry, read_bytes, read_text, verify_file
from pocketlm.text.bulk import BulkEncoder, Unequal
from pocketlm.text.documents import BEGINNING, Document, Place
from pocketlm.text.sources import Remote, Source
from pocketlm.text.tokenizer import Tokenizer

PLAN_FILE = "plan.json"
PIECE_FILES = "piece-*.json"
SEEN_FILES = "piece-*.seen"
MAX_PIECES = 5120  # dataset.json and manifest.json are then within three quarters of what reading.py reads
BATCH_CHARS = 1 << 21  # of text tokenized at once
REPORT_EVERY_S = 5.0

Progress = Callable[[str], None]

# what plan.json and piece-*.json have at least, and of what types
FILE = {"bytes": int, "sha256": str}
HASH = {"kind": "hash", "val_fraction": float}
PLAN = {
    "inputs": {
        "schema": int,
        "source": {"spec": str, "fingerprint": str},
        "tokenizer": {"spec": str, "fingerprint": (str, None)},
        "val_fraction": float,
        "piece_documents": int,
        "selection": (dict, ...),
    },
    "attempt": int,
    "documents": (int, None),
    "text_bytes": int,
    "split": (HASH, HASH | {"kind": "block", "document": int, "byte": int}),
    "dropped": dict,
    "tokenizer": FILE | {"fingerprint": str, "end_token": str},
}
SHARD = COUNTS | FILE | {"name": str}
PIECE = {
    "plan": str,
    "documents": int,
    "empty_documents": int,
    "text_bytes": int,
    "next": {"file": int, "group": int, "row": int},
    "train": (SHARD, None),
    "val": (SHARD, None),
}


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
        return Split.from_tree(self.tree["split"])

    @property
    def piece_documents(self) -> int:
        return int(self.tree["inputs"]["piece_documents"])

    @property
    def max_documents(self) -> int:
        """0 is no limit."""
        return int(self.tree["inputs"].get("max_documents", 0))

    @property
    def selection(self) -> Tree:
        """Which documents are left out; empty for none."""
        return dict(self.tree["inputs"].get("selection", {}))

    @property
    def piece_shape(self) -> Tree:
        """What piece-*.json has at least."""
        dropped = {"dropped": {reason: COUNT for reason in reasons(self.selection)}} if self.selection else {}
        return PIECE | dropped | ({"seen": FILE} if "dedup" in self.selection else {})

    @property
    def num_pieces(self) -> int | None:
        """None where nobody counted the documents: then a piece that is not full is the last."""
        documents: int | None = self.tree["documents"]
        return None if documents is None else -(-documents // self.piece_documents)

    @property
    def hash(self) -> str:
        return hash_of(self.tree)


def read_plan(folder: Path, inputs: Tree | None = None) -> Plan | None:
    """The plan of an unfinished folder, if it is whole and was made from the same inputs, where they are given."""
    tree = unsealed(folder / PLAN_FILE, PLAN)
    if tree is None or inputs not in (None, tree["inputs"]):
        return None
    return plan_of(folder, tree)


def plan_of(folder: Path, tree: Tree) -> Plan | None:
    """A plan as plan.json has it, with the tokenizer of its folder; None where that is not the plan's."""
    try:
        verify_file(folder / TOKENIZER_FILE, tree["tokenizer"])
        tokenizer = Tokenizer(read_text(folder / TOKENIZER_FILE), tree["tokenizer"]["end_token"])
    except (FileError, DataError):
        return None
    plan = Plan(folder, tree, tokenizer)
    return plan if plan.num_pieces is None or 1 <= plan.num_pieces <= MAX_PIECES else None


# --- pieces


def write_pieces(plan: Plan, source: Source, progress: Progress) -> list[Tree]:
    """Writes every piece that is not whole; returns what piece-*.json says of each.

    Where a library turns out to be wrong, every piece is made anew: which of them it had made nobody wrote down. One
    write sees to it, that of the plan: no piece names the hash that it has now.
    """
    encoder = BulkEncoder(plan.tokenizer, plan.tree["text_bytes"], progress)
    while True:
        try:
            return _write_missing(plan, source, encoder, progress)
        except Unequal:
            plan = disowned(plan)


def disowned(plan: Plan) -> Plan:
    """The plan with another hash, so that no piece that was made is one of its pieces."""
    plan = replace(plan, tree=plan.tree | {"attempt": plan.tree["attempt"] + 1})
    write_file(plan.folder / PLAN_FILE, sealed(plan.tree))
    return plan


def _write_missing(plan: Plan, source: Source, encoder: BulkEncoder, progress: Progress) -> list[Tree]:
    """All pieces. Of a piece that is whole no document is read: it says where the next one begins."""
    report = Report(plan.tree["text_bytes"] if plan.num_pieces else None, progress, source.remote)
    writer, entries = Writer(plan, source, encoder, report), list[Tree]()
    while not is_last(plan, entries):
        if entry := whole_piece(plan, len(entries)):
            report.skip(entry["text_bytes"])
        else:
            entry = writer.write(len(entries), begin_of(entries))
        entries.append(entry)
    report.end()
    return entries


def begin_of(entries: Sequence[Tree]) -> Place:
    """Where in the source the piece after these begins."""
    return Place(**entries[-1]["next"]) if entries else BEGINNING


class Writer:
    """Writes pieces. One that follows the last one written goes on reading; any other begins at its place, with what
    the files of all pieces before it say of the documents that were kept."""

    def __init__(self, plan: Plan, source: Source, encoder: BulkEncoder, report: Report) -> None:
        self.plan, self.source, self.encoder, self.report = plan, source, encoder, report
        self._documents: Iterator[tuple[int, Document]] = iter(())
        self._selection = Selection(plan.selection)
        self._reads: int | None = None
        """The piece that both go on with."""

    def write(self, piece: int, place: Place, known: Tree | None = None) -> Tree:
        """
        Args:
            piece: its number.
            place: where its documents begin.
            known: what piece-*.json says of it, where it was made before.

        Raises:
            Unequal: the library that tokenized it is wrong.
            DataError: what a piece before has kept is missing or damaged; or it is not what it was, and is not written.
        """
        plan = self.plan
        if self._reads != piece:
            self._documents = numbered(self.source, plan.max_documents, place, piece * plan.piece_documents)
            self._selection = _selection_before(plan, piece)
        self._reads = None
        own = islice(self._documents, plan.piece_documents)
        entry = _write_piece(plan, piece, own, place, self._selection, self.encoder, self.report, known)
        self._reads = piece + 1
        return entry


def _selection_before(plan: Plan, piece: int) -> Selection:
    """The selection that has judged all documents before a piece."""
    selection = Selection(plan.selection)
    for before in range(piece if selection.kept else 0):
        entry, file = known_piece(plan, before), _seen_file(plan, before)
        assert selection.kept is not None
        if entry is None or not selection.kept.load(read_bytes(file, entry["seen"]["bytes"])):
            raise DataError(f"{file} is damaged; delete the folder {plan.folder} and run the command again")
    return selection


def numbered(source: Source, limit: int, start: Place = BEGINNING, number: int = 0) -> Iterator[tuple[int, Document]]:
    """The documents from a place on, numbered from `number` on; where there is a limit, those below it."""
    documents = enumerate(source.documents(start), number)
    return islice(documents, max(0, limit - number)) if limit else documents


def is_last(plan: Plan, entries: Sequence[Tree]) -> bool:
    """Whether the last of these pieces is the set's.

    Raises:
        DataError: it is not, and there is no room for another.
    """
    if plan.num_pieces is not None:
        return len(entries) == plan.num_pieces
    full = len(entries) * plan.piece_documents
    if entries and (entries[-1]["documents"] < plan.piece_documents or full == plan.max_documents):
        return True
    if len(entries) == MAX_PIECES:
        raise DataError(
            f"the source goes on after {full:,} documents, {MAX_PIECES:,} pieces of {plan.piece_documents:,}; "
            f"give a larger piece_documents, or max_documents {full:,}"
        )
    return False


def _piece_file(plan: Plan, piece: int) -> Path:
    return plan.folder / f"piece-{piece:05d}.json"


def _shard_file(plan: Plan, split: str, piece: int) -> Path:
    return plan.folder / f"{split}-{piece:05d}.tokens"


def _seen_file(plan: Plan, piece: int) -> Path:
    return plan.folder / f"piece-{piece:05d}.seen"


def known_piece(plan: Plan, piece: int) -> Tree | None:
    """What piece-*.json says of a piece, if it belongs to this plan; its shards may be gone."""
    entry = unsealed(_piece_file(plan, piece), plan.piece_shape)
    return entry if entry and entry["plan"] == plan.hash else None


def known_pieces(plan: Plan) -> list[Tree]:
    """What piece-*.json says of the pieces that were made, from the first on to the first that was not."""
    entries = list[Tree]()
    while entry := known_piece(plan, len(entries)):
        entries.append(entry)
    return entries


def drop_tokens(plan: Plan, piece: int) -> None:
    """Removes the training tokens of a piece; what else is known of it stays, so that it can be made again."""
    remove_file(_shard_file(plan, "train", piece))


def whole_piece(plan: Plan, piece: int) -> Tree | None:
    """What piece-*.json says of a piece, if it belongs to this plan and its files are as they were written."""
    if (entry := known_piece(plan, piece)) is None:
        return None
    try:
        for split in ("train", "val"):
            if shard := entry[split]:
                if shard["name"] != _shard_file(plan, split, piece).name:
                    return None
                verify_file(_shard_file(plan, split, piece), shard)
        if "seen" in entry:
            verify_file(_seen_file(plan, piece), entry["seen"])
    except FileError:
        return None
    return entry


def _write_piece(
    plan: Plan,
    piece: int,
    documents: Iterable[tuple[int, Document]],
    place: Place,
    selection: Selection,
    encoder: BulkEncoder,
    report: Report,
    known: Tree | None,
) -> Tree:
    """place: where the documents begin. known: see `Writer.write`."""
    rule, tokenizer = plan.split, plan.tokenizer
    counts = {"documents": 0, "empty_documents": 0, "text_bytes": 0}
    shards = {"train": Collected(), "val": Collected()}
    for batch in _batches(documents, BATCH_CHARS):
        kept = [(number, selection.text(number, document)) for number, document in batch]
        split = [rule.parts(number, text) for number, text in kept]
        for collected, texts in zip(shards.values(), zip(*split, strict=True), strict=True):
            collected.add([text for text in texts if text.strip()], encoder)
        empty = sum(not text_bytes(document.text) for _, document in batch)
        size = sum(text_bytes(text) for _, text in kept)
        for name, count in zip(counts, (len(batch), empty, size), strict=True):
            counts[name] += count
        last = batch[-1][1].place
        place = last._replace(row=last.row + 1)
        report.add(size, len(batch))
    entry: Tree = {"plan": plan.hash, "next": place._asdict()} | counts
    if known:
        _check_same(plan, piece, shards, known)
    for name, collected in shards.items():
        entry[name] = collected.write(_shard_file(plan, name, piece), tokenizer.vocab_size)
    if plan.selection:
        entry["dropped"] = selection.take()
    if selection.kept:
        entry["seen"] = write_file(_seen_file(plan, piece), selection.kept.take())
    write_file(_piece_file(plan, piece), sealed(entry))
    return entry


def _check_same(plan: Plan, piece: int, shards: Mapping[str, Collected], known: Tree) -> None:
    """What was made again is what it was, before any of it is written.

    Raises:
        DataError: it is not.
    """
    for name, collected in shards.items():
        if collected.entry(plan.tokenizer.vocab_size) != (known[name] and file_of(known[name])):
            raise DataError(
                f"piece {piece} of {plan.folder} is not what it was when it was first made: the source gives other "
                "text; delete the folder, and begin the run anew with a new --out"
            )


def file_of(tree: Tree) -> Entry:
    """Size and hash of a file, out of all that is said of it."""
    return {name: tree[name] for name in FILE}


class Collected:
    """The documents of one shard in the making."""

    def __init__(self) -> None:
        self.documents: list[Tokens] = []
        self.text_bytes = 0

    def add(self, texts: list[str], encoder: BulkEncoder) -> None:
        """Tokenizes documents; each ends with the end id."""
        dtype = token_dtype(encoder.tokenizer.vocab_size)
        for ids in encoder.encode(texts):
            document = np.empty(len(ids) + 1, dtype=dtype)
            document[:-1], document[-1] = ids, encoder.tokenizer.end_id
            self.documents.append(document)
        self.text_bytes += sum(map(text_bytes, texts))

    def entry(self, vocab_size: int) -> Entry | None:
        """Size and hash of the shard as it would be written; None where it would not be."""
        if not self.documents:
            return None
        size, digest = 0, hashlib.sha256()
        for chunk in shard_chunks(self.documents, token_dtype(vocab_size)):
            size += len(chunk)
            digest.update(chunk)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def write(self, path: Path, vocab_size: int) -> Tree | None:
        """Writes the shard and says what is in it; a shard without documents is not written."""
        if not self.documents:
            remove_file(path)
            return None
        counts = {
            "name": path.name,
            "documents": len(self.documents),
            "tokens": sum(map(len, self.documents)),
            "text_bytes": self.text_bytes,
        }
        return counts | write_file(path, shard_chunks(self.documents, token_dtype(vocab_size)))


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

    def __init__(
        self,
        total_bytes: int | None,
        progress: Progress,
        remote: Remote | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_bytes, self.progress, self.remote, self.clock = total_bytes, progress, remote, clock
        self.started_at = self.said_at = clock()
        self.bytes = self.skipped_bytes = self.documents = 0

    def skip(self, text_bytes: int) -> None:
        """Text that was tokenized in an earlier run."""
        self.bytes += text_bytes
        self.skipped_bytes += text_bytes

    def add(self, text_bytes: int, documents: int = 0) -> None:
        """Text tokenized now."""
        self.bytes += text_bytes
        self.documents += documents
        now = self.clock()
        if now - self.said_at >= REPORT_EVERY_S or self.bytes == self.total_bytes:
            self._say(now)

    def end(self) -> None:
        """Nothing is left, if it was not known before when that would be."""
        if self.total_bytes is None:
            self._say(self.clock())

    def _say(self, now: float) -> None:
        self.said_at = now
        rate = (self.bytes - self.skipped_bytes) / 1e6 / max(now - self.started_at, 1e-9)
        total = "" if self.total_bytes is None else f" of {self.total_bytes / 1e6:,.1f}"
        line = f"tokenized {self.bytes / 1e6:,.1f}{total} MB at {rate:.1f} MB/s"
        if self.remote:
            line += f"; {self.documents:,} documents read, {self.remote.status()}"
        self.progress(line)
