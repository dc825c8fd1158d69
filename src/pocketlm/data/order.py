"""Which row comes when: a pure function of a position, never of arrival.

The training stream is cut into pieces, each piece into rows of `context` tokens (a row is read with one token more,
the last target). A run consumes rows at positions 0, 1, 2, ...; with N rows in all, position g belongs to epoch
g // N and is row `permutation(seed, epoch, piece)` of its piece. So the state of the order is one integer, any
position is found at once, and neither the number of ranks nor the micro-batch nor a resume can change it.

The permutation is a Feistel network over the next power of four, walked until it falls inside the piece (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002, the cycle-walking cipher).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

VERSION = 1  # kept in every checkpoint; golden vectors in the tests hold it still
ROUNDS = 6

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """A token stream cut into rows.

    first_tokens[k] is where piece k begins, num_rows[k] how many whole rows it has. The tail of a piece that is
    shorter than context + 1 tokens is not in any row.
    """

    context: int
    first_tokens: tuple[int, ...]
    num_rows: tuple[int, ...]
    dropped_tokens: int
    complete: bool = True
    """Whether these are all rows of an epoch, or others are still to come."""

    @property
    def total(self) -> int:
        """N, the rows of an epoch."""
        return sum(self.num_rows)

    def first_token(self, rows: Indices) -> Indices:
        """Where each row begins in the stream. rows: (R,) in 0 .. N-1."""
        piece, inside = self.locate(rows)
        return np.asarray(self.first_tokens, dtype=np.int64)[piece] + inside * self.context

    def locate(self, rows: Indices) -> tuple[Indices, Indices]:
        """The piece of each row, and its number inside that piece."""
        piece = np.searchsorted(self.ends, rows, side="right")
        return piece, rows - (self.ends - np.asarray(self.num_rows))[piece]

    @cached_property
    def ends(self) -> Indices:
        """The row behind each piece. (pieces,) int64."""
        return np.cumsum(self.num_rows)


def cut_rows(
    piece_starts: Sequence[int], context: int, shuffle: Literal["global", "piece"], complete: bool = True
) -> Rows:
    """Cuts a stream into rows of `context` tokens with stride `context`.

    Args:
        piece_starts: the first token of each piece, and the stream's length as the last entry.
        context: tokens in a row.
        shuffle: "global" takes the whole stream as one piece.
        complete: whether these are all pieces.
    """
    starts = [piece_starts[0], piece_starts[-1]] if shuffle == "global" else list(piece_starts)
    sizes = [end - start for start, end in pairwise(starts)]
    num_rows = tuple(max(0, size - 1) // context for size in sizes)
    targets = sum(max(0, size - 1) for size in sizes)
    return Rows(context, tuple(starts[:-1]), num_rows, targets - sum(num_rows) * context, complete)


def rows_at(rows: Rows, seed: int, position: int, count: int) -> Indices:
    """The rows read at positions position .. position + count - 1. (count,) int64; may cross epochs and pieces."""
    assert rows.total >= 1
    assert rows.complete or position + count <= rows.total, "an epoch that has no end yet"
    epochs, inside_epoch = np.divmod(np.arange(position, position + count, dtype=np.int64), rows.total)
    pieces, inside = rows.locate(inside_epoch)
    result = inside_epoch - inside  # the first row of each piece
    for epoch, piece in sorted(set(zip(epochs.tolist(), pieces.tolist(), strict=True))):
        here = (epochs == epoch) & (pieces == piece)
        result[here] += permute(inside[here], rows.num_rows[piece], order_key(seed, epoch, piece))
    return result


def order_key(seed: int, epoch: int, piece: int) -> int:
    """64 bits that name one permutation."""
    return key_of(f"pocketlm order {VERSION}: {seed} {epoch} {piece}")


def key_of(name: str) -> int:
    """The key of a permutation, 64 bits, from a name that no other one has."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def permute(indices: Indices, size: int, key: int) -> Indices:
    """Where a keyed permutation of 0 .. size-1 sends each index. indices: any shape, int64."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, key)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    """A permutation of 0 .. 4**half_bits - 1."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        round_key = np.uint64((key + number * 0x9E3779B97F4A7C15) % 2**64)
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return left << shift | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); 64-bit arithmetic wraps."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
