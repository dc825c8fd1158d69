"""SentencePiece's BPE as merges: an independent encoder, written after llama2.c's, gives every text the same ids."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import DataError
from pocketlm.formats.llama2c import read_tokenizer
from pocketlm.text.sentencepiece import BYTES, Kind, Pieces, merges_of, pieces_of, tokenizer_of
from pocketlm.text.tokenizer import Tokenizer, byte_tokenizer

MADE = ["\u2581t", "he", "\u2581the", "in", "ing", "\u2581\u2581", "ra", "ve", "raven", "aa", "aaa", "ab", "ba"]
MADE += ["aba", "abab", "\u2581a", "\u00e9t", "\u00e9t\u00e9"]
LETTERS = sorted(set("".join(MADE)) | set("abcdefghijklmnopqrstuvwxyz\u4e2d"))
TEXTS = ["<unk>", "<s>", "</s>", *BYTES, *MADE, *LETTERS]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(TEXTS) - 259)]
KINDS = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL] + [Kind.BYTE] * 256 + [Kind.NORMAL] * (len(TEXTS) - 259)
PIECES = Pieces(TEXTS, SCORES, KINDS, begin_id=1, end_id=2)


def encoded(pieces: Pieces, text: str) -> list[int]:
    """The best merge of all, the leftmost of equals, again and again."""
    ids = {piece: number for number, piece in enumerate(pieces.texts)}
    parts = list((" " * pieces.adds_space + text if text else "").replace(" ", "\u2581"))
    while True:
        pairs = [parts[place] + parts[place + 1] for place in range(len(parts) - 1)]
        known = [(-pieces.scores[ids[pair]], place) for place, pair in enumerate(pairs) if pair in ids]
        if not known:
            break
        _, place = min(known)
        parts[place : place + 2] = [pairs[place]]
    found = [[ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts]
    return [number for part in found for number in part]


@given(st.text(st.sampled_from("ab the ingraven\u00e9t\u4e2d\u2028Z"), max_size=40), st.booleans())
def test_ids_are_those_of_the_rule(text: str, adds_space: bool) -> None:
    pieces = Pieces(TEXTS, SCORES, KINDS, adds_space=adds_space)
    tokenizer = _known(adds_space)
    assert tokenizer.encode(text) == encoded(pieces, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _known(adds_space: bool, cache: dict[bool, Tokenizer] = {}) -> Tokenizer:  # noqa: B006
    if adds_space not in cache:
        cache[adds_space] = tokenizer_of(Pieces(TEXTS, SCORES, KINDS, adds_space=adds_space), "pieces")
    return cache[adds_space]


def test_ids_of_a_real_vocabulary(shared: Path) -> None:
    file = shared / "models/stories260K/tok512.bin"
    tokenizer, data, place = read_tokenizer(file, 512), file.read_bytes(), 4
    texts, scores = [], []
    for _ in range(512):
        score, length = struct.unpack_from("<fi", data, place)
        texts.append(data[place + 8 : place + 8 + length].decode().replace(" ", "\u2581"))
        scores.append(score)
        place += 8 + length
    pieces = Pieces(texts, scores, [])
    (stories,) = (path for path in (shared / "text").glob("tinyshakespeare*"))
    text, draw = stories.read_text(), random.Random(0)
    for _ in range(200):
        begin = draw.randrange(len(text))
        passage = text[begin : begin + draw.randrange(120)] + draw.choice(["", " \u00e9\u4e2d", "  \t\n", "\U0001f600"])
        assert tokenizer.encode(passage) == encoded(pieces, passage)


def test_there_and_back() -> None:
    tokenizer = tokenizer_of(PIECES, "pieces")
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.end_token) == (1, 2, "</s>")
    again = pieces_of(tokenizer)
    assert again is not None
    assert (again.texts, again.kinds) == (TEXTS, KINDS)
    assert (again.begin_id, again.end_id, again.adds_space) == (1, 2, True)
    assert tokenizer_of(again, "pieces").fingerprint == tokenizer.fingerprint
    reached = [piece for piece in MADE if piece != "raven"]  # no two pieces make it
    made = [again.scores[TEXTS.index(piece)] for piece in reached]
    assert made == sorted(made, reverse=True)
    assert min(again.scores[259:]) == again.scores[TEXTS.index("raven")] < made[-1]


def test_every_way_to_make_a_piece_the_best_first() -> None:
    scores = {"a": -9.0, "b": -8.0, "ab": -2.0, "ba": -1.0, "aba": -3.0, "x": 0.0}
    assert merges_of(scores) == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]


def test_what_sentencepiece_would_cut_in_another_way_has_no_pieces() -> None:
    assert pieces_of(byte_tokenizer()) is None
    whole = tokenizer_of(PIECES, "pieces").tree
    model, merges = whole["model"], [tuple(merge) for merge in whole["model"]["merges"]]
    two_ranks = [("ab", "a"), *(merge for merge in merges if merge != ("ab", "a"))]  # the other way is a later one
    for change in (
        {"model": model | {"merges": merges[1:]}},  # a piece that no merge makes, and SentencePiece would
        {"model": model | {"merges": two_ranks}},
        {"model": model | {"byte_fallback": False}},
        {"model": model | {"ignore_merges": True}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ):
        assert pieces_of(Tokenizer(json.dumps(whole | change), "</s>")) is None


@pytest.mark.parametrize("scheme", ["never", "first", "always"])
def test_metaspace_is_the_same_treatment_of_spaces_where_it_adds_none(scheme: str) -> None:
    tree = tokenizer_of(replace(PIECES, adds_space=scheme != "never"), "pieces").tree
    cut = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    tokenizer = Tokenizer(json.dumps(tree | {"normalizer": None, "pre_tokenizer": cut}), "</s>")
    pieces, same = pieces_of(tokenizer), replace(PIECES, adds_space=scheme != "never")
    if scheme == "never":
        assert pieces is not None
        assert not pieces.adds_space
        for text in ("the raven  sings", " the raven", "    return x\n"):
            assert tokenizer.encode(text) == encoded(same, text)
    else:
        assert pieces is None
        assert tokenizer.encode("the raven") == encoded(same, "the raven")
        assert tokenizer.encode(" the raven") != encoded(same, " the raven")  # the reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"texts": [*TEXTS[:-1], TEXTS[-2]]}, "more than once"),
        ({"texts": ["<unk>", "<s>", "</s>", "<0xZZ>", *TEXTS[4:]]}, "given the byte '<0xZZ>'"),
        ({"texts": [*TEXTS[:-1], "x" * 300]}, "a piece has 300 characters"),
        ({"scores": [*SCORES[:-1], float("nan")]}, "a score is no number"),
        ({"kinds": [Kind.UNUSED, *KINDS[1:3], Kind.UNUSED, *KINDS[4:]]}, "has no <0x00>"),
        ({"end_id": 300}, "id 300 begins or ends a text"),
        ({"begin_id": 50}, "id 50 begins or ends a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_vocabularies_that_are_none(change: dict[str, object], words: str) -> None:
    fields = {"texts": TEXTS, "scores": SCORES, "kinds": KINDS} | change
    with pytest.raises(DataError, match=words):
        tokenizer_of(Pieces(**fields), "pieces")  # type: ignore[arg-type]
