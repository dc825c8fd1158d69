"""Libraries that give GPT-2's and SmolLM2's ids faster than `tokenizers` does.

An adapter makes an `Encode` of a tokenizer, or says in `Unsuited` why it does not. None of them is trusted: `bulk.py`
holds what they give against the tokenizer itself. Two things are the same for all:

    Nothing that was added to the vocabulary is handed over, so no text can make a special token.
    Where the vocabulary lacks a byte (SmolLM2's lacks 21 that text never has, or hardly ever), `tokenizers` drops it
    and may merge its neighbours. Here such a byte gets an id from vocab_size on: the mark of a text to be done again.

gigatoken knows GPT-2's pattern, not SmolLM2's, where each numeral stands alone. As long as no merge takes a digit the
two differ only where a digit follows two blanks or more (GPT-2 leaves the last of them out of their run), and at
numerals beyond ASCII, whose bytes may merge. A text with either is cut at its numerals, as SmolLM2's pattern does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from pocketlm.text.tokenizer import Ids, Tokenizer
from pocketlm.text.tokenizer_json import byte_alphabet, merges_alone

Encode = Callable[[list[str]], list[Ids]]
Tree = dict[str, Any]

# GPT-2's, and the same with each numeral alone, so that the blanks before one are a run of their own.
PATTERNS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
DIGIT_AFTER_BLANKS = re.compile(r"[0-9](?<=\s\s.)")
ASCII = bytes(range(128))
BLANKS_AND_DIGITS = bytes(ord(" 0a"[0 if chr(b).isspace() else 1 if chr(b).isdigit() else 2]) for b in ASCII).ljust(
    256, b"a"
)
RENEW_CHARS = 1 << 26


class Unsuited(Exception):
    """Why a library does not take a tokenizer."""


def gigatoken_encoder(tokenizer: Tokenizer) -> Encode:
    """gigatoken, on the calling thread.

    It remembers every piece of text it has met, and never forgets: up to ten bytes for a character of random words. So
    it is made anew after RENEW_CHARS, before it holds 700 MB; that takes a tenth of a second.

    Raises:
        ImportError: it is not installed.
        Unsuited: a tokenizer of another kind.
        Exception: the library's own refusal.
    """
    from gigatoken.gigatoken_rs import load_hf_json

    tree = _plain_tree(tokenizer)
    numerals = None
    if tokenizer.pre_tokenizer_name == "smollm":
        if re.search("[0-9]", "".join(map("".join, tree["model"]["merges"]))):
            raise Unsuited("its merges take digits")
        numerals = _Numerals()
    pattern = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = tree["model"] | {"vocab": _with_all_bytes(tokenizer)}
    data = json.dumps(tree | {"pre_tokenizer": pattern, "model": model})
    engine: Any = None
    chars = 0

    def encode(texts: list[str]) -> list[Ids]:
        nonlocal engine, chars
        if engine is None or chars > RENEW_CHARS:
            engine, chars = load_hf_json(data), 0
        chars += sum(map(len, texts))
        if numerals is None:
            return [engine.encode(text) for text in texts]
        return [_joined([engine.encode(part) for part in numerals.apart(text)]) for text in texts]

    encode([""])
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def encode(texts: list[str]) -> list[Ids]:
        batch = engine.encode_ordinary_batch(texts, num_threads=cores)
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


def _joined(parts: list[Ids]) -> Ids:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Numerals:
    """Numerals as `tokenizers` knows them in this version; it is asked about each character that comes."""

    def __init__(self) -> None:
        self._digits = pre_tokenizers.Digits(individual_digits=True)
        self._met: set[str] = set()
        self._numerals: set[str] = set()

    def _among(self, characters: set[str]) -> set[str]:
        if new := characters - self._met:
            cut = self._digits.pre_tokenize_str("".join(f"a{character}" for character in new))
            self._numerals |= {part for part, _ in cut if len(part) == 1 and part != "a"}
            self._met |= new
        return characters & self._numerals

    def apart(self, text: str) -> list[str]:
        """A text cut before and after each numeral if the two patterns may differ in it, else whole."""
        beyond = beyond_ascii(text)
        others = self._among(beyond)
        if any(map(str.isspace, beyond)):
            differ = DIGIT_AFTER_BLANKS.search(text) is not None
        else:
            differ = b"  0" in text.encode().translate(BLANKS_AND_DIGITS)
        if not others and not differ:
            return [text]
        return [part for part in re.split(f"([0-9{''.join(sorted(others))}])", text) if part]


def beyond_ascii(text: str) -> set[str]:
    """The characters of a text that are not ASCII."""
    return set() if text.isascii() else set(text.encode().translate(None, ASCII).decode())
