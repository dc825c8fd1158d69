"""Several data sets read as one, by weight: which source a row comes from is a pure function of its position.

Positions are cut into blocks of 1,024 rows. Each block has a fixed number of rows of each source (the largest
remainders of weight x 1,024), at places that a keyed permutation chooses (order.py). A source's own rows come in its
own order, from its first one on: it does not know that it is mixed. So a set is tokenized once, and mixed anew with
other weights whenever a run wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pocketlm.data.feed import Check, Supply
from pocketlm.data.loader import Loader
from pocketlm.data.order import VERSION, Indices, key_of, permute

BLOCK = 1024


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each source in a block, by the method of largest remainders; of equal ones the first has more."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    rows = np.floor(exact).astype(np.int64)
    rows[np.argsort(rows - exact, kind="stable")[: BLOCK - int(rows.sum())]] += 1
    return tuple(rows.tolist())


@lru_cache(maxsize=8)  # a step asks several times for the block that it is in, and perhaps the next
def block_sources(seed: int, block: int, rows: tuple[int, ...]) -> Indices:
    """The source of each row of a block. (BLOCK,) int64, not to be written to."""
    key = key_of(f"pocketlm mixture {VERSION}: {seed} {block}")
    places = permute(np.arange(BLOCK, dtype=np.int64), BLOCK, key)
    sources: Indices = np.searchsorted(np.cumsum(rows), places, side="right")
    sources.flags.writeable = False
    return sources


def consumed(seed: int, rows: tuple[int, ...], position: int) -> tuple[int, ...]:
    """How many rows of each source lie before a position: the source's own position."""
    block, inside = divmod(position, BLOCK)
    part = np.bincount(block_sources(seed, block, rows)[:inside], minlength=len(rows))
    return tuple((block * np.asarray(rows, dtype=np.int64) + part).tolist())


def sources_at(seed: int, rows: tuple[int, ...], position: int, count: int) -> Indices:
    """The source of each row at positions position .. position + count - 1. (count,) int64."""
    first, last = position // BLOCK, (position + count - 1) // BLOCK
    blocks = [block_sources(seed, block, rows) for block in range(first, last + 1)]
    return np.concatenate(blocks)[position - first * BLOCK :][:count]


class Mixture:
    """The rows of several loaders as those of one."""

    def __init__(self, loaders: Sequence[Loader], weights: Sequence[float], seed: int) -> None:
        self.loaders, self.shares, self.seed = tuple(loaders), shares(weights), seed

    def positions(self, position: int) -> tuple[int, ...]:
        """Each source's own position."""
        return consumed(self.seed, self.shares, position)

    def read(self, position: int, count: int) -> Tensor:
        """The rows at positions position .. position + count - 1. (count, context + 1) int64."""
        sources = sources_at(self.seed, self.shares, position, count)
        starts = self.positions(position)
        batch = torch.empty(count, self.loaders[0].context + 1, dtype=torch.int64)
        for source, loader in enumerate(self.loaders):
            mine = np.flatnonzero(sources == source)
            if len(mine):
                batch[torch.from_numpy(mine)] = loader.read(starts[source], len(mine))
        return batch

    def epochs(self, position: int) -> float | None:
        """As a loader's, of the one that is read most often; None where it is not known of all."""
        mine = zip(self.loaders, self.positions(position), strict=True)
        known = [epochs for loader, own in mine if (epochs := loader.epochs(own)) is not None]
        return max(known) if len(known) == len(self.loaders) else None

    def segment(self, size: int, position: int) -> int:
        """The segments of all sources together: another number whenever one of them is in another."""
        mine = zip(self.loaders, self.positions(position), strict=True)
        return sum(loader.segment(size, own) for loader, own in mine)


class MixedSupply:
    """The rows of a mixture from sets of which some are in the making."""

    def __init__(self, mixture: Mixture, supplies: Sequence[Supply | None]) -> None:
        self.mixture, self.supplies = mixture, tuple(supplies)

    @property
    def waited_s(self) -> float:
        return sum(supply.waited_s for supply in self.supplies if supply)

    def saved(self, position: int) -> None:
        """As `Supply.saved`."""
        for supply, own in zip(self.supplies, self.mixture.positions(position), strict=True):
            if supply:
                supply.saved(own)

    def order(self, position: int, count: int, left: int) -> None:
        """As `Supply.order`."""
        for supply, begin, own, more in self._each(position, count, left):
            supply.order(begin, own, more)

    def await_rows(self, position: int, count: int, left: int, check: Check) -> None:
        """As `Supply.await_rows`."""
        for supply, begin, own, more in self._each(position, count, left):
            supply.await_rows(begin, own, more, check)

    def _each(self, position: int, count: int, left: int) -> Iterator[tuple[Supply, int, int, int]]:
        """Each supply of whose set rows are read, with its own position, count and rows left."""
        begin, end, last = (self.mixture.positions(position + more) for more in (0, count, left))
        for source, supply in enumerate(self.supplies):
            if supply and end[source] > begin[source]:
                yield supply, begin[source], end[source] - begin[source], last[source] - begin[source]

    def close(self) -> None:
        """Ends the other processes."""
        for supply in self.supplies:
            if supply:
                supply.close()
