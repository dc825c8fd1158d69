"""What a run reads: one data set or a mixture, finished, or made by other processes meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.config import DataConfig
from pocketlm.data.feed import Feed, Known, Supply
from pocketlm.data.loader import Loader
from pocketlm.data.mixture import MixedSupply, Mixture, shares
from pocketlm.data.prepare import prepare
from pocketlm.data.sealed import Tree, hash_of
from pocketlm.data.shards import COUNTS, Dataset, Ids, TokenStream
from pocketlm.data.streamed import StreamedDataset, open_as_run
from pocketlm.errors import DataError

Rows = tuple[Loader | Mixture, Supply | MixedSupply | None]
"""The rows, and what brings them where they are not all there yet."""


@dataclass(frozen=True)
class MixedDataset(Dataset):
    """Several sets, made with one tokenizer. Its validation text is theirs, one after the other."""

    parts: tuple[Dataset, ...]
    shares: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """Hex; of the sets, and of their shares."""
        return hash_of({"parts": [part.fingerprint for part in self.parts], "shares": self.shares})

    def verify(self) -> None:
        """Reads every shard that a run verifies of each.

        Raises:
            DataError: the first that is damaged.
        """
        for part in self.parts:
            part.verify()

    def check_context(self, context: int) -> None:
        """
        Raises:
            DataError: one of the sets has not one row.
        """
        for part in self.parts:
            part.check_context(context)


class AllTokens(TokenStream):
    """The training tokens of all sets, only to be counted."""

    def __init__(self, parts: Sequence[TokenStream]) -> None:
        super().__init__(())
        self._parts = tuple(parts)
        self.num_tokens = sum(part.num_tokens for part in parts)

    def counts(self, vocab_size: int) -> Ids:
        """How often each id occurs. (vocab_size,) int64."""
        return sum((part.counts(vocab_size) for part in self._parts[1:]), self._parts[0].counts(vocab_size))


def mixed(parts: Sequence[Dataset], config: DataConfig) -> MixedDataset:
    """The sets of `config.sources` as one.

    Raises:
        DataError: they were made with different tokenizers.
    """
    tokenizer = parts[0].tokenizer
    for part in parts:
        if part.tokenizer.fingerprint != tokenizer.fingerprint:
            raise DataError(f"{part.path} was made with another tokenizer than {parts[0].path}; delete one of them")
    weights = [one.weight for one in config.sources]
    rows = shares(weights)
    spec = " + ".join(f"{share / sum(rows):.3g} {one.source}" for share, one in zip(rows, config.sources, strict=True))
    counts = {split: _summed([part.info[split] for part in parts]) for split in ("train", "val")}
    info = parts[0].info | {"source": {"spec": spec}} | counts
    files = {str(part.path / name): entry for part in parts for name, entry in part.files.items()}
    val = TokenStream([shard for part in parts for shard in part.val.shards])
    folder = Path(os.path.commonpath([part.path for part in parts]) or ".")
    return MixedDataset(
        folder, info, files, tokenizer, AllTokens([part.train for part in parts]), val, tuple(parts), rows
    )


def _summed(splits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sum(split[name] for split in splits) for name in COUNTS} | {"shards": []}


class RunData:
    """The data of one run. What streams is begun at once, by one of its processes; the others are told of it."""

    def __init__(self, config: DataConfig, say: Callable[[str], None], *, feeds: bool = True) -> None:
        """
        Args:
            feeds: whether what streams is this process's to make.
        """
        self.config, self._say = config, say
        self._feeds = [Feed(part, say) if part.streams and feeds else None for part in config.parts]
        self._told: list[Tree | None] = [None] * len(self._feeds)
        self._parts: list[Dataset] = []

    def open(self) -> Dataset:
        """The data set, as soon as a run can begin with it.

        Raises:
            DataError: it is refused, does not come, or is not seen from here.
        """
        self._parts = [self._opened(*one) for one in zip(self.config.parts, self._feeds, self._told, strict=True)]
        return mixed(self._parts, self.config) if self.config.sources else self._parts[0]

    def _opened(self, part: DataConfig, feed: Feed | None, told: Tree | None) -> Dataset:
        if feed:
            return feed.dataset(part.context)
        if told is None:
            return open_as_run(prepare(part, progress=self._say), part)
        dataset = Known.unpacked(told).dataset(part, part.context)
        assert dataset, "it was enough to begin with"
        return dataset

    def tell(self) -> list[Tree | None]:
        """What the other processes need to open what streams as it was opened here."""
        return [feed.known.packed() if feed else None for feed in self._feeds]

    def hear(self, told: list[Tree | None]) -> None:
        """What another process has told, before anything is opened here."""
        self._told = told

    def rows(self, seed: int, position: int) -> Rows:
        """The rows of the set that was opened, for a run that goes on from a position.

        Raises:
            DataError: it has not one row.
        """
        loaders = [
            Loader(dataset.train, part.context, seed, part.order)
            for dataset, part in zip(self._parts, self.config.parts, strict=True)
        ]
        if not self.config.sources:
            return loaders[0], _supply(self._feeds[0], self._parts[0], loaders[0], position)
        mixture = Mixture(loaders, [one.weight for one in self.config.sources], seed)
        each = zip(self._feeds, self._parts, loaders, mixture.positions(position), strict=True)
        supplies = [_supply(*one) for one in each]
        return mixture, MixedSupply(mixture, supplies) if any(supplies) else None

    def close(self) -> None:
        """Ends the other processes."""
        for feed in self._feeds:
            if feed:
                feed.close()


def _supply(feed: Feed | None, dataset: Dataset, loader: Loader, position: int) -> Supply | None:
    if feed is None:
        return None
    assert isinstance(dataset, StreamedDataset)
    return Supply(feed, dataset, loader, position)
