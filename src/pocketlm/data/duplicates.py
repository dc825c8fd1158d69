"""Texts that repeat an earlier one, exactly or nearly. The one that comes first is kept.

Exact: the first 64 bits of the SHA-256 of the UTF-8 text, in a set. Among 10^8 texts one pair of different ones is
taken for equal with a probability of 3 in 10,000.

Near: a text is the set of its runs of five words; two texts are near copies if the runs they share are at least
`threshold` of all that either has (the Jaccard index). It is estimated by MinHash (Broder, "On the resemblance and
containment of documents", 1997) with 128 permutations, those of datasketch, within 0.035 for an index of 0.8 (one
standard deviation). Which earlier texts are compared at all says locality-sensitive hashing (Indyk and Motwani, 1998):
those that agree in one of `bands` bands of `rows` values. A pair at the threshold is found in nine cases of ten or
more, one that is more alike almost always.

The index is our own: that of datasketch takes 6 kB a text, three times as much, and answers in the order of a set.

What is known of a kept text is one row: its hash, and its signature. Rows are all the state there is, so whoever goes
on reads the rows of earlier pieces and comes to the same verdicts.
"""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.data.split import hash_of_text
from pocketlm.errors import DataError

if TYPE_CHECKING:
    from datasketch import MinHash

EXACT, NEAR = "exact_duplicates", "near_duplicates"
METHOD = "minhash of 128 permutations, 5 words"
PERMUTATIONS = 128
WORDS = 5
SEED = 1
RECALL = 0.9
EXACT_ROW = np.dtype([("hash", "<u8")])
NEAR_ROW = np.dtype([("hash", "<u8"), ("signature", "<u4", (PERMUTATIONS,))])
MEMORY_BYTES = {EXACT_ROW: 90, NEAR_ROW: 2400}
"""A kept text in memory, measured with 10^5 to 10^6 of them at a threshold of 0.8."""

_SEPARATORS = bytes(code if code > 127 or chr(code).isalnum() else ord(" ") for code in range(256))
_MARKS = "\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u2013\u2014\u2026\u2022\u00b7\u00a0\u202f\u3000"
# Thai, Lao, Burmese, Khmer, kana and Chinese have no space between words: there, every character is one.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")

Signature = NDArray[np.uint32]


class Kept:
    """The texts that were kept until now."""

    def __init__(self, threshold: float | None) -> None:
        """threshold: of near copies; None looks for exact ones only.

        Raises:
            DataError: datasketch is not installed.
        """
        self.near = None if threshold is None else NearIndex(threshold)
        self.row = EXACT_ROW if self.near is None else NEAR_ROW
        self._hashes = set[int]()
        self._new = list[bytes]()

    def reason(self, text: str) -> str | None:
        """Which kind of copy a text is, `EXACT` or `NEAR`; if it is none, None, and it is one of the kept from now."""
        text_hash = hash_of_text(text)
        if text_hash in self._hashes:
            return EXACT
        row = text_hash.to_bytes(8, "little")
        if self.near is not None:
            signature = self.near.signature(text)
            if self.near.finds(signature):
                return NEAR
            self.near.add(signature)
            row += signature.astype("<u4", copy=False).tobytes()
        self._hashes.add(text_hash)
        self._new.append(row)
        return None

    def take(self) -> bytes:
        """The rows of the texts kept since the last call, in their order."""
        rows = b"".join(self._new)
        self._new.clear()
        return rows

    def load(self, rows: bytes) -> bool:
        """Takes up what `take` gave in an earlier process; False for what it cannot have given."""
        if len(rows) % self.row.itemsize:
            return False
        table = np.frombuffer(rows, dtype=self.row)
        self._hashes.update(table["hash"].tolist())
        if self.near is not None:
            for signature in table["signature"]:
                self.near.add(signature)
        return True


class NearIndex:
    """Signatures of the kept texts, found by their bands."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.bands, self.rows = bands_and_rows(threshold)
        self._empty = _empty_signature()
        self._signatures = list[bytes]()
        self._first = dict[int, int]()
        self._others = dict[int, list[int]]()
        generator = np.random.RandomState(SEED)  # numpy promises that its numbers stay what they are
        self._weights = generator.randint(0, 1 << 64, (self.bands, self.rows), dtype=np.uint64)

    def signature(self, text: str) -> Signature:
        """(128,) uint32: for each permutation the smallest value of a run of words; all ones for a text of no words."""
        own = self._empty.copy()
        own.update_batch(runs_of_words(text))
        signature: Signature = own.hashvalues
        return signature

    def finds(self, signature: Signature) -> bool:
        """Whether one of the texts is a near copy. A text of no words is a near copy of none."""
        if not self._has_words(signature):
            return False
        candidates = dict.fromkeys(one for key in self._keys(signature) for one in self._bucket(key))
        return any(self._alike(signature, candidate) for candidate in candidates)

    def add(self, signature: Signature) -> None:
        """One more text."""
        if not self._has_words(signature):
            return
        number = len(self._signatures)
        self._signatures.append(signature.tobytes())
        for key in self._keys(signature):
            if self._first.setdefault(key, number) != number:
                self._others.setdefault(key, []).append(number)

    def _has_words(self, signature: Signature) -> bool:
        return not np.array_equal(signature, self._empty.hashvalues)

    def _bucket(self, key: int) -> list[int]:
        """The texts with a band of this key; almost always one or none, which takes no list to keep."""
        return [self._first[key], *self._others.get(key, ())] if key in self._first else []

    def _keys(self, signature: Signature) -> list[int]:
        """A 64-bit hash of each band. Where two bands have one by chance, a text more is compared."""
        table = signature[: self.bands * self.rows].reshape(self.bands, self.rows)
        keys: list[int] = (table * self._weights).sum(axis=1).tolist()
        return keys

    def _alike(self, signature: Signature, number: int) -> bool:
        other = np.frombuffer(self._signatures[number], dtype=np.uint32)
        return bool(np.count_nonzero(signature == other) >= self.threshold * PERMUTATIONS)


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """(bands, values in a band): the longest bands that find RECALL of the pairs with that index.

    With r values in each of b bands a pair of index j agrees in one of them with probability 1 - (1 - j^r)^b.
    """
    rows = next(
        rows for rows in range(PERMUTATIONS, 0, -1) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    )
    return PERMUTATIONS // rows, rows


def runs_of_words(text: str) -> list[bytes]:
    """Each run of five words in a text, in lower case and without what stands between; of fewer words, all as one.

    Between words stands what is in ASCII no letter and no digit, and the quotes, dashes and spaces of typography.
    """
    if not text.isascii():
        for mark in _MARKS:
            text = text.replace(mark, " ")
        text = _UNSPACED.sub(r" \g<0> ", text)
    data = b" ".join(text.lower().encode().translate(_SEPARATORS).split())
    if not data:
        return []
    spaces = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord(" ")).tolist()
    begins, ends = [0, *(space + 1 for space in spaces)], [*spaces, len(data)]
    return [data[begin:end] for begin, end in zip(begins, ends[WORDS - 1 :], strict=False)] or [data]


def _empty_signature() -> MinHash:
    """What every signature begins as; the permutations are drawn once. CRC-32 is fast, and datasketch mixes it."""
    try:
        from datasketch import MinHash  # with scipy, which takes most of a second to import
    except ModuleNotFoundError as error:
        raise DataError(
            f"data.dedup near takes {error.name}, which is not installed; type: pip install 'pocketlm[dedup]'"
        ) from None
    settings: dict[str, Any] = {"num_perm": PERMUTATIONS, "seed": SEED, "scheme": "affine32"}
    return MinHash(**settings, hashfunc=zlib.crc32)
