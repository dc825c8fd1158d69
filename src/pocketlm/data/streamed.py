"""A data set that streams: training reads its pieces while others are still to come, and old ones may go.

Which rows come when is decided by the plan and the pieces alone (order.py), so it is the same however fast the text
came, and whether the set was finished before. To begin, a run needs the plan, the first piece, and the first pieces
that have `val_tokens` held-out tokens together: these are its validation text for good. Held-out documents of later
pieces are in no run: neither trained on nor scored.

What tells two such sets apart is what their bytes follow from, not their bytes: those are not all there yet.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from pocketlm.config import DataConfig
from pocketlm.data.pieces import Plan, file_of, is_last, known_pieces, read_plan
from pocketlm.data.prepare import dataset_info
from pocketlm.data.sealed import Tree, hash_of
from pocketlm.data.shards import SHARD_VERSION, Dataset, Ids, Shard, TokenStream, open_dataset
from pocketlm.data.standing import is_finished
from pocketlm.errors import DataError


class PieceStream(TokenStream):
    """The training tokens of the pieces that are known, in a line; some are on the disk.

    Attributes:
        piece_starts: where each known piece begins, and where the last one ends. Grows as pieces come.
        complete: whether there will be no more.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        super().__init__(())
        self.folder, self.vocab_size = folder, vocab_size
        self.complete = False
        self._entries = list[Tree | None]()
        self._open = dict[int, Shard]()

    def add(self, entry: Tree | None) -> None:
        """The next piece: what piece-*.json says of its training shard; None where it has none."""
        self._entries.append(entry)
        self.num_tokens += int(entry["tokens"]) if entry else 0
        self.piece_starts.append(self.num_tokens)

    def keep(self, pieces: Container[int]) -> None:
        """Lets go of all other shards: a file that is removed keeps its room on the disk while it is mapped."""
        self._open = {piece: shard for piece, shard in self._open.items() if piece in pieces}

    def read(self, start: int, length: int) -> Ids:
        """Tokens start .. start + length - 1, all of one piece, which is on the disk. (length,) int64.

        Raises:
            DataError: its shard is damaged.
        """
        piece = int(np.searchsorted(self.piece_starts, start, side="right")) - 1
        inside = start - self.piece_starts[piece]
        tokens = self._shard(piece).tokens[inside : inside + length]
        assert len(tokens) == length, (start, length)
        return tokens.astype(np.int64)

    def check(self, pieces: Iterable[int]) -> None:
        """Reads the shards of these pieces that were not read yet.

        Raises:
            DataError: the first that is missing or damaged.
        """
        for piece in pieces:
            if (entry := self._entries[piece]) is None:
                continue
            if piece not in self._open and not (path := self.folder / entry["name"]).exists():
                raise unseen(path)
            _ = self._shard(piece).tokens

    def counts(self, vocab_size: int) -> Ids:
        """How often each id occurs in the first piece that is whole on the disk. (vocab_size,) int64."""
        for piece, entry in enumerate(self._entries):
            if entry and (self.folder / entry["name"]).exists():
                with suppress(DataError):  # it will be made again before it is read
                    return TokenStream([self._shard(piece)]).counts(vocab_size)
        return np.zeros(vocab_size, np.int64)

    def _shard(self, piece: int) -> Shard:
        if piece not in self._open:
            entry = self._entries[piece]
            assert entry is not None, piece
            self._open[piece] = Shard(self.folder / entry["name"], file_of(entry), self.vocab_size)
        return self._open[piece]


def unseen(path: Path) -> DataError:
    """What one rank has said is on the disk, and another one does not find."""
    return DataError(
        f"{path} is not seen by all ranks, and text that streams is prepared by one for all; "
        f"give a --data.dir on a disk that all machines share, or add --data.stream off"
    )


@dataclass(frozen=True)
class StreamedDataset(Dataset):
    """A set whose order and validation text need no more than its first pieces, be it finished or not."""

    @property
    def fingerprint(self) -> str:
        """Hex; of all that the tokens follow from: source, tokenizer, split, pieces."""
        made_from = {name: value for name, value in self.info.items() if name not in _NOT_MADE_FROM}
        made_from |= {"source": self.info["source"]["fingerprint"], "tokenizer": self.tokenizer.fingerprint}
        made_from["split"] = {name: value for name, value in self.info["split"].items() if name != "words"}
        validation = [shard.entry["sha256"] for shard in self.val.shards]
        return hash_of({"shards": SHARD_VERSION, "validation": validation} | made_from)

    def verify(self) -> None:
        """Reads the validation shards; a training shard is checked when it is first read.

        Raises:
            DataError: the first that is damaged.
        """
        for shard in self.val.shards:
            _ = shard.tokens


_NOT_MADE_FROM = {"source", "tokenizer", "split", "dropped", "train", "val", "dtype"}


def num_validation_pieces(held_out: Sequence[int], config: DataConfig, complete: bool) -> int | None:
    """How many pieces from the first on have the validation text; None where these have not enough.

    Args:
        held_out: tokens of each known piece.
        complete: whether these are all pieces.
    """
    enough, sums = config.validation_tokens, list(accumulate(held_out))
    if enough and sums and sums[-1] >= enough:
        return 1 + sum(held_out < enough for held_out in sums)
    return len(held_out) if complete else None


def num_tokens(shard: Tree | None) -> int:
    """Of a shard, as piece-*.json has it; None is one that was not written, for it would be empty."""
    return int(shard["tokens"]) if shard else 0


def open_finished(folder: Path, config: DataConfig) -> StreamedDataset:
    """A finished set as a run sees it that streams.

    Raises:
        DataError: as `open_dataset`.
    """
    dataset = open_dataset(folder)
    held_out = {_piece_of(shard.path): shard for shard in dataset.val.shards}
    num_pieces = 1 + max(
        map(_piece_of, (shard.path for split in (dataset.train, dataset.val) for shard in split.shards))
    )
    tokens = [held_out[piece].layout.tokens if piece in held_out else 0 for piece in range(num_pieces)]
    count = num_validation_pieces(tokens, config, complete=True)
    assert count is not None
    val = TokenStream([shard for piece, shard in held_out.items() if piece < count])
    return StreamedDataset(folder, dataset.info, dataset.files, dataset.tokenizer, dataset.train, val)


def _piece_of(path: Path) -> int:
    """The number in a shard's name."""
    return int(path.stem.rpartition("-")[2])


def open_as_run(folder: Path, config: DataConfig) -> Dataset:
    """A finished set as a run with these settings sees it.

    Raises:
        DataError: as `open_dataset`.
    """
    return open_finished(folder, config) if config.validation_tokens else open_dataset(folder)


def open_unfinished(plan: Plan, entries: Sequence[Tree], config: DataConfig, complete: bool) -> StreamedDataset | None:
    """A set in the making; None where its validation text is not there yet.

    Args:
        plan: its plan.
        entries: what piece-*.json says of each known piece.
        complete: whether these are all pieces.

    Raises:
        DataError: a validation shard is missing or damaged.
    """
    count = num_validation_pieces([num_tokens(entry["val"]) for entry in entries], config, complete)
    if count is None:
        return None
    folder, vocab_size = plan.folder, plan.tokenizer.vocab_size
    held_out = [shard for entry in entries[:count] if (shard := entry["val"])]
    val = TokenStream([Shard(folder / shard["name"], file_of(shard), vocab_size) for shard in held_out])
    train = PieceStream(folder, vocab_size)
    for entry in entries:
        train.add(entry["train"])
    train.complete = complete
    files = {shard["name"]: file_of(shard) for shard in held_out}
    return StreamedDataset(folder, dataset_info(plan, entries), files, plan.tokenizer, train, val)


def open_streamed(folder: Path, config: DataConfig) -> StreamedDataset:
    """What stands in a folder, for reading only: the pieces that are there.

    Raises:
        DataError: it is damaged, or has not come as far as the validation text.
    """
    if is_finished(folder):
        return open_finished(folder, config)
    plan = read_plan(folder)
    entries = known_pieces(plan) if plan else []
    dataset = open_unfinished(plan, entries, config, is_last(plan, entries)) if plan else None
    if dataset is None and is_finished(folder):  # it was, in this moment
        return open_finished(folder, config)
    if dataset is None:
        raise DataError(f"{folder} has not come as far as its validation text; run the command that makes it again")
    return dataset
