"""From a position to a batch of token rows, read from the mapped shards.

A step's rows are a function of the position alone; the micro-batch only says how many go through the model at once.
There are no worker processes: reading 31 rows of 256 tokens takes 0.1 ms, a millionth of an epoch.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pocketlm.data.order import Rows, cut_rows, rows_at
from pocketlm.data.segments import segments, turn_of
from pocketlm.errors import DataError


class Stream(Protocol):
    """Tokens in a line, of which any stretch can be read."""

    num_tokens: int
    piece_starts: list[int]
    complete: bool

    def read(self, start: int, length: int) -> np.ndarray: ...


class Loader:
    """Rows of context + 1 tokens in the run's order.

    Attributes:
        rows: of the pieces that are known.
    """

    def __init__(self, stream: Stream, context: int, seed: int, shuffle: Literal["global", "piece"]) -> None:
        self.stream, self.context, self.seed, self.shuffle = stream, context, seed, shuffle
        self.rows: Rows
        self._known: tuple[int, bool] | None = None
        self.cut()
        if self.rows.total < 1:
            raise DataError(
                f"the training text has {stream.num_tokens} tokens, a row needs {context + 1}; "
                f"give more text, or a shorter --data.context"
            )

    def cut(self) -> None:
        """Takes in the pieces that the stream has now: one that streams gets more (streamed.py)."""
        known = (len(self.stream.piece_starts), self.stream.complete)
        if known == self._known:
            return
        self._known = known
        self.rows = cut_rows(self.stream.piece_starts, self.context, self.shuffle, self.stream.complete)

    def epochs(self, position: int) -> float | None:
        """How often the rows have been read before a position; None where it is not known how many there are."""
        return position / self.rows.total if self.rows.complete else None

    def segment(self, size: int, position: int) -> int:
        """The segment of the row before a position, from 0; there is one where `size`, in pieces, is 0."""
        return segments(self.rows, size).of(turn_of(self.rows, position - 1)) if size and position else 0

    def read(self, position: int, count: int) -> Tensor:
        """The rows at positions position .. position + count - 1. (count, context + 1) int64."""
        starts = self.rows.first_token(rows_at(self.rows, self.seed, position, count))
        length = self.context + 1
        rows = np.empty((count, length), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            row[:] = self.stream.read(int(start), length)
        return torch.from_numpy(rows)
