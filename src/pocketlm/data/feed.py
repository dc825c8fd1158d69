"""A training run's end of a set that another process makes meanwhile (feeder.py): when its rows are there, which pieces
to make next, and which may go.

A run needs the pieces of its next step and no others. What is ordered beside these follows from its position and from
the newest checkpoint, and decides when text comes, never which:

    everything is kept     as many pieces as the rest of the run reads
    keep_segments          those segments (segments.py), and of them no more than the rest of the run reads
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

from pocketlm.config import DataConfig
from pocketlm.data.loader import Loader
from pocketlm.data.order import Rows, cut_rows
from pocketlm.data.pieces import Plan, plan_of, read_plan
from pocketlm.data.sealed import Tree
from pocketlm.data.segments import pieces_of, segments, turn_of, turns_of
from pocketlm.data.standing import is_finished
from pocketlm.data.streamed import PieceStream, StreamedDataset, num_tokens, open_finished, open_unfinished, unseen
from pocketlm.errors import DataError, PocketError, UsageError

COMMAND = (sys.executable, "-P", "-m", "pocketlm.data.feeder")  # nothing is imported from where the run stands
AHEAD = 4  # pieces that are ordered beyond those that are known
CHECK_EVERY_S = 0.1

Say = Callable[[str], None]
Check = Callable[[], None]
Order = dict[str, Any]
"""What the feeder is told, its number apart; see `feeder.Order`."""


def nothing_to_check() -> None:
    """For who waits where no signal is watched."""


class Ended(Exception):
    """The other process has ended; `refusal` is what to say of it."""

    def __init__(self, refusal: PocketError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Feeder:
    """The other process, and the lines to and from it."""

    def __init__(self, config: DataConfig) -> None:
        self._messages = queue.SimpleQueue[Tree | None]()
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders = self._process.stdin
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()
        self._write(config.model_dump_json())

    def _listen(self, lines: TextIO) -> None:
        with lines:
            for line in lines:
                if line.endswith("\n"):  # it may have been killed in the middle of one
                    self._messages.put(json.loads(line))
        self._messages.put(None)

    def _write(self, line: str) -> None:
        with suppress(BrokenPipeError):  # why it has ended is heard
            print(line, file=self._orders, flush=True)

    def order(self, order: Order) -> None:
        self._write(json.dumps(order))

    def heard(self, check: Check) -> Tree:
        """The next message, which is waited for.

        Args:
            check: called while waiting; if it raises, nothing is lost.

        Raises:
            Ended: the process has, and may have said why.
        """
        while True:
            check()
            with suppress(queue.Empty):
                message = self._messages.get(timeout=CHECK_EVERY_S)
                if message is None:
                    raise Ended(DataError(f"the process that prepares the data {self._end()}; run the command again"))
                if "refused" in message:
                    kind = UsageError if message["code"] == UsageError.exit_code else DataError
                    raise Ended(kind(message["refused"]))
                return message

    @property
    def has_said(self) -> bool:
        return not self._messages.empty()

    def _end(self) -> str:
        code = self._process.wait()
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"

    def close(self) -> None:
        """Ends the process; nothing of its work is lost but the piece that it is at."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        with suppress(BrokenPipeError):
            self._orders.close()


@dataclass
class Known:
    """What was heard of a set."""

    plan: Plan | None = None
    entries: list[Tree] = field(default_factory=list)
    """What piece-*.json says of each piece, from the first one on."""
    there: set[int] = field(default_factory=set)
    """Pieces that are on the disk, and stay until an order lets them go."""
    complete: bool = False
    finished: Path | None = None

    def dataset(self, config: DataConfig, context: int) -> StreamedDataset | None:
        """The set, as soon as enough is known of it: its validation text, and one row of its training text."""
        if self.finished:
            return open_finished(self.finished, config)
        if self.plan is None:
            return None
        starts = list(accumulate((num_tokens(entry["train"]) for entry in self.entries), initial=0))
        if not self.complete and not cut_rows(starts, context, config.order).total:
            return None
        return open_unfinished(self.plan, self.entries, config, self.complete)

    def packed(self) -> Tree:
        """As JSON holds it, for who reads the same set and has no feeder."""
        if self.finished:
            return {"finished": str(self.finished)}
        assert self.plan
        return {
            "folder": str(self.plan.folder),
            "plan": self.plan.tree,
            "entries": self.entries,
            "complete": self.complete,
        }

    @classmethod
    def unpacked(cls, tree: Tree) -> Known:
        """What was packed. Of the disk it needs what stays there, also if the set is finished meanwhile.

        Raises:
            DataError: that is not there.
        """
        if "finished" in tree:
            known, is_seen = cls(finished=Path(tree["finished"])), is_finished(Path(tree["finished"]))
        else:
            plan = plan_of(Path(tree["folder"]), tree["plan"])
            known, is_seen = cls(plan, tree["entries"], complete=tree["complete"]), plan is not None
        if not is_seen:
            raise unseen(Path(tree.get("finished") or tree["folder"]))
        return known


def wanted(
    rows: Rows, position: int, count: int, left: int, saved: int, config: DataConfig
) -> tuple[list[int], list[int] | None]:
    """Which pieces are to be made, the most urgent first, and which may stay; None for all.

    Args:
        rows: of the pieces that are known.
        position: the next row of the run.
        count: rows of a step.
        left: rows of all steps that are left.
        saved: the row from which a resume would go on.
    """
    num_pieces, read = len(rows.num_rows), turns_of(rows, position, count)
    is_known = rows.complete or position + left <= rows.total
    end = turn_of(rows, position + left - 1) + 1 if is_known else num_pieces + AHEAD
    if not config.keep_segments:
        return pieces_of(range(read.start, min(end, read.start + num_pieces + AHEAD)), rows), None
    kept = segments(rows, config.segment_pieces).kept(turn_of(rows, saved), read, config.keep_segments)
    return pieces_of(range(read.start, min(end, kept.stop)), rows), pieces_of(kept, rows)


class Feed:
    """A set in the making: what is heard of it, and what is ordered. Every method is the main thread's.

    A feeder that ends before its time has lost nothing but the piece that it was at. Where rows are lacking another one
    begins; if that ends too before they have come, so does the run.
    """

    def __init__(self, config: DataConfig, say: Say) -> None:
        self.config, self.say = config, say
        self.known = Known()
        self._feeder: Feeder | None = Feeder(config)
        self._ended: Ended | None = None
        self._dataset: StreamedDataset | None = None
        self._number = 0
        self.has_begun_anew = False
        """Since rows were last there."""
        self._ordered: Order = {}
        self._unheard: dict[int, Container[int]] = {}
        """What those orders keep, by their number, of which the feeder may not have heard."""

    @property
    def is_finished(self) -> bool:
        """Whether all pieces are there to stay."""
        return self.known.finished is not None

    def dataset(self, context: int) -> StreamedDataset:
        """The set as it is when a run can begin with it; it grows as more is heard.

        Raises:
            DataError: it is refused, or does not come.
        """
        config = self.config
        keep = list(range(config.keep_segments * config.segment_pieces)) if config.keep_segments else None
        try:
            while (dataset := self.known.dataset(config, context)) is None:
                if self.known.plan:
                    self.order([len(self.known.entries)], keep)
                self._hear(nothing_to_check)
        except Ended as ended:
            self._end(ended)
            raise ended.refusal from None
        self._dataset = dataset
        return dataset

    def order(self, make: list[int], keep: list[int] | None) -> None:
        """Says what is wanted, if it was not said; what may go is taken for gone. See `feeder.Order`."""
        wanted: Order = {"make": make, "keep": keep}
        if wanted == self._ordered or self._feeder is None:
            return
        self._ordered, self._number = wanted, self._number + 1
        if keep is not None:
            self._unheard[self._number] = keep
            self.known.there.intersection_update(keep)
        self._feeder.order({"number": self._number} | wanted)

    def hear(self, check: Check) -> None:
        """Takes in one message, which is waited for.

        Raises:
            PocketError: none comes: the feeder has ended, and another one did, too.
        """
        if self._feeder is None:
            assert self._ended
            if self.has_begun_anew:
                raise self._ended.refusal from None
            self.say(f"{self._ended}; it is begun anew")
            self.has_begun_anew = True
            self._feeder, self._ordered, self._unheard = Feeder(self.config), {}, {}
            self.known.there.clear()
        try:
            self._hear(check)
        except Ended as ended:
            self._end(ended)

    def hear_all(self, check: Check) -> None:
        """Takes in what has been said already."""
        try:
            while self._feeder and self._feeder.has_said:
                self._hear(check, is_waiting=False)
        except Ended as ended:
            self._end(ended)

    def _end(self, ended: Ended) -> None:
        """Nothing more will be heard of this feeder."""
        assert self._feeder is not None
        self._feeder.close()
        self._feeder, self._ended = None, ended

    def _hear(self, check: Check, *, is_waiting: bool = True) -> None:
        """Takes in one message; of how far the text is who does not wait needs to know nothing."""
        assert self._feeder is not None
        known, message = self.known, self._feeder.heard(check)
        match message:
            case {"say": line}:
                self.say(line)
            case {"report": line}:
                if is_waiting:
                    self.say(line)
            case {"plan": folder, "known": entries, "complete": complete}:
                known.plan = read_plan(Path(folder))
                for entry in entries[len(known.entries) :]:
                    self._grow(entry, complete)
                known.complete = complete
            case {"known": entry, "complete": complete}:
                self._grow(entry, complete)
            case {"there": piece, "number": number}:
                self._is_there(piece, number)
            case {"finished": folder}:
                known.finished = Path(folder)
                self._feeder.close()
                self._feeder = None
            case _:
                raise AssertionError(message)

    def _grow(self, entry: Tree, complete: bool) -> None:
        self.known.entries.append(entry)
        self.known.complete = complete
        if self._dataset:
            train = self._dataset.train
            assert isinstance(train, PieceStream)
            train.add(entry["train"])
            train.complete = complete

    def _is_there(self, piece: int, number: int) -> None:
        """What the feeder has said after the order of this number; those after it may let the piece go."""
        self._unheard = {later: keep for later, keep in self._unheard.items() if later > number}
        if all(piece in keep for keep in self._unheard.values()):
            self.known.there.add(piece)

    def close(self) -> None:
        """Ends the other process, if it has not ended. A set that has only to be marked as whole is waited for."""
        known = self.known
        is_whole = known.complete and known.there.issuperset(range(len(known.entries)))
        try:
            while self._feeder and is_whole and self._ordered.get("keep", ()) is None:
                self._hear(nothing_to_check, is_waiting=False)
        except Ended as ended:
            self._end(ended)
        if self._feeder:
            self._feeder.close()
            self._feeder = None


class Supply:
    """The rows of a run from a set in the making. Every method is the main thread's.

    Attributes:
        waited_s: seconds that `await_rows` has waited.
    """

    def __init__(
        self,
        feed: Feed,
        dataset: StreamedDataset,
        loader: Loader,
        position: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            feed: of the set.
            dataset: what it has opened.
            loader: of its training text.
            position: the row that the run goes on from.
        """
        self.feed, self.dataset, self.loader, self._clock = feed, dataset, loader, clock
        self.waited_s = 0.0
        self._saved = position

    def saved(self, position: int) -> None:
        """A checkpoint from which a resume goes on with this row is on the disk."""
        self._saved = position

    def await_rows(self, position: int, count: int, left: int, check: Check) -> None:
        """Returns when the rows at positions position .. position + count - 1 are there.

        Args:
            position: the next row of the run.
            count: rows of a step.
            left: rows of all steps that are left.
            check: called while waiting; if it raises, nothing is lost.

        Raises:
            DataError: they do not come.
        """
        if self.feed.is_finished:
            return
        self.feed.hear_all(check)
        self.order(position, count, left)
        if not self._has(position, count):
            began_at = self._clock()
            try:
                while not self._has(position, count):
                    self.feed.hear(check)
                    self.order(position, count, left)
            finally:
                self.waited_s += self._clock() - began_at
        self.feed.has_begun_anew = False

    def close(self) -> None:
        """Ends the other process."""
        self.feed.close()

    def _has(self, position: int, count: int) -> bool:
        rows = self.loader.rows
        if self.feed.is_finished:
            return True
        if not rows.complete and position + count > rows.total:
            return False
        return self.feed.known.there.issuperset(pieces_of(turns_of(rows, position, count), rows))

    def order(self, position: int, count: int, left: int) -> None:
        """Lets come what `await_rows` of the same will wait for, and what comes after it."""
        self.loader.cut()
        if self.feed.is_finished:
            return
        make, keep = wanted(self.loader.rows, position, count, left, self._saved, self.feed.config)
        if keep is not None and isinstance(train := self.dataset.train, PieceStream):
            train.keep(keep)
        self.feed.order(make, keep)
