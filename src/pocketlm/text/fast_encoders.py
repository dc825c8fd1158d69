"""Libraries that give GPT-2's and SmolLM2's ids faster than `tokenizers` does.

An adapter makes an `Encode` of a tokenizer, or says in `Unsuited` why it does not. None of them is trusted: `bulk.py`
holds what they give against the tokenizer itself. Two things are the same for all:

    Nothing that was added to the vocabulary is handed over, so no text can make a special token.
    Where the vocabulary lacks a byte (SmolLM2's lacks 21 that text never has, or hardly ever), `tokenizers` drops it
    and may merge its neighbours. Here such a byte gets an id from vocab_size on: the mark of a text to be done again.

gigatoken knows GPT-2's pattern, not SmolLM2's, where each numeral stands alone. As long as no merge takes a digit the
two differ only where a digit follows two blanks or more (GPT-2 leaves the last of them out of their run), and at
numerals beyond ASCII, whose bytes may merge. A text in which either may be is cut at its numerals, as SmolLM2's pattern
does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from pocketlm.limits import available_cores
from pocketlm.text.tokenizer import Ids, Tokenizer
from pocketlm.text.tokenizer_json import byte_alphabet, merges_alone

Encode = Callable[[list[bytes]], list[Ids]]
"""UTF-8 texts to the ids of each."""
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

    def encode(data: list[bytes]) -> list[Ids]:
        nonlocal engine, met_bytes
        if engine is None or met_bytes > RENEW_BYTES:
            engine, met_bytes = Engine.from_json(plain_json), 0
        met_bytes += sum(map(len, data))
        parts = numerals.apart(data) if numerals else [[own] for own in data]
        batch = engine.encode_batch(list(chain.from_iterable(parts)), parallel=False)
        ids, ends = np.asarray(awkward.flatten(batch)), np.append(0, np.cumsum(awkward.num(batch)))
        bounds = ends[np.cumsum([0, *map(len, parts)])].tolist()
        return [ids[begin:end] for begin, end in pairwise(bounds)]

    encode([b""])
    return encode


def tiktoken_encoder(tokenizer: Tokenizer) -> Encode:
    """tiktoken, whose batches go over this process's cores. It merges by the rank of what comes out.

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

    def encode(data: list[bytes]) -> list[Ids]:
        batch = engine.encode_ordinary_batch(list(map(bytes.decode, data)), num_threads=cores)
        return [table[np.array(ranked, dtype=np.intp)] for ranked in batch]

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

    def apart(self, data: list[bytes]) -> list[list[bytes]]:
        """Each text, cut before and after each numeral if the two patterns may differ in it, else whole."""
        beyond = list(map(beyond_ascii, data))
        self._meet(set("".join(beyond)))
        rare = self._numerals | self._blanks
        differ = {number for number, own in enumerate(beyond) if not rare.isdisjoint(own)}
        differ.update(_with_digits_after_blanks(data))
        cut = re.compile(f"({'|'.join(['[0-9]', *sorted(self._numerals)])})".encode())
        return [list(filter(None, cut.split(own))) if i in differ else [own] for i, own in enumerate(data)]

    def _meet(self, characters: set[str]) -> None:
        if new := characters - self._met:
            cut = self._digits.pre_tokenize_str("".join(f"a{character}" for character in new))
            self._numerals |= {part for part, _ in cut if len(part) == 1 and part != "a"}
            self._blanks.update(filter(str.isspace, new))
            self._met |= new


def _with_digits_after_blanks(data: list[bytes]) -> list[int]:
    """The numbers of texts in which an ASCII digit follows two ASCII blanks; perhaps of some more."""
    codes = np.frombuffer(b"  " + b"".join(data), dtype=np.uint8)
    places = np.flatnonzero(codes - np.uint8(ord("0")) < 10)
    after = places[(codes[places - 1] <= ord(" ")) & (codes[places - 2] <= ord(" "))] - 2
    found: list[int] = np.searchsorted(np.cumsum(list(map(len, data))), after, side="right").tolist()
    return found


def beyond_ascii(data: bytes) -> str:
    """The characters of a UTF-8 text that are not ASCII."""
    return "" if data.isascii() else data.translate(None, ASCII).decode()
