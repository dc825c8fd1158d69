"""The tokenizer inside a GGUF file.

    "gpt2"    byte-level BPE: tokens, merges, and in `tokenizer.ggml.pre` the name of the way text is cut
    "llama"   SentencePiece's BPE: pieces and scores

Ids stay equal only if llama.cpp cuts text in the same way, and it knows ways by name: a tokenizer whose way has no name
here is refused, in both directions. So is one whose ids follow from more than merges, or whose added tokens ask for
more than to be found. One difference is left: Qwen's tokenizers compose characters first (NFC), and llama.cpp does not,
so that text which is not composed gets other ids there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pocketlm.errors import DataError, FileError, one_line, quoted
from pocketlm.formats.gguf_file import Header, Numbers, Value
from pocketlm.text.sentencepiece import Kind, Pieces, pieces_of, tokenizer_of
from pocketlm.text.tokenizer import Tokenizer
from pocketlm.text.tokenizer_json import PRE_TOKENIZERS, WHOLE_WORDS, Tree, byte_level_bpe, merges_as_named, with_begin

KEY = "tokenizer.ggml."
COMPOSES = "pocketlm.tokenizer.nfc"
"""Whether a "qwen2" tokenizer has NFC; Qwen's own do, and files of others do not say."""
Field = bool | int | float | str | list[str] | list[int] | list[float]
Fields = dict[str, Field]


def fields_of(tokenizer: Tokenizer, rows: int) -> Fields:
    """What a GGUF file says of a tokenizer.

    Args:
        rows: of the embedding; ids above the tokenizer's are written as unused.

    Raises:
        DataError: llama.cpp would give other ids.
    """
    _check_added(tokenizer.tree)
    if (pieces := pieces_of(tokenizer)) is not None:
        own: Fields = {
            "model": "llama",
            "tokens": _padded(pieces.texts, rows),
            "scores": [float(score) for score in pieces.scores] + [0.0] * (rows - len(pieces.scores)),
            "add_space_prefix": pieces.adds_space,
        }
        kinds = pieces.kinds
    else:
        own, kinds = _byte_level_fields(tokenizer, rows)
    begin = tokenizer.end_id if tokenizer.begin_id is None else tokenizer.begin_id
    both: Fields = {
        "token_type": [int(kind) for kind in kinds] + [int(Kind.UNUSED)] * (rows - len(kinds)),
        "bos_token_id": begin,
        "eos_token_id": tokenizer.end_id,
        "add_bos_token": tokenizer.begin_id is not None,
        "add_eos_token": False,
    }
    if Kind.UNKNOWN in kinds:
        both["unknown_token_id"] = list(kinds).index(Kind.UNKNOWN)
    fields = {KEY + name: value for name, value in (own | both).items()}
    return fields | ({COMPOSES: bool(tokenizer.tree["normalizer"])} if own.get("pre") == "qwen2" else {})


def _check_added(tree: Tree) -> None:
    """Refuses added tokens that are text, where llama.cpp would find other ones in a text."""
    flags = ["lstrip", "rstrip", "single_word"]
    if tree.get("normalizer") not in (None, {"type": "NFC"}):
        flags.append("normalized")  # then it is looked for in the changed text, in its own changed form
    plain = [entry for entry in tree.get("added_tokens") or () if not entry.get("special")]
    why = [
        (entry["content"], f"has {flag}, which llama.cpp does not know")
        for entry in plain
        for flag in flags
        if entry.get(flag)
    ]
    why += _overlaps([entry["content"] for entry in plain])
    for content, reason in why[:1]:
        raise DataError(
            f"the added token {quoted(content)} {reason}, and would give other ids; only a Hugging Face folder keeps "
            "them: pocketlm export hf"
        )


def _overlaps(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Tokens with whose end another begins: a text has the first of them here, in llama.cpp the longest.

    Of runs of one character (blanks) both take the longest.
    """
    begun: dict[str, set[str]] = {}
    for text in texts:
        for end in range(1, len(text)):
            begun.setdefault(text[:end], set()).add(text)
    return [
        (text, f"ends as {quoted(other)} begins, of which llama.cpp takes the longer")
        for text in texts
        for begin in range(1, len(text))
        for other in sorted(begun.get(text[begin:], set()) - {text})
        if len(other) >= len(text) and len({*text, *other}) > 1
    ]


def tokenizer_in(header: Header) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        FileError: none, or one that is damaged.
        DataError: of a kind that is not known, or no vocabulary.
    """
    fields = {name.removeprefix(KEY): value for name, value in header.fields.items() if name.startswith(KEY)}
    origin = f"{header.path}: its tokenizer"
    tokens = fields.get("tokens")
    if not isinstance(tokens, list):
        raise FileError(f"{header.path} has no tokenizer: no {KEY}tokens in it")
    kinds = _numbers(fields, "token_type", len(tokens), default=Kind.NORMAL, origin=origin)
    if fields.get("model") == "llama":
        return _sentencepiece(fields, tokens, kinds, origin)
    if fields.get("model") == "gpt2":
        composes = fields.get("pre") == "qwen2" and header.fields.get(COMPOSES) is not False
        return _byte_level(fields, tokens, kinds, origin, {"type": "NFC"} if composes else None)
    raise DataError(f"{origin} is of the kind {quoted(fields.get('model'))}; allowed are llama and gpt2")


def eot_id(header: Header) -> int | None:
    """What ends a turn, of a model that converses; None if the file does not say.

    Raises:
        DataError: it is no id of the vocabulary.
    """
    return _id_in(header, "eot_token_id")


def token_in(header: Header, name: str) -> str | None:
    """The text of the token whose id is in a field, `bos_token_id` for one; None if the file does not say.

    Raises:
        DataError: it is no id of the vocabulary.
    """
    number = _id_in(header, name)
    return None if number is None else _tokens(header)[number]


def _id_in(header: Header, name: str) -> int | None:
    fields = {name: header.fields[KEY + name]} if KEY + name in header.fields else {}
    return _id(fields, name, _tokens(header), f"{header.path}: its tokenizer")


def _tokens(header: Header) -> list[str]:
    tokens = header.fields.get(f"{KEY}tokens")
    return tokens if isinstance(tokens, list) else []


# --- SentencePiece


def _sentencepiece(fields: Mapping[str, Value], tokens: list[str], kinds: list[Any], origin: str) -> Tokenizer:
    begin = _id(fields, "bos_token_id", tokens, origin) if fields.get("add_bos_token", True) is True else None
    end = _id(fields, "eos_token_id", tokens, origin)
    if end is None:
        raise DataError(f"{origin} does not say which token ends a text")
    scores = _numbers(fields, "scores", len(tokens), default=None, origin=origin)
    adds_space = fields.get("add_space_prefix", True) is True
    return tokenizer_of(Pieces(tokens, scores, kinds, begin, end, adds_space), origin)


# --- byte-level BPE


def _byte_level_fields(tokenizer: Tokenizer, rows: int) -> tuple[Fields, Sequence[int]]:
    tree, name = tokenizer.tree, tokenizer.pre_tokenizer_name
    if name is None or tree["model"].get("type") != "BPE":
        raise DataError(
            f"llama.cpp has no name for the way this tokenizer cuts text, and would give other ids; known are "
            f"{', '.join(PRE_TOKENIZERS)}, and SentencePiece's, but for Metaspace's space before a text: train with "
            "--data.tokenizer gpt2 or bpe:SIZE"
        )
    if not merges_as_named(tree, name):
        way = "whole words, and then merges (ignore_merges)" if name in WHOLE_WORDS else "merges alone"
        raise DataError(
            f"of text cut as {name} llama.cpp makes ids by {way}, and this tokenizer makes other ones; only a Hugging "
            "Face folder keeps them: pocketlm export hf"
        )
    texts = {number: text for text, number in tree["model"]["vocab"].items()}
    texts |= {entry["id"]: entry["content"] for entry in tree["added_tokens"]}
    added = {entry["id"] for entry in tree["added_tokens"]}
    numbers = range(tokenizer.vocab_size)
    kinds = [_kind(number, texts, added, tokenizer.special_ids) for number in numbers]
    merges = [" ".join(merge) for merge in tree["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": _padded([texts.get(number, f"<unused{number}>") for number in numbers], rows),
        "merges": merges or [""],  # llama.cpp wants the list, and the writer something in it: no two make nothing
    }, kinds


def _kind(number: int, texts: Mapping[int, str], added: set[int], special: frozenset[int]) -> Kind:
    if number not in texts:
        return Kind.UNUSED
    if number in special:
        return Kind.CONTROL
    return Kind.USER_DEFINED if number in added else Kind.NORMAL


def _byte_level(
    fields: Mapping[str, Value], tokens: list[str], kinds: list[Any], origin: str, normalizer: Tree | None
) -> Tokenizer:
    name, merges = fields.get("pre"), fields.get("merges")
    if name not in PRE_TOKENIZERS:
        raise DataError(f"{origin} cuts text by {quoted(name)}; allowed are {', '.join(PRE_TOKENIZERS)}")
    if not isinstance(merges, list):
        raise FileError(f"{origin} has no merges")
    pairs = [tuple(merge.split(" ")) for merge in merges if merge]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{origin} has a merge that is not of two tokens")
    used = {text: number for number, text in enumerate(tokens) if kinds[number] != Kind.UNUSED}
    if len(used) < sum(kind != Kind.UNUSED for kind in kinds):
        raise DataError(f"{origin} has a token more than once")
    begins = fields.get("add_bos_token", name == "llama-bpe") is True
    begin = _id(fields, "bos_token_id", tokens, origin) if begins else None
    end = _id(fields, "eos_token_id", tokens, origin)
    special = {number for number, kind in enumerate(kinds) if kind == Kind.CONTROL}
    special |= {number for number in (begin, end) if number is not None}
    added = [
        {"id": number, "content": text, "special": number in special} | dict.fromkeys(_FLAGS, False)
        for text, number in used.items()
        if number in special or kinds[number] == Kind.USER_DEFINED
    ]
    tree = byte_level_bpe(used, [(first, second) for first, second in pairs], str(name))
    tree |= {"added_tokens": added, "normalizer": normalizer}
    if begin is not None:
        tree = with_begin(tree, tokens[begin], begin)
    return Tokenizer(json.dumps(tree), None if end is None else tokens[end], origin)


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


# --- fields


def _padded(texts: Sequence[str], rows: int) -> list[str]:
    return [*texts, *(f"<unused{number}>" for number in range(len(texts), rows))]


def _numbers(fields: Mapping[str, Value], name: str, length: int, *, default: Any, origin: str) -> list[Any]:
    """A list of numbers, one a token."""
    values = fields.get(name)
    if values is None and default is not None:
        return [default] * length
    if not isinstance(values, Numbers) or len(values.values) != length:
        raise FileError(f"{origin} has {length:,} tokens, and not as many numbers in {KEY}{name}")
    return [number.item() for number in values.values]


def _id(fields: Mapping[str, Value], name: str, tokens: Sequence[str], origin: str) -> int | None:
    """The id in a field; None where it is not there, or says that there is none."""
    number = fields.get(name)
    if number in (None, -1, 0xFFFFFFFF):
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise DataError(f"{origin} has {len(tokens):,} tokens, and {KEY}{name} is {one_line(str(number))[:40]}")
    return number
