"""Segments: pieces of a set that come and go together, while a run reads it.

A run reads piece after piece, epoch after epoch. Its turns count the pieces as they are read: in epoch e of a set of n
pieces, piece k has turn e * n + k. A segment is `size` turns that follow each other; the last one of an epoch may have
fewer. It is the unit of checkpoint and deletion, and none of order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocketlm.data.order import Rows


@dataclass(frozen=True)
class Segments:
    """How the turns of a run are cut."""

    size: int
    """Turns in a segment."""
    num_pieces: int | None
    """Of the set; None where it is not known yet, and no turn of the second epoch is asked for."""

    def of(self, turn: int) -> int:
        """The segment of a turn, from 0."""
        if self.num_pieces is None:
            return turn // self.size
        epoch, piece = divmod(turn, self.num_pieces)
        return epoch * self._in_epoch(self.num_pieces) + piece // self.size

    def first_turn(self, segment: int) -> int:
        """Where a segment begins; what `of` takes back."""
        if self.num_pieces is None:
            return segment * self.size
        epoch, inside = divmod(segment, self._in_epoch(self.num_pieces))
        return epoch * self.num_pieces + inside * self.size

    def kept(self, saved: int, read: range, keep: int) -> range:
        """The turns whose pieces are on the disk: `keep` segments, or more where one step reads more.

        From the segment of the newest checkpoint on, so that a resume finds what it needs; but one segment beyond what
        is read comes first, and before all what is read, also if no checkpoint can be saved any more.

        Args:
            saved: the turn that a resume would go on from.
            read: the turns of the next step.
            keep: at least 2.
        """
        first, last = self.of(read.start), self.of(read.stop - 1)
        begin = max(min(self.of(saved), last - (keep - 2)), last - (keep - 1), 0)
        begin = min(begin, first)
        return range(self.first_turn(begin), self.first_turn(max(begin + keep, last + 1)))

    def _in_epoch(self, num_pieces: int) -> int:
        return -(-num_pieces // self.size)


def turn_of(rows: Rows, position: int) -> int:
    """The turn of the row at a position. One behind the last row that is known has the turn behind the last piece."""
    num_pieces = len(rows.num_rows)
    if not rows.complete and position >= rows.total:
        return num_pieces
    epoch, inside = divmod(position, rows.total)
    return epoch * num_pieces + int(np.searchsorted(rows.ends, inside, side="right"))


def turns_of(rows: Rows, position: int, count: int) -> range:
    """The turns of the rows at positions position .. position + count - 1."""
    return range(turn_of(rows, position), turn_of(rows, position + count - 1) + 1)


def pieces_of(turns: range, rows: Rows) -> list[int]:
    """The pieces of these turns, each once."""
    return list(dict.fromkeys(turn % len(rows.num_rows) if rows.complete else turn for turn in turns))


def segments(rows: Rows, size: int) -> Segments:
    """Those of a set with these rows."""
    return Segments(size, len(rows.num_rows) if rows.complete else None)
