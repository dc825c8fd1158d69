"""Libraries that give GPT-2's and SmolLM2's ids faster than `tokenizers` does.

An adapter makes an `Encode` of a tokenizer, or says in `Unsuited` why it does not. None of them is trusted: `bulk.py`
holds what they give against the tokenizer itself. Two things are the same for all:

    Nothing that was added to the vocabulary is handed over, so no text can make a special token.
    Where the vocabulary lacks a byte (SmolLM2's lacks 21 that text never has, or hardly ever), `tokenizers` drops it
    and may merge its neighbours. Here such a byte gets an id from vocab_size on: the mark of a text to be done again.

gigatoken knows GPT-2's pattern, not SmolLM2's, where each numeral stands alone. As long as no merge takes a digit the
two differ only where a digit follows two blanks or more (GPT-2 leaves the last of them out of their run), and at
numerals beyond ASCII, whose bytes may merge. A text in which either may be is cut at these numerals, as SmolLM2's
pattern does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from pocketlm.errors import DataError
from pocketlm.limits import available_cores
from pocketlm.text.cuts import cut_at_lines
from pocketlm.text.tokenizer import HALF_A_PAIR, PART_CHARS, Ids, Tokenizer
from pocketlm.text.tokenizer_json import byte_alphabet, merges_alone

Tree = dict[str, Any]

# GPT-2's, and the same with each numeral alone, so that the blanks before one are a run of their own.
PATTERNS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
ASCII = bytes(range(128))
RENEW_BYTES = 1 << 26


class Unsuited(Exception):
    """Why a library does not take a tokenizer."""


class Utf8(list[bytes]):
    """Texts in UTF-8, with what is asked of them more than once; not to be changed."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """
        Raises:
            DataError: half a surrogate pair; no library is asked what it makes of that.
        """
        try:
            return cls(map(str.encode, texts))
        except UnicodeEncodeError:
            raise DataError(HALF_A_PAIR) from None

    @cached_property
    def beyond_ascii(self) -> list[str]:
        """The characters of each text that are not ASCII."""
        return ["" if own.isascii() else own.translate(None, ASCII).decode() for own in self]

    @cached_property
    def characters(self) -> set[str]:
        """All of these."""
        return set("".join(self.beyond_ascii))

    def with_any(self, characters: set[str]) -> list[int]:
        """The numbers of the texts that have one of these, which are not ASCII."""
        if characters.isdisjoint(self.characters):
            return []
        return [number for number, own in enumerate(self.beyond_ascii) if not characters.isdisjoint(own)]


Encode = Callable[[Utf8], list[Ids]]
"""Texts to the ids of each."""


def gigatoken_encoder(tokenizer: Tokenizer) -> Encode:
    """gigatoken, on the calling thread; it lets others compute meanwhile.

    It remembers every piece of text it has met, and never forgets: up to ten bytes for a byte of random words. So it is
    made anew after RENEW_BYTES, before it holds 700 MB; that takes a tenth of a second.

    Raises:
        ImportError: it is not installed.
        Unsuited: a tokenizer of another kind.
        Exception: the library's own refusal.
    """
    import awkward  # what its batches come in
    from gigatoken import Tokenizer as Engine

    tree = _plain_tree(tokenizer)
    numerals = None
    if tokenizer.pre_tokenizer_name == "smollm":
        if re.search("[0-9]", "".join(map("".join, tree["model"]["merges"]))):
            raise Unsuited("its merges take digits")
        numerals = _Numerals()
    pattern = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = tree["model"] | {"vocab": _with_all_bytes(tokenizer)}
    plain_json = json.dumps(tree | {"pre_tokenizer": pattern, "model": model})
    engine: Any = None
    met_bytes = 0

    def encode(data: Utf8) -> list[Ids]:
        nonlocal engine, met_bytes
        if engine is None or met_bytes > RENEW_BYTES:
            engine, met_bytes = Engine.from_json(plain_json), 0
        met_bytes += sum(map(len, data))
        parts = numerals.apart(data) if numerals else [[own] for own in data]
        batch = engine.encode_batch(list(chain.from_iterable(parts)), parallel=False)
        ids, ends = np.asarray(awkward.flatten(batch)), np.append(0, np.cumsum(np.asarray(awkward.num(batch))))
        bounds = ends[np.cumsum([0, *map(len, parts)])].tolist()
        return [ids[begin:end] for begin, end in pairwise(bounds)]

    encode(Utf8.of([""]))
    return encode


def tiktoken_encoder(tokenizer: Tokenizer) -> Encode:
    """tiktoken, whose batches go over the cores, a long text in parts. It merges by the rank of what comes out.

    Raises:
        Unsuited: a tokenizer of another kind, or one in which two merges have one result.
    """
    import tiktoken

    tree = _plain_tree(tokenizer)
    vocabulary = _with_all_bytes(tokenizer)
    ids = [vocabulary[character] for character in byte_alphabet()]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for rank, merge in enumerate(tree["model"]["merges"], 256):
        ids.append(vocabulary["".join(merge)])
        ranks[tokenizer.token_bytes[ids[-1]]] = rank
    if len(ranks) != len(ids):
        raise Unsuited("two of its merges have one result")
    table: NDArray[np.uint32] = np.array(ids, dtype=np.uint32)
    pattern = PATTERNS[str(tokenizer.pre_tokenizer_name)]
    engine = tiktoken.Encoding("pocketlm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    cores = available_cores()

    def encode(data: Utf8) -> list[Ids]:
        cut = [cut_at_lines(own.decode(), PART_CHARS) for own in data]
        batch = iter(engine.encode_ordinary_batch(list(chain.from_iterable(cut)), num_threads=cores))
        ranked = (list(chain.from_iterable(islice(batch, len(parts)))) for parts in cut)
        return [table[np.array(own, dtype=np.intp)] for own in ranked]

    return encode


def _plain_tree(tokenizer: Tokenizer) -> Tree:
    """The tokenizer.json of byte-level BPE alone: without added tokens, and what is put around a text.

    Raises:
        Unsuited: its ids follow from more than that.
    """
    if tokenizer.pre_tokenizer_name not in PATTERNS:
        raise Unsuited("it cuts text in another way than GPT-2 and SmolLM2")
    tree = tokenizer.tree
    if not merges_alone(tree):
        raise Unsuited("its ids do not follow from merges alone")
    if any(not entry.get("special") for entry in tree.get("added_tokens") or ()):
        raise Unsuited("it has added tokens that text makes")
    return tree | {"added_tokens": [], "post_processor": None}


def _with_all_bytes(tokenizer: Tokenizer) -> dict[str, int]:
    """The vocabulary; a byte that it lacks has an id from vocab_size on."""
    vocabulary: dict[str, int] = tokenizer.tree["model"]["vocab"]
    missing = [character for character in byte_alphabet() if character not in vocabulary]
    return vocabulary | {character: tokenizer.vocab_size + place for place, character in enumerate(missing)}


class _Numerals:
    """Numerals as `tokenizers` knows them in this version; it is asked about each character that comes."""

    def __init__(self) -> None:
        self._digits = pre_tokenizers.Digits(individual_digits=True)
        self._met: set[str] = set()
        self._numerals: set[str] = set()
        self._blanks: set[str] = set()

    def apart(self, data: Utf8) -> list[list[bytes]]:
        """Each text, cut before and after each numeral at which the two patterns may differ, and perhaps at others."""
        self._meet(data.characters)
        cuts = dict.fromkeys(data.with_any(self._numerals), _at(self._numerals))
        cuts |= dict.fromkeys(data.with_any(self._blanks), _at({"[0-9]", *self._numerals}))
        texts = [[own] for own in data]
        for number, places in _digits_after_blanks(data).items():
            own = data[number]
            texts[number] = [own[begin:end] for begin, end in pairwise([0, *places, len(own)])]
        for number, cut in cuts.items():
            texts[number] = list(filter(None, chain.from_iterable(map(cut.split, texts[number]))))
        return texts

    def _meet(self, characters: set[str]) -> None:
        if new := characters - self._met:
            cut = self._digits.pre_tokenize_str("".join(f"a{character}" for character in new))
            self._numerals |= {part for part, _ in cut if len(part) == 1 and part != "a"}
            self._blanks.update(filter(str.isspace, new))
            self._met |= new


def _at(numerals: set[str]) -> re.Pattern[bytes]:
    return re.compile(f"({'|'.join(sorted(numerals))})".encode())


def _digits_after_blanks(data: Utf8) -> dict[int, list[int]]:
    """The places of ASCII digits that follow two ASCII blanks, and perhaps of some more; {text: bytes before each}."""
    codes = np.frombuffer(b"".join(data), dtype=np.uint8)
    blank = codes <= ord(" ")
    digits = 2 + np.flatnonzero(blank[:-2] & blank[1:-1])  # two blanks are rarer than digits
    digits = digits[codes[digits] - np.uint8(ord("0")) < 10]
    ends = np.cumsum([0, *map(len, data)])
    numbers = np.searchsorted(ends, digits, side="right") - 1
    places: dict[int, list[int]] = {}
    for number, place in zip(numbers.tolist(), (digits - ends[numbers]).tolist(), strict=True):
        places.setdefault(number, []).append(place)
    return places
