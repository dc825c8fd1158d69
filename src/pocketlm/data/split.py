"""Which text is held out: a pure rule on texts, decided before anything is tokenized.

The hash rule: a document is validation if and only if

    int(first 8 bytes of SHA-256 of its UTF-8 text) / 2**64  <  val_fraction

so equal documents fall on the same side, and a document never changes sides when the corpus grows.

A corpus of one book or of a few documents cannot be split that way. Where the hash rule holds out less than 16,384
bytes or more than a tenth of all text, the last part of the corpus is held out instead, as one block cut at a line
start. The rule counts bytes, not tokens, because `bpe:SIZE` trains its tokenizer on the training text: the split must
stand before there are tokens. 16,384 bytes are at least 2,048 tokens of up to 8 bytes each.

The hash rule keeps exact copies together, the block rule does not, and neither finds near copies.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

ENOUGH_BYTES = 16_384
LARGEST_SHARE = 0.10


@dataclass(frozen=True)
class Split:
    """A rule, and for the block rule where the block begins."""

    kind: Literal["hash", "block"]
    val_fraction: float
    document: int = 0
    """block: the document that the cut is in, counted from 0."""
    byte: int = 0
    """block: the cut is at the first line start at or after this byte of it."""

    def parts(self, number: int, text: str) -> tuple[str, str]:
        """(training part, validation part) of document `number`; together they are its text."""
        if self.kind == "hash":
            held_out = is_validation(text, self.val_fraction)
        elif number == self.document:
            return cut_at_line(text, self.byte)
        else:
            held_out = number > self.document
        return ("", text) if held_out else (text, "")

    def words(self) -> str:
        """The rule as a sentence for people."""
        if self.kind == "hash":
            return f"validation is every document whose SHA-256 lies in the lowest {self.val_fraction:g} of all values"
        return (
            f"validation is the end of the corpus, from a line start at document {self.document}, byte {self.byte} on: "
            "choosing documents by their hash would hold out too little or too much"
        )

    def tree(self) -> dict[str, Any]:
        """As plain values; `from_tree` gives it back."""
        block = asdict(self)
        return block if self.kind == "block" else {"kind": self.kind, "val_fraction": self.val_fraction}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        return cls(**{field.name: tree[field.name] for field in fields(cls) if field.name in tree})


def text_bytes(text: str) -> int:
    """UTF-8 bytes of a document; one of nothing but white space has none, and is left out of the data set."""
    if not text.strip():
        return 0
    return len(text) if text.isascii() else len(text.encode())


def is_validation(text: str, fraction: float) -> bool:
    """The hash rule."""
    return hash_of_text(text) / 2**64 < fraction


def hash_of_text(text: str) -> int:
    """The first 64 bits of the SHA-256 of its UTF-8."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def cut_at_line(text: str, byte: int) -> tuple[str, str]:
    """A text in two at the first line start at or after a byte.

    Where the first half of what remains has no line start, the cut is at that byte's character, inside a line.
    """
    data = text.encode()
    byte = min(byte, len(data))  # a plan may say anything
    line_start = 1 + data.find(b"\n", max(0, byte - 1), byte + (len(data) - byte) // 2)
    if byte == 0:
        return "", text
    cut = line_start or next(at for at in range(byte, -1, -1) if at == len(data) or data[at] & 0xC0 != 0x80)
    return data[:cut].decode(), data[cut:].decode()


@dataclass(frozen=True)
class Survey:
    """What a pass over the documents counts."""

    documents: int
    text_bytes: int
    held_out_bytes: int
    """Of documents that the hash rule holds out."""
    split: Split
    whole: bool = True
    """Whether these were all documents."""


def survey(texts: Iterable[str], val_fraction: float, enough: int | None = None) -> Survey:
    """Reads all texts once and chooses the rule; or only the first, if they choose the hash rule.

    enough: so many first documents are asked, then at each doubling all until there.
    """
    sizes, held_out = array("Q"), 0
    for text in texts:
        sizes.append(text_bytes(text))
        held_out += sizes[-1] if is_validation(text, val_fraction) else 0
        if len(sizes) == enough:
            if choose_split(sizes, held_out, val_fraction).kind == "hash":
                return Survey(len(sizes), sum(sizes), held_out, Split("hash", val_fraction), whole=False)
            enough *= 2
    return Survey(len(sizes), sum(sizes), held_out, choose_split(sizes, held_out, val_fraction))


def choose_split(sizes: array[int], held_out_bytes: int, val_fraction: float) -> Split:
    """The hash rule where it holds out enough and not too much, else the block rule.

    sizes: UTF-8 bytes of every document. A val_fraction near or above a tenth raises the limit to 1.5 times itself.
    """
    total = sum(sizes)
    largest = max(LARGEST_SHARE, 1.5 * val_fraction) * total
    if ENOUGH_BYTES <= held_out_bytes <= largest:
        return Split("hash", val_fraction)
    block = int(min(max(val_fraction * total, ENOUGH_BYTES), max(LARGEST_SHARE, val_fraction) * total))
    document, after = len(sizes), 0
    while after < block:
        document -= 1
        after += sizes[document]
    return Split("block", val_fraction, document, after - block)
