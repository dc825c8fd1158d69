"""Many documents to ids, by the fastest library whose ids are this tokenizer's.

The bytes of a data set must not depend on which library made them, so none is believed. The `Tokenizer` is the
reference, and a library that takes its vocabulary is held against it

    once           on texts that are known to be hard, and on 131,072 characters of the first documents
    always         every document's ids must stand for as many bytes as its text has
                   every character beyond ASCII is tried, between letters, digits and blanks, when it first comes:
                   libraries differ in which version of Unicode says what is a letter
    ever again     one character of 1,024, at random places

Places are compared in the very ids that are written: a part of some 4,096 characters, cut where no ids depend on it
(cuts.py), which its bytes find again among the ids of its text; a text without such places is compared whole. The
reference encodes these parts in a thread beside the library; no ids leave before both are done and equal.

All of it takes a few percent of the time. A library that fails is told of and never asked again, and everything that
was made before is in doubt: `Unequal` says so. A document with a byte that the vocabulary lacks has fewer bytes in its
ids by right; the reference does it.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pocketlm.beside import Beside
from pocketlm.errors import DataError
from pocketlm.text.cuts import cut_at_lines
from pocketlm.text.fast_encoders import Encode, Unsuited, Utf8, gigatoken_encoder, tiktoken_encoder
from pocketlm.text.tokenizer import Ids, Tokenizer

SMALL_BYTES = 1 << 20  # below it, checking a library takes as long as doing without
CHECKED_CHARS = 1 << 12
FIRST_CHECKS_CHARS = 32 * CHECKED_CHARS
CHECK_EVERY = 1 << 10  # characters for one that is checked
PROBE = "a__b _ 1_1  _._'s\n_\n\n_  2"  # of a character that has not come before, where patterns look at what it is
OF_NO_TOKEN = -(1 << 30)  # "bytes" of an id that nothing has: more than a text can make up for
MAX_CHARGE = 1 << 14  # a part that is longer, for lack of places to cut, counts as this

HARD_TEXTS = [
    "",
    " ",
    "\n\n  \t\r\n \n",
    "".join(map(chr, range(1, 0x100))),
    "it's I'LL we've 'tis 12345 3.14 a  1  22\n\n333 \t4\u00a0 5 6  \u0661\u0662 \u2167\u00bd \u00b2\u00b3\u00bd",
    "na\u00efve e\u0301 \u0928\u093f \u0e19\u0e49\u0e33 \ufdfa \u4e00\u4e8c\u4e09 \u2028\u3000x",
    "\U0001f999\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufe0f\u200b\ufeff\ufffd",
    "    def f(x):\n\n\n\t\treturn x**2  # --- ===>   \n",
    "a" * 999 + " " * 999 + "=" * 99 + "\n" * 99 + "7" * 99 + "ab" * 99,
]

LIBRARIES: tuple[tuple[str, Callable[[Tokenizer], Encode]], ...] = (
    ("gigatoken", gigatoken_encoder),
    ("tiktoken", tiktoken_encoder),
)
REFERENCE = "tokenizers"
INSTALL = "pip install 'pocketlm[fast]'"

T = TypeVar("T")


class Unequal(Exception):
    """A library gave other ids than the tokenizer; what it gave before is in doubt."""


class Part(NamedTuple):
    """A part of a text, and which of its bytes it is."""

    text: str
    begin: int
    end: int


class BulkEncoder:
    """A tokenizer's `encode_batch` for many batches.

    Attributes:
        tokenizer: the reference.
        name: the library that does the work.
    """

    def __init__(self, tokenizer: Tokenizer, text_bytes: int, say: Callable[[str], None]) -> None:
        """
        Args:
            tokenizer: the reference.
            text_bytes: about how much there is to do; for little the reference does it.
            say: is told which library does the work, and why others do not.
        """
        self.tokenizer, self._say = tokenizer, say
        lengths = [*tokenizer.byte_lengths, *[0] * 256, OF_NO_TOKEN]
        self._byte_lengths = np.array(lengths, dtype=np.int32)
        self._of_no_bytes = np.array([tokenizer.vocab_size], dtype=np.uint32)
        self._is_small = text_bytes < SMALL_BYTES
        self._libraries = iter(() if self._is_small else LIBRARIES)
        self._library: Encode | None = None
        self._random = random.Random(0)
        self._choose()

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of each text, each (tokens,) uint32.

        Raises:
            Unequal: the next call takes the next library; texts that had ids from this one are to be done again.
            DataError: what `Tokenizer.encode_batch` refuses.
        """
        while self._library and texts:
            try:
                return self._checked(self._library, texts)
            except Unequal as error:
                self._say(f"{self.name} is wrong about {error}: what it made is thrown away and made again")
                self._choose()
                raise
            except Unsuited as error:
                self._say(f"{self.name} stopped: {error}")
                self._choose()
        return self.tokenizer.encode_batch(texts)

    def _choose(self) -> None:
        """The next library that takes the vocabulary and knows the hard texts; else none."""
        self._due: float = FIRST_CHECKS_CHARS
        self._characters: set[str] = set()
        for name, make in self._libraries:
            try:
                self._library = _guarded(partial(make, self.tokenizer))
                hard = [*HARD_TEXTS, *self.tokenizer.special_tokens, " ".join(self.tokenizer.special_tokens)]
                self._compare(hard, self._ids(self._library, Utf8.of(hard)), self.tokenizer.encode_batch(hard))
                self.name = name
                return self._say(f"tokenizing with {name}, held against tokenizers")
            except (Unsuited, DataError) as error:
                self._say(f"{name} is not used: {error}")
            except Unequal as error:
                self._say(f"{name} is not used: it is wrong about {error}")
        self.name, self._library = REFERENCE, None
        if not self._is_small:
            self._say(f"tokenizing with {self.name}")

    def _checked(self, library: Encode, texts: list[str]) -> list[Ids]:
        """The library's ids, held against those that the reference makes beside it."""
        data = Utf8.of(texts)
        new = data.characters - self._characters
        probes = [PROBE.replace("_", character) for character in sorted(new)]
        parts = self._parts(texts, data)
        asked = probes + [part.text for own in parts.values() for part in own]
        with Beside(REFERENCE, partial(self.tokenizer.encode_batch, asked)) as right:
            ids = self._ids(library, data)
            given: list[Ids | None] = [*self._ids(library, Utf8.of(probes))]
        for number, own in parts.items():
            given += self._found(own, ids[number], len(data[number]))
        self._compare(asked, given, right.result())
        self._characters |= new
        return ids

    def _parts(self, texts: list[str], data: Utf8) -> dict[int, list[Part]]:
        """Which parts of which texts are due: each as likely as it is long in bytes, some perhaps twice."""
        ends, parts, cut = np.cumsum(list(map(len, data))), dict[int, list[Part]](), cache(_cut)
        size, count = int(ends[-1]), 0
        self._due += sum(map(len, texts)) / CHECK_EVERY
        while self._due > 0 and count < len(texts) + size // CHECKED_CHARS and size > 0:
            place = self._random.randrange(size)
            number = int(np.searchsorted(ends, place, side="right"))
            own, within = cut(texts[number]), place - int(ends[number]) + len(data[number])
            part = own[bisect_right(own, within, key=lambda part: part.end)]
            parts.setdefault(number, []).append(part)
            self._due -= min(len(part.text), MAX_CHARGE)
            count += 1
        return parts

    def _found(self, parts: list[Part], ids: Ids, size: int) -> list[Ids | None]:
        """The ids of parts among those of their text; None in a text that the reference made, having fewer bytes."""
        lengths = self._byte_lengths.take(ids, mode="clip")
        before = np.append(0, np.cumsum(lengths, dtype=np.int64))
        if before[-1] != size:
            return [None] * len(parts)
        begins = np.searchsorted(before, [part.begin for part in parts]).tolist()
        ends = np.searchsorted(before, [part.end for part in parts], side="right").tolist()
        return [ids[begin : end - 1] for begin, end in zip(begins, ends, strict=True)]

    def _ids(self, library: Encode, data: Utf8) -> list[Ids]:
        """What a library gives, where it stands for all bytes of a text; else the reference's ids.

        Raises:
            Unequal: the reference's do stand for all of them.
        """
        if not data:
            return []
        ids = _guarded(partial(library, data))
        if len(ids) != len(data):
            raise Unequal(f"how many texts there are: {len(data)}, not {len(ids)}")
        for number in np.flatnonzero(self._sizes(ids) != list(map(len, data))).tolist():
            text = data[number].decode()
            (ids[number],) = self.tokenizer.encode_batch([text])
            if self._sizes([ids[number]]) == len(data[number]):
                raise Unequal(_told(text))
        return ids

    def _sizes(self, ids: list[Ids]) -> NDArray[np.int64]:
        """How many bytes the ids of each text stand for; less than none where an id is nobody's. (texts,)"""
        counts = np.array(list(map(len, ids)))
        lengths = self._byte_lengths.take(np.concatenate([*ids, self._of_no_bytes]), mode="clip")
        sums: NDArray[np.int64] = np.add.reduceat(lengths, np.cumsum(counts) - counts, dtype=np.int64)
        return np.where(counts > 0, sums, 0)  # of no ids `reduceat` gives the one that follows, which there must be

    def _compare(self, texts: list[str], ids: Sequence[Ids | None], right: list[Ids]) -> None:
        for text, given, expected in zip(texts, ids, right, strict=True):
            if given is not None and not np.array_equal(given, expected):
                raise Unequal(_told(text))


def _cut(text: str) -> list[Part]:
    parts = cut_at_lines(text, CHECKED_CHARS)
    bounds = pairwise([0, *accumulate(len(part.encode()) for part in parts)])
    return [Part(part, *own) for part, own in zip(parts, bounds, strict=True)]


def _guarded(work: Callable[[], T]) -> T:
    """Work done by a library, whatever it raises.

    Raises:
        Unsuited: with its reason.
    """
    try:
        return work()
    except ModuleNotFoundError as error:
        raise Unsuited(f"{error.name} is not installed; to tokenize many times faster type: {INSTALL}") from None
    except (Unsuited, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # Rust's, which is no Exception
            raise Unsuited(f"{type(error).__name__}: {' '.join(str(error).split()):.120}") from None
        raise


def _told(text: str) -> str:
    return f"the text {text[:40]!r}{' ...' if len(text) > 40 else ''}"
