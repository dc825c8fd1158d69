"""SentencePiece's BPE as a tokenizer.json, and back: pieces with scores there, merges with ranks here.

There, of all neighbours whose text together is a piece, those with the best score are merged first. Here a list says
which two make a third, the first of them first: so each piece stands in it with every way to cut it in two, the piece
with the best score first. A character that is no piece becomes its bytes, each a piece of its own, in both.

The two differ where pieces have equal scores: SentencePiece takes the leftmost, the list the first of the vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from pocketlm.errors import DataError, one_line
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.text.tokenizer_json import Tree, with_begin

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MAX_PIECE_CHARS = 256


class Kind(IntEnum):
    """What a piece is; the numbers are SentencePiece's, and llama.cpp's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Pieces:
    """A vocabulary, id by id, a space written as U+2581."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    begin_id: int | None = None
    """What its model wants before a text."""
    end_id: int = 2
    adds_space: bool = True
    """Whether a space is put before a text."""


def tokenizer_of(pieces: Pieces, origin: str) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Raises:
        DataError: it is not one that gives each text its ids.
    """
    special = {number for number, kind in enumerate(pieces.kinds) if kind in (Kind.UNKNOWN, Kind.CONTROL)}
    for number in {pieces.end_id, *([] if pieces.begin_id is None else [pieces.begin_id])} - special:
        raise DataError(f"{origin}: id {number} begins or ends a text, and is no control token of its vocabulary")
    kept = [(number, kind) for number, kind in enumerate(pieces.kinds) if kind != Kind.UNUSED]
    vocabulary = {pieces.texts[number]: number for number, _ in kept}
    _check(pieces, vocabulary, len(kept), origin)
    added = [
        {"id": number, "content": pieces.texts[number], "special": number in special} | _AS_IT_STANDS
        for number, kind in kept
        if number in special or kind == Kind.USER_DEFINED
    ]
    scores = {pieces.texts[number]: pieces.scores[number] for number, kind in kept if kind == Kind.NORMAL}
    unknown = next((pieces.texts[number] for number, kind in kept if kind == Kind.UNKNOWN), None)
    tree = _tree(vocabulary, merges_of(scores), unknown, pieces.adds_space) | {"added_tokens": added}
    if pieces.begin_id is not None:
        tree = with_begin(tree, pieces.texts[pieces.begin_id], pieces.begin_id)
    return Tokenizer(json.dumps(tree), pieces.texts[pieces.end_id], origin)


_AS_IT_STANDS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _check(pieces: Pieces, vocabulary: Mapping[str, int], kept: int, origin: str) -> None:
    if not all(map(math.isfinite, pieces.scores)):
        raise DataError(f"{origin}: a score is no number")
    if len(vocabulary) < kept:
        ((text, _),) = Counter(pieces.texts).most_common(1)
        raise DataError(f"{origin}: the vocabulary has {one_line(text)!r} more than once")
    for text in (pieces.texts[number] for number, kind in enumerate(pieces.kinds) if kind == Kind.BYTE):
        if not BYTE.fullmatch(text):
            raise DataError(f"{origin}: given the byte {one_line(text)!r}; allowed are <0x00> to <0xFF>")
    if missing := [piece for piece in (*BYTES, SPACE) if piece not in vocabulary]:
        raise DataError(f"{origin}: the vocabulary has no {missing[0]}; all 256 bytes and the space must be in it")
    longest = max(vocabulary, key=len)
    if len(longest) > MAX_PIECE_CHARS:
        raise DataError(f"{origin}: a piece has {len(longest):,} characters; allowed are {MAX_PIECE_CHARS}")


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def _tree(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], unknown: str | None, adds_space: bool) -> Tree:
    before = [_PREPEND] if adds_space else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    model = {"type": "BPE", "unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*before, _REPLACE]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model | {"vocab": vocabulary, "merges": merges},
    }


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every two pieces that make a third, the third with the best score first, and the earlier of equal ones."""
    best_first = sorted(scores, key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in best_first
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def pieces_of(tokenizer: Tokenizer) -> Pieces | None:
    """The vocabulary of a tokenizer of this kind; None if it is not one: SentencePiece would give other ids.

    Scores are ranks: the piece that is made first has 0, and what no merge makes has the lowest.
    """
    model = tokenizer.tree["model"]
    spaces = _spaces(tokenizer.tree)
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if spaces is None or not model.get("byte_fallback") or any(model.get(name) for name in others):
        return None
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {entry["id"]: entry["content"] for entry in tokenizer.tree["added_tokens"]}
    kinds = _kinds(tokenizer, texts)
    merges = [(str(first), str(second)) for first, second in model["merges"]]
    ranks = {text: rank for rank, text in enumerate(dict.fromkeys(first + second for first, second in merges))}
    normal = [text for number, text in sorted(texts.items()) if kinds[number] == Kind.NORMAL]
    scores = {text: -float(ranks.get(text, len(ranks))) for text in normal}
    again = merges_of(scores)
    if set(again) != set(merges) or not _in_order(merges, ranks):
        return None
    numbers = range(tokenizer.vocab_size)
    return Pieces(
        [texts.get(number, f"<unused{number}>") for number in numbers],
        [scores.get(texts.get(number, ""), 0.0) for number in numbers],
        [kinds.get(number, Kind.UNUSED) for number in numbers],
        tokenizer.begin_id,
        tokenizer.end_id,
        spaces,
    )


def _in_order(merges: Sequence[tuple[str, str]], ranks: Mapping[str, int]) -> bool:
    """Whether all ways to make a piece stand together, as one score asks for."""
    made = [ranks[first + second] for first, second in merges]
    return made == sorted(made)


def _kinds(tokenizer: Tokenizer, texts: Mapping[int, str]) -> dict[int, Kind]:
    unknown = tokenizer.tree["model"].get("unk_token")
    plain = {entry["id"] for entry in tokenizer.tree["added_tokens"] if entry["id"] not in tokenizer.special_ids}
    kinds = {}
    for number, text in texts.items():
        if number in tokenizer.special_ids:
            kinds[number] = Kind.UNKNOWN if text == unknown else Kind.CONTROL
        elif number in plain:
            kinds[number] = Kind.USER_DEFINED
        else:
            kinds[number] = Kind.BYTE if BYTE.fullmatch(text) else Kind.NORMAL
    return kinds


def _spaces(tree: Tree) -> bool | None:
    """Whether a tokenizer.json puts a space before a text; None if it treats spaces in another way than pieces do.

    Metaspace puts none before a text that begins with one, where SentencePiece does.
    """
    cutting, normalizer = tree.get("pre_tokenizer"), tree.get("normalizer") or {}
    if cutting and not normalizer and (cutting["type"], cutting.get("replacement")) == ("Metaspace", SPACE):
        same = not cutting.get("split", True) and cutting.get("prepend_scheme") == "never"
        return False if same else None
    steps = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    if cutting or steps not in ([_REPLACE], [_PREPEND, _REPLACE]):
        return None
    return len(steps) == 2
