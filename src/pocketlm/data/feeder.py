"""The process that makes the pieces of a set while a training run reads them. `feed.py` starts it, at its other end.

    python -m pocketlm.data.feeder

Both ends speak lines of JSON. From the run come its `DataConfig`, then orders, each in place of the one before:

    {"number": 5, "make": [7, 8], "keep": [6, 7, 8]}

pieces that are to be on the disk, the most urgent first; and those whose training tokens may stay, null for all, of
which every order is carried out. The answers, each a line:

    {"say": LINE}         for people
    {"report": LINE}      how far the text is; several a minute
    {"plan": FOLDER, "known": ENTRIES, "complete": BOOL}    plan and tokenizer are there; what piece-*.json says of each
                          piece that was made before; and whether these are all
    {"known": ENTRY, "complete": BOOL}                      the next one, when it was made
    {"there": PIECE, "number": ORDER}   its tokens are on the disk, and were held against their hash; they stay there
                          until an order after this one does not keep them
    {"finished": FOLDER}  the set is whole and has a manifest: nothing more will come, and nothing will go
    {"refused": LINE, "code": EXIT_CODE}    the end

The process dies with its run: when the orders end it leaves at once, as if it were killed, and what it was writing is
swept away by the next one. It takes no signal of the terminal, and gives way to the training for the processor.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple, TextIO

from pocketlm.config import DataConfig
from pocketlm.data.pieces import (
    Plan,
    Progress,
    Report,
    Writer,
    begin_of,
    disowned,
    drop_tokens,
    is_last,
    known_pieces,
    whole_piece,
)
from pocketlm.data.prepare import prepare
from pocketlm.data.sealed import Tree
from pocketlm.errors import DataError, PocketError
from pocketlm.text.bulk import BulkEncoder, Unequal
from pocketlm.text.sources import Source

NICENESS = 10


class Order(NamedTuple):
    """What the run wants of the disk."""

    number: int
    make: list[int]
    keep: list[int] | None


class Orders:
    """The orders that come, read by a thread."""

    def __init__(self, lines: TextIO) -> None:
        self._orders = queue.SimpleQueue[Order]()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterable[str]) -> None:
        try:
            for line in lines:
                if line.endswith("\n"):  # the run may have been killed in the middle of one
                    self._orders.put(Order(**json.loads(line)))
        finally:
            os._exit(0)

    def take(self, *, wait: bool) -> list[Order]:
        """Those that have come since; with `wait` at least one."""
        orders = [self._orders.get()] if wait else []
        while not self._orders.empty():
            orders.append(self._orders.get())
        return orders


class Answers:
    """The lines to the run."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def tell(self, **message: Any) -> None:
        """One line. A run that does not read any more has ended."""
        try:
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()
        except BrokenPipeError:
            os._exit(0)


class Feeder:
    """Makes what is ordered; the `write` of `prepare`."""

    def __init__(self, orders: Orders, answers: Answers) -> None:
        self.orders, self.answers = orders, answers

    def write(self, plan: Plan, source: Source, progress: Progress) -> list[Tree]:
        """Serves the run until all pieces are there and all may stay: then the set can be finished.

        Raises:
            DataError: a piece that is made again is not what it was, or a library for tokenizing is wrong.
        """
        report = Report(None, lambda line: self.answers.tell(report=line), source.remote)
        writer = Writer(plan, source, BulkEncoder(plan.tokenizer, plan.tree["text_bytes"], progress), report)
        pieces = _Pieces(plan, writer, self.answers)
        order: Order | None = None
        while True:
            for newer in self.orders.take(wait=order is None):
                order = newer
                pieces.drop(order)
            assert order is not None
            if (piece := pieces.first_missing(order.make)) is not None:
                pieces.provide(piece, order)
            elif order.keep is None and pieces.are_all_there():
                return pieces.entries
            else:
                order = None


class _Pieces:
    """What is known of the pieces, and which are on the disk for certain."""

    def __init__(self, plan: Plan, writer: Writer, answers: Answers) -> None:
        self.plan, self.writer, self.answers = plan, writer, answers
        self.entries, self.there, self.gone = known_pieces(plan), set[int](), set[int]()
        self.complete = is_last(plan, self.entries)
        answers.tell(plan=str(plan.folder), known=self.entries, complete=self.complete)

    def first_missing(self, wanted: Iterable[int]) -> int | None:
        ends = len(self.entries) if self.complete else None
        return next((one for one in wanted if one not in self.there and (ends is None or one < ends)), None)

    def provide(self, piece: int, order: Order) -> None:
        """A piece on the disk; of those that nobody has seen the next one, whichever was asked for."""
        piece = min(piece, len(self.entries))
        known = self.entries[piece] if piece < len(self.entries) else None
        if known is None or whole_piece(self.plan, piece) is None:
            entry = self._written(piece, known)
            if known is None:
                self.entries.append(entry)
                self.complete = is_last(self.plan, self.entries)
                self.answers.tell(known=entry, complete=self.complete)
        self.there.add(piece)
        self.gone.discard(piece)
        self.answers.tell(there=piece, number=order.number)

    def _written(self, piece: int, known: Tree | None) -> Tree:
        try:
            return self.writer.write(piece, begin_of(self.entries[:piece]), known)
        except Unequal as error:
            disowned(self.plan)
            raise DataError(
                f"the library that tokenizes is wrong about {error}: tokens that the run has read are in doubt; "
                f"type pip uninstall gigatoken, delete {self.plan.folder}, and begin the run anew with a new --out"
            ) from None

    def drop(self, order: Order) -> None:
        """Removes the training tokens of what may not stay."""
        if order.keep is None:
            return
        for piece in sorted(set(range(len(self.entries))).difference(order.keep, self.gone)):
            drop_tokens(self.plan, piece)
            self.there.discard(piece)
            self.gone.add(piece)

    def are_all_there(self) -> bool:
        """Whether the set can be finished with what is on the disk; what was not looked at is now."""
        if not self.complete or self.gone:
            return False
        for piece in set(range(len(self.entries))) - self.there:
            if whole_piece(self.plan, piece) is None:
                self.gone.add(piece)
                return False
            self.there.add(piece)
        return True


def main() -> int:
    """Serves the run at stdin and stdout; what libraries print goes to stderr."""
    os.nice(NICENESS)
    answers = Answers(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    config = DataConfig.model_validate_json(sys.stdin.readline())
    feeder = Feeder(Orders(sys.stdin), answers)
    try:
        folder = prepare(config, progress=lambda line: answers.tell(say=line), write=feeder.write)
        answers.tell(finished=str(folder))
    except PocketError as error:
        answers.tell(refused=str(error), code=error.exit_code)
        return error.exit_code
    except OSError as error:
        answers.tell(
            refused=f"{error.filename or 'the data'}: {error.strerror}; mend that, and run the command again",
            code=DataError.exit_code,
        )
        return DataError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
