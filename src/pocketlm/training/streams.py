"""Text that streams, on several ranks: one of them has it made (data/feed.py), all of them read it from the disk.

Before a step whose rows come from a set in the making, every rank says the same:

    a word of the first    what it has heard of the sets, and whether the rows are there; it waits a moment for them
    check                  where they are not: whether the run stops; then the first rank's word again
    each                   where a step reads other pieces than the one before: whether every rank finds them whole

What is refused - the feeder's refusal, a disk that is not shared, a damaged piece - is refused on all ranks at that
step. A piece that the first rank lets go nobody reads any more: it orders for a step only when all ranks have said the
words that stand inside the step before (step.py), each after it had read its rows. Once every set is finished nothing
is said any more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pocketlm.config import DataConfig
from pocketlm.data.feed import Check, Feed, Supply
from pocketlm.data.loader import Loader
from pocketlm.data.mixture import MixedSupply, Mixture
from pocketlm.data.sealed import Tree
from pocketlm.data.segments import pieces_of, turns_of
from pocketlm.data.streamed import PieceStream
from pocketlm.distributed import Ranks
from pocketlm.errors import DataError

TURN_S = 0.1
"""How long the first rank waits for rows until it speaks to the others."""


class NotYet(Exception):
    """The rows are not there, and the turn is over. Nothing is lost."""


@dataclass
class Told:
    """One set that streams, as the first rank has heard of it, and what it has told the others."""

    feed: Feed
    num_pieces: int

    def news(self) -> Tree:
        """What they do not know yet."""
        known, begin = self.feed.known, self.num_pieces
        self.num_pieces = len(known.entries)
        new = [entry["train"] for entry in known.entries[begin:]]
        return {"train": new, "complete": known.complete, "finished": self.feed.is_finished}


class SharedSupply:
    """The rows of a run on several ranks from sets in the making. Every method is the main thread's.

    Attributes:
        is_refused: whether `await_rows` has raised what it raised on all ranks.
    """

    def __init__(
        self, ranks: Ranks, config: DataConfig, rows: Loader | Mixture, supply: Supply | MixedSupply | None
    ) -> None:
        """
        Args:
            rows: what this rank reads.
            supply: what brings them; the first rank's.
        """
        self.ranks, self.rows, self.supply = ranks, rows, supply
        self.is_refused = False
        self._lets_go = config.keep_segments > 0
        streams = zip(config.parts, _loaders(rows), strict=True)
        self._streams = [loader for part, loader in streams if part.streams]
        feeds = [one.feed for one in _supplies(supply) if one]
        self._told = [Told(feed, len(feed.known.entries)) for feed in feeds]
        self._checked: list[list[int]] = []
        self._is_finished = False

    @property
    def waited_s(self) -> float:
        return self.supply.waited_s if self.supply else 0.0

    def saved(self, position: int) -> None:
        """As `Supply.saved`; the first rank's."""
        assert self.supply
        self.supply.saved(position)

    def order(self, position: int, count: int, left: int) -> None:
        """As `Supply.order`. Nothing is said to other ranks."""
        if self.supply:
            self.supply.order(position, count, left)

    def close(self) -> None:
        """Ends the other processes. Nothing is said to other ranks."""
        if self.supply:
            self.supply.close()

    def await_rows(self, position: int, count: int, left: int, check: Check) -> None:
        """As `Supply.await_rows`. All ranks call it before the same step, and none is still reading rows.

        Raises:
            DataError: the rows do not come, or not to all ranks.
        """
        if self._is_finished:
            return
        try:
            while not self._take_in(self.ranks.from_first(lambda: self._turn(position, count, left))):
                check()
            self._check_pieces(position, count)
        except DataError:
            self.is_refused = True
            raise

    def _turn(self, position: int, count: int, left: int) -> Tree:
        """What the first rank has to say after it has waited a moment."""
        assert self.supply
        try:
            self.supply.await_rows(position, count, left, _until_the_turn_ends())
            are_there = True
        except NotYet:
            are_there = False
        return {"there": are_there, "sets": [told.news() for told in self._told]}

    def _take_in(self, word: Tree) -> bool:
        """Grows the sets by what the first rank has heard; says whether the rows are there."""
        for loader, news in zip(self._streams, word["sets"], strict=True):
            if isinstance(stream := loader.stream, PieceStream) and not self.ranks.is_first:
                for entry in news["train"]:
                    stream.add(entry)
                stream.complete = news["complete"]
            loader.cut()
        self._is_finished = all(news["finished"] for news in word["sets"])
        return bool(word["there"])

    def _check_pieces(self, position: int, count: int) -> None:
        """Lets go of what this step does not read, where that may be removed, and reads what is new.

        Raises:
            DataError: a rank does not find a piece, or finds it damaged.
        """
        pieces = [self._pieces(loader, position, count) for loader in self._streams]
        if pieces == self._checked:
            return
        self._checked = pieces
        self.ranks.each(self._read_pieces)

    def _read_pieces(self) -> None:
        for loader, pieces in zip(self._streams, self._checked, strict=True):
            if isinstance(stream := loader.stream, PieceStream):
                if self._lets_go and not self.ranks.is_first:
                    stream.keep(pieces)
                stream.check(pieces)

    def _pieces(self, loader: Loader, position: int, count: int) -> list[int]:
        """Those that a step reads of one set, the same on every rank."""
        if isinstance(self.rows, Mixture):
            number = self.rows.loaders.index(loader)
            position, end = (self.rows.positions(at)[number] for at in (position, position + count))
            count = end - position
        return pieces_of(turns_of(loader.rows, position, count), loader.rows) if count else []


def _until_the_turn_ends() -> Check:
    """Raises `NotYet` when its time is over, but not at the first call: each turn hears something, or waits."""
    ends_at: float | None = None

    def check() -> None:
        nonlocal ends_at
        now = time.perf_counter()
        if ends_at is not None and now > ends_at:
            raise NotYet
        ends_at = ends_at or now + TURN_S

    return check


def _loaders(rows: Loader | Mixture) -> Sequence[Loader]:
    return rows.loaders if isinstance(rows, Mixture) else (rows,)


def _supplies(supply: Supply | MixedSupply | None) -> Sequence[Supply | None]:
    return supply.supplies if isinstance(supply, MixedSupply) else (supply,)
